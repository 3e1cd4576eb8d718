"""What a long document costs in `chat`: the first question, the second, the next day, generation at that depth, drafts.

    python -m yarn_edge.bench.peers.chat MODEL.gguf --text FILE [--tokens 12000] [--peer DIR]

The second question is asked in the same conversation. "Restarted" is a whole process of `yarn-edge chat --cache`, from its start to
the first byte of its answer, with an empty folder and with the one that it left. Generation is compared with llama-bench (in --peer
DIR) at the same depth: with its defaults, and without flash attention. Drafts: parts of the document are copied, with drafts and
without, from a prompt that holds the part and a first copy of it, behind --copy-depth tokens of the document's beginning.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from yarn_edge.chat.conversation import Document
from yarn_edge.chat.session import Session
from yarn_edge.chat.template import ChatTemplate
from yarn_edge.engine.answer import AnswerStats
from yarn_edge.engine.opened import EngineSettings, opened
from yarn_edge.engine.prompt_lookup import Lookup
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import count, length, length_from
from yarn_edge.memory.placement import Wanted
from yarn_edge.progress import note
from yarn_edge.runtime.context_settings import Attention
from yarn_edge.runtime.model import Model

from ..speed.configuration import Configuration
from .llama_bench import executable, llama_bench_speeds
from .race import Race, Results
from .turns import YARN_EDGE, command_line, markdown

GREEDY = Sampling(temperature=0)
QUESTIONS = ("Who are the people in this text?", "What happens at the end of it?")
ROOM = 1024  # tokens of context beside the document
PLACES = 3  # of the document that are copied
LOOKUPS: tuple[Lookup, ...] = ("off", "on")  # at temperature 0 "auto" makes no drafts


def document_of(model: Path, text: Path, n_tokens: int) -> str:
    """The first `n_tokens` tokens of the text. Raises YarnEdgeError if it has fewer."""
    with Model(model, vocab_only=True) as vocabulary:
        read = text.read_text(encoding="utf-8", errors="replace")[: 16 * n_tokens]
        tokens = vocabulary.tokenize(read, add_special=False, parse_special=False)
        if len(tokens) < n_tokens:
            raise YarnEdgeError(f"{text}: has only {len(tokens)} of the {n_tokens} tokens of --tokens")
        return b"".join(map(vocabulary.token_bytes, tokens[:n_tokens])).decode(errors="ignore")


def two_questions(args: argparse.Namespace, document: str, ctx: int) -> list[AnswerStats]:
    """Both questions in one process, without drafts."""
    stats: list[AnswerStats] = []
    wanted = Wanted("cpu", ctx, "f16", threads=args.threads)
    with (
        opened(args.model, wanted, EngineSettings(lookup="off")) as generation,
        closing(ChatTemplate.of(generation.context.model)) as template,
    ):
        session = Session(generation, template, GREEDY)
        session.conversation.waiting = (Document("document", document),)
        for question in QUESTIONS:
            for _piece in session.stream(question, args.gen_tokens):
                pass
            assert session.stats is not None
            stats.append(session.stats)
    return stats


def first_byte(args: argparse.Namespace, document: Path, ctx: int, cache: Path) -> float:
    """Seconds from the start of a process to the first byte of its answer."""
    asked = {"file": document, "p": QUESTIONS[0], "temperature": 0, "max_tokens": 4, "quiet": True}
    where = {"cache": cache, "ctx": ctx, "kv_type": "f16", "backend": "cpu", "threads": args.threads}
    began = time.perf_counter()
    command = command_line(YARN_EDGE, "chat", args.model, **asked, **where)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None
    seen = os.read(process.stdout.fileno(), 1)
    took = time.perf_counter() - began
    process.stdout.read()
    process.stdout.close()
    if process.wait() or not seen:
        raise YarnEdgeError(f"chat ended with {process.returncode}" + ("" if seen else ", without an answer"))
    return took


def restarted(args: argparse.Namespace, document: str, ctx: int) -> dict[str, Any]:
    """A process with an empty cache on the disk, and one after it."""
    with tempfile.TemporaryDirectory(prefix="yarn-edge-") as folder:
        path, cache = Path(folder, "document.txt"), Path(folder, "states")
        path.write_text(document, encoding="utf-8")
        cold, warm = (first_byte(args, path, ctx, cache) for _ in range(2))
        size = sum(file.stat().st_size for file in cache.iterdir())
    return {"cold_start_s": cold, "restarted_s": warm, "restarted_ratio": warm / cold, "cache_bytes": size}


def copying(args: argparse.Namespace, document: str) -> dict[str, Any]:
    """A text and a copy of it are continued as a second copy, without drafts and with them; for several places of the document."""
    places = []
    before = document_of(args.model, args.text, args.copy_depth) if args.copy_depth else ""
    for number in range(PLACES):
        start = number * (len(document) - args.copy_chars) // PLACES
        part = document[start : start + args.copy_chars]
        prompt = before + "\n\nThe same text, word for word:\n\n".join((part, part, part[: len(part) // 8]))
        with tempfile.TemporaryDirectory(prefix="yarn-edge-") as cache:
            copies: dict[str, dict[str, Any]] = {way: _copied(args, prompt, way, Path(cache)) for way in LOOKUPS}
        same = len({copy.pop("text") for copy in copies.values()}) == 1
        places.append({**copies, "same": same, "ratio": copies["on"]["tok_per_s"] / copies["off"]["tok_per_s"]})
    ratios = [place["ratio"] for place in places]
    return {"places": places, "same": all(place["same"] for place in places), "ratio": statistics.median(ratios)}


def _copied(args: argparse.Namespace, prompt: str, lookup: Lookup, cache: Path) -> dict[str, Any]:
    wanted = Wanted("cpu", args.copy_ctx + args.copy_depth, "f16", threads=args.threads)
    with opened(args.model, wanted, EngineSettings(cache, lookup=lookup)) as one:
        tokens = one.context.model.tokenize(prompt, add_special=False, parse_special=False)
        text = "".join(one.generate(tokens, GREEDY, args.copy_tokens))
        if one.stats is None or one.stats.tok_per_s is None:
            raise YarnEdgeError(f"the model ended the copy of {args.text} at once")
        counts = {"drafted": one.stats.draft_tokens, "accepted": one.stats.draft_accepted}
        return {"tok_per_s": one.stats.tok_per_s, "text": text, **counts}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this race."""
    add, some = parser.add_argument, length_from(2, 10**6)
    add("model", type=Path, metavar="MODEL.gguf")
    add("--text", type=Path, required=True, metavar="FILE", help="text that the document is cut from")
    add("--tokens", type=length, default=12000, metavar="N", help="tokens of the document (default: 12000)")
    add("--gen-tokens", type=some, default=64, metavar="N", help="tokens of an answer (default: 64)")
    add(
        "--copy-chars",
        type=count(100, 10**7),
        default=1500,
        metavar="N",
        help="length of a copied text (default: 1500)",
    )
    add("--copy-tokens", type=some, default=200, metavar="N", help="tokens of a copy (default: 200)")
    add("--copy-ctx", type=length, default=4096, metavar="N", help="context for copying, in tokens (default: 4096)")
    add("--copy-depth", type=length, default=0, metavar="N", help="tokens before the text that is copied (default: 0)")
    add("--copy-only", action="store_true", help="measure only the copies")
    add("--peer", type=Path, metavar="DIR", help="folder with llama-bench")


def run(args: argparse.Namespace, results: Results) -> None:
    """All of it, in the order of the docstring above."""
    document = document_of(args.model, args.text, args.tokens)
    about = {"model": args.model.name, "tokens": args.tokens}
    if args.copy_only:
        results |= {**about, "copying": copying(args, document)}
        return
    program = None if args.peer is None else executable(args.peer)
    ctx = args.tokens + ROOM + 2 * args.gen_tokens
    note(f"two questions about {args.tokens} tokens")
    first, second = two_questions(args, document, ctx)
    assert first.ttft_s is not None
    assert second.ttft_s is not None
    depth = first.context_used - first.generated_tokens
    results |= {**about, "first_ttft_s": first.ttft_s, "second_ttft_s": second.ttft_s}
    results |= {"second_ratio": second.ttft_s / first.ttft_s, "second_evaluated": second.prompt_tokens_evaluated}
    results |= {"tok_per_s": first.tok_per_s, "depth": depth}
    note("a process with an empty cache on the disk, and one after it")
    results |= restarted(args, document, ctx)
    note("copying")
    results["copying"] = copying(args, document)
    if program is None:
        return
    results["peer"] = {}
    flashes: tuple[Attention, ...] = ("flash", "plain")
    for flash in flashes:
        note(f"llama-bench, {flash} attention")
        sizes = (512, 512, args.threads, depth, 0, args.gen_tokens, 1)
        speed = llama_bench_speeds(program, Configuration(str(args.model), "cpu", "f16", flash, *sizes))["tg"]
        results["peer"][flash] = {"tok_per_s": speed, "ratio": results["tok_per_s"] / speed}


def _tables(results: Results) -> str:
    rows: list[tuple[object, ...]] = []
    if "first_ttft_s" in results:
        rows.append(("first question, to the first token", f"{results['first_ttft_s']:.2f} s", ""))
        rows.append(("second question", f"{results['second_ttft_s']:.2f} s", f"1/{1 / results['second_ratio']:.0f}"))
        rows.append((f"generation at a depth of {results['depth']}", f"{results['tok_per_s']:.1f} tok/s", ""))
    if "restarted_s" in results:
        times = f"{results['restarted_s']:.2f} s", f"1/{1 / results['restarted_ratio']:.0f}"
        rows.append(("a new process, empty cache on the disk", f"{results['cold_start_s']:.2f} s", ""))
        rows.append(("a new process after it", *times))
    for flash, peer in results.get("peer", {}).items():
        share = f"ours is {peer['ratio']:.2f} of it"
        rows.append((f"llama-bench, {flash} attention", f"{peer['tok_per_s']:.1f} tok/s", share))
    for place in results.get("copying", {}).get("places", []):
        what = f"copying, {place['on']['accepted']} of {place['on']['drafted']} drafted tokens accepted"
        speeds = ", ".join(f"{lookup} {place[lookup]['tok_per_s']:.1f} tok/s" for lookup in LOOKUPS)
        rows.append((what, speeds, f"{place['ratio']:.2f}, {'the same answer' if place['same'] else 'another answer'}"))
    return markdown(["", "", ""], rows)


RACE = Race("chat", "What a long document costs in chat.", add_arguments, run, _tables)

if __name__ == "__main__":
    raise SystemExit(RACE.main())
