"""What a Hugging Face checkpoint says: its config, in any dialect, as a RopeScaling, and its tokenizer.

May import: positions and the top-level modules below it (flags, errors, …).
"""
