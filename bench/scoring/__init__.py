"""Scoring texts in one causal pass: documents, windows, variants of a model.

May import: yarn_edge.engine and below.
"""
