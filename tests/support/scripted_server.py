"""Our server with a model that says what a test wants: real requests, prompts, calls of tools and answers, without a generation."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from yarn_edge.addresses import listening
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.engine.answer import AnswerStats
from yarn_edge.engine.load import EngineLoad
from yarn_edge.engine.sampling import Sampling
from yarn_edge.runtime.model import Model
from yarn_edge.serve.answering import Served
from yarn_edge.serve.app import make_app
from yarn_edge.serve.bodies import Bodies
from yarn_edge.serve.command import LOOPBACK
from yarn_edge.serve.connections import HttpServer
from yarn_edge.serve.guard import Access
from yarn_edge.serve.lanes import TextLane
from yarn_edge.serve.prompts import Prompts
from yarn_edge.serve.vectors import VectorLane
from yarn_edge.serve.worker import AnswerPiece, Asked

from support.tiny_chat import tiny_chat_model

CTX, PREPARED_FOR = 8192, 11
# Qwen's form of tools, shortened.
HERMES = (
    "{%- if tools %}<u>system\n# Tools\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>\n"
    'For each call, return <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call></s>{% endif %}'
    "{%- for m in messages %}<u>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "</s>{% endfor %}{% if add_generation_prompt %}<u>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


class ScriptedWorker:
    """Answers with what `says` was told last; `asked` has what it was asked."""

    def __init__(self, model: Model) -> None:
        self.model, self.n_ctx, self.waiting = model, CTX, 0
        self.asked: list[Asked] = []
        self._pieces: Sequence[AnswerPiece | Exception] = ()
        self._stopping: asyncio.Future[None] | None = None

    def says(self, *said: str | AnswerPiece | Exception, ended: str = "stop", **end: Any) -> None:
        """The next answers: texts or pieces, and how they end."""
        self.asked.clear()
        pieces = [AnswerPiece("answer", one) if isinstance(one, str) else one for one in said]
        stats = AnswerStats(PREPARED_FOR, 0, 0, len(pieces), 0.1, 10.0, ended, 0, 0, 20, CTX)  # type: ignore[arg-type]
        self._pieces = [*pieces, AnswerPiece("end", ended=ended, stats=stats, **end)]  # type: ignore[arg-type]

    @property
    def stopping(self) -> asyncio.Future[None]:
        self._stopping = self._stopping or asyncio.get_running_loop().create_future()
        return self._stopping

    def check_room(self) -> None:
        pass

    def load(self) -> EngineLoad:
        return EngineLoad(**dict.fromkeys(EngineLoad.__dataclass_fields__, 3))

    async def answers(
        self, several: Sequence[Asked], _silence_s: float
    ) -> AsyncGenerator[tuple[int, AnswerPiece], None]:
        self.asked += several
        for piece in self._pieces:
            for number in range(len(several)):
                await asyncio.sleep(0)
                if isinstance(piece, Exception):
                    raise piece
                yield number, piece


class ScriptedServer:
    """worker: says what is said; url: where the server is."""

    def __init__(self, worker: ScriptedWorker, port: int) -> None:
        self.worker, self.port, self.url = worker, port, f"http://127.0.0.1:{port}"


@contextmanager
def scripted_server(folder: Path, template: str = HERMES, key: str | None = None) -> Iterator[ScriptedServer]:
    """A server in a thread of this process."""
    with ExitStack() as held:
        model = held.enter_context(Model(tiny_chat_model(folder / "tiny.gguf", template)))
        renderer = held.enter_context(ChatTemplate.of(model, origin="the model's chat template"))
        lanes = (TextLane(renderer), TextLane(held.enter_context(renderer.another())))
        worker = ScriptedWorker(model)
        served = Served(
            worker,  # type: ignore[arg-type]
            Prompts(model, CTX, lanes),
            VectorLane(None),  # type: ignore[arg-type]
            Bodies(1 << 20),
            "tiny",
            1_700_000_000,
            Sampling(),
            Access(key, LOOPBACK),
        )
        listener = held.enter_context(listening("127.0.0.1", 0))
        server = HttpServer(make_app(served), lambda: None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield ScriptedServer(worker, listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(10)
            for lane in lanes:
                lane.shut_down()
