"""What llama.cpp makes of a file: which keys each architecture honors, the positions that result, how to carry others.

May import: positions and gguf. The rules are simulated here; llama.cpp itself is not called.
"""
