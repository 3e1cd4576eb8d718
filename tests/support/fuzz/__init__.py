"""Hostile inputs by kind, run under limits (`make fuzz`; docs/fuzzing.md).

`kinds` lists them. An input is made from its kind, the seed and its number, so that it can be made again.
"""
