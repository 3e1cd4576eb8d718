"""Our models as a model of lm-evaluation-harness.

May import: bench.scoring; lm_eval where it is installed.
"""
