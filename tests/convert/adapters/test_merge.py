"""Adapters of every kind against peft's own merge_and_unload in float32, and what cannot be merged, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from yarn_edge.checkpoint.config_file import read_json
from yarn_edge.convert.adapters.requests import AdaptedCheckpoint
from yarn_edge.convert.source_model import SourceModel, open_source_model
from yarn_edge.errors import YarnEdgeError

from support import adapters, tiny
from support.adapters import pair
from support.made_once import Shelf

Q = "model.layers.0.self_attn.q_proj"
ROUNDING = 2e-6  # of the largest value of a tensor


@pytest.fixture(scope="session")
def base(shelf: Shelf) -> Path:
    return shelf.made_once("adapter-base", lambda folder: adapters.write_base(folder / "base") and None) / "base"


@pytest.fixture(scope="session")
def tied(shelf: Shelf) -> Path:
    return shelf.made_once("adapter-tied", lambda folder: adapters.write_base(folder / "base", True) and None) / "base"


@pytest.fixture(scope="session")
def kinds(base: Path, shelf: Shelf) -> Path:
    def make(folder: Path) -> None:
        for name in adapters.KINDS:
            adapters.with_peft(base, folder / name, name)

    return shelf.made_once("adapters", make)


def opened(base: Path | None, *folders: str | Path) -> SourceModel:
    return open_source_model(AdaptedCheckpoint.of(base, *folders))


def values(model: SourceModel) -> dict[str, Any]:
    return {name: tensor.float32() for name, tensor in model.checkpoint.tensors.items()}


def assert_close(ours: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        wanted = tensor.float().numpy()
        assert np.abs(ours[name] - wanted).max() <= ROUNDING * np.abs(wanted).max(), name


@pytest.mark.parametrize("name", adapters.KINDS)
def test_merged_as_peft_does(name: str, base: Path, kinds: Path) -> None:
    merged, plain = load_file(kinds / name / "merged.safetensors"), load_file(base / "model.safetensors")
    assert any(not torch.equal(merged[key], plain[key]) for key in plain)
    assert_close(values(opened(base, kinds / name / "adapter")), merged)


NAMES = {
    "with the adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "as torch.compile and FSDP leave them": lambda name: name.replace(
        "self_attn.", "self_attn._fsdp_wrapped_module."
    ).replace("base_model.", "_orig_mod.base_model."),
    "of a model without its head": lambda name: name.replace("base_model.model.model.", "base_model.model."),
    "of a module": lambda name: name.removeprefix("base_model.model."),
    "of DDP": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("case", NAMES)
def test_names_as_trainers_write_them(case: str, base: Path, kinds: Path, tmp_path: Path) -> None:
    folder = adapters.renamed(kinds / "rank_pattern" / "adapter", tmp_path / "a", NAMES[case])
    assert_close(values(opened(base, folder)), load_file(kinds / "rank_pattern" / "merged.safetensors"))


def test_whole_modules_under_their_longer_names(base: Path, kinds: Path, tmp_path: Path) -> None:
    """As DeepSpeed and older versions of peft write modules_to_save."""

    def longer(name: str) -> str:
        return name if "lora" in name else name.replace(".weight", ".modules_to_save.default.weight")

    folder = adapters.renamed(kinds / "norms whole" / "adapter", tmp_path / "a", longer)
    assert_close(values(opened(base, folder)), load_file(kinds / "norms whole" / "merged.safetensors"))


def test_several_adapters_with_weights(base: Path, kinds: Path) -> None:
    """The sum of what each adds, times its weight."""
    plain = load_file(base / "model.safetensors")
    one, other = (load_file(kinds / name / "merged.safetensors") for name in ("plain", "rslora"))
    wanted = {key: w + 0.5 * (one[key] - w) - 2 * (other[key] - w) for key, w in plain.items()}
    model = opened(base, f"{kinds / 'plain' / 'adapter'}=0.5", f"{kinds / 'rslora' / 'adapter'}=-2")
    for key, tensor in wanted.items():
        assert np.abs(values(model)[key] - tensor.numpy()).max() < 1e-5, key


def test_rows_are_the_same_however_they_are_cut(base: Path, kinds: Path) -> None:
    tensor = opened(base, kinds / "dora" / "adapter").checkpoint.tensors[f"{Q}.weight"]
    whole = tensor.float32()
    parts = np.concatenate([tensor.bits(at, min(at + 7, 64)) for at in range(0, 64, 7)])
    assert np.abs(parts - whole).max() <= 1e-7 * np.abs(whole).max()


def tied_pair(kind: str) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{'model.embed_tokens' if kind == 'embeddings' else 'lm_head'}.{name}": tensor
        for name, tensor in {
            "embeddings": {"lora_embedding_A": torch.randn(4, 320) * 0.1, "lora_embedding_B": torch.randn(64, 4) * 0.1},
            "head": {"lora_A.weight": torch.randn(4, 64) * 0.1, "lora_B.weight": torch.randn(320, 4) * 0.1},
        }[kind].items()
    }


@pytest.mark.parametrize("kind", ["embeddings", "head"])
def test_tied_weights_become_two_where_one_is_changed(kind: str, tied: Path, tmp_path: Path) -> None:
    """What ran in training: peft's module adds to one of them alone."""
    torch.manual_seed(0)
    found = tied_pair(kind)
    model = opened(tied, adapters.write(tmp_path / "a", found))
    shared = load_file(tied / "model.safetensors")["model.embed_tokens.weight"]
    first, second = found.values()
    added = 2 * ((second @ first).T if kind == "embeddings" else second @ first)
    got = values(model)
    changed, kept = ("model.embed_tokens.weight", "lm_head.weight")[:: 1 if kind == "embeddings" else -1]
    assert np.abs(got[changed] - (shared + added).numpy()).max() < 1e-5
    assert np.array_equal(got[kept], shared.numpy())
    assert "output.weight" in {row.target for row in model.rows}


def test_tied_weights_stay_tied_where_both_are_changed_alike(tied: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 320) * 0.1, torch.randn(64, 4) * 0.1
    found = {
        "base_model.model.model.embed_tokens.lora_embedding_A": a,
        "base_model.model.model.embed_tokens.lora_embedding_B": b,
        "base_model.model.lm_head.lora_A.weight": b.T,
        "base_model.model.lm_head.lora_B.weight": a.T,
    }
    model = opened(tied, adapters.write(tmp_path / "a", found))
    assert "output.weight" not in {row.target for row in model.rows}
    assert (
        np.abs(values(model)["model.embed_tokens.weight"] - values(opened(tied))["model.embed_tokens.weight"]).max()
        > 0.01
    )


def test_trained_rows_of_tied_embeddings_are_the_heads_too(tied: Path, tmp_path: Path) -> None:
    rows = torch.randn(2, 64)
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    model = opened(tied, adapters.write(tmp_path / "a", {name: rows}, trainable_token_indices=[5, 300]))
    assert "lm_head.weight" not in model.checkpoint.tensors
    assert np.array_equal(values(model)["model.embed_tokens.weight"][[5, 300]], rows.numpy())


def test_added_tokens_come_with_the_adapters_tokenizer(base: Path, tmp_path: Path) -> None:
    grown = {name: torch.randn(323, 64) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    folder = adapters.write(tmp_path / "a", {f"base_model.model.{name}": tensor for name, tensor in grown.items()})
    tiny.write_tokenizer(folder)
    model = opened(base, folder)
    assert model.sizes.vocab == 323
    assert model.tokenizer == folder
    assert np.array_equal(values(model)["lm_head.weight"], grown["lm_head.weight"].numpy())


def test_the_base_by_its_name(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, or a model in the Hub's cache."""
    snapshot = tmp_path / "hub" / "models--org--base" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(base)
    refs = tmp_path / "hub" / "models--org--base" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = pair(Q, 64, 64)
    for name, path in (("org/base", snapshot), (str(base), base)):
        folder = adapters.write(tmp_path / "a", found, base_model_name_or_path=name)
        if name == "org/base":  # links out of the cache are not followed
            with pytest.raises(YarnEdgeError, match="neither a folder here nor in"):
                opened(None, folder)
            snapshot.unlink()
            snapshot.mkdir()
            for file in base.iterdir():
                (snapshot / file.name).symlink_to(file)
        assert opened(None, folder).checkpoint.path == path


A, B = (f"base_model.model.{Q}.lora_{letter}.weight" for letter in "AB")
GOOD = pair(Q, 64, 64)
# tensors, config, and what the message says
REFUSED: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "no B": ({A: GOOD[A]}, {}, "has no lora_B beside it"),
    "another width": (
        pair(Q, 64, 48),
        {"base_model_name_or_path": "org/other"},
        r"another base \(it was trained on org/other",
    ),
    "another rank": (GOOD, {"r": 8}, "have rank 4 and 4, but adapter_config.json says 8"),
    "another rank by a pattern": (GOOD, {"rank_pattern": {"q_proj": 2}}, "says 2 for it"),
    "an unknown module": (
        pair("model.layers.9.self_attn.q_proj", 64, 64),
        {},
        "layers.9.*which the base does not have",
    ),
    "an unknown tensor": (
        {**GOOD, "base_model.model.score.weight": torch.ones(2, 64)},
        {},
        "score.weight.*the base does not have",
    ),
    "an unknown part": ({**GOOD, f"base_model.model.{Q}.lora_E": torch.ones(4, 1)}, {}, "lora_E.*does not have"),
    "several adapters": ({**GOOD, A.replace("weight", "one.weight"): GOOD[A]}, {}, "holds several adapters"),
    "more embeddings than that": ({"base_model.model.model.norm.weight": torch.ones(65)}, {}, "another base"),
    "not finite": ({A: GOOD[A] * torch.inf, B: GOOD[B]}, {}, "not finite numbers: the training diverged"),
    "aLoRA": (GOOD, {"alora_invocation_tokens": [1, 2]}, "starts to act only after certain tokens"),
    "experts as one": (GOOD, {"target_parameters": ["mlp.experts.up"]}, "stacked experts as one parameter"),
    "PiSSA": (GOOD, {"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "IA3": (GOOD, {"peft_type": "IA3"}, "only LORA is merged"),
    "prompts": (GOOD, {"peft_type": "PREFIX_TUNING"}, "no merged weight can do that"),
    "a pattern that never ends": (GOOD, {"rank_pattern": {"(a+)+b": 4}}, "too long to match"),
    "a pattern that is none": (GOOD, {"alpha_pattern": {"q_proj(": 4}}, "not a regular expression"),
    "a rank of another kind": (GOOD, {"r": "8"}, "r is '8'"),
    "an alpha that is no number": (GOOD, {"lora_alpha": None}, "lora_alpha is null"),
    "a token beyond": (
        {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 64)},
        {"trainable_token_indices": [999]},
        "up to 999, and the base has 320 rows",
    ),
    "a bias without one": (
        {
            **pair("model.layers.0.mlp.up_proj", 96, 64),
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.bias": torch.ones(96),
        },
        {"lora_bias": True},
        "up_proj.bias, which the base does not have",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused(case: str, base: Path, tmp_path: Path) -> None:
    found, config, message = REFUSED[case]
    folder = adapters.write(tmp_path / "a", found, **config)
    with pytest.raises(YarnEdgeError, match=message):
        values(opened(base, folder))


WEIGHTED = {
    "dora": "lengths, which cannot be weighted by 0.5",
    "norms whole": "whole tensor, which cannot be weighted by 0.5",
    "tokens": "cannot be added to .* or weighted",
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_what_has_no_weight(name: str, base: Path, kinds: Path) -> None:
    with pytest.raises(YarnEdgeError, match=WEIGHTED[name]):
        opened(base, f"{kinds / name / 'adapter'}=0.5")


TWICE = {
    ("dora", "plain"): "one is DoRA",
    ("plain", "dora"): "one is DoRA",
    ("norms whole", "norms whole"): "replaces what .* changes",
    ("embeddings and head whole", "head"): "changes what .* replaces",
}


@pytest.mark.parametrize("one, other", TWICE)
def test_adapters_that_do_not_add_up(one: str, other: str, base: Path, kinds: Path) -> None:
    with pytest.raises(YarnEdgeError, match=TWICE[one, other]):
        opened(base, kinds / one / "adapter", kinds / other / "adapter")


def test_a_truncated_file_is_refused(base: Path, kinds: Path, tmp_path: Path) -> None:
    folder = adapters.renamed(kinds / "plain" / "adapter", tmp_path / "a", str)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(YarnEdgeError, match="truncated"):
        opened(base, folder)


def zeroed(kinds: Path, folder: Path) -> Path:
    file = adapters.renamed(kinds / "plain" / "adapter", folder, str) / "adapter_model.safetensors"
    adapters.save_file({n: t * (0 if "lora_B" in n else 1) for n, t in load_file(file).items()}, file)
    return folder


def test_what_users_are_told(base: Path, kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = kinds / "plain" / "adapter"
    opened(base, zeroed(kinds, tmp_path / "zero"))
    assert "zero changes nothing: its products are 0" in capsys.readouterr().err
    opened(base, f"{plain}=0")
    assert "adapter changes nothing: its weight is 0" in capsys.readouterr().err
    other = adapters.renamed(plain, tmp_path / "other", str)
    config = read_json(other / "adapter_config.json")
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/Other-7B"}))
    opened(base, other)
    assert "was trained on org/Other-7B, and is put on" in capsys.readouterr().err
    opened(base, plain)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name, text, told",
    [
        (
            "README.md",
            "axolotl version: x\n```yaml\n  rope_scaling:\n    type: yarn\n```",
            "README.md has 'rope_scaling:",
        ),
        ("train.yaml", "cutoff_len: 65536\nrope_scaling: yarn\n", "train.yaml has 'rope_scaling: yarn'"),
        ("config.json", json.dumps(tiny.config()), "config.json says other positions than the base"),
        ("train.yml", "rope_scaling: null\n", "an adapter has no rope scaling of its own"),
    ],
    ids=["axolotl", "LLaMA-Factory", "a config beside it", "none"],
)
def test_rope_scaling_that_only_the_training_knows(
    name: str, text: str, told: str, kinds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.write_checkpoint(tmp_path / "base", attention_bias=True, rope_scaling=..., max_position_embeddings=256)
    folder = adapters.renamed(kinds / "plain" / "adapter", tmp_path / "a", str)
    (folder / name).write_text(text)
    opened(base, folder)
    assert told in capsys.readouterr().err
