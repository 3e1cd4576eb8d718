"""`get`, `publish`, and `hf:` in every command that takes a GGUF or a checkpoint."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import shutil
from pathlib import Path

import pytest

from yarn_edge.cli import COMMANDS, main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.hub.arguments import BROUGHT, bring
from yarn_edge.hub.get import get_from_hub
from yarn_edge.hub.ggufs import chosen
from yarn_edge.hub.reference import HubReference, parse_reference
from yarn_edge.hub.repository import RemoteEntry, Repository

from support.hub_server import COMMIT, Hub, committed, hashes_of


@pytest.fixture(scope="module")
def ggufs(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-F16.gguf and tiny-Q8_0.gguf, also served as org/tiny-GGUF."""
    folder = tmp_path_factory.mktemp("ggufs")
    for path in convert(root / "org" / "tiny", str(folder / "tiny-{quant}.gguf"), "F16,Q8_0"):
        (root / "org" / "tiny-GGUF").mkdir(exist_ok=True)
        shutil.copy(path, root / "org" / "tiny-GGUF")
    return folder


@pytest.mark.parametrize(
    "text, reference",
    [
        ("hf:org/name", HubReference("org/name")),
        ("hf:org/na.me-1@refs/pr/1", HubReference("org/na.me-1", "refs/pr/1")),
        ("hf:org/name:Q4_K_M", HubReference("org/name", "main", "Q4_K_M")),
        ("hf:org/name@v1:sub/file.gguf", HubReference("org/name", "v1", "sub/file.gguf")),
    ],
)
def test_references(text: str, reference: HubReference) -> None:
    assert parse_reference(text) == reference
    assert str(reference) == text


def repository(reference: str, *names: str) -> Repository:
    return Repository(parse_reference(reference), COMMIT, {name: RemoteEntry(name, 1) for name in names})


SPLIT = ("big-Q8_0-00001-of-00002.gguf", "big-Q8_0-00002-of-00002.gguf")


@pytest.mark.parametrize(
    "quant, names, expected",
    [
        ("", ("m.gguf", "mmproj-m.gguf"), ["m.gguf"]),
        ("", ("m-Q4_K_M.gguf", "m-Q8_0.gguf"), ["m-Q4_K_M.gguf"]),
        (":q8_0", ("m-Q4_K_M.gguf", "m.Q8_0.gguf"), ["m.Q8_0.gguf"]),
        (":Q8_0", (*SPLIT, "big-F16.gguf"), list(SPLIT)),
        (":Q8_0/big.gguf", ("Q8_0/big.gguf", "F16/big.gguf"), ["Q8_0/big.gguf"]),
        (":F16", ("Q8_0/big.gguf", "F16/big.gguf"), ["F16/big.gguf"]),
        (":Q4_K", ("m-Q4_K_M.gguf",), "no GGUF named Q4_K.*m-Q4_K_M.gguf"),
        (":Q8_0", ("a-Q8_0.gguf", "b-Q8_0.gguf"), "2 GGUFs named Q8_0"),
        ("", ("a-Q8_0.gguf", "a-F16.gguf"), "no GGUF named Q4_K_M"),
        (":Q8_0", (SPLIT[0],), "1 of 2 shards"),
        ("", ("model.safetensors",), "has no GGUF; it has model.safetensors"),
    ],
)
def test_which_gguf_is_meant(quant: str, names: tuple[str, ...], expected: list[str] | str) -> None:
    found = repository(f"hf:org/name{quant}", *names)
    if isinstance(expected, list):
        assert chosen(found) == expected
    else:
        with pytest.raises(YarnEdgeError, match=expected):
            chosen(found)


def test_get_a_gguf(hub: Hub, ggufs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["get", "hf:org/tiny-GGUF:Q8_0"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path / "cache" / "models--org--tiny-GGUF" / "snapshots" / COMMIT
    assert path.read_bytes() == (ggufs / "tiny-Q8_0.gguf").read_bytes()
    sent = hub.sent
    assert get_from_hub("hf:org/tiny-GGUF:Q8_0") == path
    assert hub.sent == sent


@pytest.mark.usefixtures("hub")
def test_get_a_checkpoint(root: Path) -> None:
    folder = get_from_hub("hf:org/tiny")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (root / "org" / "tiny").iterdir()
    )


@pytest.mark.usefixtures("ggufs")
def test_what_was_downloaded_wrong_does_not_stay(hub: Hub, tmp_path: Path) -> None:
    hub.faults.lying.add("tiny-Q8_0.gguf")
    with pytest.raises(YarnEdgeError, match="another hash than the Hub states, and was removed"):
        get_from_hub("hf:org/tiny-GGUF:Q8_0")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size > 10_000]


def test_a_small_file_is_hashed_as_git_does(hub: Hub) -> None:
    hub.faults.wrong["config.json"] = "0" * 40
    with pytest.raises(YarnEdgeError, match=r"config\.json: what was downloaded has another hash"):
        get_from_hub("hf:org/tiny")


def takes_files(action: argparse.Action) -> bool:
    metavar = str(action.metavar)
    return not action.option_strings or "gguf" in metavar.lower() or metavar in ("CHECKPOINT", "BASE")


OWN = {
    "convert": {"checkpoint"},  # streams by itself
    "get": {"reference"},
    "publish": {"folder", "target"},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_argument_that_takes_a_model_takes_hf(command: str) -> None:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    wanted = {a.dest for a in parser._actions if takes_files(a) and a.dest not in ("help", "output")}
    assert wanted - OWN.get(command, set()) == BROUGHT.get(command, {}).keys()


@pytest.mark.usefixtures("hub", "ggufs")
def test_arguments_are_brought_and_variants_kept() -> None:
    words = ["hf:org/tiny-GGUF:Q8_0@kv=q8_0", "local.gguf", "hf:org/tiny-GGUF@main:F16"]
    args = argparse.Namespace(base="hf:org/tiny-GGUF:F16", models=words, text="hf:not a model")
    bring("compare", args)
    assert Path(args.base).name == "tiny-F16.gguf"
    assert args.models[0].endswith("tiny-Q8_0.gguf@kv=q8_0")
    assert args.models[1:] == ["local.gguf", args.base]
    assert args.text == "hf:not a model"


@pytest.mark.usefixtures("ggufs")
def test_inspect_takes_either(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("hf:org/tiny", "hf:org/tiny-GGUF:F16"):
        assert main(["inspect", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["declared"]
    assert not [path for _m, path, _r, _t in hub.requests if path.endswith(".safetensors")]


@pytest.fixture(scope="module")
def one(ggufs: Path) -> Path:
    """A folder with one of the two."""
    folder = ggufs / "one"
    folder.mkdir()
    shutil.copy(ggufs / "tiny-Q8_0.gguf", folder)
    return folder


PUBLISH = ["--ctx", "64", "--max-tokens", "128", "--trust"]


def test_publish_is_a_dry_run_by_default(hub: Hub, ggufs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(ggufs), "hf:me/new", *PUBLISH, "--base-model", "org/tiny"]) == 0
    card = capsys.readouterr().out
    assert hub.requests == []
    assert 'base_model: "org/tiny"\nbase_model_relation: quantized' in card
    for name in ("tiny-F16.gguf", "tiny-Q8_0.gguf"):
        assert f"    {hashlib.sha256((ggufs / name).read_bytes()).hexdigest()}  {name}" in card
    assert "hf:me/new:Q8_0" in card
    assert str(ggufs) not in card


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how the client uploads
def test_publish_states_what_was_measured(hub: Hub, ggufs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from yarn_edge import compare_models, measure_perplexity

    assert main(["publish", str(ggufs), "hf:me/new", *PUBLISH, "--upload", "--private", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (commit,) = hub.commits
    card = committed(commit, "README.md")
    assert card == said["card"].encode()
    for name in ("tiny-F16.gguf", "tiny-Q8_0.gguf"):
        sha = hashes_of(ggufs / name)[0]
        assert committed(commit, name) == sha
        assert hub.uploads[sha] == (ggufs / name).read_bytes()
    settings = {"ctx": 64, "max_tokens": 128}
    base, other = ggufs / "tiny-F16.gguf", ggufs / "tiny-Q8_0.gguf"
    (kl,) = compare_models(base, [other], **settings)["models"]
    longest = measure_perplexity(other, **settings)["curve"][-1]
    (line,) = [line for line in said["card"].splitlines() if line.startswith("| tiny-Q8_0")]
    assert f"| {kl['kld_mean']:.3g} | {kl['top1']:.2%} |" in line
    assert f"| {longest['ppl']:.4f} |" in line
    assert f"perplexity, {longest['ctx']} tokens" in said["card"]


def test_publish_without_quality_states_none(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(one), "hf:me/new", "--no-quality", "--trust"]) == 0
    card = capsys.readouterr().out
    assert "perplexity" not in card.lower()
    assert "KL" not in card
    assert "metadata, kernel, live-graph" in card


def test_publish_leaves_a_card_of_others_alone(
    hub: Hub, ggufs: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = root / "me" / "old"
    theirs.mkdir(parents=True, exist_ok=True)
    (theirs / "README.md").write_text("# mine\n")
    assert main(["publish", str(ggufs), "hf:me/old", "--no-quality", "--trust", "--upload"]) == 2
    assert "has a README.md that yarn-edge did not write: --force replaces it" in capsys.readouterr().err
    assert hub.commits == []


def test_publish_refuses_what_does_not_verify(
    hub: Hub, ggufs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    assert main(["publish", str(folder), "hf:me/new"]) == 2
    assert "holds no GGUF to publish" in capsys.readouterr().err
    data = bytearray((ggufs / "tiny-F16.gguf").read_bytes())
    at = data.index(b"llama.rope.scaling.factor")
    at += len(b"llama.rope.scaling.factor") + 4
    data[at : at + 4] = b"\0\0\0\x41"  # 8.0
    (folder / "tiny.gguf").write_bytes(data)
    assert main(["publish", str(folder), "hf:me/new", "--no-quality", "--trust", "--upload"]) == 2
    assert "is not published" in capsys.readouterr().err
    assert hub.commits == []


def test_publish_with_a_token_that_may_not(hub: Hub, one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults.statuses = [0, 403]
    assert main(["publish", str(one), "hf:me/new", "--no-quality", "--trust", "--upload"]) == 2
    assert "may not do this (status 403)" in capsys.readouterr().err
