"""Checkpoint -> GGUF. Installed as `yarn_edge.convert`."""
