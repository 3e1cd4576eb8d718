"""Measuring quality and speed. Installed as `yarn_edge.bench`.

May import: everything in yarn_edge, convert among it; nothing there imports this.
"""
