"""How much memory a model will take, and which device, context and cache type to choose, before it is loaded.

One question, one place: `plan` says what a context will take, `choice` which context fits, `together` whether several
fit at once, `placement` where a conversation runs.

May import: runtime and below.
"""
