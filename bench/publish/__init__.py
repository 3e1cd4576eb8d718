"""`yarn-edge publish`: GGUFs are measured, described in a model card, and put on the Hub.

May import: bench.quality, yarn_edge.convert, yarn_edge.verify, yarn_edge.hub and below.
"""
