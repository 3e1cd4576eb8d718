"""quantize and the end of convert: the same bytes and keys as llama.cpp's own quantizer, from one reading; or nothing."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.cli import main
from yarn_edge.convert import one_pass
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.imatrix.matrix import Importance, ImportanceMatrix, write_imatrix
from yarn_edge.convert.quant_types import known_quants, parse_quants
from yarn_edge.convert.quantize import quantize
from yarn_edge.convert.recipe import QuantOptions
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.ggml_types import type_named
from yarn_edge.runtime.llama_api import llama

from support import depth, tiny
from support.gguf_files import split, write_gguf
from support.llama_quantize import assert_same_file, tensors_of, upstream

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4}
# Every file type that rows of 256 weights can have, and of those that need importance all.
NEEDS_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")
ALL = [name for name in known_quants() if name not in NEEDS_IMPORTANCE]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose rows all K-quants can hold, in bfloat16."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("wide") / "ck", dtype=torch.bfloat16, **WIDE)


@pytest.fixture(scope="module")
def wide_bf16(wide: Path) -> Path:
    return convert(wide, str(wide.parent / "wide-BF16.gguf"), "BF16")[0]


@pytest.fixture(scope="module")
def importance(wide_bf16: Path) -> Path:
    """An imatrix for every matrix but the embeddings, of random numbers."""
    rng = np.random.default_rng(0)
    entries = {
        name: Importance(rng.random((1, t.shape[0])) * 100, np.array([64]))
        for name, t in read_gguf(wide_bf16).tensors.items()
        if len(t.shape) > 1 and name.startswith("blk.")
    }
    path = wide_bf16.with_name("importance.gguf")
    write_imatrix(ImportanceMatrix(path, entries, ("calibration.txt",), 4, 512), path)
    return path


def gguf_py_knows(quant: str) -> bool:
    return quant != "Q2_0"  # gguf-py of the pinned version cannot read it back


@pytest.fixture(scope="module")
def both_ways(wide: Path, wide_bf16: Path) -> dict[str, tuple[Path, Path]]:
    """Every type from one reading of the checkpoint, and from one reading of the GGUF."""
    names = ",".join(ALL)
    from_checkpoint = convert(wide, str(wide.parent / "c-{quant}.gguf"), names)
    from_gguf = quantize(wide_bf16, str(wide.parent / "q-{quant}.gguf"), names)
    return dict(zip(ALL, zip(from_checkpoint, from_gguf, strict=True), strict=True))


@pytest.mark.parametrize("quant", [n for n in ALL if gguf_py_knows(n)])
def test_the_bytes_are_those_of_llama_cpp(
    quant: str, both_ways: dict[str, tuple[Path, Path]], wide_bf16: Path, tmp_path: Path
) -> None:
    theirs = upstream(wide_bf16, tmp_path / "theirs.gguf", quant)
    for ours in both_ways[quant]:
        assert_same_file(ours, theirs)


def test_q2_0_too(both_ways: dict[str, tuple[Path, Path]], wide_bf16: Path, tmp_path: Path) -> None:
    theirs = read_gguf(upstream(wide_bf16, tmp_path / "theirs.gguf", "Q2_0"))
    for path in both_ways["Q2_0"]:
        ours = read_gguf(path)
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, info in ours.tensors.items():
            other = theirs.tensors[name]
            assert info.type_name == other.type_name
            data = [p.read_bytes()[i.offset : i.offset + i.n_bytes] for p, i in ((path, info), (theirs.path, other))]
            assert data[0] == data[1]


@pytest.mark.parametrize(
    "quant", ["Q4_K_M", "Q5_K_M", "IQ4_XS", "Q4_0", *(NEEDS_IMPORTANCE if depth.full else ("IQ3_XS", "Q2_K_S"))]
)
def test_the_bytes_are_those_of_llama_cpp_with_an_importance_matrix(
    quant: str, wide: Path, wide_bf16: Path, importance: Path, tmp_path: Path
) -> None:
    theirs = upstream(wide_bf16, tmp_path / "theirs.gguf", quant, importance)
    assert_same_file(
        quantize(wide_bf16, str(tmp_path / "q.gguf"), quant, options=QuantOptions(imatrix=importance))[0], theirs
    )
    if quant not in ("Q4_K_M", "IQ2_M"):
        return
    ours = convert(wide, str(tmp_path / "c.gguf"), quant, options=QuantOptions(imatrix=importance))[0]
    assert_same_file(ours, theirs)
    told = read_gguf(ours).metadata
    assert told["quantize.imatrix.file"] == str(importance)[:127]
    assert told["quantize.imatrix.dataset"] == "calibration.txt"
    assert told["quantize.imatrix.entries_count"] == 8 * 7
    assert told["quantize.imatrix.chunks_count"] == 4


def test_weights_matter(wide_bf16: Path, importance: Path, tmp_path: Path) -> None:
    with_weights = tensors_of(
        quantize(wide_bf16, str(tmp_path / "w.gguf"), "Q4_K_M", options=QuantOptions(imatrix=importance))[0]
    )
    without = tensors_of(quantize(wide_bf16, str(tmp_path / "n.gguf"), "Q4_K_M")[0])
    name = "blk.3.ffn_up.weight"
    assert with_weights[name][:2] == without[name][:2]
    assert with_weights[name][2] != without[name][2]


@pytest.mark.parametrize("dtype, source", [(torch.float32, "F32"), (torch.float16, "F16")])
def test_other_precisions_of_the_checkpoint(dtype: torch.dtype, source: str, tmp_path: Path) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck", dtype=dtype, **{**WIDE, "num_hidden_layers": 2})
    base = convert(ck, str(tmp_path / "base.gguf"), source)[0]
    theirs = upstream(base, tmp_path / "theirs.gguf", "Q5_K_S")
    assert_same_file(convert(ck, str(tmp_path / "ours.gguf"), "Q5_K_S")[0], theirs)


CHOICES: dict[str, tuple[str, QuantOptions, dict[str, Any]]] = {
    "pure": ("Q4_K_M", QuantOptions(pure=True), {"pure": True}),
    "output": ("Q4_K_M", QuantOptions(output_type=type_named("Q8_0")), {"output_tensor_type": 8}),
    "embedding": ("Q6_K", QuantOptions(embedding_type=type_named("q3_k")), {"token_embedding_type": 11}),
    "embedding to F16": ("Q6_K", QuantOptions(embedding_type=type_named("f16")), {"token_embedding_type": 1}),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choices(case: str, wide_bf16: Path, tmp_path: Path) -> None:
    quant, options, params = CHOICES[case]
    theirs = upstream(wide_bf16, tmp_path / "theirs.gguf", quant, **params)
    ours = quantize(wide_bf16, str(tmp_path / "ours.gguf"), quant, options=options)[0]
    assert_same_file(ours, theirs)
    assert tensors_of(ours) != tensors_of(quantize(wide_bf16, str(tmp_path / "plain.gguf"), quant)[0])


def test_types_of_single_tensors(wide_bf16: Path, tmp_path: Path) -> None:
    options = QuantOptions(tensor_types=((r"blk\.[01]\.ffn_down", type_named("Q8_0")), ("attn_v", type_named("F16"))))
    patterns = (llama().llama_model_tensor_override * 3)()
    patterns[0].pattern, patterns[0].type = rb"blk\.[01]\.ffn_down", 8
    patterns[1].pattern, patterns[1].type = b"attn_v", 1
    patterns[2].pattern = None
    theirs = upstream(wide_bf16, tmp_path / "theirs.gguf", "Q4_K_M", tt_overrides=patterns)
    ours = quantize(wide_bf16, str(tmp_path / "ours.gguf"), "Q4_K_M", options=options)[0]
    assert_same_file(ours, theirs)
    types = {name: kind for name, (kind, _shape, _data) in tensors_of(ours).items()}
    assert (types["blk.1.ffn_down.weight"], types["blk.2.attn_v.weight"]) == ("Q8_0", "F16")


def test_a_pattern_without_effect_is_told(wide_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(
        wide_bf16, str(tmp_path / "o.gguf"), "Q8_0", options=QuantOptions(tensor_types=(("atn_q", type_named("Q4_0")),))
    )
    assert "--tensor-type 'atn_q' changes no tensor's type" in capsys.readouterr().err


def test_the_real_model(
    whole_smol_checkpoint: Path, whole_smol_f32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 576 weights, which K-quants cannot hold: the replacements are llama.cpp's, and are told."""
    theirs = upstream(whole_smol_f32, tmp_path / "theirs.gguf", "Q4_K_M")
    ours = convert(whole_smol_checkpoint, str(tmp_path / "ours.gguf"), "Q4_K_M")[0]
    assert_same_file(ours, theirs)
    assert "166 tensors have rows of 576, which Q4_K cannot hold: Q5_0 is used instead" in capsys.readouterr().err


def one_layer(**more: int) -> dict[str, Any]:
    """What llama.cpp's quantizer asks of a llama's header."""
    counts = {"block_count": 1, "context_length": 64, "embedding_length": 256, "feed_forward_length": 512}
    counts |= {"attention.head_count": 4, **more}
    return {f"llama.{k}": v for k, v in counts.items()} | {"llama.attention.layer_norm_rms_epsilon": 1e-5}


def expert_file(path: Path, n_experts: int = 4) -> Path:
    """A header that llama.cpp's quantizer takes for a model with experts, and tensors of experts."""
    experts = {"expert_count": n_experts, "expert_used_count": 2}
    rng = np.random.default_rng(1)
    shapes = {
        "ffn_gate_inp": (n_experts, 256),
        "ffn_up_exps": (n_experts, 512, 256),
        "ffn_down_exps": (n_experts, 256, 512),
        "attn_v": (256, 256),
    }
    drawn = {f"blk.0.{n}.weight": rng.standard_normal(s).astype(np.float32) * 0.1 for n, s in shapes.items()}
    return write_gguf(path, "llama", one_layer(**experts), drawn)


def test_experts_have_importance_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "SLICE_WEIGHTS", 300 * 256)  # slices that would cross from one expert into the next
    source = expert_file(tmp_path / "source.gguf")
    rng = np.random.default_rng(2)
    entries = {
        f"blk.0.{name}.weight": Importance(rng.random((n, width)) * 9, np.arange(1, n + 1))
        for name, n, width in (("ffn_up_exps", 4, 256), ("ffn_down_exps", 4, 512), ("attn_v", 1, 256))
    }
    matrix = tmp_path / "importance.gguf"
    write_imatrix(ImportanceMatrix(matrix, entries, (), 1, 512), matrix)
    theirs = upstream(source, tmp_path / "theirs.gguf", "IQ3_XXS", matrix)
    assert_same_file(
        quantize(source, str(tmp_path / "ours.gguf"), "IQ3_XXS", options=QuantOptions(imatrix=matrix))[0], theirs
    )


def test_splits_become_one_file(wide_bf16: Path, tmp_path: Path) -> None:
    shards = split(wide_bf16, tmp_path / "s", 20)
    assert len(shards) > 2
    theirs = upstream(shards[0], tmp_path / "theirs.gguf", "Q4_K_M")
    ours = quantize(shards[0], str(tmp_path / "ours.gguf"), "Q4_K_M")[0]
    assert_same_file(ours, theirs)
    assert not any(key.startswith("split.") for key in read_gguf(ours).metadata)


def test_alignment_of_the_source_is_kept(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 256)).astype(np.float32)
    tensors = {"blk.0.attn_q.weight": values, "blk.0.attn_v.weight": values * 2}
    write_gguf(tmp_path / "in.gguf", "llama", one_layer(), tensors, alignment=128)
    file = read_gguf(quantize(tmp_path / "in.gguf", str(tmp_path / "out.gguf"), "Q8_0")[0])
    assert file.alignment == 128
    assert all(t.offset % 128 == 0 for t in file.tensors.values())


def test_quantized_sources(wide_bf16: Path, tmp_path: Path) -> None:
    q8 = quantize(wide_bf16, str(tmp_path / "q8.gguf"), "Q8_0")[0]
    with pytest.raises(YarnEdgeError, match=r"quantized already \(Q8_0\).*--allow-requantize"):
        quantize(q8, str(tmp_path / "o.gguf"), "Q4_K_M")
    ours = quantize(q8, str(tmp_path / "o.gguf"), "Q4_K_M", allow_requantize=True)[0]
    assert_same_file(ours, upstream(q8, tmp_path / "theirs.gguf", "Q4_K_M", allow_requantize=True))
    same = quantize(q8, str(tmp_path / "same.gguf"), "Q8_0")[0]  # nothing to do is no requantizing
    assert tensors_of(same) == tensors_of(q8)


@pytest.mark.parametrize("quant", NEEDS_IMPORTANCE)
def test_types_that_need_importance_refuse_without(quant: str, wide: Path, wide_bf16: Path, tmp_path: Path) -> None:
    for run in (
        lambda: convert(wide, str(tmp_path / "o.gguf"), quant),
        lambda: quantize(wide_bf16, str(tmp_path / "o.gguf"), quant),
    ):
        with pytest.raises(YarnEdgeError, match=f"{quant} needs an importance matrix for .*yarn-edge imatrix"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_the_list_of_types_that_need_importance_is_llama_cpps(wide_bf16: Path) -> None:
    refused = []
    for name, quant in known_quants().items():
        params = llama().llama_model_quantize_default_params()
        params.ftype, params.dry_run = quant.ftype, True
        from yarn_edge.runtime.llama_api import captured_log

        with captured_log() as log:
            code = llama().llama_model_quantize(os.fsencode(wide_bf16), b"", ctypes.byref(params))
        assert code == 0, name
        if any("will require an imatrix" in line for line in log):
            refused.append(name)
    assert sorted(refused) == sorted(NEEDS_IMPORTANCE)


def test_a_matrix_that_lacks_a_tensor(wide_bf16: Path, importance: Path, tmp_path: Path) -> None:
    from yarn_edge.convert.imatrix.matrix import read_imatrix

    matrix = read_imatrix(importance)
    kept = {name: entry for name, entry in matrix.entries.items() if name != "blk.4.attn_q.weight"}
    path = tmp_path / "fewer.gguf"
    write_imatrix(ImportanceMatrix(path, kept, (), 4, 512), path)
    with pytest.raises(YarnEdgeError, match=r"IQ2_XS needs .* blk\.4\.attn_q\.weight, and has none"):
        quantize(wide_bf16, str(tmp_path / "o.gguf"), "IQ2_XS", options=QuantOptions(imatrix=path))
    theirs = upstream(wide_bf16, tmp_path / "t.gguf", "Q4_K_M", path)
    assert_same_file(
        quantize(wide_bf16, str(tmp_path / "o.gguf"), "Q4_K_M", options=QuantOptions(imatrix=path))[0], theirs
    )


def test_a_matrix_of_another_model(wide_bf16: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    entries = {"blk.0.attn_q.weight": Importance(np.ones((1, 768)), np.array([4]))}
    write_imatrix(ImportanceMatrix(path, entries, (), 1, 512), path)
    with pytest.raises(YarnEdgeError, match=r"768 values for blk\.0\.attn_q\.weight, whose shape is \[256, 256\]"):
        quantize(wide_bf16, str(tmp_path / "o.gguf"), "Q4_K_M", options=QuantOptions(imatrix=path))


BAD_FLAGS = [
    (["--tensor-type", "attn_q"], "is not REGEX=TYPE"),
    (["--tensor-type", "=q8_0"], "is not REGEX=TYPE"),
    (["--tensor-type", "attn_q=q9"], "is not a tensor type to quantize to"),
    (["--output-type", "i32"], "is not a tensor type"),
    (["--output-type", "q8_k"], "is not a tensor type"),
    (["--tensor-type", "a" * 300 + "=q8_0"], "300 characters"),
    (["--tensor-type", "attn_[=q8_0"], "no recipe for Q4_K_M --tensor-type attn_[=Q8_0 for this model"),
    (["--quant", "Q9"], "--quant 'Q9' is unknown"),
    (["--quant", "NVFP4"], "is unknown"),
    (["--quant", "Q4_K_M,Q8_0"], "must hold {quant}"),
    (["--threads", "0"], "is not from 1"),
    (["--imatrix", "nothing.gguf"], "nothing.gguf"),
    (["--tensor-type", "(.*)*(.*)*x=q8_0"], "repeats too much"),
    (["--tensor-type", ".*.*.*.*x=q8_0"], "repeats too much"),
    (["--tensor-type", "\udcff=q8_0"], "printable"),
    (["--embedding-type", "iq2_xs"], "needs an importance matrix for token_embd.weight"),
]


@pytest.mark.parametrize("flags, told", BAD_FLAGS, ids=[" ".join(f)[:40] for f, _t in BAD_FLAGS])
def test_bad_flags(
    flags: list[str], told: str, wide_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", str(wide_bf16), "-o", str(tmp_path / "o.gguf"), *flags]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_type_that_rows_cannot_hold(smol_f32: Path, tmp_path: Path) -> None:
    with pytest.raises(YarnEdgeError, match=r"token_embd\.weight: rows of 576 do not hold whole Q4_K blocks of 256"):
        quantize(smol_f32, str(tmp_path / "o.gguf"), "Q8_0", options=QuantOptions(embedding_type=type_named("Q4_K")))


def test_dry_run_prints_the_plan_and_writes_nothing(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["convert", str(wide), "-o", str(tmp_path / "{quant}.gguf"), "--quant", "Q4_K_M,IQ2_M", "--dry-run"]
    assert main(args) == 2  # IQ2_M needs importance: a plan that cannot be carried out is no plan
    assert "IQ2_M needs an importance matrix" in capsys.readouterr().err
    args[5] = "Q4_K_M,Q8_0"
    assert main([*args, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    paths = convert(wide, str(tmp_path / "{quant}.gguf"), "Q4_K_M,Q8_0")
    for told, path in zip(plan["files"], paths, strict=True):
        assert told["output"] == str(path)
        assert told["file_bytes"] == path.stat().st_size
        assert {t["name"]: t["type"] for t in told["tensors"]} == {n: t[0] for n, t in tensors_of(path).items()}
        stored = sum(len(data) for _kind, _shape, data in tensors_of(path).values())
        assert told["bits_per_weight"] == pytest.approx(8 * stored / plan["n_weights"], rel=1e-3)
    assert plan["written"] is False
    assert plan["seconds"] > 0
    assert main([*args, "--force"]) == 0
    out = capsys.readouterr().out
    assert "Q4_K_M, " in out
    assert "bits per weight" in out


def test_json_of_a_run(wide_bf16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", str(wide_bf16), "-o", str(tmp_path / "o.gguf"), "--quant", "Q8_0", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] is True
    assert told["files"][0]["file_bytes"] == (tmp_path / "o.gguf").stat().st_size


@pytest.mark.parametrize("threads", [1, 7])
def test_threads_do_not_change_the_bytes(threads: int, wide_bf16: Path, tmp_path: Path) -> None:
    one = quantize(wide_bf16, str(tmp_path / "a.gguf"), "Q4_K_M", threads=2)[0]
    other = quantize(wide_bf16, str(tmp_path / "b.gguf"), "Q4_K_M", threads=threads)[0]
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("slice_weights", [1, 5000, 1 << 30])
def test_slices_do_not_change_the_bytes(slice_weights: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256)
    one = convert(ck, str(tmp_path / "a.gguf"), "Q4_K_M")[0]
    monkeypatch.setattr(one_pass, "SLICE_WEIGHTS", slice_weights)
    assert convert(ck, str(tmp_path / "b.gguf"), "Q4_K_M")[0].read_bytes() == one.read_bytes()


@pytest.fixture
def slow_slices(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Something to do when the tenth slice is made."""
    state: dict[str, Any] = {"n": 0, "act": lambda: None}
    make = one_pass._Worker.make

    def counted(self: Any, slice_: Any) -> int:
        state["n"] += 1
        if state["n"] == 10:
            state["act"]()
        return make(self, slice_)

    monkeypatch.setattr(one_pass._Worker, "make", counted)
    return state


@pytest.mark.parametrize("form", ["single", "bin"])
def test_a_checkpoint_that_shrinks_meanwhile(form: str, tmp_path: Path, slow_slices: dict[str, Any]) -> None:
    ck = tiny.write_checkpoint(tmp_path / "ck", form=form, hidden_size=256, intermediate_size=256)
    weights = next(p for p in ck.iterdir() if p.suffix in (".safetensors", ".bin"))
    slow_slices["act"] = lambda: os.truncate(weights, 10_000)
    with pytest.raises(YarnEdgeError, match="was changed while it was read"):
        convert(ck, str(tmp_path / "o.gguf"), "Q4_K_M", threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


@pytest.mark.parametrize("how", ["shrinks", "touched", "replaced"])
def test_a_gguf_that_changes_meanwhile(how: str, wide_bf16: Path, tmp_path: Path, slow_slices: dict[str, Any]) -> None:
    source = Path(shutil.copy(wide_bf16, tmp_path / "in.gguf"))
    acts = {
        "shrinks": lambda: os.truncate(source, 100_000),
        "touched": lambda: os.utime(source, (1, 1)),
        "replaced": lambda: source.write_bytes(bytes(source.stat().st_size)),
    }
    slow_slices["act"] = acts[how]
    with pytest.raises(YarnEdgeError, match="was changed while it was read"):
        quantize(source, str(tmp_path / "o.gguf"), "Q4_K_M", threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["in.gguf"]


def test_a_source_whose_name_goes_elsewhere_is_read_to_its_end(
    wide_bf16: Path, tmp_path: Path, slow_slices: dict[str, Any]
) -> None:
    """Unlinked or renamed over, the open file is still what it was."""
    source = Path(shutil.copy(wide_bf16, tmp_path / "in.gguf"))
    slow_slices["act"] = source.unlink
    ours = quantize(source, str(tmp_path / "o.gguf"), "Q8_0")[0]
    assert tensors_of(ours) == tensors_of(quantize(wide_bf16, str(tmp_path / "p.gguf"), "Q8_0")[0])


def test_an_output_that_appears_meanwhile_is_not_overwritten(
    wide_bf16: Path, tmp_path: Path, slow_slices: dict[str, Any]
) -> None:
    late = tmp_path / "o-Q8_0.gguf"
    slow_slices["act"] = lambda: late.write_text("mine")
    with pytest.raises(YarnEdgeError, match="exists already"):
        quantize(wide_bf16, str(tmp_path / "o-{quant}.gguf"), "Q4_K_M,Q8_0")
    assert late.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == [late.name]  # and the other file is not there alone


def test_two_at_once_on_one_name(smol_f32: Path, tmp_path: Path) -> None:
    """Without --force one of them has the name, and the other says so."""
    command = [
        sys.executable,
        "-m",
        "yarn_edge",
        "quantize",
        str(smol_f32),
        "-o",
        str(tmp_path / "o.gguf"),
        "--quant",
        "Q8_0",
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate()[1] for process in running]
    assert sorted(p.returncode for p in running) == [0, 2]
    assert "exists already" in told[[p.returncode for p in running].index(2)]
    assert [p.name for p in tmp_path.iterdir()] == ["o.gguf"]
    assert len(read_gguf(tmp_path / "o.gguf").tensors) == 9 * depth.smol_layers() + 2


NOT_FINITE = {"nan": float("nan"), "infinite": float("inf"), "minus infinite": -float("inf")}


@pytest.mark.parametrize("case", NOT_FINITE)
@pytest.mark.parametrize("quant", ["Q4_K_M", "F32"])
def test_values_that_are_no_numbers(case: str, quant: str, tmp_path: Path) -> None:
    state = tiny.tensors(tiny.config(hidden_size=256, intermediate_size=256))
    state["model.layers.1.mlp.up_proj.weight"][255, 255] = NOT_FINITE[case]
    ck = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256)
    tiny.write_weights(ck, state)
    with pytest.raises(YarnEdgeError, match=r"layers\.1\.mlp\.up_proj\.weight has values that are not finite"):
        convert(ck, str(tmp_path / "o.gguf"), quant)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


# A value, and the types that can and cannot hold it: a scale is the largest value / 127 (Q8_0), / 31 (Q4_K, twice), …
@pytest.mark.parametrize(
    "value, quant, holds",
    [
        (7e4, "F16", False),
        (7e4, "BF16", True),
        (7e4, "Q8_0", True),
        (8e6, "Q8_0", True),
        (9e6, "Q8_0", False),
        (1e30, "BF16", True),
        (1e30, "Q4_K_M", False),
        (7e4, "Q4_0", True),
        (6e5, "Q4_0", False),
        (3e38, "F32", True),
    ],
)
def test_large_values(value: float, quant: str, holds: bool, tmp_path: Path) -> None:
    state = tiny.tensors(tiny.config(hidden_size=256, intermediate_size=256))
    state["model.layers.1.mlp.up_proj.weight"][100, 7] = value
    ck = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256)
    tiny.write_weights(ck, state)
    if holds:
        assert convert(ck, str(tmp_path / "o.gguf"), quant)[0].exists()
        return
    with pytest.raises(
        YarnEdgeError, match=r"up_proj\.weight has values up to .* cannot hold: (use BF16|choose another)"
    ):
        convert(ck, str(tmp_path / "o.gguf"), quant)
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_memory_does_not_grow_with_the_model(smol_f32: Path, tmp_path: Path) -> None:
    """Reading 540 MB and writing 260 MB of it takes far less than either: anonymous memory, whatever is mapped."""
    code = (
        "import sys, threading, time\nfrom pathlib import Path\nfrom yarn_edge.convert.quantize import quantize\n"
        "def anonymous():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    return int(status.split('RssAnon:')[1].split()[0])\n"
        "peak, done = [0], threading.Event()\n"
        "def watch():\n"
        "    while not done.wait(0.005): peak[0] = max(peak[0], anonymous())\n"
        "watcher = threading.Thread(target=watch); watcher.start()\n"
        f"quantize({str(smol_f32)!r}, {str(tmp_path / '{quant}.gguf')!r}, 'Q8_0,Q6_K')\n"
        "done.set(); watcher.join(); print(peak[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000  # kB


@pytest.mark.parametrize(
    "text, names",
    [("q4_k_m", ["Q4_K_M"]), (" Q4_K_M , q8_0", ["Q4_K_M", "Q8_0"]), ("Q4_K,Q4_K_M", ["Q4_K_M"]), ("fp16", ["F16"])],
)
def test_names(text: str, names: list[str]) -> None:
    assert [q.name for q in parse_quants(text)] == names


def test_a_matrix_that_fits_nothing(wide_bf16: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    write_imatrix(
        ImportanceMatrix(path, {"other.weight": Importance(np.ones((1, 256)), np.array([4]))}, (), 1, 512), path
    )
    with pytest.raises(YarnEdgeError, match="has no entry for any tensor"):
        quantize(wide_bf16, str(tmp_path / "o.gguf"), "Q4_K_M", options=QuantOptions(imatrix=path))


def test_the_matrix_is_not_overwritten(wide_bf16: Path, importance: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copy(importance, tmp_path / "mine.gguf"))
    with pytest.raises(YarnEdgeError, match="is one of the files that are read"):
        quantize(wide_bf16, str(mine), "Q8_0", options=QuantOptions(imatrix=mine), force=True)


def test_two_names_of_one_file(wide_bf16: Path, tmp_path: Path) -> None:
    for name in ("Q8_0", "Q4_0"):
        (tmp_path / f"x-{name}.gguf").symlink_to("z.gguf")
    with pytest.raises(YarnEdgeError, match="is the same file as the one for Q8_0"):
        quantize(wide_bf16, str(tmp_path / "x-{quant}.gguf"), "Q8_0,Q4_0")


def test_a_worker_that_fails_anywhere_fails_the_run(
    wide_bf16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(one_pass._Worker, "__init__", no_memory)
    with pytest.raises(MemoryError):
        quantize(wide_bf16, str(tmp_path / "o.gguf"), "Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_gguf(tmp_path / "in.gguf", "llama", one_layer())
    with pytest.raises(YarnEdgeError, match="has no tensors"):
        quantize(tmp_path / "in.gguf", str(tmp_path / "o.gguf"), "Q8_0")
