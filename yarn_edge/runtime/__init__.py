"""Running models with llama.cpp and ggml: models, contexts, evaluation, devices, the nodes of the live graph.

May import: llama_rules, gguf, positions. llama_cpp is imported where it is first needed.
"""
