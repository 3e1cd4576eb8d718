"""Generating text: an opened model, generation, sampling, cached prompts, drafts.

May import: memory, runtime and below.
"""
