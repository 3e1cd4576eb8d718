"""The commands perplexity, compare, sweep and passkey, and their parts.

May import: bench.scoring, yarn_edge.report.
"""
