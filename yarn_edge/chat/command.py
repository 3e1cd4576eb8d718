"""`yarn-edge chat MODEL`: talk to a model in the terminal, or ask once with -p or piped input.

Only the answer goes to stdout; notes go to stderr. `yarn_edge.chat.session` is the conversation, `yarn_edge.chat.terminal` shows it.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.engine.flags import add_engine_flags, engine_settings
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import add_kv_flags, add_threads_flag, length, length_from
from yarn_edge.progress import note
from yarn_edge.split_flags import split_request
from yarn_edge.stdout import write_data, write_json, write_text
from yarn_edge.text_file import given_text

if TYPE_CHECKING:
    from yarn_edge.chat.conversation import Document
    from yarn_edge.chat.session import Session
    from yarn_edge.chat.template import Renderer
    from yarn_edge.memory.placement import Wanted
    from yarn_edge.runtime.model import Model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `chat`. The classes that use the values check their ranges, so library users get the same errors."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file")
    context = "context size in tokens (default: the model's, or what fits in memory; with -p, what it needs)"
    for names, metavar, kind, default, text in (
        (("-p", "--prompt"), "TEXT", str, None, "print the answer to TEXT on stdout, then exit"),
        (("--system",), "TEXT", str, None, "system prompt"),
        (("--ctx",), "N", length, None, context),
        (("--temperature",), "T", float, 0.8, "randomness of sampling; 0 always takes the most probable token"),
        (("--top-k",), "K", int, 40, "sample from the K most probable tokens; 0: from all"),
        (("--top-p",), "P", float, 0.95, "sample from the most probable tokens that add up to P; 1: from all"),
        (("--min-p",), "P", float, 0.05, "drop tokens less probable than P times the best one; 0: none"),
        (("--repeat-penalty",), "R", float, 1.0, "values above 1 reduce repetition"),
        (("--seed",), "N", int, None, "random seed: the same seed and conversation give the same answer"),
        (("--max-tokens",), "N", length_from(1), None, "maximum length of an answer in tokens"),
    ):
        shown = text if default is None else f"{text} (default: {default})"
        parser.add_argument(*names, metavar=metavar, type=kind, default=default, help=shown)
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="document to read before the first prompt: text, Markdown, source code, PDF; may be repeated",
    )
    add_kv_flags(parser, "the KV cache", None)
    add_threads_flag(parser)
    add_engine_flags(parser)
    parser.add_argument("--raw", action="store_true", help="use no chat template: continue the text as it is")
    as_json = "with -p or piped input: print one JSON object with the answer and its statistics"
    parser.add_argument("--json", action="store_true", help=as_json)


def run(args: argparse.Namespace) -> int:
    """Answer once, or talk until the user leaves. Returns the exit code. Raises YarnEdgeError."""
    once = args.prompt is not None or not sys.stdin.isatty()
    if args.json and not once:
        raise YarnEdgeError("--json needs -p/--prompt or piped input")
    if args.raw and args.system:
        raise YarnEdgeError("--system cannot be used with --raw: there is no chat template to put it in")
    from yarn_edge.chat.documents import read_document

    documents = tuple(map(read_document, args.file))
    prompt = _one_shot_prompt(documents, args.prompt) if once else None
    args.system = given_text(args.system or "", "--system") or None

    from yarn_edge.chat.session import Session
    from yarn_edge.engine.opened import opened
    from yarn_edge.engine.sampling import Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.seed)
    with (
        opened(args.model, _wanted(args, documents, prompt), engine_settings(args)) as generation,
        closing(_renderer(args, generation.context.model)) as renderer,
    ):
        session = Session(generation, renderer, sampling, system=args.system, notice=note)
        session.conversation.waiting = documents
        if prompt is not None:
            _answer_once(session, prompt, args)
        else:
            from yarn_edge.chat.terminal import Terminal

            terminal = Terminal(session, args.max_tokens, args.debug)
            if documents:
                terminal.preload()
            terminal.converse()
    return 0


def _renderer(args: argparse.Namespace, model: Model) -> Renderer:
    from yarn_edge.chat.template import ChatTemplate, RawText

    return RawText() if args.raw else ChatTemplate.of(model)


def _wanted(args: argparse.Namespace, documents: tuple[Document, ...], prompt: str | None) -> Wanted:
    """What the flags request. A prompt that is answered once needs context only for itself and the answer."""
    from yarn_edge.chat.conversation import Conversation
    from yarn_edge.chat.session import ANSWER_ROOM
    from yarn_edge.memory.placement import Wanted
    from yarn_edge.runtime.kv_cache import requested_kv_type

    def needed(model: Model) -> int:
        asked = Conversation(args.system, waiting=documents).asked(prompt or "")
        with closing(_renderer(args, model)) as renderer:
            return len(renderer.tokens(model, asked.messages())) + (args.max_tokens or ANSWER_ROOM)

    kv_type = requested_kv_type(args.kv_type, args.kv_k, args.kv_v)
    wanted = (args.backend, args.ctx, kv_type, args.memory, args.threads, args.attention)
    return Wanted(*wanted, needed_ctx=None if prompt is None else needed, split=split_request(args))


def _one_shot_prompt(documents: tuple[Document, ...], prompt: str | None) -> str:
    """The piped text, then the prompt; both may be empty if there are documents."""
    from yarn_edge.chat.documents import read_stream

    piped = "" if sys.stdin.isatty() else read_stream(sys.stdin.buffer, "standard input")
    parts = (piped, given_text(prompt or "", "-p/--prompt"))
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not text and not documents:
        raise YarnEdgeError("the prompt is empty: give one with -p TEXT, or pipe it in")
    return text


def _answer_once(session: Session, prompt: str, args: argparse.Namespace) -> None:
    """Write only the answer to stdout. Reasoning goes to stderr, if that is a terminal."""
    from yarn_edge.chat.reasoning import split
    from yarn_edge.chat.screen import faint

    write = write_text if sys.stdout.isatty() else write_data
    said: dict[str, list[str]] = {"answer": [], "reasoning": []}
    try:
        with closing(session.stream(prompt, args.max_tokens)) as pieces:
            parts = (("answer", piece) for piece in pieces) if args.raw else split(pieces, lambda: session.opened)
            for kind, piece in parts:
                said[kind].append(piece)
                if kind == "reasoning":
                    faint(piece)
                elif not args.json:
                    write(piece)
    except KeyboardInterrupt:
        write_text("" if args.json else "\n")
        raise
    if args.json:
        texts = {kind: "".join(pieces) for kind, pieces in said.items()}
        write_json(texts | (asdict(session.stats) if session.stats else {}))
    else:
        write_text("\n")
    if session.stats and session.stats.finish_reason == "context":
        note(f"the context of {session.context.n_ctx} tokens is full: the answer was cut off")
    session.generation.keep_on_disk()
