"""A machine that lends its devices: `yarn-edge worker`. The RPC server is llama.cpp's own; this room puts a door in front of it.

May import: runtime, and below.
"""
