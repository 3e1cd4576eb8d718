"""Second moments of the inputs of every weight matrix, from the running model: what error feedback needs (`kernels.feedback`).

May import: convert.imatrix, convert.kernels and below.
"""
