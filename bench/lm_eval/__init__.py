"""A model for lm-evaluation-harness: GGUFs that yarn-edge runs.

May import: bench.scoring, and lm_eval if it is installed.
"""
