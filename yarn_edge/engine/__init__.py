"""Tokens after tokens: an opened model, generation, sampling, cached prompts, drafts.

May import: memory, runtime and below.
"""
