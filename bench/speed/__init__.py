"""The command bench: tokens per second by backend, depth and cache, each configuration in its own process.

May import: yarn_edge.report, yarn_edge.engine and below.
"""
