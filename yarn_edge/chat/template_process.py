"""The process in which a stranger's chat template is rendered: `python -m yarn_edge.chat.template_process`.

The template and the tokens that it may name come as one line of JSON on stdin, then a line of messages for each rendering. The
reply to each is one line on stdout: the text, or the error.

Most templates read a message's content as text, some as a list of parts ({"type": "text", "text": …}). Which of them a template does
is tried out once for each role, as llama.cpp does: with text, and if that is not rendered, with parts.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from yarn_edge.chat.given_text import NEEDLE

MAX_RENDERED_CHARS = 16 << 20
MAX_PROCESS_BYTES = 1 << 30
# role -> the shortest conversation in which a template renders a message of this role.
_TRIALS = {"user": ("user",), "system": ("system", "user"), "assistant": ("user", "assistant", "user")}


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


def _content(text: str, parts: bool) -> Any:
    return [{"type": "text", "text": text}] if parts else text


class _Prompts:
    """A compiled template. tokens: the names that it may use for special tokens, and their texts."""

    def __init__(self, template: Any, tokens: Mapping[str, str]) -> None:
        self.template, self.tokens = template, tokens
        self._reads_parts: dict[str, bool] = {}  # by role

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> dict[str, str]:
        """The reply to a request: text, or error."""
        for role in dict.fromkeys(("user", *(message["role"] for message in messages))):
            if role not in self._reads_parts:
                self._reads_parts[role] = self._needs_parts(role)
        return self._text(messages, self._reads_parts, add_generation_prompt)

    def _needs_parts(self, role: str) -> bool:
        """Whether text is lost and parts are not; where both are, what holds for the user."""
        if self._shows(role, parts=False):
            return False
        return self._shows(role, parts=True) or self._reads_parts.get("user", False)

    def _shows(self, role: str, parts: bool) -> bool:
        trial = _TRIALS.get(role, ())
        messages = [{"role": other, "content": NEEDLE if other == role else "Hello"} for other in trial]
        try:
            text = self._text(messages, {**self._reads_parts, role: parts}, True).get("text", "")
        except Exception:  # it reads the other form
            return False
        part = _content(NEEDLE, parts=True)[0]
        return NEEDLE.casefold() in text.casefold() and not (repr(part) in text or json.dumps(part) in text)

    def _text(
        self, messages: Sequence[Mapping[str, str]], reads_parts: Mapping[str, bool], add_generation_prompt: bool
    ) -> dict[str, str]:
        given = [{**m, "content": _content(m["content"], reads_parts.get(m["role"], False))} for m in messages]
        pieces, room = [], MAX_RENDERED_CHARS
        for piece in self.template.generate(
            messages=given, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.tokens
        ):
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
