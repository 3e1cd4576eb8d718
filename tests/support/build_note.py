"""What commands say of the build of llama-cpp-python, which depends on who compiled it and is no part of what they did."""

from __future__ import annotations

import re


def without_build_note(stderr: str) -> str:
    """A command's standard error without the line that a build with AMX kernels adds (`repack.extra_buffers`)."""
    return re.sub(r"^this llama-cpp-python has AMX kernels,.*\n", "", stderr, flags=re.MULTILINE)
