"""Which files and tensors of a folder are the model: as transformers chooses them, or the true reason in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from yarn_edge.convert.checkpoint import open_checkpoint
from yarn_edge.convert.conversion import plan_conversion
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.verify.logits import check_logits

from support import tiny

STATE = tiny.tensors(tiny.config())
MARK = "model.norm.weight"  # its first value tells the sets of weights apart
INDEX = "model.safetensors.index.json"


def state(number: float) -> dict[str, torch.Tensor]:
    marked = {name: values.clone() for name, values in STATE.items()}
    marked[MARK][0] = number
    return marked


def index(folder: Path, file: str, name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(STATE, file)}))


def safe(folder: Path, number: float, name: str) -> None:
    save_file(state(number), folder / name, {"format": "pt"})


def torchs(folder: Path, number: float, name: str) -> None:
    torch.save(state(number), folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without weights."""
    path = tmp_path / "ck"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny.config()))
    tiny.write_tokenizer(path)
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# files, of which the one with 7 counts, and the note
CHOICES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an index of a whole file's own": (lambda f: (safe(f, 7, "model.safetensors"), index(f, "model.safetensors")), ""),
    "a stale index": (
        lambda f: (safe(f, 7, "model.safetensors"), index(f, "model-00001-of-00002.safetensors")),
        f"{INDEX} names files that are missing: model.safetensors is read instead",
    ),
    "a stale index of .bin": (
        lambda f: (
            torchs(f, 7, "pytorch_model.bin"),
            index(f, "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        ),
        "pytorch_model.bin is read instead",
    ),
    "a variant beside": (lambda f: (safe(f, 7, "model.safetensors"), safe(f, 8, "model.fp16.safetensors")), ""),
    "a variant of another format": (
        lambda f: (torchs(f, 7, "pytorch_model.bin"), safe(f, 8, "model.fp16.safetensors")),
        "",
    ),
    "both formats": (lambda f: (safe(f, 7, "model.safetensors"), torchs(f, 8, "pytorch_model.bin")), ""),
    "other programs' files": (
        lambda f: (
            safe(f, 7, "model.safetensors"),
            safe(f, 8, "consolidated.safetensors"),
            *(
                (f / name).write_text("x")
                for name in ("model.onnx", "model-optimizer.bin", "training_args.bin", "pytorch_model_fsdp.bin")
            ),
        ),
        "",
    ),
    "a shard left over": (
        lambda f: (
            safe(f, 7, "model-00001-of-00001.safetensors"),
            index(f, "model-00001-of-00001.safetensors"),
            safe(f, 8, "model-00002-of-00003.safetensors"),
        ),
        "",
    ),
    "named by the config": (
        lambda f: (
            safe(f, 7, "ema.safetensors"),
            safe(f, 8, "model.safetensors"),
            edit(f / "config.json", transformers_weights="ema.safetensors"),
        ),
        "",
    ),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_files_that_transformers_takes(case: str, folder: Path) -> None:
    make, told = CHOICES[case]
    make(folder)
    checkpoint = open_checkpoint(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert (checkpoint.tensors[MARK].float32()[0], theirs[MARK][0].item()) == (7, 7)
    notes = " ".join(checkpoint.notes)
    assert told in notes
    assert bool(told) == bool(notes)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two whole sets": (
        lambda f: (safe(f, 7, "model.safetensors"), safe(f, 8, "a.safetensors"), index(f, "a.safetensors")),
        "remove one of the two sets",
    ),
    "shards without index": (
        lambda f: (safe(f, 7, "model-1.safetensors"), safe(f, 8, "model-2.safetensors")),
        r"2 files of weights \(model-1.safetensors, model-2.safetensors\), but model.safetensors.index.json is missing",
    ),
    "an index of nothing": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "weight_map is missing"),
    "a missing shard beside .bin": (
        lambda f: (index(f, "x.safetensors"), torchs(f, 7, "pytorch_model.bin")),
        "the shard is missing",
    ),
    "mistral's layout": (
        lambda f: safe(f, 7, "consolidated.safetensors"),
        "consolidated.safetensors is Mistral's own layout: take",
    ),
    "a GGUF": (lambda f: (f / "x.gguf").write_text("x"), "x.gguf is a GGUF already: pass the file"),
    "a file of gptq": (
        lambda f: safe(f, 7, "gptq_model-4bit.safetensors"),
        "gptq_model-4bit.safetensors is another name",
    ),
    "deepspeed's state": (lambda f: (f / "global_step10").mkdir(), "run zero_to_fp32.py"),
    "named, but elsewhere": (
        lambda f: edit(f / "config.json", transformers_weights="../x.safetensors"),
        "not a safetensors file of this",
    ),
    "named, but missing": (
        lambda f: edit(f / "config.json", transformers_weights="x.safetensors"),
        "transformers_weights .* is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_weights_or_two_sets_are_told_apart(case: str, folder: Path) -> None:
    make, words = REFUSED[case]
    make(folder)
    with pytest.raises(YarnEdgeError, match=words):
        open_checkpoint(folder)


def tied(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """A checkpoint with tied embeddings, and these tensors instead of its own."""
    edit(folder / "config.json", tie_word_embeddings=True)
    changed = {n: v for n, v in STATE.items() if n != "lm_head.weight"} | tensors
    save_file({n: v.clone() for n, v in changed.items() if v is not None}, folder / "model.safetensors")
    return folder


EMBEDDINGS = STATE["model.embed_tokens.weight"].half()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_tied_head_is_compared_by_value(dtype: torch.dtype, folder: Path) -> None:
    head = EMBEDDINGS.to(dtype, copy=True)
    tied(folder, **{"model.embed_tokens.weight": EMBEDDINGS, "lm_head.weight": head})
    assert "output.weight" not in {row.target for row in plan_conversion(folder).rows}
    head[-1, -1] += 0.5
    tied(folder, **{"model.embed_tokens.weight": EMBEDDINGS, "lm_head.weight": head})
    with pytest.raises(YarnEdgeError, match=r"lm_head.weight differs from the embeddings"):
        plan_conversion(folder)


def test_a_tied_head_in_bfloat16_is_not_the_float32_that_it_was_rounded_from(folder: Path) -> None:
    embeddings = STATE["model.embed_tokens.weight"]
    tied(folder, **{"lm_head.weight": embeddings.bfloat16()})
    with pytest.raises(YarnEdgeError, match=r"lm_head.weight differs"):
        plan_conversion(folder)


def test_tied_weights_may_be_saved_under_the_heads_name(folder: Path) -> None:
    tied(folder, **{"model.embed_tokens.weight": None, "lm_head.weight": EMBEDDINGS})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    assert torch.equal(theirs.model.embed_tokens.weight, EMBEDDINGS)
    plan = plan_conversion(folder)
    (row,) = [row for row in plan.rows if row.target == "token_embd.weight"]
    np.testing.assert_array_equal(plan.checkpoint.tensors[row.source].float32(), EMBEDDINGS.float().numpy())


def test_buffers_of_earlier_versions_are_left_out_with_a_note(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 8, 16),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
    }
    save_file(STATE | buffers, folder / "model.safetensors")
    plan_conversion(folder)
    assert "saved buffers that are not weights are left out: model.layers.0.self_attn." in capsys.readouterr().err


MISSING: dict[str, tuple[Callable[[str], str | None], str]] = {
    "another prefix": (
        lambda n: n.replace("model.", "transformer."),
        "tensor model.embed_tokens.weight is missing, but transformer.embed_tokens.weight is there: rename",
    ),
    "no head": (
        lambda n: None if n == "lm_head.weight" else n.removeprefix("model."),
        "tensor lm_head.weight is missing: save the model with its head, or set tie_word_embeddings",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_tensor_has_its_reason(case: str, folder: Path) -> None:
    rename, words = MISSING[case]
    renamed = {name: values for old, values in STATE.items() if (name := rename(old))}
    save_file(renamed, folder / "model.safetensors")
    with pytest.raises(YarnEdgeError, match=words):
        plan_conversion(folder)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file")
    return convert(tiny.write_checkpoint(path / "ck"), str(path / "o.gguf"), "F32")[0]


def logits(file: Path, folder: Path) -> tuple[str, str]:
    with Model(file) as model:
        check = check_logits(model, folder, None, 64)
    return check.status, check.detail


@pytest.mark.parametrize("wrapper", ["", "module.", "base_model.model.", "_orig_mod."])
def test_verify_reads_the_names_that_convert_reads(wrapper: str, file: Path, folder: Path) -> None:
    save_file({wrapper + name: values for name, values in STATE.items()}, folder / "model.safetensors")
    assert logits(file, folder)[0] == "pass"


def test_verify_ignores_a_config_that_was_left_over(file: Path, folder: Path) -> None:
    safe(folder, STATE[MARK][0].item(), "model.safetensors")
    edit(folder / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert logits(file, folder)[0] == "pass"


def test_verify_fails_on_a_dropped_adapter(file: Path, folder: Path) -> None:
    safe(folder, STATE[MARK][0].item(), "model.safetensors")
    assert logits(file, folder)[0] == "pass"
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    status, detail = logits(file, folder)
    assert status == "fail"
    assert "a LORA adapter (adapter_config.json), which is not in the file: merge it first" in detail


UNREAD = {
    "an unmerged adapter": (
        {"model.norm.base_layer.weight": STATE[MARK], "model.norm.lora_A.weight": STATE[MARK].clone()},
        "not merged",
    ),
    "quantized": ({"model.norm.qweight": STATE[MARK].int()}, "is quantized by GPTQ or AWQ"),
    "another name": (
        {"model.last_norm.weight": STATE[MARK]},
        "transformers does not find model.norm.weight .it has model.last_norm.weight",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_verify_never_compares_with_weights_that_transformers_makes_up(case: str, file: Path, folder: Path) -> None:
    others, words = UNREAD[case]
    save_file({n: v for n, v in STATE.items() if n != MARK} | others, folder / "model.safetensors")
    with pytest.raises(YarnEdgeError, match=words):
        logits(file, folder)


def test_the_bad_input_that_was_refused_still_is(folder: Path) -> None:
    """A shard copied over the whole file: half of the tensors."""
    tiny.write_weights(folder, STATE, "shards")
    for shard in folder.glob("model-00001*"):
        shutil.move(shard, folder / "model.safetensors")
    for rest in folder.glob("model-0*"):
        rest.unlink()
    with pytest.raises(YarnEdgeError, match=r"tensor .* is missing"):
        plan_conversion(folder)
