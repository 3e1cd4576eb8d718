"""The model families that `convert` supports, as rows of data.

May import: yarn_edge.checkpoint, yarn_edge.llama_rules and below.
"""
