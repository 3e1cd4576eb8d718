"""The same conversation over HTTP: an OpenAI-compatible server and a page for the browser.

May import: chat, engine and below.
"""
