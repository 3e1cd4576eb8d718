"""How much memory a model will take, and which device and context to choose, before it is loaded.

May import: runtime and below.
"""
