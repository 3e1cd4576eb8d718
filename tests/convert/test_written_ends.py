"""What is written for the ends of an answer, and that answers end there: in llama.cpp, in our engine, and as in transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, processors

from yarn_edge.chat.template import ChatTemplate
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.quantize import quantize
from yarn_edge.convert.vocab import Vocabulary, read_vocabulary
from yarn_edge.convert.vocab_proof import prove, write_vocab_gguf
from yarn_edge.engine.generation import Generation
from yarn_edge.engine.sampling import Sampling
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.ends import OWN_ENDS
from yarn_edge.llama_rules.template_tokens import UNNAMED
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.model import Model

from support import tiny
from support.tiny_tokenizers import BYTE_LEVEL, SIZE, save, train

EOT, EOM = "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"


def proved(
    folder: Path, added: Sequence[str], ends: Any, eos: str = "<|end|>", suffix: str | None = None
) -> Vocabulary:
    """The proved vocabulary with tokens added and generation_config.json's `ends`, given by text. suffix: put after texts."""
    tokenizer = train(BYTE_LEVEL)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    if suffix is not None:
        pair = (suffix, tokenizer.token_to_id(suffix))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {suffix}", pair=f"$A $B {suffix}", special_tokens=[pair]
        )
    save(folder, tokenizer, eos_token=eos)
    ids = [tokenizer.token_to_id(text) for text in ends]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return prove(read_vocabulary(folder, SIZE), folder)


LLAMA3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
# tokens added, ends by text, EOS, keys by text, words of the note
WRITTEN: dict[str, tuple[list[str], list[str], str, dict[str, Any], list[str]]] = {
    "the tokenizer's alone": ([], ["<|end|>"], "<|end|>", {}, []),
    "Llama 3.1": (LLAMA3, LLAMA3[1:], "<|eot_id|>", {}, []),
    "Gemma": (["<eos>", "<end_of_turn>"], ["<eos>", "<end_of_turn>"], "<eos>", {}, []),
    "ChatML on a base model": (["<|endoftext|>", "<|im_end|>"], ["<|im_end|>"], "<|endoftext|>", {}, []),
    "one that llama.cpp does not know": (["<turn>"], ["<turn>"], "<|end|>", {EOT: "<turn>"}, ["'<turn>' (", EOT]),
    "two, and one that it knows": (
        ["<a>", "<|im_end|>", "<b>"],
        ["<a>", "<|im_end|>", "<b>"],
        "<|end|>",
        {EOT: "<a>", EOM: "<b>"},
        ["'<a>'", "'<b>'"],
    ),
    "more than it has keys for": (
        ["<a>", "<b>", "<c>", "<d>"],
        ["<a>", "<b>", "<c>", "<d>"],
        "<|end|>",
        {EOT: "<a>", EOM: "<b>", OWN_ENDS: ["<c>", "<d>"]},
        ["'<c>'", "'<d>'", "only in yarn-edge", "stop strings"],
    ),
    "a piece of text": ([], ["!"], "<|end|>", {EOT: "!"}, ["'!'"]),
    "EOS, which it takes from its list as in gpt-oss": (
        ["<|return|>", "<|call|>"],
        ["<|end|>", "<|return|>"],
        "<|end|>",
        {OWN_ENDS: ["<|end|>"]},
        ["'<|end|>'", "only in yarn-edge"],
    ),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_each_end_is_known_to_llama_cpp_or_written(case: str, tmp_path: Path) -> None:
    added, ends, eos, keys, words = WRITTEN[case]
    vocabulary = proved(tmp_path / "ck", added, ends, eos)
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    assert vocabulary.special_ids["eos"] == ids[eos]
    assert vocabulary.end_keys == {
        key: [ids[t] for t in value] if isinstance(value, list) else ids[value] for key, value in keys.items()
    }
    told = " ".join(vocabulary.notes)
    assert bool(told) is bool(words)
    assert all(word in told for word in words), told
    with Model(write_vocab_gguf(vocabulary, tmp_path / "v.gguf"), vocab_only=True) as model:
        assert [text for text in (eos, *ends) if not model.is_end(ids[text])] == []
        own = keys.get(OWN_ENDS, [])
        assert [text for text in dict.fromkeys((eos, *ends)) if not model.is_end_in_llama_cpp(ids[text])] == own
        assert not model.is_end(ids["?"])


def test_an_end_known_by_text_needs_no_key_though_it_is_no_special_token(tmp_path: Path) -> None:
    """llama.cpp makes a control token of it."""
    tokenizer = train(BYTE_LEVEL)
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=False, normalized=False)])
    folder = save(tmp_path / "ck", tokenizer)
    index = tokenizer.token_to_id("<end_of_turn>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [index]}))
    vocabulary = prove(read_vocabulary(folder, SIZE), folder)
    assert vocabulary.ends == (tokenizer.token_to_id("<|end|>"), index)
    assert (vocabulary.token_types[index], vocabulary.end_keys, vocabulary.notes) == (4, {}, ())


def test_what_the_tokenizer_adds_does_not_replace_its_end(tmp_path: Path) -> None:
    vocabulary = proved(tmp_path / "ck", ["<stop>", "<sep>"], ["<stop>"], "<stop>", suffix="<sep>")
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    assert vocabulary.special_ids["eos"] == ids["<sep>"]
    assert (vocabulary.ends, vocabulary.end_keys) == ((ids["<stop>"],), {EOT: ids["<stop>"]})


@pytest.mark.parametrize("value", [[5000], [-1], [2.5], "2", 2, ["a"], [True]], ids=str)
def test_a_damaged_list_of_ends_is_one_line(value: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "ck", train(BYTE_LEVEL))
    vocabulary = replace(read_vocabulary(folder, SIZE), end_keys={OWN_ENDS: value})
    path = write_vocab_gguf(vocabulary, tmp_path / "v.gguf")
    with pytest.raises(YarnEdgeError) as error:
        Model(path, vocab_only=True)
    assert str(error.value).startswith(f"{path}: {OWN_ENDS} is ")
    assert "\n" not in str(error.value)


WRITING = "{{ bos_token }}|{{ messages[0].content }}|{{ eos_token }}"
# tokenizer_config.json -> the roles written as unnamed
UNNAMED_BY: dict[str, tuple[dict[str, Any], list[str]]] = {
    "both named": ({}, []),
    "no BOS": ({"bos_token": None}, ["bos"]),
    "no EOS": ({"eos_token": None}, ["eos"]),
    "neither": ({"bos_token": None, "eos_token": None}, ["bos", "eos"]),
    "an empty BOS": ({"bos_token": ""}, ["bos"]),
}


@pytest.mark.parametrize("absent", [False, True], ids=["null", "absent"])
@pytest.mark.parametrize("case", UNNAMED_BY)
def test_templates_write_the_tokens_that_transformers_writes(case: str, absent: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    config, roles = UNNAMED_BY[case]
    folder = save(tmp_path / "ck", train(BYTE_LEVEL), chat_template=WRITING, **config)
    if absent:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if v}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "bos_token_id": 0, "eos_token_id": 1}))
    messages = [{"role": "user", "content": "Hi"}]
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False)
    vocabulary = prove(read_vocabulary(folder, SIZE), folder)
    assert vocabulary.keys().get(UNNAMED, []) == roles
    assert vocabulary.special_ids["eos"] == 1  # llama.cpp ends answers there all the same
    assert [role for role in ("bos", "eos") if f"writes {role}_token" in " ".join(vocabulary.notes)] == roles
    with (
        Model(write_vocab_gguf(vocabulary, tmp_path / "v.gguf"), vocab_only=True) as model,
        ChatTemplate.of(model) as template,
    ):
        assert template.render(messages) == wanted
        assert model.is_end(1)


def test_a_template_that_writes_neither_needs_no_key(tmp_path: Path) -> None:
    folder = save(tmp_path / "ck", train(BYTE_LEVEL), bos_token=None, chat_template="{{ messages[0].content }}")
    assert UNNAMED not in read_vocabulary(folder, SIZE).keys()  # noqa: SIM118


def test_llama_cpps_arbitrary_default_is_no_token_for_templates(tmp_path: Path) -> None:
    folder = save(tmp_path / "ck", train(BYTE_LEVEL))
    vocabulary = read_vocabulary(folder, SIZE)
    path = write_vocab_gguf(replace(vocabulary, special_ids={"eos": 1}), tmp_path / "v.gguf")
    with Model(path, vocab_only=True) as model:
        assert (model.bos, model.template_token("bos"), model.template_token("eos")) == (11, "", "<|end|>")


@pytest.mark.parametrize("value", ["bos", ["pad"], [1], 3], ids=str)
def test_damaged_unnamed_tokens_are_one_line(value: Any, tmp_path: Path) -> None:
    vocabulary = replace(read_vocabulary(save(tmp_path / "ck", train(BYTE_LEVEL)), SIZE), end_keys={UNNAMED: value})
    path = write_vocab_gguf(vocabulary, tmp_path / "v.gguf")
    with Model(path, vocab_only=True) as model, pytest.raises(YarnEdgeError) as error:
        model.template_token("bos")
    assert str(error.value).startswith(f"{path}: {UNNAMED} is ")
    assert "\n" not in str(error.value)


PROMPT = [72, 40, 91, 25]


def continued(path: Path, n: int) -> tuple[list[int], str]:
    """(the most probable tokens after PROMPT, why the engine stopped); the tokens are those that are in the cache then."""
    with Model(path) as model, Context(model, ContextSettings(n_ctx=64)) as context:
        generation = Generation(context)
        list(generation.generate(PROMPT, Sampling(temperature=0), n))
        assert generation.stats is not None
        return generation.cached.tokens[len(PROMPT) :], generation.stats.finish_reason


@pytest.mark.parametrize("listed", ["first", "last"])
def test_answers_end_where_transformers_ends_them(listed: str, tmp_path: Path) -> None:
    """A real model whose answer comes to a token that only generation_config.json calls an end, in a key of llama.cpp or our own."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.write_checkpoint(tmp_path / "ck")
    with torch.no_grad():
        free = (
            AutoModelForCausalLM.from_pretrained(folder)
            .generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
            .tolist()
        )
    end = next(token for token in reversed(free) if token not in PROMPT)
    others = [token for token in range(2, 40) if token not in free][:2]
    ends = [end, *others] if listed == "first" else [*others, end]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with torch.no_grad():
        stopped = (
            AutoModelForCausalLM.from_pretrained(folder)
            .generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(PROMPT) :]
            .tolist()
        )
    assert stopped == free[: free.index(end) + 1]
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    metadata = read_gguf(path).metadata
    assert metadata[EOT] == ends[0]
    assert metadata[OWN_ENDS].tolist() == ends[2:]
    smaller = quantize(path, str(tmp_path / "small.gguf"), "Q8_0")[0]
    assert read_gguf(smaller).metadata[OWN_ENDS].tolist() == ends[2:]
    assert continued(path, 12) == (stopped[:-1], "stop")
