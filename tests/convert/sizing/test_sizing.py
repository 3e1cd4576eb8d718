"""Types for a size: the best that fit, as trying all shows; predicted losses are those that a changed model has."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba")

from yarn_edge.cli import main
from yarn_edge.convert.moments.gradients import output_gradients
from yarn_edge.convert.sizing.allocate import choose_types, tensor_bytes, tensor_ns
from yarn_edge.convert.sizing.decode_time import decode_ns
from yarn_edge.convert.sizing.sensitivity import CANDIDATES, TensorCost, _spread, kinds_for
from yarn_edge.convert.sizing.sized import SizeWanted, size_wanted
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.sample_text import sample_text

from support import tiny

KINDS = [type_named(name) for name in CANDIDATES]


def random_costs(seed: int, n: int = 4) -> list[TensorCost]:
    random = np.random.default_rng(seed)
    sizes = 256 * random.integers(1, 40, n)
    scale = np.exp(2 * random.standard_normal(n))
    return [
        TensorCost(
            str(i),
            int(sizes[i]),
            float(sizes[i]),
            {k: float(scale[i] * 4.0 ** -(j + random.random())) for j, k in enumerate(KINDS)},
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_fits_is_better_but_by_the_last_step(seed: int) -> None:
    costs = random_costs(seed)
    least, most = (sum(tensor_bytes(c, kind) for c in costs) for kind in (KINDS[0], KINDS[-1]))
    for share in (0.1, 0.4, 0.8):
        budget = int(least + share * (most - least))
        chosen = choose_types(costs, budget)
        spent = sum(tensor_bytes(c, chosen[c.name]) for c in costs)
        ours = sum(c.nats[chosen[c.name]] for c in costs)
        assert spent <= budget
        every = itertools.product(KINDS, repeat=len(costs))
        best = min(
            sum(c.nats[k] for c, k in zip(costs, kinds, strict=True))
            for kinds in every
            if sum(tensor_bytes(c, k) for c, k in zip(costs, kinds, strict=True)) <= spent
        )
        assert ours <= best * 1.3  # of the same size; the hull leaves out what only an exact fill would take
        larger = choose_types(costs, most)
        assert set(larger.values()) == {KINDS[-1]}


@pytest.mark.parametrize("seed", range(4))
def test_nothing_that_fits_and_is_as_fast_is_better_but_by_the_last_step(seed: int) -> None:
    costs = random_costs(seed)
    least, most = (sum(tensor_bytes(c, kind) for c in costs) for kind in (KINDS[0], KINDS[-1]))
    budget = int(least + 0.4 * (most - least))
    free = choose_types(costs, budget)
    most_ns = 0.9 * sum(tensor_ns(c, free[c.name]) for c in costs)
    chosen = choose_types(costs, budget, most_ns=most_ns)
    spent, took = (sum(of(c, chosen[c.name]) for c in costs) for of in (tensor_bytes, tensor_ns))
    assert spent <= budget
    assert took <= most_ns
    best = min(
        sum(c.nats[k] for c, k in zip(costs, kinds, strict=True))
        for kinds in itertools.product(KINDS, repeat=len(costs))
        if sum(tensor_bytes(c, k) for c, k in zip(costs, kinds, strict=True)) <= spent
        and sum(tensor_ns(c, k) for c, k in zip(costs, kinds, strict=True)) <= took
    )
    assert sum(c.nats[chosen[c.name]] for c in costs) <= best * 1.3


def test_the_smallest_types_are_the_fastest() -> None:
    for width in (256, 32):
        kinds = kinds_for(width)
        assert min(kinds, key=lambda kind: kind.row_bytes(width)) == min(kinds, key=lambda kind: decode_ns(1, kind))
    tight = choose_types(random_costs(0), 10**9, most_ns=0.0)  # then these, rather than nothing
    assert set(tight.values()) == {KINDS[0]}


def test_rows_stand_for_equal_shares() -> None:
    values = np.exp(3 * np.random.default_rng(0).standard_normal(5000))
    errors = np.random.default_rng(1).random(5000)
    picked, shares = _spread(values, 128)
    assert shares.sum() == pytest.approx(1)
    assert values.sum() * shares @ errors[picked] == pytest.approx(values @ errors, rel=0.1)
    np.testing.assert_allclose(_spread(values[:100], 128)[1], values[:100] / values[:100].sum())


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(YarnEdgeError, match="the smallest types need"):
        choose_types(random_costs(0), 100)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("4.5bpw", SizeWanted(bits_per_weight=4.5)), ("120MB", SizeWanted(120_000_000)), ("2GiB", SizeWanted(2 << 30))],
)
def test_sizes(text: str, wanted: SizeWanted) -> None:
    assert size_wanted(text) == wanted


@pytest.mark.parametrize("text", ["", "bpw", "0.1bpw", "99bpw", "-3MB", "many", "4.5", "1000000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(YarnEdgeError, match="expected bytes"):
        size_wanted(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizing")
    tiny.write_checkpoint(folder / "ck", hidden_size=256, intermediate_size=512)
    (folder / "a.txt").write_text(sample_text()[:6000], encoding="utf-8")
    (folder / "b.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300, encoding="utf-8")
    return folder


def test_gradients_predict_the_divergence(folder: Path) -> None:
    """Small random errors in the results of one matrix: half of G times their mean square is the KL, on average."""
    import torch
    import transformers

    tokens = list(range(5, 261))
    gradients = output_gradients(folder / "ck", [tokens] * 8)
    matters = gradients.rows["layers.0.mlp.down_proj.weight"]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "ck", dtype=torch.float64).eval()
    size = 0.05
    with torch.inference_mode():
        p = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        torch.manual_seed(1)
        found = []
        handle = model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda _m, _x, y: y + size * torch.randn_like(y)
        )
        for _ in range(12):
            q = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
        handle.remove()
    predicted = 0.5 * float(matters.sum()) * size**2
    assert predicted == pytest.approx(np.mean(found), rel=0.25)


def test_the_file_has_the_size(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    texts = f"{folder / 'a.txt'},{folder / 'b.txt'}"
    words = ["convert", str(folder / "ck"), "-o", str(out), "--calibrate", texts]
    words += ["--calibrate-tokens", "1024", "--size", "1000KB"]
    assert main(words) == 0
    made = read_gguf(out)
    assert 0.95 * 1_000_000 < out.stat().st_size <= 1_000_000
    assert made.metadata["yarn_edge.calibration.method"] == "error feedback, types by sensitivity"
    assert len({t.type_name for t in made.tensors.values() if t.name.startswith("blk") and len(t.shape) == 2}) > 1
    assert "types by sensitivity:" in capsys.readouterr().err


def test_a_dry_run_tells_what_the_file_will_be(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.gguf", tmp_path / "plan.png"
    words = ["convert", str(folder / "ck"), "-o", str(out), "--calibrate", f"{folder / 'a.txt'},{folder / 'b.txt'}"]
    words += ["--calibrate-tokens", "1024", "--size", "1000KB", "--moments", str(tmp_path / "m.gguf"), "--quiet"]
    assert main([*words, "--dry-run", "--json", "--plot", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert not out.exists()
    assert main(words) == 0
    made = read_gguf(out)
    assert {row["name"]: row["type"] for row in told["tensors"]} == {
        name: tensor.type_name for name, tensor in made.tensors.items() if len(tensor.shape) > 1
    }
    files = {row["types"]: row for row in told["files"]}
    assert files["--size 1000KB"]["file_bytes"] == out.stat().st_size
    nats = [files[name]["nats"] for name in ("Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")]
    assert nats == sorted(nats, reverse=True)
    assert files["--size 1000KB"]["nats"] == pytest.approx(sum(row["nats"] for row in told["tensors"]))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--size", "2MB"], "pass --calibrate TEXT,TEXT as well"),
        (["--size", "2MB", "--calibrate", "{a}", "--pure"], "leave out --tensor-type"),
        (["--size", "2MB", "--calibrate", "{a}", "--quant", "Q4_K_M,Q5_K_M"], "makes one file"),
        (["--size", "9KB", "--calibrate", "{a}"], "with the smallest types (Q2_K, or Q4_0 where rows are"),
        (["--size", "2MB", "--calibrate", "{a}", "--quant", "F16"], "--calibrate changes K-quants, and F16 has none"),
    ],
    ids=["alone", "pure", "several", "small", "float"],
)
def test_what_cannot_be_done(
    folder: Path, tmp_path: Path, flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [flag.format(a=folder / "a.txt") for flag in flags]
    assert main(["convert", str(folder / "ck"), "-o", str(tmp_path / "{quant}.gguf"), *words]) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
