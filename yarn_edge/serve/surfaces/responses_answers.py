"""Answers of /v1/responses: a response of items, or events with numbers, as the openai package reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from yarn_edge.serve.blocks import AnswerBlock, AnswerBlocks, AnswerStep, BlockKind, new_id, said_tokens
from yarn_edge.serve.writing import Event, Head, Writer, reasoning_tokens

_PREFIXES: dict[BlockKind, str] = {"reasoning": "rs", "answer": "msg", "call": "fc"}
# By kind of block, the events of its text: while it grows, when it is done.
_DELTAS: dict[BlockKind, tuple[str, str]] = {
    "reasoning": ("response.reasoning_text.delta", "response.reasoning_text.done"),
    "answer": ("response.output_text.delta", "response.output_text.done"),
    "call": ("response.function_call_arguments.delta", "response.function_call_arguments.done"),
}


class ResponsesWriter(Writer):
    """A response, or the events of which it is made."""

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self._ids: dict[int, str] = {}
        self._number = 0

    def whole(self, answers: Sequence[AnswerBlocks]) -> dict[str, Any]:
        return self._response(answers[0], "incomplete" if answers[0].reason == "length" else "completed")

    def _response(self, answer: AnswerBlocks, status: str) -> dict[str, Any]:
        question, request = self.head.question, self.head.request
        ended = status in ("completed", "incomplete")
        return {
            "id": f"resp_{self.head.number}",
            "object": "response",
            "created_at": self.head.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": self.head.model,
            "output": self._output(answer, status) if ended else [],
            "usage": self._usage(answer) if ended else None,
            "instructions": getattr(request, "instructions", None),
            "max_output_tokens": question.max_tokens,
            "metadata": (request.model_extra or {}).get("metadata") or {},
            "parallel_tool_calls": question.tools.parallel,
            "previous_response_id": None,
            "reasoning": {"effort": question.options.get("reasoning_effort"), "summary": None},
            "store": False,
            "temperature": question.sampling.temperature,
            "text": getattr(request, "text", None) or {"format": {"type": "text"}},
            "tool_choice": getattr(request, "tool_choice", None) or "auto",
            "tools": getattr(request, "tools", None) or [],
            "top_logprobs": question.top_logprobs or 0,
            "top_p": question.sampling.top_p,
            "truncation": "disabled",
        }

    def _output(self, answer: AnswerBlocks, status: str) -> list[dict[str, Any]]:
        """The items; only the last one of an answer that was cut off is not complete."""
        last = len(answer.blocks) - 1
        return [self._item(block, status if block.number == last else "completed") for block in answer.blocks]

    def _usage(self, answer: AnswerBlocks) -> dict[str, Any]:
        n_prompt, generated = self.head.n_prompt, answer.generated
        return {
            "input_tokens": n_prompt,
            "input_tokens_details": {"cached_tokens": answer.cached or 0, "cache_write_tokens": 0},
            "output_tokens": generated,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens(answer.blocks, generated)},
            "total_tokens": n_prompt + generated,
        }

    def _id(self, block: AnswerBlock) -> str:
        return self._ids.setdefault(block.number, new_id(_PREFIXES[block.kind]))

    def _item(self, block: AnswerBlock, status: str) -> dict[str, Any]:
        """An item of the output; one that is in progress has no content yet."""
        same = {"id": self._id(block), "status": status}
        begun = status == "in_progress"
        if block.kind == "call":
            call = {"call_id": block.id, "name": block.name, "arguments": "" if begun else block.text}
            return {**same, "type": "function_call", **call}
        content = [] if begun else [self._part(block, block.text)]
        if block.kind == "reasoning":
            return {**same, "type": "reasoning", "summary": [], "content": content}
        return {**same, "type": "message", "role": "assistant", "content": content}

    def _part(self, block: AnswerBlock, text: str) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        tokens = said_tokens(block.tokens, self.head.token_bytes) if text else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}

    def _event(self, kind: str, **fields: Any) -> Event:
        number, self._number = self._number, self._number + 1
        return Event({"type": kind, "sequence_number": number, **fields}, kind)

    def begin(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(answers[0], "in_progress"))

    def step(self, step: AnswerStep) -> Iterator[Event]:
        block = step.block
        if block is None:
            return
        where = {"output_index": block.number, "item_id": self._id(block)}
        inside = where if block.kind == "call" else {**where, "content_index": 0}
        if step.what == "begun":
            yield self._event(
                "response.output_item.added", output_index=block.number, item=self._item(block, "in_progress")
            )
            if block.kind != "call":
                yield self._event("response.content_part.added", **inside, part=self._part(block, ""))
        elif step.what == "grown":
            logprobs = {"logprobs": said_tokens(step.tokens, self.head.token_bytes)} if block.kind == "answer" else {}
            yield self._event(_DELTAS[block.kind][0], **inside, delta=step.text, **logprobs)
        else:
            yield from self._done(step, inside)

    def _done(self, step: AnswerStep, inside: dict[str, Any]) -> Iterator[Event]:
        block = step.block
        assert block is not None
        name = "arguments" if block.kind == "call" else "text"
        logprobs = {"logprobs": said_tokens(block.tokens, self.head.token_bytes)} if block.kind == "answer" else {}
        more = {"name": block.name} if block.kind == "call" else {}
        yield self._event(_DELTAS[block.kind][1], **inside, **{name: block.text}, **more, **logprobs)
        if block.kind != "call":
            yield self._event("response.content_part.done", **inside, part=self._part(block, block.text))
        yield self._event("response.output_item.done", output_index=block.number, item=self._item(block, "completed"))

    def end(self, answers: Sequence[AnswerBlocks]) -> Iterator[Event]:
        response = self.whole(answers)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, error: dict[str, Any]) -> Event:
        told = error["error"]
        response = {
            **self._response(AnswerBlocks(0), "failed"),
            "error": {"code": told["code"] or told["type"], "message": told["message"]},
        }
        return self._event("response.failed", response=response)
