"""From a checkpoint or a GGUF to quantized GGUFs. Installed as `yarn_edge.convert`.

May import: all of yarn_edge but its command table and yarn_edge.bench.
"""
