"""Measuring quality and speed. Installed as `yarn_edge.bench`."""
