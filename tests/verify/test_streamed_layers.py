"""A checkpoint that transformers runs layer by layer has the logits that it has in memory, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yarn_edge.checkpoint.tensor_names import KEY_MAPPING
from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.progress import set_quiet
from yarn_edge.verify import transformers_reference
from yarn_edge.verify.command import verify
from yarn_edge.verify.streamed_layers import StreamedLayers, open_layers
from yarn_edge.verify.transformers_reference import reference_logits

from support import tiny_families

TOKENS = [(7 * i * i + 3 * i + 11) % 300 for i in range(100)]
EXPERT = "model.layers.1.mlp.experts.2."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def without_notes() -> None:
    set_quiet(True)


def both(folder: Path) -> list[np.ndarray[Any, Any]]:
    return [reference_logits(folder, TOKENS, streamed=streamed) for streamed in (False, True)]


def changed(folder: Path, name: str, change: Callable[[Tensors], None]) -> Path:
    """A tiny checkpoint with other tensors."""
    state = tiny_families.saved(tiny_families.write(folder / "whole", name))
    change(state)
    config = tiny_families.model(name).config.to_dict()
    tiny_families.rewrite(folder / "changed", state, config)
    return folder / "changed"


# Dense, tied and with layers without rope, with windows and nested rope, experts of two kinds, queries and keys in one tensor.
@pytest.mark.parametrize("name", ["granite", "smollm3-tied", "gemma3", "qwen3_moe", "mixtral", "phi3"])
def test_the_logits_are_the_same(name: str, tmp_path: Path) -> None:
    whole, streamed = both(tiny_families.write(tmp_path / "ck", name, torch.bfloat16))
    assert np.isfinite(whole).all()
    assert whole.std() > 0.1
    assert np.array_equal(whole, streamed)


@pytest.mark.parametrize("form", ["shards", "pytorch_model.bin", "wrapped names"])
def test_however_the_tensors_are_kept(form: str, tmp_path: Path) -> None:
    name = "qwen3_moe"
    folder = tmp_path / "ck"
    if form == "shards":
        tiny_families.model(name).to(torch.float16).save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("*.safetensors"))) > 3
    elif form == "wrapped names":

        def wrap(state: Tensors) -> None:
            for key in list(state):
                state["module." + key.replace("layers.1.", "layers.1._orig_mod.")] = state.pop(key)

        folder = changed(tmp_path, name, wrap)
    else:
        state = tiny_families.saved(tiny_families.write(folder, name))
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    assert np.array_equal(*both(folder))


def _head_only(state: Tensors) -> None:
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")


def _another_head(state: Tensors) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0)


@pytest.mark.parametrize("change", [_head_only, _another_head])
def test_tied_weights_are_those_of_either_name(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    assert np.array_equal(*both(changed(tmp_path, "smollm3-tied", change)))


def test_what_asks_a_weight_for_its_device_before_it_is_read(tmp_path: Path) -> None:
    """Llama 4 moves the tokens to the device of its embeddings."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "intermediate_size_mlp": 96, "head_dim": 16, "vocab_size": 320}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.AutoConfig.for_model("llama4_text", **sizes, **heads, pad_token_id=None)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "ck")
    assert np.array_equal(*both(tmp_path / "ck"))


def opened(folder: Path, name: str) -> StreamedLayers:
    kind = type(tiny_families.model(name))
    arguments = {"dtype": torch.float32, "attn_implementation": "eager", "key_mapping": KEY_MAPPING}
    return open_layers(kind, folder, **arguments)[0]


def bytes_in_memory(model: Any) -> int:
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
    return sum(n for n in stores.values() if n > 4)


@pytest.mark.parametrize("name", ["smollm3-tied", "qwen3_moe"])
def test_one_module_is_in_memory_at_a_time(name: str, tmp_path: Path) -> None:
    layers = opened(tiny_families.write(tmp_path / "ck", name, torch.bfloat16), name)
    inside: list[int] = []
    between: list[int] = []
    for module in layers.model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_a: inside.append(bytes_in_memory(layers.model)))
    layers.run(torch.tensor([TOKENS]), lambda *_a: between.append(bytes_in_memory(layers.model)))
    model = tiny_families.model(name).model
    sizes = [4 * sum(p.numel() for p in part.parameters()) for part in (*model.layers, model.embed_tokens)]
    assert max(inside) == max(sizes)
    assert between == [0] * 7  # embeddings, four layers, norm, head


def test_a_weight_that_is_read_outside_of_its_module_is_not_a_number(tmp_path: Path) -> None:
    layers = opened(tiny_families.write(tmp_path / "ck", "granite"), "granite")
    assert torch.isnan(layers.model.model.layers[0].mlp(torch.ones(1, 1, 64))).all()


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("granite", "model.layers.2.self_attn.q_proj.weight", "does not find model.layers.2.self_attn.q_proj.weight"),
        ("granite", "model.norm.weight", "does not find model.norm.weight: no reference"),
        ("smollm3-tied", "model.embed_tokens.weight", "does not find lm_head.weight and 1 more"),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight", "does not find model.layers.3.mlp.gate.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight", f"does not find {EXPERT}up_proj.weight: no"),
        ("mixtral", "model.layers.3.block_sparse_moe.experts.3.w2.weight", "does not find .*experts.3.w2.weight: no"),
    ],
)
def test_a_missing_tensor_is_found(name: str, key: str, said: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, name, lambda state: state.__delitem__(key))
    for streamed in (False, True):
        with pytest.raises(YarnEdgeError, match=said):
            reference_logits(folder, TOKENS, streamed=streamed)


def test_a_tensor_of_another_shape_is_found(tmp_path: Path) -> None:
    key = "model.layers.1.mlp.down_proj.weight"
    folder = changed(tmp_path, "granite", lambda state: state.__setitem__(key, state[key][:-1]))
    for streamed in (False, True):
        with pytest.raises(
            YarnEdgeError, match=rf"cannot load {key}, of shape \[63, 96\] where the config implies \[64, 96\],: no"
        ):
            reference_logits(folder, TOKENS, streamed=streamed)


@pytest.mark.parametrize("kind", ["up_proj", "down_proj"])
def test_an_expert_of_another_shape_is_found(kind: str, tmp_path: Path) -> None:
    key = f"{EXPERT}{kind}.weight"
    folder = changed(tmp_path, "qwen3_moe", lambda state: state.__setitem__(key, state[key][:-1]))
    for streamed in (False, True):
        with pytest.raises(
            YarnEdgeError, match=rf"cannot load {key}, of shape \[.* where other experts have \[.*\],: no"
        ):
            reference_logits(folder, TOKENS, streamed=streamed)


def test_verify_says_so_before_its_proofs(tmp_path: Path) -> None:
    path = convert(tiny_families.write(tmp_path / "ck", "qwen3_moe"), str(tmp_path / "out.gguf"), "F32")[0]
    folder = changed(tmp_path, "qwen3_moe", lambda state: state.__delitem__(f"{EXPERT}up_proj.weight"))
    told: list[str] = []
    with pytest.raises(YarnEdgeError, match=f"does not find {EXPERT}up_proj.weight"):
        verify(path, folder, on_check=lambda check: told.append(check.name))
    assert told == ["metadata"]


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_a_model_that_computes_with_quantized_values_is_refused(tmp_path: Path) -> None:
    folder = tiny_families.write(tmp_path / "ck", "granite")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": {"quant_method": "bitnet"}}))
    with pytest.raises(YarnEdgeError, match="quantized values, which cannot be run layer by layer"):
        reference_logits(folder, TOKENS, streamed=True)


def test_verify_streams_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_quiet(False)
    folder = tiny_families.write(tmp_path / "ck", "glm4")
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    needed = 4 * sum(p.numel() for p in tiny_families.model("glm4").parameters())
    capsys.readouterr()
    told = "transformers runs one layer after the other"
    for spare, streamed in ((2 * needed, False), (needed // 2, True)):
        monkeypatch.setattr(transformers_reference, "spare_bytes", lambda spare=spare: spare)
        assert main(["verify", str(path), "--against", str(folder)]) == 0
        shown = capsys.readouterr()
        assert "pass  logits" in shown.out
        assert (told in shown.err) is streamed
