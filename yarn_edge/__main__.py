"""`python -m yarn_edge COMMAND …` is the same as `yarn-edge COMMAND …`."""

from yarn_edge.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
