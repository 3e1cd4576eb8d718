"""What llama.cpp does with a file: which keys each architecture honors, the resulting positions, and how to carry others.

May import: positions and gguf. The rules are simulated here, without calling llama.cpp.
"""
