"""The process of one worker of `--on local`: `yarn_edge.jobs.local` starts it and talks to it through pipes."""

from __future__ import annotations

from yarn_edge.jobs.local import serve_pipe

if __name__ == "__main__":
    serve_pipe()
