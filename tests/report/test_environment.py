"""What is told of the place of a measurement: on Linux, without /proc, and nothing about persons or hosts."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from yarn_edge.report import environment as environment_module
from yarn_edge.report.environment import environment


def test_environment_names_no_one(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"x" * 17)
    found = environment([model, tmp_path / "gone.gguf"])
    assert found["model 1"] == "model.gguf, 17 bytes"
    assert found["model 2"] == "gone.gguf"
    assert all(isinstance(v, str) and v and v.isprintable() for v in found.values())
    assert found["date"].endswith("+00:00")
    assert int(found["cores usable"]) >= 1
    assert "CPU (" in found["devices"]
    told = " ".join(found.values())
    assert str(tmp_path) not in told
    for secret in (socket.gethostname(), getpass.getuser()):
        assert len(secret) < 4 or secret not in told.split()


def test_environment_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = environment()
    for name in ("CPUINFO", "MEMINFO"):
        monkeypatch.setattr(environment_module, name, tmp_path / "none")
    found = environment()
    assert set(found) == set(usual)
    assert found["CPU"]
    assert found["memory"].endswith(" GiB")
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert environment()["memory"] == "unknown"


def test_environment_reads_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    (tmp_path / "meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 1 kB\n")
    monkeypatch.setattr(environment_module, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(environment_module, "MEMINFO", tmp_path / "meminfo")
    found = environment()
    assert (found["CPU"], found["memory"]) == ("Some CPU @ 3 GHz", "16.0 GiB")


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, yarn_edge.report.deliver, yarn_edge.report.pictures\n"
        "sys.exit(', '.join(m for m in ('matplotlib', 'jinja2', 'llama_cpp', 'rich') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
