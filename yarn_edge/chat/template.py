"""Messages -> the text and tokens of a prompt, by the chat template in the model's file.

A template is a program by a stranger (Jinja2, `tokenizer.chat_template`), run with the settings of transformers'
`apply_chat_template`. It runs in a sandbox *and* in a process of its own (`template_process`), because a sandbox stops escapes but
not nested `{% for %}` loops.

Limits: the template's length, the time of a rendering (also within one C call: the process is killed), its memory (if the
operating system has RLIMIT_AS: Linux), its output, `range()`. Memory has no limit on macOS and Windows.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Protocol

from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.child import start_child

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

Message = Mapping[str, str]  # "role": system, user or assistant; "content"

MAX_TEMPLATE_CHARS = 1 << 20
TIME_LIMIT_S = 10.0
_LITERAL, _END = "\ue0f0", "\ue0f1"  # private use: around names of control tokens that are part of a message
_UNKNOWN, _CONTROL = 2, 3  # tokenizer.ggml.token_type


class Renderer(Protocol):
    """How a session turns messages into a prompt."""

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt, up to where the assistant answers, with BOS if the model uses it."""
        ...

    def close(self) -> None:
        """Free what it holds."""


class RawText:
    """No template: the messages one after another, for models that only continue text."""

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """Names of control tokens in the text become control tokens."""
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
    """A template that is compiled in its process. Use it as a context manager, or call `close`.

    origin: names it in error messages, such as the file's path. Raises YarnEdgeError if the template is too long; errors inside it
    appear when it renders.
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
            raise YarnEdgeError(f"{origin}: {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed")
        self.origin, self.time_limit_s = origin, time_limit_s
        self._setup = {"template": source, "bos_token": bos_token, "eos_token": eos_token, "time_limit_s": time_limit_s}
        self._worker: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] | None = None
        self._controls: re.Pattern[str] | None = None

    @classmethod
    def of(cls, model: Model) -> ChatTemplate:
        """The template in the model's file. Raises YarnEdgeError if there is none."""
        if model.chat_template is None:
            raise YarnEdgeError(
                f"{model.path}: has no tokenizer.chat_template (a base model?); use --raw to continue text without one"
            )
        bos, eos = (model.token_bytes(t).decode("utf-8", "replace") if t >= 0 else "" for t in (model.bos, model.eos))
        origin = f"{model.path}: tokenizer.chat_template"
        template = cls(model.chat_template, bos_token=bos, eos_token=eos, origin=origin)
        template._controls = _control_names(model)
        template._start()  # it imports Jinja2 while the caller makes a context
        return template

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of the prompt. Raises YarnEdgeError with the template's own message, or the limit that it exceeded."""
        reply = self._ask({"messages": list(messages), "add_generation_prompt": add_generation_prompt})
        if "error" in reply:
            raise YarnEdgeError(f"{self.origin}: {one_line(str(reply['error']))}")
        return str(reply["text"])

    def tokens(self, model: Model, messages: Sequence[Message]) -> list[int]:
        """Names of control tokens become control tokens in the template's own text, and stay text in a message.

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
        """End the process. Rendering again starts a new one."""
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
        worker = start_child("yarn_edge.chat.template_process")
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
            self.close()  # Ctrl-C: a late reply must not be taken for that of the next request
            raise
        self.close()
        reason = f"takes over {self.time_limit_s:g} s to render" if timed_out.is_set() else "crashed while rendering"
        return {"error": f"{reason}; use --raw to do without it"}


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
        with suppress(OSError):  # it had not read everything
            pipe.close()  # type: ignore[union-attr]
    worker.wait()
