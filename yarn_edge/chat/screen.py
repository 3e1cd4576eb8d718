"""What the conversation shows and how its lines are typed: dim notes, styled answers, the input line. rich and prompt_toolkit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from yarn_edge.chat.answer_view import REASONING
from yarn_edge.foreign_text import harmless
from yarn_edge.progress import show
from yarn_edge.stdout import write_text

# The terminal breaks lines. rich shows nothing at the width 0, which some terminals report.
_ANY_WIDTH = 80


def dim(text: str) -> None:
    """Show dim lines on stderr. Names of strangers in them should be one line each."""
    from rich.console import Console

    console = Console(stderr=True, width=_ANY_WIDTH)
    with console.capture() as capture:
        console.print(harmless(text), style="dim", markup=False, highlight=False, soft_wrap=True)
    show(capture.get().rstrip("\n"))


def faint(text: str) -> None:
    """Show a piece of reasoning on stderr, if that is a terminal."""
    if not sys.stderr.isatty():
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, width=_ANY_WIDTH, highlight=False, soft_wrap=True).print(
        Text(harmless(text), REASONING), end=""
    )


def styled_output() -> Callable[[str, str], None]:
    """Writes to stdout: styled on a terminal, plain elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=_ANY_WIDTH, highlight=False, soft_wrap=True)

    def styled(text: str, style: str) -> None:
        console.print(Text(harmless(text), style), end="")

    def plain(text: str, _style: str) -> None:
        write_text(text)

    return styled if sys.stdout.isatty() else plain


@contextmanager
def typing_unseen() -> Iterator[None]:
    """Do not echo what is typed during an answer; it stays in the input for the next line."""
    try:
        import termios
    except ImportError:  # Windows
        yield
        return
    descriptor = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(descriptor)
    except termios.error:  # the terminal was closed
        yield
        return
    unseen = [*before]
    unseen[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(descriptor, termios.TCSANOW, unseen)
        yield
    finally:
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(descriptor, termios.TCSANOW, before)


def line_reader(words: Sequence[str]) -> Callable[[str], str]:
    """A line editor with history that completes `words`; Esc Enter and pasted text make several lines."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.keys import Keys
    from prompt_toolkit.output import create_output
    from prompt_toolkit.utils import is_dumb_terminal

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add(Keys.Vt100MouseEvent)  # prompt_toolkit's own reading of them raises an exception for a damaged one
    def nothing(_event: KeyPressEvent) -> None:
        pass

    session: PromptSession[str] = PromptSession(
        history=InMemoryHistory(),
        key_bindings=keys,
        output=None if is_dumb_terminal() else create_output(always_prefer_tty=True),
        completer=WordCompleter(list(words), sentence=True),
        complete_while_typing=False,
    )
    return lambda prompt: session.prompt(prompt, prompt_continuation="  ")
