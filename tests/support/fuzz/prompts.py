"""`chat` that is asked once: hostile bytes on a pipe, hostile arguments and documents, with a real model so small that it babbles."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.progress import set_quiet

from support import tiny
from support.fuzz.mutations import mutate_bytes
from support.fuzz.runner import Case
from support.fuzz.terminals import OBEYED, PLAIN, text

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
_NUMBERS = ("0", "1", "-1", "4k", "nan", "1e99", "99999999999999999999", "\x1b[777m", "", "١", "1_0", "0x10", " 7")
_FLAGS = (
    "--ctx",
    "--max-tokens",
    "--temperature",
    "--top-k",
    "--top-p",
    "--min-p",
    "--repeat-penalty",
    "--seed",
    "--kv-type",
    "--memory",
)


class Prompts:
    """One answer each: exit code 0 or 2; of an error one line on stderr, nothing there that a terminal obeys; --json is JSON."""

    name, in_process = "prompts", False

    def __init__(self, scratch: Path) -> None:
        checkpoint = tiny.write_checkpoint(scratch / "ck")
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        self.model = convert(checkpoint, str(scratch / "tiny.gguf"), "F32")[0]

    def case(self, rng: random.Random, scratch: Path) -> Case:
        piped = _bytes(rng) if rng.random() < 0.8 else b""
        words = [
            "chat",
            str(self.model),
            "--threads",
            "1",
            "--max-tokens",
            "3",
            "--trust",
            *_some(rng, scratch / "files"),
        ]

        def ask() -> str:
            set_quiet(False)
            with _streams(piped) as (out, err):
                code = main(words)
            said, errors = out.getvalue().decode(), err.getvalue()
            assert code in (0, 2), f"exit code {code}: {errors[-300:]!r}"
            assert OBEYED.search(errors.replace("\n", "")) is None, repr(errors[-300:])
            assert (code == 2) == ("yarn-edge: error: " in errors), repr(errors[-300:])
            assert code == 0 or (errors.splitlines()[-1].startswith("yarn-edge: error: ") and not said), repr(
                errors[-300:]
            )
            if code == 0 and "--json" in words:
                json.loads(said)
            return "answered" if code == 0 else "refused"

        return Case(len(piped) + 100_000, ask)


def _bytes(rng: random.Random) -> bytes:
    data = text(rng, 60).encode("utf-8", "replace")
    if rng.random() < 0.3:
        data = data.replace(b"\0", b"")
    return mutate_bytes(rng, data, len(data)) if rng.random() < 0.3 and data else data


def _argument(rng: random.Random) -> str:
    """As the system hands one over: no NUL, and half a character for a byte that is not UTF-8."""
    data = _bytes(rng) if rng.random() < 0.5 else rng.choice(PLAIN).encode()
    return os.fsdecode(data.replace(b"\0", b"")[:2000])


def _some(rng: random.Random, folder: Path) -> Iterator[str]:
    """A few flags with values of every kind."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for _ in range(rng.randint(0, 3)):
        kind = rng.random()
        if kind < 0.35:
            yield f"{rng.choice(('-p', '--prompt', '--system'))}={_argument(rng)}"
        elif kind < 0.6:
            path = folder / os.fsdecode(_bytes(rng).replace(b"\0", b"").replace(b"/", b"")[:200] or b"x")
            path.write_bytes(_bytes(rng) + b" words")
            yield f"--file={path}"
        elif kind < 0.7:
            yield f"--file={rng.choice(('/dev/zero', '/', 'none', '~nosuchuser/x', '/proc/self/mem', str(folder)))}"
        elif kind < 0.9:
            yield f"{rng.choice(_FLAGS)}={rng.choice(_NUMBERS)}"
        else:
            yield rng.choice(("--json", "--raw", "--quiet", "--debugg", "--\x1b[777m", "\udcff", "--json"))


@contextmanager
def _streams(piped: bytes) -> Iterator[tuple[io.BytesIO, io.StringIO]]:
    """stdin is a pipe with these bytes; what is written to stdout and stderr."""
    before, out, err = (sys.stdin, sys.stdout, sys.stderr), io.BytesIO(), io.StringIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8")
    sys.stdout, sys.stderr = io.TextIOWrapper(out, encoding="utf-8", write_through=True), err
    try:
        yield out, err
    finally:
        sys.stdout.flush()
        sys.stdout.detach()
        sys.stdin, sys.stdout, sys.stderr = before
