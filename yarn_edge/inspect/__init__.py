"""The doctor: what a model declares, what llama.cpp really applies, what is wrong, and how to fix it.

May import: memory, runtime, checkpoint and below.
"""
