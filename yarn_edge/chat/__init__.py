"""A conversation in the terminal: documents, the chat template, the session and its looks.

May import: engine and below.
"""
