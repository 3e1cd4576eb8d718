"""The house keeps its own rules: small modules and functions, one name for one thing, rooms that say what they are for."""

from __future__ import annotations

import ast
import functools
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PLACES = {"yarn_edge": "yarn_edge", "yarn_edge.convert": "convert", "yarn_edge.bench": "bench"}
MODULES = sorted(path for folder in PLACES.values() for path in (ROOT / folder).rglob("*.py"))
MAX_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS, MAX_FORMATTER_SKIPS = 300, 60, 8, 40
# What every command's module has (cli.COMMANDS), and what `python -m` runs.
CONTRACT = {"add_arguments", "run", "main"}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names, without self."""
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [argument.arg for argument in given if argument.arg not in ("self", "cls")]


def public(kind: type[ast.stmt] | tuple[type[ast.stmt], ...]) -> dict[str, list[str]]:
    """Modules by the public names of this kind that they define."""
    homes = defaultdict(list)
    for path in MODULES:
        for node in tree(path).body:
            if isinstance(node, kind) and not (name := getattr(node, "name", "_")).startswith("_"):
                homes[name].append(str(path.relative_to(ROOT)))
    return homes


def test_modules_are_short() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}


def test_functions_are_short() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name} has {n} lines"
        for path in MODULES
        for f in functions(path)
        if (n := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_functions_have_few_parameters() -> None:
    wide = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name} has {n} parameters"
        for path in MODULES
        for f in functions(path)
        if (n := len(parameters(f))) > MAX_PARAMETERS
    ]
    assert wide == []


def test_a_class_name_means_one_thing() -> None:
    assert {name: homes for name, homes in public(ast.ClassDef).items() if len(homes) > 1} == {}


def test_a_function_name_means_one_thing() -> None:
    homes = public((ast.FunctionDef, ast.AsyncFunctionDef))
    assert {name: found for name, found in homes.items() if len(found) > 1 and name not in CONTRACT} == {}


def test_only_one_module_writes_to_stdout() -> None:
    writers = [str(p.relative_to(ROOT)) for p in MODULES if "sys.stdout.write" in p.read_text(encoding="utf-8")]
    assert writers == ["yarn_edge/stdout.py"]


def test_no_name_says_nothing() -> None:
    assert [path for path in MODULES if path.stem in ("utils", "util", "common", "helpers", "misc")] == []


def test_every_room_says_what_it_is_for() -> None:
    mute = [path for path in MODULES if path.name == "__init__.py" and not ast.get_docstring(tree(path))]
    assert mute == []


def test_every_module_says_what_it_does() -> None:
    mute = [path for path in MODULES if path.stem != "__main__" and not ast.get_docstring(tree(path))]
    assert mute == []


def test_the_packages_that_are_installed_are_those_that_are_there() -> None:
    listed = PROJECT["tool"]["setuptools"]["packages"]
    there = [
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in PLACES.items()
        for path in (ROOT / folder).rglob("__init__.py")
    ]
    assert sorted(listed) == sorted(there)
    assert PROJECT["tool"]["setuptools"]["package-dir"] == PLACES


def test_the_formatter_decides() -> None:
    """`fmt: skip` is for tables."""
    sources = [*MODULES, *(path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__))]
    skips = sum(path.read_text(encoding="utf-8").count("# fmt: skip") for path in sources)
    assert skips <= MAX_FORMATTER_SKIPS


FORBIDDEN = {
    "nothing": ("", "", 0),
    "yarn_edge imports bench": ("yarn_edge/positions/rope.py", "from yarn_edge.bench import demo", 1),
    "yarn_edge imports convert": ("yarn_edge/engine/opened.py", "from yarn_edge.convert import quantize", 1),
    "convert imports bench": ("convert/quantize.py", "from yarn_edge.bench import demo", 1),
    "a lower room imports a higher one": ("yarn_edge/gguf/file.py", "from yarn_edge.runtime import model", 1),
    "a circle of two files": ("yarn_edge/gguf/file.py", "from yarn_edge.gguf import read", 1),
}


@pytest.mark.parametrize("file, line, code", FORBIDDEN.values(), ids=FORBIDDEN)
def test_an_import_against_the_layers_is_noticed(file: str, line: str, code: int, tmp_path: Path) -> None:
    """One such line breaks the contracts of pyproject.toml that `make check` holds us to."""
    for package, folder in PLACES.items():
        shutil.copytree(ROOT / folder, tmp_path.joinpath(*package.split(".")), ignore=shutil.ignore_patterns("*.pyc"))
    if file:
        path = tmp_path / file if file.startswith("yarn_edge/") else tmp_path / "yarn_edge" / file
        path.write_text(path.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", ROOT / "pyproject.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("0 broken" in done.stdout) == (not code)
