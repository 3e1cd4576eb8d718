"""What /proc says of a process."""

from __future__ import annotations

from pathlib import Path


def state_of(pid: int) -> str:
    """Its state by one letter, as proc(5) has them (T: stopped); "gone" also for one that is dead and not waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"
    return "gone" if state == "Z" else state
