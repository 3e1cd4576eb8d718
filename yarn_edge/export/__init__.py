"""What another program must be given to run a GGUF at its own positions, or why it cannot run them.

May import: llama_rules, gguf and below.
"""
