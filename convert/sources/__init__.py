"""Checkpoints whose weights are not plain floats: how their tensors are read.

MXFP4 keeps its bits. All else is dequantized: each weight becomes a tensor whose rows are made when they are read, by a row of
`methods.READERS` for each way of quantizing. The values are those of the method's own library, bit for bit.

May import: stored tensors of convert, yarn_edge.checkpoint, yarn_edge.errors.
"""
