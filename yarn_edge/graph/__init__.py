"""The live graph, read and changed: before llama.cpp computes a node it asks about it, and then the node can be seen or edited."""
