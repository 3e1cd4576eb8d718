"""`python -m yarn_edge.chat MODEL …` does the same as `yarn-edge chat MODEL …`."""

import sys

from yarn_edge.cli import run_and_exit

run_and_exit(["chat", *sys.argv[1:]])
