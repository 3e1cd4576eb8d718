"""Many jobs through one door, `concurrent.futures.Executor`: processes of this machine, or workers of Ray, Dask or Slurm.

May import: runtime, gguf and below.
"""
