"""The Hub: what `hf:ORG/NAME` names, listed, downloaded to the cache that all programs share, or streamed without touching the disk.

huggingface_hub is the client; it is imported where it is used. Nothing here knows what a checkpoint or a GGUF contains.

May import: the top-level modules below it (writer, progress, errors, …).
"""
