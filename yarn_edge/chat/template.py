"""Messages -> the prompt's text and tokens, by the template that the model's file carries.

A template is a program by a stranger (Jinja2, `tokenizer.chat_template`), with the settings of transformers'
`apply_chat_template`. It runs in the sandbox *and* in a process of its own, because a sandbox stops escapes but not
`{% for %}` in `{% for %}`. Run as a module, this file is that process.

Bounded: the template's length, the time of a rendering (also inside one C call; the process is killed), its memory
(where the operating system has RLIMIT_AS: Linux), its output, `range()`. Not bounded: memory on macOS and Windows.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from yarn_edge.errors import YarnEdgeError, one_line

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

Message = Mapping[str, str]  # "role": system, user or assistant; "content"

MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 16 << 20
MAX_WORKER_BYTES = 1 << 30
TIME_LIMIT_S = 10.0
_LITERAL, _END = "\ue0f0", "\ue0f1"  # private use: around control tokens' names that a message spells out
_UNKNOWN, _CONTROL = 2, 3  # tokenizer.ggml.token_type


class Renderer(Protocol):
    """What a session needs to know about prompts."""

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """The prompt's token ids, BOS included where the model wants it, ready for the assistant's answer."""
        ...

    def close(self) -> None:
        """Free what it holds."""


class RawText:
    """No template: the texts one after another, for models that only continue text."""

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """Markup in the text is markup."""
        text = "".join(message["content"] for message in messages)
        return with_bos(model, model.tokenize(text, add_special=False, parse_special=True))

    def close(self) -> None:
        """Nothing to free."""


def with_bos(model: Model, tokens: list[int]) -> list[int]:
    """`tokens` with one BOS in front if the file asks for it (tokenizer.ggml.add_bos_token), never two."""
    if model.add_bos and model.bos >= 0 and tokens[:1] != [model.bos]:
        return [model.bos, *tokens]
    return tokens


class ChatTemplate:
    """A compiled template in its process. Use as a context manager, or call `close`.

    origin: for messages, such as the file's path. Raises YarnEdgeError when the template is too long; what is wrong
    inside it shows when it renders.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        origin: str = "chat template",
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise YarnEdgeError(f"{origin}: {len(source)} characters, more than a template's {MAX_TEMPLATE_CHARS}")
        self.origin, self.time_limit_s = origin, time_limit_s
        self._setup = {"template": source, "bos_token": bos_token, "eos_token": eos_token, "time_limit_s": time_limit_s}
        self._worker: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] | None = None
        self._controls: re.Pattern[str] | None = None

    @classmethod
    def of(cls, model: Model) -> ChatTemplate:
        """The template in the model's file. Raises YarnEdgeError where there is none."""
        if model.chat_template is None:
            raise YarnEdgeError(
                f"{model.path}: has no tokenizer.chat_template (a base model?); --raw continues a text without one"
            )
        bos, eos = (model.token_bytes(t).decode("utf-8", "replace") if t >= 0 else "" for t in (model.bos, model.eos))
        origin = f"{model.path}: tokenizer.chat_template"
        template = cls(model.chat_template, bos_token=bos, eos_token=eos, origin=origin)
        template._controls = _control_names(model)
        template._start()  # it imports Jinja2 while the caller makes a context
        return template

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt's text. Raises YarnEdgeError with the template's own complaint, or the limit that it broke."""
        reply = self._ask({"messages": list(messages), "add_generation_prompt": add_generation_prompt})
        if "error" in reply:
            raise YarnEdgeError(f"{self.origin}: {one_line(str(reply['error']))}")
        return str(reply["text"])

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """The template's markup becomes control tokens; the same markup inside a message stays text.

        So a document that contains `<|im_end|>` cannot end the user's turn.
        """
        controls = self._controls
        if controls is None or not any(controls.search(m["content"]) for m in messages):
            text = self.render(messages)
            return with_bos(model, model.tokenize(text, add_special=False, parse_special=True))
        marks = str.maketrans("", "", _LITERAL + _END)
        marked = rf"{_LITERAL}\g<0>{_END}"
        wrapped = [{**m, "content": controls.sub(marked, m["content"].translate(marks))} for m in messages]
        tokens: list[int] = []
        for i, piece in enumerate(re.split(f"{_LITERAL}({controls.pattern}){_END}", self.render(wrapped))):
            tokens += model.tokenize(piece.translate(marks), add_special=False, parse_special=i % 2 == 0)
        return with_bos(model, tokens)

    def close(self) -> None:
        """End the process. Rendering again starts another."""
        if self._stop:
            self._stop()
        self._worker = self._stop = None

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self.close()
        # From the root, and without the working folder: a stranger's json.py there must not answer.
        here = os.path.realpath(os.curdir)
        entries = [str(Path(__file__).parents[2]), *(e for e in sys.path if e and os.path.realpath(e) != here)]
        path = os.pathsep.join(dict.fromkeys(os.path.abspath(e) for e in entries))  # noqa: PTH100
        worker = subprocess.Popen(
            [sys.executable, "-m", "yarn_edge.chat.template"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            cwd=os.sep,
            start_new_session=True,  # the terminal's Ctrl-C is not for it
        )
        self._worker, self._stop = worker, weakref.finalize(self, _end, worker)
        _send(worker.stdin, self._setup)
        return worker

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        timed_out = threading.Event()
        try:
            worker = self._start()
            assert worker.stdout is not None

            def kill() -> None:
                timed_out.set()
                worker.kill()

            timer = threading.Timer(self.time_limit_s, kill)
            timer.start()
            try:
                _send(worker.stdin, request)
                line = worker.stdout.readline()
            except OSError:
                line = b""
            finally:
                timer.cancel()
            if line:
                return dict(json.loads(line))
        except BaseException:
            self.close()  # Ctrl-C: a late reply must not answer the next request
            raise
        self.close()
        limit = f"takes over {self.time_limit_s:g} s" if timed_out.is_set() else "ended its process"
        return {"error": f"{limit} to render; --raw goes without it"}


def _control_names(model: Model) -> re.Pattern[str] | None:
    meta = model.gguf.metadata
    tokens, types = meta.get("tokenizer.ggml.tokens"), meta.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or types is None or len(types) != len(tokens):
        return None
    names = {t for t, kind in zip(tokens, types, strict=True) if kind in (_UNKNOWN, _CONTROL) and t}
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _send(pipe: IO[bytes] | None, value: Mapping[str, Any]) -> None:
    assert pipe is not None
    pipe.write(json.dumps(value).encode() + b"\n")
    pipe.flush()


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    for pipe in (worker.stdin, worker.stdout):
        with suppress(OSError):  # of what it had not read yet
            pipe.close()  # type: ignore[union-attr]
    worker.wait()


def _environment() -> Any:
    """The Jinja2 environment of transformers (utils/chat_template_utils.py, _cached_compile_jinja_template)."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training; here its body is rendered."""

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

    extensions = [Generation, loopcontrols]
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
    """`work`'s reply, or its error; the kernel ends the process past the limit even if the parent is gone."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, limit_s + 1)
    try:
        return work()
    except MemoryError:
        return {"error": f"needs more memory than {MAX_WORKER_BYTES >> 20} MiB"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _serve() -> None:
    """The process: the template in the first line, then one line of messages in, one line of text out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(requests.readline())
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MAX_WORKER_BYTES, MAX_WORKER_BYTES))
    limit_s = float(setup["time_limit_s"])
    compiled: list[Any] = []

    def compile_() -> dict[str, str]:
        compiled.append(_environment().from_string(setup["template"]))
        return {}

    broken = _reply(compile_, limit_s)
    tokens = {name: setup[name] for name in ("bos_token", "eos_token")}
    while line := requests.readline():
        request = {**json.loads(line), **tokens}
        reply = _reply(partial(_render, compiled[0], request), limit_s) if compiled else broken
        _send(replies, reply)


if __name__ == "__main__":
    _serve()
