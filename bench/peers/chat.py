"""What a long document costs in `chat`: the first question, the second, the next day, generation at that depth, drafts.

    python -m yarn_edge.bench.peers.chat MODEL.gguf --text FILE [--tokens 12000] [--peer DIR]

The second question is asked in the same conversation; "restarted" is a whole process of `yarn-edge chat --cache`, from its start to
the first byte of its answer, with an empty folder and with the one that it left. Generation stands next to llama-bench (in --peer DIR)
at the same depth: with its defaults, and without flash attention, as `chat` runs. Drafts: parts of the document are copied, with and
without them, from a prompt that holds the part and a first copy of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from yarn_edge.chat.conversation import Document
from yarn_edge.chat.session import Session
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.engine.generation import AnswerStats
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.prompt_lookup import Lookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import MAX_THREADS, count, length
from yarn_edge.memory.placement import Wanted
from yarn_edge.progress import note
from yarn_edge.report.environment import environment, machine_state
from yarn_edge.runtime.llama_api import physical_threads
from yarn_edge.runtime.model import Model

from ..speed.configuration import Configuration
from .llama_bench import executable, speeds

GREEDY = Sampling(temperature=0)
QUESTIONS = ("Who are the people in this text?", "What happens at the end of it?")
ROOM = 1024  # tokens of context beside the document
PLACES = 3  # of the document that are copied
LOOKUPS: tuple[Lookup, ...] = ("off", "auto", "on")


def document_of(model: Path, text: Path, n_tokens: int) -> str:
    """The first `n_tokens` tokens of the text. Raises YarnEdgeError where it has fewer."""
    with Model(model, vocab_only=True) as vocabulary:
        read = text.read_text(encoding="utf-8", errors="replace")[: 16 * n_tokens]
        tokens = vocabulary.tokenize(read, add_special=False, parse_special=False)
        if len(tokens) < n_tokens:
            raise YarnEdgeError(f"{text}: has {len(tokens)} tokens of {n_tokens}")
        return b"".join(map(vocabulary.token_bytes, tokens[:n_tokens])).decode(errors="ignore")


def conversation(args: argparse.Namespace, document: str, ctx: int) -> dict[str, AnswerStats]:
    """Two questions in one process, without drafts."""
    found: dict[str, AnswerStats] = {}
    wanted = Wanted("cpu", ctx, "f16", threads=args.threads)
    with (
        opened(args.model, wanted, EngineSettings(lookup="off")) as generation,
        closing(ChatTemplate.of(generation.context.model)) as template,
    ):
        session = Session(generation, template, GREEDY)
        session.conversation.waiting = (Document("document", document),)
        for name, question in zip(("first", "second"), QUESTIONS, strict=True):
            for _piece in session.stream(question, args.gen_tokens):
                pass
            assert session.stats is not None
            found[name] = session.stats
    return found


def first_byte(args: argparse.Namespace, document: Path, ctx: int, cache: Path) -> float:
    """Seconds from the start of a process to the first byte of its answer."""
    command = [
        sys.executable,
        "-m",
        "yarn_edge",
        "chat",
        str(args.model),
        "--file",
        str(document),
        "-p",
        QUESTIONS[0],
        "--cache",
        str(cache),
        "--ctx",
        str(ctx),
        "--kv-type",
        "f16",
        "--backend",
        "cpu",
        "--temperature",
        "0",
        "--max-tokens",
        "4",
        "--quiet",
        "--threads",
        str(args.threads),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    seen = os.read(process.stdout.fileno(), 1)
    took = time.perf_counter() - began
    process.stdout.read()
    process.stdout.close()
    if process.wait() or not seen:
        raise YarnEdgeError(f"chat ended with {process.returncode} and said {'nothing' if not seen else 'something'}")
    return took


def copying(args: argparse.Namespace, document: str) -> dict[str, Any]:
    """A text and a copy of it are continued as a second copy, without drafts and with them; for several places of the document."""
    places = []
    wanted = Wanted("cpu", args.copy_ctx, "f16", threads=args.threads)
    for number in range(PLACES):
        start = number * (len(document) - args.copy_chars) // PLACES
        part = document[start : start + args.copy_chars]
        prompt = "\n\nThe same text, word for word:\n\n".join((part, part, part[: len(part) // 8]))
        found: dict[str, Any] = {}
        for lookup in LOOKUPS:
            with opened(args.model, wanted, EngineSettings(lookup=lookup)) as one:
                tokens = one.context.model.tokenize(prompt, add_special=False, parse_special=False)
                text = "".join(one.generate(tokens, GREEDY, args.copy_tokens))
                if one.stats is None or one.stats.tok_per_s is None:
                    raise YarnEdgeError(f"the model ended the copy of {args.text} at once")
                found[lookup] = {"tok_per_s": one.stats.tok_per_s, "text": text}
                found[lookup] |= {"drafted": one.stats.draft_tokens, "accepted": one.stats.draft_accepted}
        texts = {found[lookup].pop("text") for lookup in LOOKUPS}
        places.append(found | {"same": len(texts) == 1, "ratio": found["on"]["tok_per_s"] / found["off"]["tok_per_s"]})
    ratios = [place["ratio"] for place in places]
    return {"places": places, "same": all(place["same"] for place in places), "ratio": statistics.median(ratios)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All of it, as the JSON object."""
    document = document_of(args.model, args.text, args.tokens)
    if args.copy_only:
        return {"tokens": args.tokens, "copying": copying(args, document)}
    program = None if args.peer is None else executable(args.peer)
    ctx = args.tokens + ROOM + 2 * args.gen_tokens
    note(f"two questions about {args.tokens} tokens")
    asked = conversation(args, document, ctx)
    first, second = asked["first"], asked["second"]
    assert first.ttft_s is not None
    assert second.ttft_s is not None
    found: dict[str, Any] = {
        "tokens": args.tokens,
        "first_ttft_s": first.ttft_s,
        "second_ttft_s": second.ttft_s,
        "second_ratio": second.ttft_s / first.ttft_s,
        "second_evaluated": second.prompt_tokens_evaluated,
        "tok_per_s": first.tok_per_s,
        "depth": first.context_used - first.generated_tokens,
    }
    with tempfile.TemporaryDirectory(prefix="yarn-edge-") as folder:
        path, cache = Path(folder, "document.txt"), Path(folder, "states")
        path.write_text(document, encoding="utf-8")
        note("a process with an empty cache on the disk, and one after it")
        cold, warm = (first_byte(args, path, ctx, cache) for _ in range(2))
        size = sum(file.stat().st_size for file in cache.iterdir())
    found |= {"cold_start_s": cold, "restarted_s": warm, "restarted_ratio": warm / cold, "cache_bytes": size}
    note("copying")
    found["copying"] = copying(args, document)
    if program is not None:
        found["peer"] = {}
        for flash in ("auto", "off"):
            note(f"llama-bench, flash attention {flash}")
            c = Configuration(
                str(args.model), "cpu", "f16", flash, 512, 512, args.threads, int(found["depth"]), 0, args.gen_tokens, 1
            )
            speed = speeds(program, c)["tg"]
            found["peer"][flash] = {"tok_per_s": speed, "ratio": found["tok_per_s"] / speed}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rows: list[tuple[str, str, str]] = []
    if "first_ttft_s" in found:
        rows += [
            ("first question, to the first token", f"{found['first_ttft_s']:.2f} s", ""),
            ("second question", f"{found['second_ttft_s']:.2f} s", f"1/{1 / found['second_ratio']:.0f}"),
            ("a new process, empty cache on the disk", f"{found['cold_start_s']:.2f} s", ""),
            ("a new process after it", f"{found['restarted_s']:.2f} s", f"1/{1 / found['restarted_ratio']:.0f}"),
            (f"generation at a depth of {found['depth']}", f"{found['tok_per_s']:.1f} tok/s", ""),
        ]
    for flash, peer in found.get("peer", {}).items():
        told = f"ours {peer['ratio']:.2f} of it"
        rows.append((f"llama-bench, flash attention {flash}", f"{peer['tok_per_s']:.1f} tok/s", told))
    for place in found["copying"]["places"]:
        what = f"copying, {place['on']['accepted']} of {place['on']['drafted']} drafted tokens taken"
        speeds = ", ".join(f"{lookup} {place[lookup]['tok_per_s']:.1f} tok/s" for lookup in LOOKUPS)
        rows.append((what, speeds, f"{place['ratio']:.2f}, the answer is {'the same' if place['same'] else 'another'}"))
    return "\n".join(["| | | |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]) + "\n"


def main() -> int:
    """Print the table, or JSON. Returns 2 for bad input."""
    parser = argparse.ArgumentParser(prog="chat_speed", description="What a long document costs in chat.")
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL.gguf")
    add("--text", type=Path, required=True, metavar="FILE")
    add("--tokens", type=length, default=12000, metavar="N", help="of the document (default: 12000)")
    add("--gen-tokens", type=count(2, 10**6), default=64, metavar="N", help="of an answer (default: 64)")
    add("--copy-chars", type=count(100, 10**7), default=1500, metavar="N", help="of a copied text (default: 1500)")
    add("--copy-tokens", type=count(2, 10**6), default=200, metavar="N", help="of a copy (default: 200)")
    add("--copy-ctx", type=length, default=4096, metavar="N")
    add("--copy-only", action="store_true", help="only the copies")
    add("--threads", type=count(1, MAX_THREADS), default=physical_threads(), metavar="N")
    add("--peer", type=Path, metavar="DIR", help="where llama-bench is")
    add("--json", action="store_true", help="one JSON object on stdout")
    args = parser.parse_args()
    try:
        state = machine_state()
        if state["busy"]:
            note(state["busy"])
        found = measure(args)
    except (YarnEdgeError, OSError) as error:
        sys.stderr.write(f"chat_speed: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("chat_speed: interrupted\n")
        return 130
    whole = {"env": environment([args.model]) | state, "model": args.model.name, **found}
    sys.stdout.write(json.dumps(whole) + "\n" if args.json else table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
