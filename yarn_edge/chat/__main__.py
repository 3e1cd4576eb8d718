"""`python -m yarn_edge.chat MODEL …` does the same as `yarn-edge chat MODEL …`."""

import sys

from yarn_edge.cli import main

raise SystemExit(main(["chat", *sys.argv[1:]]))
