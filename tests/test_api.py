"""The public Python API: loaded lazily, complete, documented, and every example of docs/python.md and the README runs."""

from __future__ import annotations

import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import yarn_edge
from yarn_edge.sample_text import sample_text

from support import tiny

ROOT = Path(__file__).parent.parent
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def run_code(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def blocks(page: str) -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert found, page
    return found


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: a tiny checkpoint that has a chat template, and a text."""
    folder = tmp_path_factory.mktemp("api")
    for name in ("checkpoint", "demo-out/smollm2-135m-yarn4"):
        tiny.write_checkpoint(folder / name, hidden_size=256, head_dim=64)
        path = folder / name / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    (folder / "book.txt").write_text(sample_text()[:3000], encoding="utf-8")
    return folder


def run_blocks(page: str) -> None:
    names: dict[str, object] = {"__name__": "__example__"}
    for number, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}, example {number}", "exec"), names)


def test_the_examples_of_the_page_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the files that they leave are what the page says of them."""
    monkeypatch.chdir(workplace)
    run_blocks("docs/python.md")
    assert {p.name for p in workplace.glob("model-*.gguf")} == {
        f"model-{quant}.gguf" for quant in ("F16", "Q8_0", "Q4_K_M", "Q6_K")
    }
    before, patched = yarn_edge.read_scaling("model-F16.gguf"), yarn_edge.read_scaling("patched.gguf")
    assert before.differences(patched) == {"attention_factor": (before.attention_factor, 1.2)}
    assert yarn_edge.read_scaling("longer.gguf").extended_context == 2048


def test_the_example_of_the_readme_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    run_blocks("README.md")
    assert re.match(r"KL 0\.\d{4} nats, top-1 \d+\.\d%\n", capsys.readouterr().out)


def test_every_public_name_is_shown_in_an_example() -> None:
    code = "\n".join(blocks("docs/python.md"))
    imported = {
        alias.name
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module == "yarn_edge"
        for alias in node.names
    }
    assert imported == set(yarn_edge.__all__)


def test_import_loads_nothing_else() -> None:
    code = "import sys, yarn_edge\nprint([m for m in sys.modules if m.startswith('yarn_edge.') or m == 'numpy'])"
    assert run_code(code) == "[]\n"


def test_import_takes_less_than_50_ms() -> None:
    """Of processor time, so that other work on the machine does not count."""
    code = "import time\nstart = time.process_time()\nimport yarn_edge\nprint(time.process_time() - start)"
    assert statistics.median(float(run_code(code)) for _ in range(5)) < 0.05


def test_a_name_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, yarn_edge\n"
        "yarn_edge.YarnEdgeError\n"
        "assert 'yarn_edge.errors' in sys.modules and 'numpy' not in sys.modules\n"
        "yarn_edge.read_gguf\n"
        "assert 'yarn_edge.gguf.read' in sys.modules and 'llama_cpp' not in sys.modules"
    )
    run_code(code)


@pytest.mark.parametrize("name", yarn_edge.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(yarn_edge, name)
    assert value.__doc__
    assert name in dir(yarn_edge)
    assert getattr(yarn_edge, name) is value


def test_no_public_name_is_a_subpackage() -> None:
    """Importing the subpackage would put it in the name's place."""
    for name in yarn_edge.__all__:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(f"yarn_edge.{name}")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "yarn_edge" / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == yarn_edge._PUBLIC
    assert sorted(seen) == sorted(yarn_edge.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'yarn_edge' has no attribute 'nothing'"):
        yarn_edge.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec("from yarn_edge import nothing")


def test_bad_input_is_one_error(workplace: Path) -> None:
    with pytest.raises(yarn_edge.YarnEdgeError, match="no such checkpoint folder"):
        yarn_edge.convert_checkpoint(workplace / "nowhere", "x.gguf")
    with pytest.raises(yarn_edge.YarnEdgeError, match="protocol 'other' is unknown; known: curve"):
        yarn_edge.measure_perplexity("x.gguf", protocol="other")
    (workplace / "empty.gguf").write_bytes(b"")
    with pytest.raises(yarn_edge.YarnEdgeError, match="freeze_at is for checkpoints"):
        yarn_edge.read_scaling(workplace / "empty.gguf", freeze_at=4096)


def test_the_product_itself_does_not_use_the_public_names() -> None:
    """They would hide who imports whom from the import contracts, which do not look behind `yarn_edge` itself."""
    for room in ("yarn_edge", "convert", "bench"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module == "yarn_edge" and not node.level:
                    assert not {alias.name for alias in node.names} & set(yarn_edge.__all__), path
