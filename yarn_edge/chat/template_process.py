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

from yarn_edge.chat.template_forms import Given, TemplateForms

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


class _TooMuchError(Exception):
    """A prompt is longer than MAX_RENDERED_CHARS."""


class _Prompts:
    """A compiled template. tokens: the names that it may use for special tokens, and their texts."""

    def __init__(self, template: Any, tokens: Mapping[str, str]) -> None:
        self.template, self.tokens = template, tokens
        self.forms = TemplateForms(lambda messages, tools: self._text(messages, {"tools": tools}))

    def render(self, messages: Given, **given: Any) -> dict[str, str]:
        """The reply to a request: text, or error. given: what the template reads besides messages."""
        try:
            return {"text": self._text(self.forms.given(messages), given)}
        except _TooMuchError:
            return {"error": f"writes more than {MAX_RENDERED_CHARS} characters"}

    def _text(self, messages: Given, given: Mapping[str, Any]) -> str:
        pieces, room = [], MAX_RENDERED_CHARS
        variables = {"add_generation_prompt": True, "tools": None, "documents": None, **given, **self.tokens}
        for piece in self.template.generate(messages=messages, **variables):
            room -= len(piece)
            if room < 0:
                raise _TooMuchError
            pieces.append(piece)
        return "".join(pieces)


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
    compiled: list[_Prompts] = []

    def compile_template() -> dict[str, str]:
        tokens = {name: setup[name] for name in ("bos_token", "eos_token")}
        compiled.append(_Prompts(_environment().from_string(setup["template"]), tokens))
        return {}

    broken = _reply(compile_template, limit_s)
    while line := requests.readline():
        request = json.loads(line)
        reply = _reply(partial(compiled[0].render, **request), limit_s) if compiled else broken
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    main()
