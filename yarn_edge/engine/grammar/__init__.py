"""JSON schemas as grammars of llama.cpp (GBNF): every text of the grammar is a JSON value that the schema accepts.

What a grammar cannot say is an error that names the keyword's place in the schema, never left out in silence.

May import: errors.
"""
