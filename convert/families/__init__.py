"""The model families that `convert` knows, as rows of data.

May import: yarn_edge.checkpoint and below.
"""
