"""Many clients for a long time: `python -m support.soak MODEL.gguf --minutes 10 --clients 8` in `tests/`.

Each client asks a running server for long and short answers, and leaves some of them in the middle. The same question with the same
seed must get the same answer whenever it is asked, and every answer that is waited for must come to its end. The server's memory
must not grow after the first third of the time, and it must stop when it is told to. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from yarn_edge.stdout import write_text

from support.serving import Server

DOCUMENT = "The lighthouse keeper wrote down every ship that passed, its flag and its hour. " * 60


class Clients:
    """What all clients share. answers: of each question; wrong: what should not be."""

    def __init__(self, server: Server, until: float) -> None:
        self.server, self.until = server, until
        self.answers: dict[str, str] = {}
        self.wrong: list[str] = []
        self.complete = self.left = 0
        self._lock = threading.Lock()

    def run(self, seed: int) -> None:
        """One client."""
        rng = random.Random(seed)
        while time.monotonic() < self.until:
            number = rng.randrange(40)
            begins = DOCUMENT[: rng.choice((0, 0, 200, 3000))]
            body = {
                "prompt": f"{begins}{number}. Once upon a time",
                "max_tokens": 5 + number,
                "seed": number,
                "stream": True,
                "temperature": 0 if number % 2 else 0.8,
            }
            try:
                self._ask(body, leaves=rng.random() < 0.3, rng=rng)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")

    def _ask(self, body: dict[str, Any], leaves: bool, rng: random.Random) -> None:
        said, ended, pieces = "", False, 0
        with self.server.open("POST", "/v1/completions", body) as reply:
            for line in reply:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(str(event))
                    said += "".join(choice["text"] for choice in event["choices"])
                    pieces += 1
                if leaves and pieces > rng.randrange(1, 10):
                    self.left += 1
                    return
        with self._lock:
            self.complete += 1
            if not ended:
                self.wrong.append(f"an answer without an end: {said[:80]!r}")
            before = self.answers.setdefault(body["prompt"], said)
            if before != said:
                self.wrong.append(f"another answer to {body['prompt'][-40:]!r}: {said[:60]!r}, before {before[:60]!r}")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args()
    server = Server("--parallel", str(args.clients), "--ctx", "8192", "--api-key", "a-key", model=args.model)
    memory = psutil.Process(server.process.pid)
    clients = Clients(server, time.monotonic() + 60 * args.minutes)
    threads = [threading.Thread(target=clients.run, args=(seed,)) for seed in range(args.clients)]
    for thread in threads:
        thread.start()
    resident: list[int] = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        resident.append(memory.memory_info().rss)
    third = len(resident) // 3
    first, last = max(resident[third : 2 * third]), max(resident[2 * third :])
    code = server.end()
    text = (
        f"{clients.complete} answers, {len(clients.answers)} different questions, {clients.left} left in the middle; "
    )
    text += (
        f"{len(clients.wrong)} wrong {clients.wrong[:3]}; memory {first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB; "
    )
    write_text(text + f"the server ended with {code}\n")
    return int(bool(clients.wrong) or last > 1.02 * first or code != 0)


if __name__ == "__main__":
    sys.exit(main())
