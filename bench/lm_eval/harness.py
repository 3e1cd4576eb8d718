"""lm-evaluation-harness on a GGUF: ARC, HellaSwag, MMLU, TruthfulQA and its other tasks.

Importing this module registers the model name `yarn_edge` with the harness, which has no plug-ins for that. Run as a module, it is
the harness's own command line:

    python -m yarn_edge.bench.lm_eval.harness --model yarn_edge --model_args path=model.gguf,ctx=4096 --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from yarn_edge.errors import YarnEdgeError, os_error

NAME = "yarn_edge"
NEEDED = "needs lm_eval: pip install 'yarn-edge[lm-eval]'"


def register() -> None:
    """Register `yarn_edge` with the harness. Raises ModuleNotFoundError with the remedy if lm_eval is not installed."""
    try:
        import lm_eval.models  # noqa: F401  # registers its own names, which it does only while there are none
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ModuleNotFoundError(NEEDED, name="lm_eval") from None
    if NAME not in model_registry:
        model_registry.register(NAME, target="yarn_edge.bench.lm_eval.model:YarnEdgeLM")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the harness's command line with `argv`. Returns 0, 2 for bad input to yarn-edge, 130 for Ctrl-C.

    The harness reports its own errors in its own way: exit code 2 for unknown flags, a traceback for the rest.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        register()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        return _fail(NEEDED, 2)
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", *words]  # its parser reads that
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
