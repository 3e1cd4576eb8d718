"""A conversation in the terminal: documents, the chat template, the session and how it looks.

May import: engine and below.
"""
