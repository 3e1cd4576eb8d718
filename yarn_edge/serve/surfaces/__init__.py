"""The interfaces of the server, one module each: a request is read into a question, an answer is written in the interface's form.

May import: serve's questions, blocks and fields, chat, engine and below.
"""
