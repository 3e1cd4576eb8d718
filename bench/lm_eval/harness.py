"""lm-evaluation-harness with models of ours: ARC, HellaSwag, MMLU, TruthfulQA and its other tasks on a GGUF.

Importing this module makes the harness know the model name `yarn_edge`; it has no other way to learn of one that is not its own.
Run as a module it is the harness's command line, after that:

    python -m yarn_edge.bench.lm_eval.harness --model yarn_edge --model_args path=model.gguf,ctx=4096 --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from yarn_edge.errors import YarnEdgeError, os_error

NAME = "yarn_edge"
NEEDED = "needs lm_eval: pip install 'yarn-edge[lm-eval]'"


def register() -> None:
    """Make the harness know `yarn_edge`. Raises ModuleNotFoundError with the remedy where it is not installed."""
    try:
        import lm_eval.models  # noqa: F401  # its own names, which it reads in only while it knows none
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ModuleNotFoundError(NEEDED, name="lm_eval") from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="yarn_edge.bench.lm_eval.model:YarnEdgeLM")


def main(argv: Sequence[str] | None = None) -> int:
    """The harness's command line with `argv`, unchanged. Returns 0, 2 for bad input of ours, 130 for Ctrl-C.

    Its own complaints are as it makes them: exit code 2 for unknown flags, tracebacks for the rest.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        register()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        return _fail(NEEDED, 2)
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *words]  # its parser looks there
    try:
        cli_evaluate()
    except YarnEdgeError as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(str(os_error(error)), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"yarn-edge: error: {message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
else:
    register()
