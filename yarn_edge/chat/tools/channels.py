"""The channels of gpt-oss's harmony: messages with a header, of which analysis is reasoning, and one to a function is a call."""

from __future__ import annotations

import re
from collections.abc import Sequence

from yarn_edge.chat.reasoning import undecided

Part = tuple[str, str]  # reasoning, answer: text; call: a name; arguments: text; called: ""
_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_HEADS = ("<|channel|>", "<|start|>", "to=", "assistant")
_RECIPIENT = re.compile(r"to=functions\.([A-Za-z0-9_.-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
MAX_HEADER = 1000


class Channels:
    """names: functions that can be called. `feed` pieces, then `end`. A text without a header is the answer."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._held, self._kind = names, "", "header"

    def feed(self, text: str) -> list[Part]:
        """The parts that are decided."""
        parts: list[Part] = []
        self._held += text
        while self._step(parts):
            pass
        return parts

    def end(self) -> list[Part]:
        """What is left; an open call ends."""
        parts: list[Part] = []
        if self._kind != "header":
            if self._kind == "arguments":
                self._held = self._held[: len(self._held) - undecided(self._held, _ENDS)]  # a tag that was cut
            parts += [(self._kind, self._held)] if self._held else []
            parts += [("called", "")] if self._kind == "arguments" else []
        elif self._held.strip() and not self._held.lstrip().startswith(_HEADS):
            parts.append(("answer", self._held))
        self._held, self._kind = "", "header"
        return parts

    def _step(self, parts: list[Part]) -> bool:
        if self._kind == "header":
            return self._header(parts)
        found = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
        if found:
            at, end = min(found)
            if at:
                parts.append((self._kind, self._held[:at]))
            if self._kind == "arguments":
                parts.append(("called", ""))
            self._held = self._held[at + (0 if end in _HEADS else len(end)) :]
            self._kind = "header"
            return bool(self._held)
        keep = undecided(self._held, _ENDS)
        if len(self._held) > keep:
            parts.append((self._kind, self._held[: len(self._held) - keep]))
            self._held = self._held[len(self._held) - keep :]
        return False

    def _header(self, parts: list[Part]) -> bool:
        start = self._held.lstrip()
        if start and not any(start.startswith(head) or head.startswith(start) for head in _HEADS):
            self._kind = "answer"
            return True
        header, tag, rest = self._held.partition(_MESSAGE)
        if len(header) > MAX_HEADER:
            self._kind = "answer"
            return True
        if not tag:
            return False
        self._held = rest
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        if recipient and recipient[1] in self._names:
            parts.append(("call", recipient[1]))
            self._kind = "arguments"
        else:
            self._kind = "reasoning" if channel and channel[1] == "analysis" else "answer"
        return True
