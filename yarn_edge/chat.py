"""`yarn-edge chat MODEL`: talk to a model in the terminal, or ask once with -p or piped input.

The answer, and nothing else, goes to stdout; notes go to stderr. What the conversation does is `yarn_edge.session`.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from yarn_edge.errors import YarnEdgeError, os_error
from yarn_edge.flags import add_backend_flag, add_memory_flag, add_threads_flag, count, length
from yarn_edge.progress import note, show

if TYPE_CHECKING:
    from yarn_edge.chat_template import Renderer
    from yarn_edge.placement import Wanted
    from yarn_edge.runtime import Context, Model
    from yarn_edge.session import Session

HELP = """\
/help         this list
/reset        forget the conversation (the system prompt stays)
/system TEXT  set the system prompt; without TEXT, remove it
/stats        what the last answer took
/exit         leave (also Ctrl-D)
Esc Enter starts a new line; pasted text keeps its lines. Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `chat`. Ranges are checked by what uses them, so that library users get the same errors."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="GGUF file")
    for names, metavar, kind, default, told in (
        (("-p", "--prompt"), "TEXT", str, None, "answer this once on stdout and exit"),
        (("--file",), "PATH", Path, None, "UTF-8 text to put in front of the (first) prompt"),
        (("--system",), "TEXT", str, None, "system prompt"),
        (("--ctx",), "N", length, None, "context in tokens (default: the model's, or what fits; once: what is needed)"),
        (("--kv-type",), "TYPE", str, None, "type of the KV cache (default: f16, q8_0 where that does not fit)"),
        (("--temperature",), "T", float, 0.8, "0: always the most probable token"),
        (("--top-k",), "K", int, 40, "keep the K most probable tokens; 0: all"),
        (("--top-p",), "P", float, 0.95, "keep the most probable tokens that sum up to P; 1: all"),
        (("--min-p",), "P", float, 0.05, "drop tokens below P times the best one; 0: none"),
        (("--repeat-penalty",), "R", float, 1.0, "above 1: repeat less"),
        (("--seed",), "N", int, None, "same seed, same conversation: same answer"),
        (("--max-tokens",), "N", count(1, 2**31 - 1), None, "end an answer after N tokens"),
    ):
        shown = told if default is None else f"{told} (default: {default})"
        parser.add_argument(*names, metavar=metavar, type=kind, default=default, help=shown)
    add_threads_flag(parser)
    add_backend_flag(parser)
    add_memory_flag(parser)
    parser.add_argument("--raw", action="store_true", help="no chat template: continue the text as it is")
    parser.add_argument("--json", action="store_true", help="with -p or piped input: one JSON object with the numbers")


def run(args: argparse.Namespace) -> int:
    """Answer once, or converse until the user leaves. Returns the exit code. Raises YarnEdgeError."""
    once = args.prompt is not None or not sys.stdin.isatty()
    if args.json and not once:
        raise YarnEdgeError("--json needs -p/--prompt or piped input")
    if args.raw and args.system:
        raise YarnEdgeError("--system has no place in --raw: there is no template to put it in")
    document = "" if args.file is None else _read_file(args.file)
    prompt = _one_shot_prompt(document, args.prompt) if once else ""
    _utf8(args.system or "", "--system")

    from yarn_edge.placement import place
    from yarn_edge.runtime import Context, Model
    from yarn_edge.sampling import Sampling
    from yarn_edge.session import Session

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repeat_penalty, args.seed)
    placed = place(args.model, _wanted(args, prompt))
    n_ctx, kv_type = placed.choice.n_ctx, placed.choice.kv_type
    with Model(args.model, device=placed.device) as model, closing(_renderer(args, model)) as renderer:
        if n_ctx > model.n_ctx_train:
            note(f"warning: --ctx {n_ctx} is beyond the {model.n_ctx_train} tokens that the model was made for")
        with Context(model, n_ctx=n_ctx, n_outputs=1, kv_type=kv_type, threads=args.threads) as context:
            if args.ctx is None or kv_type != "f16":
                note(placed.choice.reason)
            note(_what_runs(context))
            _warn_of_other_positions(context)
            session = Session(context, renderer, sampling, system=args.system, notice=note)
            if once:
                _answer_once(session, prompt, args.max_tokens, args.json)
            else:
                _converse(session, document, args.max_tokens)
    return 0


def _renderer(args: argparse.Namespace, model: Model) -> Renderer:
    from yarn_edge.chat_template import ChatTemplate, RawText

    return RawText() if args.raw else ChatTemplate.of(model)


def _wanted(args: argparse.Namespace, prompt: str) -> Wanted:
    """What the flags ask for. A prompt that is answered once needs no more than itself and the answer."""
    from yarn_edge.placement import Wanted
    from yarn_edge.session import ANSWER_ROOM

    def needed(model: Model) -> int:
        spoken = (("system", args.system), ("user", prompt))
        with closing(_renderer(args, model)) as renderer:
            n_prompt = len(renderer.tokens(model, [{"role": role, "content": text} for role, text in spoken if text]))
        return n_prompt + (args.max_tokens or ANSWER_ROOM)

    return Wanted(
        args.backend, args.ctx, args.kv_type, args.memory, args.threads, needed_ctx=needed if prompt else None
    )  # fmt: skip


def _utf8(text: str, what: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise YarnEdgeError(f"{what} is not valid UTF-8 (character {error.start})") from None
    return text


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YarnEdgeError(f"{what}: byte {error.start} is not valid UTF-8; convert the text to UTF-8 first") from None


def _read_file(path: Path) -> str:
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise os_error(error, path) from error


def _one_shot_prompt(document: str, prompt: str | None) -> str:
    """The file, what was piped in, and the prompt, in this order."""
    piped = "" if sys.stdin.isatty() else _decode(sys.stdin.buffer.read(), "standard input")
    parts = (document, piped, _utf8(prompt or "", "-p/--prompt"))
    text = "\n\n".join(part.strip("\n") for part in parts if part.strip())
    if not text:
        raise YarnEdgeError("the prompt is empty: give it with -p TEXT or pipe it in")
    return text


_SCALINGS = {"yarn": "YaRN", "linear": "linear scaling", "ntk": "NTK-aware scaling", "ntk-by-parts": "NTK-by-parts"}


def _what_runs(context: Context) -> str:
    """One line: file, architecture, scaling that the runtime applies, context, cache type."""
    from yarn_edge.effective import angle_error, effective
    from yarn_edge.metadata import wanted

    gguf = context.model.gguf
    try:
        scaling, goal = effective(gguf, context.arguments), wanted(gguf)
    except YarnEdgeError:
        told = "position scaling from the file, not checked"
    else:
        if not angle_error(scaling, goal).any_difference:
            scaling = goal  # the same angles in the words of the file's own description, such as YaRN for a baked file
        told = "no position scaling" if scaling.frequency_factors is None else "frequency factors of its own"
        if scaling.method not in ("none", "llama3", "longrope"):
            told = f"{_SCALINGS[scaling.method]} factor {scaling.factor:g} from {scaling.original_context}"
        if scaling.method == "yarn" or scaling.attention_factor != 1:
            told += f", attention factor {scaling.attention_factor:.4f}"
    trained = context.model.n_ctx_train
    size = f"context {context.n_ctx}" + ("" if context.n_ctx == trained else f" of {trained}")
    where = "" if context.model.device is None else f", on {context.model.device.name}"
    return f"{gguf.path.name}: {gguf.architecture}, {told}, {size}, {context.kv_type} cache{where}"


def _warn_of_other_positions(context: Context) -> None:
    """A file whose own description is not what runs gets a line; it still answers, as it would anywhere else."""
    from yarn_edge.effective import angle_error, effective
    from yarn_edge.metadata import wanted

    gguf = context.model.gguf
    try:
        error = angle_error(effective(gguf, context.arguments), wanted(gguf))
    except YarnEdgeError:
        return  # not judged: the line before says so
    if error.any_difference:
        note(
            f"warning: {gguf.path.name} says other positions than llama.cpp runs (frequencies up to {error.frequency:.2%} off, "
            f"attention factor {error.attention:.2%} off): see yarn-edge inspect"
        )


def _without_controls(text: str) -> str:
    """For a terminal: what a model writes must not move the cursor, set the title or ring the bell."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _write_answer(pieces: Iterable[str]) -> None:
    """Stream to stdout. A terminal gets it without control characters."""
    for_terminal = sys.stdout.isatty()
    for piece in pieces:
        _write(_without_controls(piece) if for_terminal else piece)


def _answer_once(session: Session, prompt: str, max_tokens: int | None, as_json: bool) -> None:
    try:
        with closing(session.stream(prompt, max_tokens)) as pieces:
            if as_json:
                answer = "".join(pieces)
                numbers = asdict(session.stats) if session.stats else {}
                _write(json.dumps({"answer": answer, **numbers}, ensure_ascii=False) + "\n")
            else:
                _write_answer(pieces)
                _write("\n")
    except KeyboardInterrupt:
        _write("" if as_json else "\n")
        raise
    if session.stats and session.stats.finish_reason == "context":
        note(f"the context of {session.context.n_ctx} tokens is full: the answer ends here")


def _converse(session: Session, document: str, max_tokens: int | None) -> None:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    reader: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), key_bindings=keys, output=create_output(always_prefer_tty=True)
    )
    _dim("/help lists the commands, Ctrl-D leaves")
    while True:
        try:
            text = reader.prompt("> ", prompt_continuation="  ").strip()
        except KeyboardInterrupt:
            _dim("Ctrl-D or /exit leaves")
            continue
        except EOFError:
            return
        word, _, rest = text.partition(" ")
        if text in ("/exit", "/quit"):
            return
        if word.lower() in COMMANDS:
            COMMANDS[word.lower()](session, rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            note(f"{word} is no command; /help lists them")
        elif text and _turn(session, f"{document}\n\n{text}" if document else text, max_tokens):
            document = ""


def _turn(session: Session, text: str, max_tokens: int | None) -> bool:
    """One question and its answer. False if it could not be asked."""
    try:
        with closing(session.stream(text, max_tokens)) as pieces:
            _write_answer(pieces)
    except KeyboardInterrupt:
        pass
    except YarnEdgeError as error:
        note(f"error: {error}")
        return False
    _write("\n")
    _dim(_summary(session))
    return bool(session.messages)


def _summary(session: Session) -> str:
    if session.stats is None:
        return "stopped"
    stats = session.stats
    told = [f"{stats.generated_tokens} tokens"]
    if stats.tok_per_s is not None:
        told.append(f"{stats.tok_per_s:.1f} tok/s")
    if stats.ttft_s is not None:
        told.append(f"first after {stats.ttft_s:.2f} s")
    told.append(f"context {stats.context_used} of {stats.n_ctx}")
    ends = {"length": "cut at --max-tokens", "context": "cut: the context is full", "interrupted": "stopped"}
    if stats.finish_reason in ends:
        told.append(ends[stats.finish_reason])
    return ", ".join(told)


def _dim(text: str) -> None:
    from rich.console import Console

    console = Console(stderr=True)
    with console.capture() as capture:
        console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
    show(capture.get().rstrip("\n"))


def _help(_session: Session, _rest: str) -> None:
    _dim(HELP)


def _reset(session: Session, _rest: str) -> None:
    session.reset()
    _dim("the conversation starts anew")


def _system(session: Session, rest: str) -> None:
    session.system = rest or None
    _dim("the system prompt is set" if rest else "the system prompt is removed")


def _show_stats(session: Session, _rest: str) -> None:
    known = asdict(session.stats) if session.stats else {"no answer": "yet"}
    _dim("\n".join(f"{name}: {value}" for name, value in known.items()))


COMMANDS = {"/help": _help, "/reset": _reset, "/system": _system, "/stats": _show_stats}

if __name__ == "__main__":
    from yarn_edge.cli import main

    raise SystemExit(main(["chat", *sys.argv[1:]]))
