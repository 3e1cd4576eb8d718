"""Messages -> the text and tokens of a prompt, by the chat template in the model's file.

A template is a program by a stranger (Jinja2, `tokenizer.chat_template`), run with the settings of transformers'
`apply_chat_template`. It runs in a sandbox *and* in a process of its own (`template_process`), because a sandbox stops escapes but
not nested `{% for %}` loops.

Limits: the template's length, the time of a rendering (also within one C call: the process is killed), its memory (if the
operating system has RLIMIT_AS: Linux), its output, `range()`. Memory has no limit on macOS and Windows.

What a template loses, the model never sees: a prompt without the last text of the user, a system message, a tool or its result is an
error. A template that knows no tools gets them in the system message (`yarn_edge.chat.tools.generic`).
"""

from __future__ import annotations

import copy
import json
import subprocess
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, Protocol

from yarn_edge.chat.given_text import NEEDLE
from yarn_edge.chat.template_literals import literal_parts, marked, texts_in
from yarn_edge.chat.template_losses import loss, lost
from yarn_edge.chat.template_options import TemplateOptions, prepared
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.runtime.child import start_child

if TYPE_CHECKING:
    from yarn_edge.runtime.model import Model

# As transformers takes it: "role" (system, developer, user, assistant, tool), "content" and, with calls, "tool_calls" (of which
# "arguments" is an object), "tool_call_id", "name".
Message = Mapping[str, Any]

NO_OPTIONS: Mapping[str, Any] = {}
MAX_TEMPLATE_CHARS = 1 << 20
TIME_LIMIT_S = 10.0
_REMEDY = "use --raw to do without it"


class Renderer(Protocol):
    """How a session turns messages into a prompt."""

    def tokens(
        self,
        model: Model,
        messages: Sequence[Message],
        at_most: int | None = None,
        until: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Token ids of the prompt, up to where the assistant answers, with BOS if the model uses it.

        at_most, until: the limits of `Tokenizer.tokenize`, for a caller who refuses more. tools: functions that the model may
        call, as transformers takes them; options: `TemplateOptions` by name.
        """
        ...

    def interrupt(self) -> None:
        """Called from another thread: end what is being rendered."""

    def close(self) -> None:
        """Free what it holds."""


class RawText:
    """No template: the messages one after another, for models that only continue text."""

    def tokens(
        self,
        model: Model,
        messages: Sequence[Message],
        at_most: int | None = None,
        until: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Names of control tokens in the text become control tokens."""
        if tools or options:
            raise YarnEdgeError("tools, and options of a chat template, are possible only with a chat template")
        text = "".join(message["content"] for message in messages)
        return with_bos(
            model, model.tokenize(text, add_special=False, parse_special=True, at_most=at_most, until=until)
        )

    def interrupt(self) -> None:
        """Nothing is rendered."""

    def close(self) -> None:
        """Nothing to free."""


def with_bos(model: Model, tokens: list[int]) -> list[int]:
    """`tokens` with one BOS in front if the file asks for it (tokenizer.ggml.add_bos_token), never two."""
    if model.add_bos and model.bos >= 0 and tokens[:1] != [model.bos]:
        return [model.bos, *tokens]
    return tokens


class ChatTemplate:
    """A template that is compiled in its process. Use it as a context manager, or call `close`.

    origin: names it in error messages, such as the file's path. remedy: ends the messages that say what it cannot do. Raises
    YarnEdgeError if the template is too long; errors inside it appear when it renders.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        origin: str = "chat template",
        remedy: str = _REMEDY,
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise YarnEdgeError(f"{origin}: {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are allowed")
        self.origin, self.remedy, self.time_limit_s = origin, remedy, time_limit_s
        self._setup = {"template": source, "bos_token": bos_token, "eos_token": eos_token, "time_limit_s": time_limit_s}
        self._worker: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] | None = None

    @classmethod
    def of(cls, model: Model, *, origin: str | None = None, remedy: str = _REMEDY) -> ChatTemplate:
        """The template in the model's file. origin, remedy: for those who should not read of the file's path and chat's flag.

        Raises YarnEdgeError if there is none.
        """
        if model.chat_template is None:
            raise YarnEdgeError(
                f"{model.path}: has no tokenizer.chat_template (a base model?); use --raw to continue text without one"
            )
        bos, eos = model.template_token("bos"), model.template_token("eos")
        origin = origin or f"{model.path}: tokenizer.chat_template"
        template = cls(model.chat_template, bos_token=bos, eos_token=eos, origin=origin, remedy=remedy)
        template._start()  # it imports Jinja2 while the caller makes a context
        return template

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        **options: Any,
    ) -> str:
        """The text of the prompt. options: the other fields of `TemplateOptions`.

        Raises YarnEdgeError with the template's own message, the limit that it exceeded, or what it loses of the messages.
        """
        try:
            asked = TemplateOptions(add_generation_prompt=add_generation_prompt, **options)
            asked.check(self._source, messages)
        except YarnEdgeError as error:
            raise YarnEdgeError(f"{self.origin}: {error}") from None
        messages, given = prepared(self._source, messages, tools, asked)
        reply = self._ask({"messages": list(messages), **given})
        if "error" in reply:
            raise YarnEdgeError(f"{self.origin}: {one_line(str(reply['error']))}")
        text = asked.cut(str(reply["text"]))
        if not text:
            raise YarnEdgeError(f"{self.origin}: renders nothing; {self.remedy}")
        kept = asked.without_tag(messages)
        what = lost(text, kept, {**given, **vars(asked)}) or self._lost_among_equals(messages, given)
        if what is not None:
            raise YarnEdgeError(f"{self.origin}: {loss(what, self.remedy)}")
        return text

    @property
    def _source(self) -> str:
        return str(self._setup["template"])

    def _lost_among_equals(self, messages: Sequence[Message], given: Mapping[str, Any]) -> str | None:
        """`lost`, for a last user text that the prompt may also hold for another reason: another text in its place must show."""
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        others = [message for i, message in enumerate(messages) if i not in users[-1:]]
        said = [*texts_in(others), *texts_in(given.get("tools")), self._source]
        if not users or not any(messages[users[-1]]["content"].strip() in text for text in said):
            return None
        trial = [*messages]
        trial[users[-1]] = {**trial[users[-1]], "content": NEEDLE}
        reply = self._ask({"messages": trial, **given})
        return "user" if "text" in reply and NEEDLE.casefold() not in str(reply["text"]).casefold() else None

    def tokens(
        self,
        model: Model,
        messages: Sequence[Message],
        at_most: int | None = None,
        until: float | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Names of control tokens become control tokens in the template's own text, and stay text in everything that is given.

        So a document that contains `<|im_end|>` cannot end the user's turn, whatever the file says of that token.
        """
        names = model.tokenizer.control_names
        given = (list(messages), list(tools), dict(options))
        if any(any(names.find(text)) for text in texts_in(given)):
            messages, tools, options = marked(given, names)
        tokens: list[int] = []
        for text, is_literal in literal_parts(self.render(messages, tools=tools, **options)):
            if is_literal:
                tokens += model.tokenizer.literal(text, model.is_end)
            else:
                tokens += model.tokenize(text, add_special=False, parse_special=True, at_most=at_most, until=until)
            if at_most is not None and len(tokens) > at_most:
                break
        return with_bos(model, tokens)

    def another(self) -> ChatTemplate:
        """The same template with a process of its own, which starts when it renders."""
        other = copy.copy(self)
        other._worker = other._stop = None
        return other

    def interrupt(self) -> None:
        """Called from another thread: the rendering that runs ends with an error."""
        if (worker := self._worker) is not None:
            worker.kill()

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
        with suppress(BrokenPipeError):  # it has ended already: the next request finds out
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
            if line.endswith(b"\n"):  # a whole reply
                return dict(json.loads(line))
        except BaseException:
            self.close()  # Ctrl-C: a late reply must not be taken for that of the next request
            raise
        self.close()
        reason = f"takes over {self.time_limit_s:g} s to render" if timed_out.is_set() else "crashed while rendering"
        return {"error": f"{reason}; {self.remedy}"}


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
