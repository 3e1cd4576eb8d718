"""Where a measurement was taken: what others need to judge its numbers, and nothing that identifies a person or a host."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from yarn_edge import __version__
from yarn_edge.errors import one_line
from yarn_edge.runtime import ggml
from yarn_edge.runtime.llama_api import llama

CPUINFO, MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
POWER, GOVERNOR = Path("/sys/class/power_supply"), Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
UNKNOWN = "unknown"


def environment(model_paths: Sequence[Path] = ()) -> dict[str, str]:
    """Name -> value, for a table: time (UTC), versions, CPU, memory, what llama.cpp was built with, its devices, the models.

    Of a model only the file's name and size are listed, since a folder can contain a user's name. What the system does not reveal
    is "unknown", never an error.
    """
    import numpy

    devices = ggml.devices()
    values = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "yarn-edge": __version__,
        "llama-cpp-python": str(llama().__version__),
        "NumPy": numpy.__version__,
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": _system(),
        "CPU": _cpu(devices),
        "cores usable": str(_cores()),
        "memory": _memory(),
        "CPU governor": _word(GOVERNOR) or UNKNOWN,
        "power source": _power_source(),
        "llama.cpp built with": _features(llama().llama_print_system_info().decode(errors="replace")),
        "devices": ", ".join(f"{d.name} ({d.description})" for d in devices),
    }
    for number, path in enumerate(model_paths, 1):
        values["model" if len(model_paths) == 1 else f"model {number}"] = _model(Path(path))
    return {name: one_line(value, 2000) for name, value in values.items()}


def _features(system_info: str) -> str:
    """`CPU : AVX = 1 | AVX2 = 1 | REPACK = 1 | ` as `CPU: AVX, AVX2, REPACK`."""
    parts = [part.strip().replace(" : ", ": ").removesuffix(" = 1") for part in system_info.split("|")]
    return ", ".join(part for part in parts if part)


def _system() -> str:
    """Such as "Linux-6.8.0-x86_64-with-glibc2.39 (Debian GNU/Linux 13)", without the host name."""
    try:
        return f"{platform.platform()} ({platform.freedesktop_os_release()['PRETTY_NAME']})"
    except (OSError, KeyError):
        return platform.platform()


def _cpu(devices: Sequence[ggml.Device]) -> str:
    """The name in /proc/cpuinfo; otherwise what ggml found (it asks macOS and Windows), otherwise the machine type."""
    try:
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    described = next((d.description for d in devices if d.kind == "cpu" and d.description not in ("", "CPU")), "")
    return described or platform.machine() or UNKNOWN


def _cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    """Memory of the machine, in GiB."""
    try:
        lines = MEMINFO.read_text(encoding="ascii", errors="replace").splitlines()
        n_bytes = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    except (OSError, ValueError, IndexError, StopIteration):
        try:
            n_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # Windows has no sysconf
            return UNKNOWN
    return f"{n_bytes / 2**30:.1f} GiB"


def _word(path: Path) -> str:
    """The content of a kernel file, "" if it does not exist."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _power_source() -> str:
    """mains or battery: a laptop on battery is slower."""
    try:
        supplies = {_word(supply / "type"): supply for supply in sorted(POWER.iterdir())}
    except OSError:
        return UNKNOWN
    for kind in ("Mains", "USB"):
        if kind in supplies and _word(supplies[kind] / "online") == "1":
            return "mains"
    if "Battery" not in supplies:
        return UNKNOWN
    return "battery" if _word(supplies["Battery"] / "status") == "Discharging" else "mains"


def machine_state() -> dict[str, Any]:
    """load_average: over the last 1, 5 and 15 minutes, None if not known; busy: a sentence if other programs compute, else ""."""
    try:
        load = list(os.getloadavg())
    except (AttributeError, OSError):
        return {"load_average": None, "busy": ""}
    cores = os.cpu_count() or 1
    busy = load[0] > max(0.5, 0.1 * cores)
    sentence = f"the machine is busy, or was a moment ago: load average {load[0]:.1f} on {cores} cores"
    return {"load_average": load, "busy": sentence if busy else ""}


def _model(path: Path) -> str:
    try:
        return f"{path.name}, {path.stat().st_size} bytes"
    except OSError:  # moved away meanwhile, which is no reason to lose a measurement
        return path.name
