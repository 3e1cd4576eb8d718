"""Rows and columns in another order, and what only some layers have, against indexing in NumPy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.checkpoint.config_file import ConfigFile
from yarn_edge.convert import one_pass, row_reader
from yarn_edge.convert.checkpoint import Checkpoint, Tensor
from yarn_edge.convert.families.architectures import hyper_parameters, model_sizes, tensor_rows
from yarn_edge.convert.families.layers import layers_called, leading
from yarn_edge.convert.families.orders import equal_part, every, interleaved, joined, segment
from yarn_edge.convert.families.rows import Architecture, TensorRow, attention, matrix, minus_exp, plus_one
from yarn_edge.convert.families.sizes import ModelSizes, Size
from yarn_edge.convert.model_tensors import without_prediction
from yarn_edge.errors import YarnEdgeError

SIZES = ModelSizes(2, 12, 10, 4, 2, 6, 20, {"experts": 3, "rank": 8, "nope": 5, "value": 7, "groups": 2})
KV = ("n_head*nope+n_head*value", "rank")
QKVZ = ("2", "2", "3", "3")  # per group, as Qwen3-Next's in_proj_qkvz
HEADS = np.arange(4 * 12).reshape(4, 12)


def v_heads(_sizes: ModelSizes, n: int) -> np.ndarray[Any, Any]:
    """Heads by group -> groups by head (Qwen 3.5), 3 rows a head."""
    return np.arange(n).reshape(2, -1, 3).swapaxes(0, 1).reshape(-1)


def backwards(_sizes: ModelSizes, n: int) -> np.ndarray[Any, Any]:
    return np.arange(n)[::-1]


def pairs(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.reshape(-1, 2, 3, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


# name -> (a row's shape and how it is read, what the target has of an array of that shape)
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], Any]] = {
    "as it is": (("vocab", "hidden"), {}, lambda x: x),
    "halves, first": (("2*ffn", "hidden"), {"rows": equal_part(0, 2)}, lambda x: x[:10]),
    "halves of experts, second": (("experts", "2*ffn", "hidden"), {"rows": equal_part(1, 2)}, lambda x: x[:, 10:]),
    "even rows": (("2*ffn", "hidden"), {"rows": every(2, 0)}, lambda x: x[::2]),
    "odd columns of transposed experts": (
        ("experts", "hidden", "2*ffn"),
        {"columns": every(2, 1), "transposed": True},
        lambda x: x[:, :, 1::2].swapaxes(1, 2),
    ),
    "odd values of the experts' biases": (("experts", "2*ffn"), {"columns": every(2, 1)}, lambda x: x[:, 1::2]),
    "interleaved": (("q", "hidden"), {"rows": interleaved}, pairs),
    "a vector interleaved": (("q",), {"rows": interleaved}, lambda x: pairs(x[:, None])[:, 0]),
    "k_b": (
        KV,
        {"rows": segment("n_head", ("nope", "value"), 0, matrices=True), "transposed": True},
        lambda x: x.reshape(4, 12, 8)[:, :5].swapaxes(1, 2),
    ),
    "v_b": (KV, {"rows": segment("n_head", ("nope", "value"), 1, matrices=True)}, lambda x: x.reshape(4, 12, 8)[:, 5:]),
    "q, k and v of qkvz": (
        ("20", "hidden"),
        {"rows": joined(*(segment("groups", QKVZ, k) for k in range(3)))},
        lambda x: np.concatenate([x.reshape(2, 10, -1)[:, a:b].reshape(-1, 12) for a, b in ((0, 2), (2, 4), (4, 7))]),
    ),
    "heads in another order": (("q", "hidden"), {"rows": v_heads}, lambda x: x[v_heads(SIZES, 24)]),
    "columns in another order": (("hidden", "q"), {"columns": v_heads}, lambda x: x[:, v_heads(SIZES, 24)]),
    "backwards": (("q", "hidden"), {"rows": backwards}, lambda x: x[::-1]),
    "far apart": (("q", "hidden"), {"rows": every(5, 2)}, lambda x: x[2::5]),
    "both, transposed": (
        ("q", "hidden"),
        {"rows": v_heads, "columns": backwards, "transposed": True},
        lambda x: x[v_heads(SIZES, 24)][:, ::-1].T,
    ),
    "a dimension of 1 in the middle": (("q", "1", "rank"), {"rows": v_heads}, lambda x: x[v_heads(SIZES, 24)][:, 0]),
    "one more": (("hidden",), {"values": plus_one}, lambda x: x + np.float32(1)),
    "minus exp": (("hidden",), {"values": minus_exp}, lambda x: (-np.exp(x.astype(np.float64))).astype(np.float32)),
}


def tensor(name: str, values: np.ndarray[Any, Any]) -> Tensor:
    raw = values.tobytes()

    def read(at: int, out: Any) -> None:
        assert at + len(out) <= len(raw)
        out[:] = np.frombuffer(raw[at : at + len(out)], np.uint8)

    return Tensor(name, "F32", values.shape, read)


def checkpoint(*tensors: Tensor) -> Checkpoint:
    return Checkpoint(Path("ck"), ConfigFile("config.json", {}), {t.name: t for t in tensors})


@pytest.mark.parametrize("small", [False, True], ids=["whole", "in slices"])
@pytest.mark.parametrize("case", CASES)
def test_a_target_has_the_rows_that_its_row_names(case: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, how, formula = CASES[case]
    if small:
        monkeypatch.setattr(one_pass, "SLICE_WEIGHTS", 70)
        monkeypatch.setattr(row_reader, "_BAND_BYTES", 100)
        monkeypatch.setattr(row_reader, "_MOST_GRAIN", 5)
    row = TensorRow("x", "y", shape, **how)
    values = np.random.default_rng(0).standard_normal(row.disk_shape(SIZES), np.float32)
    wanted = formula(values)
    source = row_reader.source_tensor(checkpoint(tensor("x", values)), row, SIZES)
    assert source.ne == wanted.shape[::-1]
    found = np.empty((source.n_rows, source.width), np.float32)
    for slice_ in one_pass._slices([source]):
        source.read(slice_.first_row, found[slice_.first_row :][: slice_.n_rows].view(np.uint8))
    assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()


def test_vectors_of_experts_are_read_over_all_of_them() -> None:
    row = TensorRow("x.{e}", "y", ("hidden",), rows=backwards)
    values = np.random.default_rng(0).standard_normal((3, 12), np.float32)
    source = row_reader.source_tensor(checkpoint(*(tensor(f"x.{e}", values[e]) for e in range(3))), row, SIZES)
    found = np.empty((3, 12), np.float32)
    source.read(0, found.view(np.uint8))
    assert source.ne == (12, 3)
    np.testing.assert_array_equal(found, values[:, ::-1])


@pytest.mark.parametrize("rows, grain", [(interleaved, 6), (v_heads, 24), (every(2, 0), 1), (None, 1)])
def test_slices_begin_at_heads_if_their_rows_change_places(rows: Any, grain: int) -> None:
    row = TensorRow("x", "y", ("q", "hidden"), rows=rows)
    source = row_reader.source_tensor(checkpoint(tensor("x", np.zeros((24, 12), np.float32))), row, SIZES)
    assert source.grain == grain


def test_rows_are_read_in_one_go_and_only_far_ones_run_by_run() -> None:
    reads: list[tuple[int, int]] = []
    values = np.zeros((24, 12), np.float32)
    held = replace(tensor("x", values), read=lambda at, out: reads.append((at // 48, len(out) // 48)))
    for rows, wanted in ((interleaved, [(0, 24)]), (every(2, 0), [(0, 23)]), (every(12, 3), [(3, 1), (15, 1)])):
        reads.clear()
        source = row_reader.source_tensor(checkpoint(held), TensorRow("x", "y", ("q", "hidden"), rows=rows), SIZES)
        source.read(0, np.empty((source.n_rows, 48), np.uint8))
        assert reads == wanted


MIXED = Architecture(
    "",
    "glm4",
    (
        *attention(),
        matrix("mlp.up_proj", "ffn_up", "ffn", "hidden", layers="dense"),
        matrix("mlp.gate", "ffn_gate_inp", "experts", "hidden", layers="!dense"),
        matrix("linear.in_proj", "ssm_in", "rank", "hidden", layers="linear"),
    ),
    {"rms_norm_eps": 1e-6, "kv_lora_rank": 16},
    sizes={
        "experts": Size(("n_experts",), "expert_count"),
        "rank": Size(("kv_lora_rank",), "attention.kv_lora_rank"),
        "q_rank": Size(("q_lora_rank",), "attention.q_lora_rank", optional=True),
    },
    prediction=("mtp.",),
    prediction_layers="n_next",
    layer_types=("full_attention", "linear_attention"),
    by_layer={"n_head": "heads_by_layer"},
    layers={"dense": leading("first_k_dense"), "linear": layers_called("layer_types", "linear_attention")},
    keys={
        "expert_weights_norm": True,
        "attention.head_count_kv": 1,
        "attention.value_length": None,
        "leading_dense_block_count": lambda config, _sizes: config.values["first_k_dense"],
    },
)
VALUES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 20,
    "n_experts": 3,
    "first_k_dense": 1,
    "heads_by_layer": [4, 2, 6],
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
}


def test_layers_differ_in_their_tensors_sizes_and_keys() -> None:
    config = ConfigFile("config.json", VALUES)
    sizes = model_sizes(MIXED, config)
    rows = {row.target: row.disk_shape(sizes) for row in tensor_rows(MIXED, config, sizes)}
    assert [rows[f"blk.{i}.attn_q.weight"] for i in range(3)] == [(24, 12), (12, 12), (36, 12)]
    named = ("ffn_up", "ffn_gate_inp", "ssm_in")
    assert [[f"blk.{i}.{name}.weight" in rows for name in named] for i in range(3)] == [
        [True, False, False],
        [False, True, True],
        [False, True, False],
    ]
    assert rows["blk.1.ssm_in.weight"] == (16, 12)
    keys = {key.partition(".")[2]: value for key, value in hyper_parameters(MIXED, config, sizes, 64).items()}
    wanted = {
        "attention.head_count": (4, 2, 6),
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": 16,
        "expert_count": 3,
        "expert_weights_norm": True,
        "leading_dense_block_count": 1,
    }
    assert {key: keys[key] for key in wanted} == wanted
    assert not keys.keys() & {"attention.value_length", "attention.q_lora_rank"}


WRONG = {
    "too many dense layers": ({"first_k_dense": 4}, "first_k_dense is 4, expected a whole number from 0 to"),
    "no types": ({"layer_types": None}, "layer_types is None, expected a list of 3 names"),
    "two layers": ({"heads_by_layer": [4, 4]}, "expected 3 whole numbers, one for each layer"),
    "no heads": ({"heads_by_layer": [4, 0, 4]}, "expected 3 whole numbers, one for each layer"),
    "odd heads": (
        {"heads_by_layer": [4, 3, 4]},
        "num_key_value_heads is 2, which does not divide num_attention_heads, 3",
    ),
    "unknown types": ({"layer_types": ["mamba"] * 3}, "only full_attention or linear_attention can be converted"),
    "no rank": ({"kv_lora_rank": None}, "kv_lora_rank is null: add it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_config_cannot_say_about_layers(case: str) -> None:
    changes, message = WRONG[case]
    config = ConfigFile("config.json", {**VALUES, **changes})
    with pytest.raises(YarnEdgeError, match=message.replace("[", r"\[")):
        tensor_rows(MIXED, config, model_sizes(MIXED, config))


@pytest.mark.parametrize(
    "n, left", [(1, ["model.layers.4.a"]), (2, []), (None, ["model.layers.3.a", "model.layers.4.a"])]
)
def test_layers_that_predict_further_tokens_are_left_out(n: int | None, left: list[str]) -> None:
    config = ConfigFile("config.json", {"num_hidden_layers": 3, "n_next": n})
    names = ("model.layers.2.a", "model.layers.3.a", "model.layers.4.a", "mtp.norm")
    found = without_prediction(checkpoint(*(tensor(name, np.zeros(1, np.float32)) for name in names)), MIXED, config)
    assert list(found.tensors) == ["model.layers.2.a", *left]
    assert found.notes == (f"note: left out: {3 - len(left)} tensors of layers that predict further tokens",)
    with pytest.raises(YarnEdgeError, match="n_next is -1, expected a whole number from 0 to"):
        without_prediction(found, MIXED, ConfigFile("config.json", {**config.values, "n_next": -1}))
