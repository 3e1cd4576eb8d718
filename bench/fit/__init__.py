"""The command fit: what runs on this machine, with which context, cache type and quantization.

May import: bench.speed's bandwidth, yarn_edge.memory, convert's file plans.
"""
