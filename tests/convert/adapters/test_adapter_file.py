"""GGUF adapters: added to a running base they give what the merged file gives, in every family; what they cannot hold is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from yarn_edge.cli import main
from yarn_edge.convert.adapters.requests import AdaptedCheckpoint
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.engine.state_cache import run_key
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.lora import LoraFile
from yarn_edge.runtime.model import Model
from yarn_edge.verify.transformers_reference import divergence

from support import adapters, depth, tiny_families
from support.adapters import pair
from support.made_once import Shelf

TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(64)]
KL_LIMIT = 1e-9
KL_LIMITS = {"gemma3": 1e-7}  # ggml computes its GELU in half precision
# Rows of q and k in another order (llama, mistral), fused rows (phi3), experts of which one is left out, untied embeddings.
FAMILIES = ("llama", "phi3", "qwen3_moe", "mixtral", "gemma3")
if depth.full:
    FAMILIES = tuple(tiny_families.FAMILIES)
SKIPPED_EXPERT = ".experts.1."


def matrices(base: Path) -> dict[str, torch.Tensor]:
    """A pair for every linear layer of a checkpoint, with ranks of their own, and for untied embeddings and head."""
    made: dict[str, torch.Tensor] = {}
    for number, (name, weight) in enumerate(load_file(base / "model.safetensors").items()):
        module = name.removesuffix(".weight")
        if weight.dim() != 2 or SKIPPED_EXPERT in name or "norm" in name:
            continue
        found = pair(module, *weight.shape, rank=RANKS[number % 2])
        if "embed_tokens" in name:
            a, b = found.values()
            made[f"base_model.model.{module}.lora_embedding_A"] = b.T
            made[f"base_model.model.{module}.lora_embedding_B"] = a.T
        else:
            made |= found
    return made


RANKS = (2, 3)


def patterns(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """rank_pattern: the rank of each module."""
    a = {name: t for name, t in tensors.items() if "lora_A" in name or "embedding_A" in name}
    return {
        name.removeprefix("base_model.model.").partition(".lora_")[0].replace(".", r"\."): len(t)
        for name, t in a.items()
    }


def logits(path: Path, *loras: str) -> Any:
    with Model(path, trust=True) as model:
        model.add_loras([LoraFile.parse(lora) for lora in loras])
        settings = ContextSettings(n_ctx=128, kv_type="f32", attention="plain", threads=1)
        with open_context(model, settings) as context:
            context.evaluate(TOKENS, 0, "all")
            return context.logits()


def kl(wanted: Any, found: Any) -> float:
    return divergence(wanted, found).kl_mean


@pytest.mark.parametrize("family", FAMILIES)
def test_added_to_the_base_it_is_the_merged_file(family: str, tmp_path: Path) -> None:
    base = tiny_families.write(tmp_path / "base", family)
    tensors = matrices(base)
    if "lm_head.weight" not in load_file(base / "model.safetensors"):  # one matrix for both
        tensors = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    folder = adapters.write(tmp_path / "a", tensors, use_rslora=True, lora_alpha=3, rank_pattern=patterns(tensors))
    asked = AdaptedCheckpoint.of(base, folder)
    (plain,), (merged,) = (
        convert(base, str(tmp_path / "b.gguf"), "F32"),
        convert(asked, str(tmp_path / "m.gguf"), "F32"),
    )
    command = ["convert", str(base), "--adapter", str(folder), "--as-adapter", "-o", str(tmp_path / "lora.gguf")]
    assert main(command) == 0
    wanted = logits(merged)
    assert kl(wanted, logits(plain)) > 1e-3
    assert kl(wanted, logits(plain, str(tmp_path / "lora.gguf"))) < KL_LIMITS.get(family, KL_LIMIT)


@pytest.fixture(scope="session")
def made(shelf: Shelf) -> Path:
    """A base as F32, and two adapters of it as GGUF, one, other; and one times 0.5 and other as one file."""

    def make(folder: Path) -> None:
        base = tiny_families.write(folder / "base", "llama")
        convert(base, str(folder / "base.gguf"), "F32")
        for name, module in (("one", "model.layers.0.self_attn.q_proj"), ("other", "model.layers.3.mlp.up_proj")):
            rows, columns = load_file(base / "model.safetensors")[f"{module}.weight"].shape
            both = pair(module, rows, columns) | pair("model.layers.1.self_attn.q_proj", 128, 64, rank=4)
            adapters.write(folder / name, both, lora_alpha=5 if name == "one" else 7)
            save = ["convert", str(base), "--as-adapter", "-o"]
            assert main([*save, str(folder / f"{name}.gguf"), "--adapter", str(folder / name)]) == 0
        both_ways = ["--adapter", f"{folder / 'one'}=0.5", "--adapter", str(folder / "other")]
        assert main([*save, str(folder / "sum.gguf"), *both_ways]) == 0

    return shelf.made_once("gguf-adapters", make)


def test_several_adapters_at_once_and_in_one_file(made: Path) -> None:
    one, other = (str(made / f"{name}.gguf") for name in ("one", "other"))
    wanted = logits(made / "base.gguf", f"{one}=0.5", other)
    assert kl(wanted, logits(made / "base.gguf", str(made / "sum.gguf"))) < KL_LIMIT
    assert kl(wanted, logits(made / "base.gguf", one, other)) > 1e-6


def test_numbers_of_a_plain_adapter_stay_as_they_are(made: Path) -> None:
    file = read_gguf(made / "other.gguf")
    assert file.metadata["general.type"] == "adapter"
    assert file.metadata["adapter.lora.alpha"] == 7
    tensor = file.tensors["blk.3.ffn_up.weight.lora_b"]
    data = np.frombuffer(tensor.path.read_bytes(), np.float32, tensor.n_elements, tensor.offset)
    saved = load_file(made / "other" / "adapter_model.safetensors")
    assert np.array_equal(data, saved["base_model.model.model.layers.3.mlp.up_proj.lora_B.weight"].numpy().ravel())


def test_states_are_kept_by_adapter(made: Path) -> None:
    """No other adapter, scale or number of them may use what was evaluated under one; a copy of the same file may."""

    def key(*loras: str) -> str:
        with Model(made / "base.gguf", trust=True) as model:
            model.add_loras([LoraFile.parse(lora) for lora in loras])
            with open_context(model, ContextSettings(n_ctx=64, threads=1)) as context:
                return run_key(context)

    one, other = (str(made / f"{name}.gguf") for name in ("one", "other"))
    copy = made / "copy.gguf"
    copy.write_bytes(Path(one).read_bytes())
    keys = [key(), key(one), key(other), key(one, other), key(f"{one}=0.5"), key(str(made / "sum.gguf"))]
    assert len({*keys}) == len(keys)
    assert key(str(copy)) == key(one)
    assert key(f"{one}=0") == key()
    changed = bytearray(Path(one).read_bytes())
    tensor = read_gguf(one).tensors["blk.1.attn_q.weight.lora_a"]
    changed[tensor.offset + tensor.n_bytes // 2] ^= 1  # not in what model_identity samples of a large file
    copy.write_bytes(changed)
    assert key(str(copy)) != key(one)


UNFIT = {
    "dora": (
        {
            **pair("model.layers.0.self_attn.v_proj", 64, 64),
            "base_model.model.model.layers.0.self_attn.v_proj.lora_magnitude_vector": torch.ones(64),
        },
        "is DoRA",
    ),
    "a norm": ({"base_model.model.model.norm.weight": torch.ones(64)}, "is a whole tensor"),
    "a bias": (
        {
            "base_model.model.model.layers.0.self_attn.v_proj.lora_B.bias": torch.ones(64),
            **pair("model.layers.0.self_attn.v_proj", 64, 64),
        },
        "is a bias",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_a_gguf_adapter_cannot_hold(
    case: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, message = UNFIT[case]
    folder = adapters.write(tmp_path / "a", tensors, use_dora=case == "dora")
    command = ["convert", str(made / "base"), "--adapter", str(folder), "--as-adapter", "-o", str(tmp_path / "x.gguf")]
    assert main(command) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    "flags, message",
    [(["--quant", "Q8_0"], "--as-adapter writes float32"), (["--pure"], "--as-adapter writes float32")],
    ids=["quant", "pure"],
)
def test_as_adapter_has_one_type(
    flags: list[str], message: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "convert",
        str(made / "base"),
        "--adapter",
        str(made / "one"),
        "--as-adapter",
        "-o",
        str(tmp_path / "x.gguf"),
    ]
    assert main([*command, *flags]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_is_no_model(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect"], ["perplexity"], ["quantize", "-o", "x.gguf"]):
        assert main([command[0], str(made / "one.gguf"), *command[1:]]) == 2
        assert "is an adapter, not a model: pass it with --lora" in capsys.readouterr().err
