"""The process in which a stranger's chat template is rendered: `python -m yarn_edge.chat.template_process`.

The template and the tokens that it may name come as one line of JSON on stdin, then a line of messages for each rendering. The
reply to each is one line on stdout: the text, or the error.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

MAX_RENDERED_CHARS = 16 << 20
MAX_PROCESS_BYTES = 1 << 30


def _environment() -> Any:
    """The Jinja2 environment of transformers (utils/chat_template_utils.py, _cached_compile_jinja_template)."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks the assistant's text for training; here only its body matters."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    extensions = [GenerationTag, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _render(template: Any, request: Mapping[str, Any]) -> dict[str, str]:
    pieces, room = [], MAX_RENDERED_CHARS
    for piece in template.generate(**request, tools=None, documents=None):
        room -= len(piece)
        if room < 0:
            return {"error": f"writes more than {MAX_RENDERED_CHARS} characters"}
        pieces.append(piece)
    return {"text": "".join(pieces)}


def _reply(work: Callable[[], dict[str, str]], limit_s: float) -> dict[str, str]:
    """The reply of `work`, or its error. After the limit the kernel ends the process, even if the parent is gone."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
    try:
        return work()
    except MemoryError:
        return {"error": f"needs more memory than {MAX_PROCESS_BYTES >> 20} MiB"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> None:
    """Render until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(requests.readline())
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_PROCESS_BYTES, MAX_PROCESS_BYTES))
    limit_s = float(setup["time_limit_s"])
    compiled: list[Any] = []

    def compile_template() -> dict[str, str]:
        compiled.append(_environment().from_string(setup["template"]))
        return {}

    broken = _reply(compile_template, limit_s)
    tokens = {name: setup[name] for name in ("bos_token", "eos_token")}
    while line := requests.readline():
        request = {**json.loads(line), **tokens}
        reply = _reply(partial(_render, compiled[0], request), limit_s) if compiled else broken
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
