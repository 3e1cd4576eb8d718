"""Scoring texts in one causal pass: documents, windows, variants of a model, likelihoods and their averages.

May import: yarn_edge.engine and below.
"""
