"""The front: what is loaded when, exit codes, streams, and help that agrees with the docs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yarn_edge import __version__
from yarn_edge.bench.evidence.smollm2 import package_gguf
from yarn_edge.cli import COMMANDS, main
from yarn_edge.convert.hf_to_gguf import convert

from support import tiny

ROOT = Path(__file__).parent.parent
HEAVY = ("numpy", "llama_cpp", "gguf", "torch", "transformers", "tokenizers", "rich", "jinja2")


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "yarn_edge", *words],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        **options,  # type: ignore[call-overload]
    )


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom yarn_edge.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"loaded = [m for m in {HEAVY!r} if m in sys.modules]\nsys.exit(repr(loaded) if loaded else 0)"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def processor_s(code: str) -> float:
    """What a fresh interpreter takes for `code`, its own start included: the best of three, since others compute too."""
    code += "\nimport sys, time\nassert 'numpy' not in sys.modules\nsys.stderr.write(str(time.process_time()))"
    return min(float(run_code(code).stderr) for _ in range(3))


def test_the_package_is_imported_in_no_time() -> None:
    assert processor_s("import yarn_edge") - processor_s("") < 0.05


def test_help_comes_at_once() -> None:
    assert processor_s("from yarn_edge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass") < 0.2


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    assert "--quiet" in capsys.readouterr().out


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"yarn-edge {__version__}\n"
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "nowhere.gguf", "--debug"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.splitlines()[-1] == "yarn-edge: error: nowhere.gguf: No such file or directory"


def test_our_own_bugs_are_called_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_args: object) -> int:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr("yarn_edge.inspect.command.run", broken)
    assert main(["inspect", "x"]) == 70
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "a bug in yarn-edge" in told


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    return convert(tiny.write_checkpoint(folder / "ck"), str(folder / "tiny.gguf"), "F32")[0]


def test_a_reader_that_left_is_no_error(model: Path) -> None:
    """stdout is a pipe whose reading end is closed already."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "yarn_edge", "inspect", str(model)]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_paths_and_places_of_every_kind(model: Path, tmp_path: Path) -> None:
    """A path with spaces and other scripts, a stranger's modules in the working folder, a locale without UTF-8."""
    folder = tmp_path / "Modèle 模型 ✓"
    folder.mkdir()
    path = folder / "my model.gguf"
    path.write_bytes(model.read_bytes())
    for name in ("convert", "bench", "tokenizers_", "conftest"):
        (folder / f"{name}.py").write_text("raise SystemExit('a stranger answered')")
    script = Path(sys.executable).with_name("yarn-edge")
    assert script.exists(), "the console script is installed beside the interpreter"
    ascii_only = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "ascii",
    }
    for environment in (dict(os.environ), ascii_only):
        done = subprocess.run(
            [script, "inspect", path.name], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        again = subprocess.run(
            [script, "inspect", str(path)], cwd=folder, env=environment, capture_output=True, check=False
        )
        assert again.returncode == 0, again.stderr


def test_quiet_says_nothing(tmp_path: Path) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck")
    done = run("convert", str(ck), "-o", str(tmp_path / "x.gguf"), "--quant", "F16", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "x.gguf").exists()


def test_converting_safetensors_needs_neither_torch_nor_transformers(tmp_path: Path) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck", form="shards")
    code = (
        "import sys\nfor m in ('torch', 'transformers', 'safetensors'):\n    sys.modules[m] = None\n"
        "from yarn_edge.cli import main\n"
        f"sys.exit(main(['convert', {str(ck)!r}, '-o', {str(tmp_path / 'x.gguf')!r}, '--quant', 'Q8_0']))"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr
    bin_ck = tiny.write_checkpoint(tmp_path / "bin", form="bin")
    code = code.replace(str(ck), str(bin_ck)).replace("x.gguf", "y.gguf")
    done = run_code(code)
    assert done.returncode == 2
    assert "needs torch: pip install 'yarn-edge[hf]'" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_and_full_streams_do_not_stop_the_work(closed: str, tmp_path: Path) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck")
    command = f"{sys.executable} -m yarn_edge convert {ck} -o {tmp_path / 'x.gguf'} --quant F16 {closed}"
    assert subprocess.run(["bash", "-c", command], capture_output=True, check=False).returncode == 0
    assert (tmp_path / "x.gguf").exists()


def test_a_strangers_files_in_the_working_folder_are_not_run(model: Path, tmp_path: Path) -> None:
    for name in ("json", "yarn_edge", "llama_cpp", "jinja2"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'RAN')!r}, 'w')\nraise SystemExit('a stranger answered')"
        )
    script = Path(sys.executable).with_name("yarn-edge")
    words = [script, "chat", str(model), "--raw", "-p", "the", "--max-tokens", "2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    template = [script, "chat", str(package_gguf()), "-p", "Hi", "--max-tokens", "2", "--threads", "1"]
    done = subprocess.run(template, cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "RAN").exists()


def test_flags_may_stand_in_front(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "inspect", "nowhere.gguf"]) == 2
    assert "Traceback" in capsys.readouterr().err
