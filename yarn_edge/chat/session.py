"""A conversation with a model: messages become a prompt, the answer is a stream of text, and a full context is dealt with.

When the context is full, the oldest turns are dropped. The system prompt and the documents stay, and the rest is evaluated again. A
document that does not fit is refused. Positions are never shifted (see `yarn_edge.engine.batching`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from yarn_edge.chat.conversation import Conversation, Turn
from yarn_edge.chat.reasoning import opened_by
from yarn_edge.chat.template import Message, Renderer
from yarn_edge.engine.answer import AnswerStats
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.context import Context

# Tokens of context that are kept free for an answer if the caller sets no max_tokens.
ANSWER_ROOM = 1024


class Session:
    """A conversation in a context that nothing else uses.

    generation: the context and what it holds (a bare context is wrapped). `conversation` may be replaced or changed between answers.
    `notice` is called with one line when turns are dropped.
    """

    def __init__(
        self,
        generation: Generation | Context,
        template: Renderer,
        sampling: Sampling,
        system: str | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self.generation = generation if isinstance(generation, Generation) else Generation(generation)
        self.context, self.template, self.sampling = self.generation.context, template, sampling
        self.conversation = Conversation(system)
        self.dropped_turns = 0
        self.opened: str | None = None  # closing tag of the reasoning block that the last prompt opened
        self._notice = notice or (lambda _message: None)

    @property
    def stats(self) -> AnswerStats | None:
        """Statistics of the last answer, None if there was none."""
        return self.generation.stats

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of `messages`, up to where the assistant answers."""
        return self.template.tokens(self.context.model, messages)

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.conversation.clear()
        self.dropped_turns = 0

    def stream(self, question: str, max_tokens: int | None = None) -> Generator[str, None, None]:
        """Yield the answer in pieces of text, as they are generated; a character is never split.

        Closing the iterator or Ctrl-C (raised again as KeyboardInterrupt) stops the answer, and what was said so far stays in the
        conversation. A question without any answer is removed. Raises YarnEdgeError if the message alone exceeds the context, or if
        the template refuses the conversation.
        """
        self.generation.stats = None
        asked, tokens, dropped = self._fit(self.conversation.asked(question), max_tokens)
        if dropped:
            self.dropped_turns += dropped
            self._notice(self._full(dropped, asked))
        self.opened = opened_by(self.context.model, tokens)
        said: list[str] = []
        complete = False
        try:
            for piece in self.generation.generate(tokens, self.sampling, max_tokens, canonical=dropped > 0):
                said.append(piece)
                yield piece
            complete = True
        finally:
            if complete or said:
                last = asked.turns[-1]
                asked.turns[-1] = Turn(last.question, "".join(said), last.documents)
            else:
                asked.undo()
            self.conversation = asked

    def preload(self) -> None:
        """Evaluate what precedes the next question, whatever that will be: the documents that wait for it.

        Only whole batches; the rest is evaluated with the question. Raises YarnEdgeError if it exceeds the context.
        """
        one, other = (self._fit(self.conversation.asked(question), None)[1] for question in ("a", "Why?"))
        common = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
        self.generation.preload(one[: common - common % self.context.n_batch])

    def _fit(self, asked: Conversation, max_tokens: int | None) -> tuple[Conversation, list[int], int]:
        """(the conversation, without its oldest turns if there is no room for an answer; its tokens; the number of dropped turns).

        Half of the space of the earlier turns is freed at once, so that the rest is not evaluated again at every turn.
        """
        n_ctx = self.context.n_ctx
        most = n_ctx - max(1, min(max_tokens or ANSWER_ROOM, n_ctx // 4))
        dropped = 0
        tokens = self.prompt(asked.messages())
        if len(tokens) > most and len(asked.turns) > 1:
            least = len(self.prompt(asked.without_all_but_last().messages()))
            while len(tokens) > least + (most - least) // 2 and len(asked.turns) > 1:
                asked = asked.without_oldest()
                dropped += 1
                tokens = self.prompt(asked.messages())
        if len(tokens) >= n_ctx:
            raise YarnEdgeError(self._too_long(asked, len(tokens)))
        return asked, tokens, dropped

    def _full(self, dropped: int, asked: Conversation) -> str:
        turns = "oldest turn was" if dropped == 1 else f"{dropped} oldest turns were"
        kept = "; the document stays" if asked.documents() else ""
        return f"the context of {self.context.n_ctx} tokens is full: the {turns} dropped from the conversation{kept}"

    def _too_long(self, asked: Conversation, needed: int) -> str:
        what = "the message with its documents" if asked.documents() else "the message"
        n_ctx, trained = self.context.n_ctx, self.context.model.n_ctx_train
        more = needed + ANSWER_ROOM
        remedy = f"--ctx {more} would hold it" if more <= trained else f"the model was trained for {trained}"
        return (
            f"{what} needs {needed} tokens and room for an answer, but the context holds {n_ctx}: {remedy} "
            "(yarn-edge fit shows what fits in memory, and with which cache)"
        )
