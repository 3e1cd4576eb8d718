"""The GGUF format, read and written: headers that may be hostile, split files, edits that copy no weights twice.

May import: the ground modules; nothing here knows what llama.cpp makes of a file.
"""
