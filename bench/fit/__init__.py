"""The command fit: what runs on this machine, with which context, cache type and quantization.

May import: the bandwidth of bench.speed, yarn_edge.memory, the file plans of convert.
"""
