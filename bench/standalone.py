"""What every module of bench that is run by itself needs: `python -m yarn_edge.bench.NAME`, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from yarn_edge.errors import YarnEdgeError, one_line, os_error

EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints in our one-line form."""

    def error(self, message: str) -> NoReturn:
        raise YarnEdgeError(f"{one_line(message)} (see --help)")


def run_module(
    name: str,
    description: str,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line and run. Returns the exit code of `run`, 2 for bad input, 130 for Ctrl-C.

    name: the module's, below yarn_edge.bench, such as "peers.convert". An error is one line on stderr, without a traceback.
    """
    parser = _Parser(prog=f"python -m yarn_edge.bench.{name}", description=description)
    add_arguments(parser)
    try:
        return run(parser.parse_args(argv))
    except YarnEdgeError as error:
        message, code = f"error: {error}", EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader left (`| head`), and nothing may be flushed into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message, code = f"error: {os_error(error)}", EXIT_BAD_INPUT
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_INTERRUPTED
    sys.stderr.write(f"{name}: {message}\n")
    return code
