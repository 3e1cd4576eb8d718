"""Checkpoint -> GGUF: every family and form, read back by gguf-py and run against transformers."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from yarn_edge.bench.evidence.dialect_oracles import Truth, nous
from yarn_edge.convert import conversion, hf_to_gguf, vocab_proof
from yarn_edge.convert.conversion import check_positions, plan_conversion
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.vocab import read_vocabulary
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model
from yarn_edge.verify.command import verify
from yarn_edge.verify.transformers_reference import divergence, reference_logits

from support import tiny

FAMILIES = list(tiny.CLASSES)
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}


def hf_name(name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    if name in whole:
        return whole[name]
    _blk, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def read_back(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor by gguf-py, as float32 in NumPy order."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        found[t.name] = dequantize(t.data, t.tensor_type).astype(np.float32).reshape(tuple(reversed(t.shape.tolist())))
    return found


def interleaved(values: np.ndarray[Any, Any], n_heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp's q/k order, row by row: row d of a head's first half goes to 2d, of its second half to 2d + 1."""
    out = np.empty_like(values)
    dim = len(values) // n_heads
    for head in range(n_heads):
        for row in range(dim):
            target = 2 * row if row < dim // 2 else 2 * (row - dim // 2) + 1
            out[head * dim + target] = values[head * dim + row]
    return out


def logits_of(path: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    with (
        Model(path) as model,
        Context(model, ContextSettings(n_ctx=256, n_batch=len(tokens), kv_type="f32", attention="plain")) as context,
    ):
        context.evaluate(tokens, 0, "all")
        return context.logits()


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 32}),
    "llama-all-heads": ("llama", {"num_key_value_heads": ...}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama-v5": (
        "llama",
        {
            "rope_scaling": ...,
            "rope_theta": ...,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "llama-own-attention-factor": ("llama", {"rope_scaling": {**tiny.YARN["rope_scaling"], "attention_factor": 1.35}}),
    "llama-linear": (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 4.0, "original_max_position_embeddings": 256},
            "max_position_embeddings": 1024,
        },
    ),
    "qwen2-plain": ("qwen2", {"rope_scaling": None, "max_position_embeddings": 256}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_arrives_and_the_logits_are_transformers(name: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[name]
    folder = tiny.write_checkpoint(tmp_path / "ck", family, **changes)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    state = tiny.tensors(tiny.config(family, **changes))
    written = read_back(path)
    assert {hf_name(n) for n in written} == set(state)
    kv_heads = tiny.config(family, **changes).get("num_key_value_heads", 4)
    for n, values in written.items():
        wanted = state[hf_name(n)].numpy()
        heads = {"attn_q": 4, "attn_k": kv_heads}.get(n.split(".")[2] if n.startswith("blk") else "")
        if heads and family in ("llama", "mistral"):
            wanted = interleaved(wanted, heads)
        np.testing.assert_array_equal(values, wanted, err_msg=n)
    tokens = [(7 * i + 3) % 300 for i in range(64)]
    found = divergence(reference_logits(folder, tokens), logits_of(path, tokens))
    assert found.kl_mean < 1e-9
    assert found.top1 == 1


@pytest.mark.parametrize("form", ["shards", "bin", "bin-shards"])
def test_every_form_of_weights_gives_the_same_tensors(form: str, tmp_path: Path) -> None:
    single = convert(tiny.write_checkpoint(tmp_path / "a"), str(tmp_path / "a.gguf"), "F32")[0]
    other = convert(tiny.write_checkpoint(tmp_path / "b", form=form), str(tmp_path / "b.gguf"), "F32")[0]
    a, b = read_back(single), read_back(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_direct_types_hold_the_values(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", dtype=dtype)
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), "F32,F16,BF16,Q8_0")
    state = tiny.tensors(tiny.config(), dtype)
    for path, kind in zip(paths, ("F32", "F16", "BF16", "Q8_0"), strict=True):
        values = read_back(path)["blk.1.ffn_down.weight"]
        source = state["model.layers.1.mlp.down_proj.weight"]
        exact = {"F32": source, "F16": source.float().half(), "BF16": source.float().bfloat16()}
        if kind == "Q8_0":
            step = source.float().abs().max().item() / 127
            assert np.abs(values - source.float().numpy()).max() <= 0.51 * step
        else:
            np.testing.assert_array_equal(values, exact[kind].float().numpy())
        types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
        assert types["blk.0.attn_norm.weight"] == "F32"
        assert types["token_embd.weight"] == kind


def test_metadata_carries_everything(tmp_path: Path) -> None:
    scaling = {**tiny.YARN["rope_scaling"], "attention_factor": 1.35}
    path = convert(tiny.write_checkpoint(tmp_path / "ck", rope_scaling=scaling), str(tmp_path / "out.gguf"), "Q8_0")[0]
    meta = {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}
    wanted = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "llama.context_length": 1024,
        "llama.block_count": 2,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.original_context_length": 256,
        "llama.rope.scaling.yarn_ext_factor": 1.0,
        "llama.rope.scaling.yarn_attn_factor": 1.0,
        "llama.rope.scaling.yarn_beta_fast": 32.0,
        "llama.rope.scaling.yarn_beta_slow": 1.0,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": 320,
        "yarn_edge.rope.attention_factor": 1.35,
        "yarn_edge.rope.factor": 4.0,
        "yarn_edge.rope.original_context": 256,
        "tokenizer.ggml.pre": "gpt-2",
    }
    assert {k: meta[k] for k in wanted} == wanted
    assert meta["llama.rope.scaling.attn_factor"] == pytest.approx(1.35 / (0.1 * np.log(4) + 1), rel=1e-7)
    provenance = json.loads(meta["yarn_edge.rope.provenance"])
    assert provenance["attention_factor"] == "config.json: rope_scaling.attention_factor"
    assert str(tmp_path) not in repr(meta), "no path of this machine in the file"


def test_flags_make_a_yarn_gguf_of_a_plain_qwen2(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", "qwen2", rope_scaling=..., max_position_embeddings=256)
    flags = {"factor": 4.0, "original_context": 256}
    path = convert(folder, str(tmp_path / "out.gguf"), "F32", overrides=ScalingOverrides(**flags))[0]
    meta = read_gguf(path).metadata
    assert (meta["qwen2.rope.scaling.type"], meta["qwen2.rope.scaling.factor"]) == ("yarn", 4.0)
    assert meta["qwen2.context_length"] == 1024


def test_llama_cpps_own_types_and_one_reading_for_many(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck", hidden_size=256, intermediate_size=256)
    paths = convert(folder, str(tmp_path / "{quant}.gguf"), "Q4_K_M,Q6_K")
    for path, ftype in zip(paths, (15, 18), strict=True):
        assert read_gguf(path).metadata["general.file_type"] == ftype
        assert read_gguf(path).metadata["yarn_edge.rope.factor"] == 4.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["Q4_K_M.gguf", "Q6_K.gguf", "ck"]


def test_force_replaces_and_a_saved_frequency_buffer_must_agree(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    state = tiny.tensors(tiny.config())
    plain = torch.tensor([10000.0 ** (-2 * d / 16) for d in range(8)])
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = plain
    tiny.write_weights(folder, state)
    output = tmp_path / "out.gguf"
    output.write_text("old")
    assert convert(folder, str(output), "F16", force=True) == [output]
    assert read_gguf(output).metadata["general.file_type"] == 1
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = plain * 1.1
    tiny.write_weights(folder, state)
    with pytest.raises(YarnEdgeError, match="other frequencies"):
        convert(folder, str(output), "F16", force=True)


def test_two_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    command = [*command_for(folder, tmp_path / "out.gguf", "Q8_0"), "--force"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    assert [p.communicate() and p.returncode for p in running] == [0, 0]
    assert len(read_gguf(tmp_path / "out.gguf").tensors) == 21
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "out.gguf"]


def command_for(checkpoint: Path, output: Path, quant: str) -> list[str]:
    return [sys.executable, "-m", "yarn_edge", "convert", str(checkpoint), "-o", str(output), "--quant", quant]


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[Any]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "it ended before"
        time.sleep(0.002)


# What is being written when the signal comes, and under which names.
MOMENTS = {
    "floats": ("F32", "o.gguf"),
    "quantized": ("Q6_K", "o.gguf"),
    "several at once": ("Q4_K_M,Q8_0", "o-{quant}.gguf"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_leaves_nothing_under_the_final_name(smol_checkpoint: Path, moment: str, tmp_path: Path) -> None:
    quant, name = MOMENTS[moment]
    command = command_for(smol_checkpoint, tmp_path / name, quant)
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_for(tmp_path, "*.partial", process)
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_cleans_up(smol_checkpoint: Path, moment: str, tmp_path: Path) -> None:
    quant, name = MOMENTS[moment]
    command = command_for(smol_checkpoint, tmp_path / name, quant)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        wait_for(tmp_path, "*.partial", process)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert told[-1] == "yarn-edge: error: interrupted"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ended_by_a_signal_nothing_is_left(number: signal.Signals, smol_checkpoint: Path, tmp_path: Path) -> None:
    command = command_for(smol_checkpoint, tmp_path / "x.gguf", "F32")
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(tmp_path, "*.partial", process)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read().splitlines()
    assert (process.returncode, told[-1]) == (128 + number, f"yarn-edge: error: ended by signal {int(number)}")
    assert list(tmp_path.iterdir()) == []


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000_000, 60_000_000))


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q4_K_M"])
def test_a_disk_that_refuses_midway_is_one_line_and_no_file(smol_checkpoint: Path, quant: str, tmp_path: Path) -> None:
    command = command_for(smol_checkpoint, tmp_path / "o.gguf", quant)
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_files, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.gguf"
    check = hf_to_gguf.check_positions

    def somebody_is_faster(plan: Any, path: Path) -> None:
        check(plan, path)
        output.write_text("theirs")

    monkeypatch.setattr(hf_to_gguf, "check_positions", somebody_is_faster)
    with pytest.raises(YarnEdgeError, match="exists already"):
        convert(tiny.write_checkpoint(tmp_path / "ck"), str(output), "F16")
    assert output.read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "out.gguf"]


def _wrong_tokens(path: Path) -> None:
    raise YarnEdgeError(f"{path}: other tokens")


def _damaged(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"x")


@pytest.mark.parametrize(
    "check, message", [(_wrong_tokens, "other tokens"), (_damaged, "its header is not the one that was written")]
)
def test_what_the_check_beside_the_tensors_finds_ends_it(
    check: Callable[[Path], None], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is on the disk in full when it is checked, and stays what it was."""
    headers: list[int] = []

    def checked(_plan: Any, path: Path) -> tuple[str, ...]:
        headers.append(len(read_gguf(path).tensors))
        check(path)
        return ()

    monkeypatch.setattr(hf_to_gguf, "check_header", checked)
    folder = tiny.write_checkpoint(tmp_path / "ck")
    with pytest.raises(YarnEdgeError, match=message):
        convert(folder, str(tmp_path / "out.gguf"), "F16")
    assert headers[0] > 0
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]


def test_a_name_chosen_by_few_texts_is_proved_beside_the_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it fails there, all names are tried with all texts: the file and what is told are those of a proof before the tensors."""
    folder = tiny.write_checkpoint(tmp_path / "ck")
    expected = convert(folder, str(tmp_path / "expected.gguf"), "F16")[0]
    told = capsys.readouterr().err
    assert told.count(", proved") == 1
    names = "llama-bpe", read_gguf(expected).metadata["tokenizer.ggml.pre"]
    rows = [SimpleNamespace(name=name) for name in names]
    monkeypatch.setattr(vocab_proof, "pretokenizer_candidates", lambda _signature: rows)
    monkeypatch.setattr(vocab_proof, "STRESS_TEXTS", ("a",))
    chosen = vocab_proof.prove(read_vocabulary(folder, 320), folder, None, None, False)
    assert chosen.pre == "llama-bpe"
    monkeypatch.setattr(conversion, "prove", vocab_proof.prove)
    proved: list[bool] = []
    monkeypatch.setattr(hf_to_gguf, "convert_job", noticing(hf_to_gguf.convert_job, proved))
    assert convert(folder, str(tmp_path / "out.gguf"), "F16")[0].read_bytes() == expected.read_bytes()
    assert proved == [False, True]
    assert capsys.readouterr().err.count(", proved") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ck", "expected.gguf", "out.gguf"]


def noticing(function: Callable[..., Any], proved: list[bool]) -> Callable[..., Any]:
    """The function, whose keyword `proved` is noticed."""

    def called(*args: Any, **words: Any) -> Any:
        proved.append(words["proved"])
        return function(*args, **words)

    return called


def test_the_check_of_a_written_file_sees_other_positions(tmp_path: Path) -> None:
    folders = [
        tiny.write_checkpoint(tmp_path / name, rope_scaling={**tiny.YARN["rope_scaling"], "factor": factor})
        for name, factor in (("a", 4.0), ("b", 8.0))
    ]
    plans = [plan_conversion(folder) for folder in folders]
    (path,) = convert(folders[0], str(tmp_path / "a.gguf"), "F16")
    check_positions(plans[0], path)
    with pytest.raises(YarnEdgeError, match="would not run with the checkpoint's positions"):
        check_positions(plans[1], path)


def test_forms_of_nous_checkpoints(tmp_path: Path) -> None:
    """The authors' formulas, written out: 0.1 (Llama) or 0.07 (Mistral, with betas 128 and 2) ln s + 1, times attn_factor."""
    block = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "finetuned": True}
    table = [
        ("llama", {}, "modeling_llama_together_yarn", 0.1 * np.log(4) + 1),
        ("llama", {"attn_factor": 1.5}, "modeling_llama_yarn", 1.5 * (0.1 * np.log(4) + 1)),
        ("mistral", {}, "modeling_mistral_yarn", 0.07 * np.log(4) + 1),
    ]
    for i, (family, extra, module, attention_factor) in enumerate(table):
        auto_map = {"AutoModelForCausalLM": f"{module}.Model"}
        folder = tiny.write_checkpoint(tmp_path / f"ck{i}", family, rope_scaling={**block, **extra})
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
        path = convert(folder, str(tmp_path / f"{i}.gguf"), "F32")[0]
        tokens = [(5 * k + 1) % 300 for k in range(64)]
        betas = (128.0, 2.0) if family == "mistral" else (32.0, 1.0)
        truth = Truth.load(folder)
        frequencies, magnitude = nous(0.07 if family == "mistral" else 0.1, betas)(config)
        assert magnitude == pytest.approx(attention_factor)
        truth.by_formula(frequencies, magnitude)
        assert divergence(truth.logits(tokens), logits_of(path, tokens)).kl_mean < 1e-9
        assert {c.status for c in verify(path, folder, n_tokens=64)} == {"pass"}


def test_no_space_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000, total=2000))
    with pytest.raises(YarnEdgeError, match=r"needs 0\.00 GB on this disk"):
        convert(folder, str(tmp_path / "out.gguf"), "F32")
    assert [p.name for p in tmp_path.iterdir()] == ["ck"]
