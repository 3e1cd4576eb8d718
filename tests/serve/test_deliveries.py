"""From a thread to a loop: in order, none is lost, and the loop is not woken for each."""

from __future__ import annotations

import asyncio
import threading

import pytest

from yarn_edge.serve.deliveries import Deliveries


def test_all_arrive_in_order_with_few_wakes(monkeypatch: pytest.MonkeyPatch) -> None:
    asyncio.run(_arrive(monkeypatch))


async def _arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, wakes = asyncio.get_running_loop(), 0
    wake = loop.call_soon_threadsafe

    def counted(*args: object) -> object:
        nonlocal wakes
        wakes += 1
        return wake(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    deliveries = Deliveries(loop)
    queues: list[asyncio.Queue[int]] = [asyncio.Queue() for _ in range(4)]
    began = threading.Event()

    def work() -> None:
        for n in range(20_000):
            deliveries.put(queues[n % 4], n)
            began.set()

    thread = threading.Thread(target=work)
    thread.start()
    began.wait()
    got = [[await queue.get() for _ in range(5000)] for queue in queues]
    thread.join()
    assert got == [list(range(q, 20_000, 4)) for q in range(4)]
    assert 0 < wakes < 20_000 / 4


def test_a_loop_that_is_over_is_no_error() -> None:
    loop = asyncio.new_event_loop()
    loop.close()
    Deliveries(loop).put(asyncio.Queue(), 1)
