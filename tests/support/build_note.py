"""The note about the build of llama-cpp-python. It depends on who compiled it, so tests of a command's output leave it out."""

from __future__ import annotations

import re


def without_build_note(stderr: str) -> str:
    """A command's standard error without the line that a build with AMX kernels adds (`repack.extra_buffers`)."""
    return re.sub(r"^this llama-cpp-python has AMX kernels,.*\n", "", stderr, flags=re.MULTILINE)
