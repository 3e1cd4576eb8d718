"""The GGUF format, read and written: headers that may be hostile, split files, edits that copy each weight once.

May import: the ground modules only. Nothing here knows what llama.cpp makes of a file.
"""
