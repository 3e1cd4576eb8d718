"""One causal pass over a text: documents, windows, variants of a model, likelihoods and their averages.

May import: yarn_edge.engine and below.
"""
