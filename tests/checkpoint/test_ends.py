"""Where answers end, by a checkpoint's files: each source that users' checkpoints have, and one line for each bad value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yarn_edge.checkpoint.ends import end_ids
from yarn_edge.checkpoint.tokenizer import TokenizersReference
from yarn_edge.errors import YarnEdgeError

from support import tiny

N_TOKENS = 320
OWN = 1  # </s>, the EOS of tokenizer_config.json


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture
def folder(tokenizer: Path, tmp_path: Path) -> Path:
    for file in tokenizer.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def read(folder: Path, own: str | None = "</s>", **files: Any) -> tuple[int, ...]:
    """`end_ids` of a folder with these files besides the tokenizer's. own: eos_token."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": own}))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return end_ids(folder, TokenizersReference(folder), N_TOKENS)


def eos(value: Any) -> dict[str, Any]:
    return {"eos_token_id": value}


# files besides the tokenizer's, ends
SOURCES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "the tokenizer alone": ({}, (OWN,)),
    "generation_config, an id": ({"generation_config": eos(7)}, (OWN, 7)),
    "generation_config, a list": ({"generation_config": eos([9, 7, OWN])}, (OWN, 9, 7)),
    "the same twice": ({"generation_config": eos([7, 7])}, (OWN, 7)),
    "a list in config alone": ({"config": eos([7, OWN])}, (OWN, 7)),
    "generation_config goes before config": ({"generation_config": eos(7), "config": eos([8, 9])}, (OWN, 7)),
    "generation_config without ends": ({"generation_config": {"do_sample": True}, "config": eos([8])}, (OWN, 8)),
    "null, and no id": ({"generation_config": eos(None), "config": eos(-1)}, (OWN,)),
    "an empty list": ({"generation_config": eos([]), "config": eos(8)}, (OWN, 8)),
    "nested": ({"config": {"text_config": eos([7, 8])}}, (OWN, 7, 8)),
    "nested, but also outside": ({"config": {**eos(6), "text_config": eos([7, 8])}}, (OWN, 6)),
    "the pad token ends too": ({"generation_config": {**eos(7), "pad_token_id": 7}}, (OWN, 7)),
    "an end among the rows without a token": ({"generation_config": eos(N_TOKENS - 1)}, (OWN, N_TOKENS - 1)),
    "beside Mistral's params": ({"params": {"dim": 64, "head_dim": 16}, "generation_config": eos(7)}, (OWN, 7)),
    "a config that is not read": ({"generation_config": eos(7), "config": eos(5000)}, (OWN, 7)),
}


@pytest.mark.parametrize("case", SOURCES)
def test_the_ends_are_those_of_every_source(case: str, folder: Path) -> None:
    files, ends = SOURCES[case]
    assert read(folder, **files) == ends


def test_without_an_eos_of_the_tokenizer(folder: Path) -> None:
    assert read(folder, None, generation_config=eos([9, 7])) == (9, 7)
    assert read(folder, None, generation_config={}) == ()


# file, contents, words of the message
BAD: dict[str, tuple[str, Any, list[str]]] = {
    "beyond the vocabulary": ("generation_config", eos([7, 320]), ["eos_token_id holds 320", "from 0 to 319"]),
    "negative": ("generation_config", eos([-2]), ["eos_token_id holds -2"]),
    "a number": ("config", eos(99999), ["eos_token_id is 99999"]),
    "true": ("generation_config", eos(True), ["eos_token_id is True"]),
    "text": ("generation_config", eos("</s>"), ["eos_token_id is '</s>'"]),
    "text in a list": ("config", eos([1, "2"]), ["eos_token_id holds '2'"]),
    "a list in a list": ("generation_config", eos([[1]]), ["eos_token_id holds [1]"]),
    "a fraction": ("generation_config", eos(2.5), ["eos_token_id is 2.5"]),
    "an object": ("config", eos({"a\nb": 1}), ["eos_token_id is {"]),
    "nested": ("config", {"text_config": eos("x")}, ["text_config.eos_token_id is 'x'"]),
    "a section that is none": ("config", {"text_config": 3}, ["text_config is 3, not an object"]),
    "damaged": ("generation_config", '{"eos_token_id": [1, ', ["not valid JSON"]),
    "no object": ("generation_config", "[2, 0]", ["holds a list, not an object"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_end_is_one_line_with_the_file_and_the_key(case: str, folder: Path) -> None:
    name, values, words = BAD[case]
    with pytest.raises(YarnEdgeError) as error:
        read(folder, **{name: values})
    told = str(error.value)
    assert "\n" not in told
    assert all(word in told for word in [str(folder / f"{name}.json"), *words]), told


LISTED = [case for case, (files, _) in SOURCES.items() if files.get("generation_config", {}).get("eos_token_id")]


@pytest.mark.parametrize("case", LISTED)
def test_transformers_stops_at_the_same_ids(case: str, folder: Path) -> None:
    """GenerationConfig, which `generate` asks, against the ends without the tokenizer's."""
    from transformers import GenerationConfig

    ends = read(folder, None, **SOURCES[case][0])
    told = GenerationConfig.from_pretrained(folder).eos_token_id
    assert set(told if isinstance(told, list) else [told]) == set(ends)


def test_transformers_reads_config_if_there_is_no_other(folder: Path) -> None:
    from transformers import GenerationConfig

    for values in (eos([7, 8]), {"text_config": eos([7, 8])}, {**eos(6), "text_config": eos([7, 8])}):
        ends = read(folder, None, config={"model_type": "llama", **values})
        told = GenerationConfig.from_model_config({"model_type": "llama", **values}).eos_token_id
        assert list(ends) == (told if isinstance(told, list) else [told])
