"""`python -m yarn_edge COMMAND …` is the same as `yarn-edge COMMAND …`."""

from yarn_edge.cli import run_and_exit

if __name__ == "__main__":
    run_and_exit()
