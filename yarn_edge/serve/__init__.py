"""The conversation over HTTP: an OpenAI-compatible server, and a page to chat in the browser.

May import: chat, engine and below.
"""
