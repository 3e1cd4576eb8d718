"""The live graph, read and changed: before llama.cpp computes a node it asks about it, and then the node can be seen or edited.

`callback` is what it calls; `tap` sees nodes, `live_rope` puts exact positions into them; `opening` opens a context with what its
file needs.

May import: runtime and below.
"""
