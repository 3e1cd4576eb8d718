"""Tools: the forms in which models write calls of functions, as rows; the grammars that hold a call to its form, and the parsers that
read calls from a stream.

May import: engine and below.
"""
