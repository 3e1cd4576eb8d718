"""Ends, BOS and chat template against the checkpoint: another one fails with both values; what means the same passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import AddedToken

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.convert.vocab import Vocabulary, read_vocabulary
from yarn_edge.convert.vocab_proof import prove, write_vocab_gguf
from yarn_edge.llama_rules.ends import END_SLOTS, OWN_ENDS
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import Check
from yarn_edge.verify.vocabulary import vocabulary_checks

from support import tiny
from support.gguf_bytes import edit_key
from support.tiny_tokenizers import BYTE_LEVEL, SIZE, save, train

ADDED = ("<a>", "<b>", "<c>", "<|im_end|>", "<tool>")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}\n"
EOT = END_SLOTS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that ends answers at <|end|>, <a>, <b>, <c> and <|im_end|>; the third is one more than llama.cpp has keys for."""
    tokenizer = train(BYTE_LEVEL)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ADDED])
    folder = save(tmp_path_factory.mktemp("ends") / "ck", tokenizer, chat_template=TEMPLATE)
    ids = [tokenizer.token_to_id(text) for text in ADDED[:-1]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary:
    return prove(read_vocabulary(folder, SIZE), folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | changes))


def checked(path: Path, folder: Path) -> dict[str, Check]:
    with Model(path, vocab_only=True) as model:
        checks = {check.name: check for check in vocabulary_checks(model, folder)}
    assert list(checks) == ["tokenizer", "ends", "bos", "template"]
    return checks


def failed(checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if check.status == "fail"]


def test_what_convert_writes_passes(vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    checks = checked(write_vocab_gguf(vocabulary, tmp_path / "v.gguf"), folder)
    assert failed(checks) == []
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    told = checks["ends"].detail
    assert told.startswith(f"answers end at '<|end|>' ({ids['<|end|>']}), '<a>' ({ids['<a>']}), ")
    assert f"other programs do not end them at '<c>' ({ids['<c>']})" in told


def with_ids(**texts: str) -> Callable[[Vocabulary], Vocabulary]:
    """Other special tokens, by text."""
    return lambda v: replace(v, special_ids=v.special_ids | {k: v.tokens.index(t) for k, t in texts.items()})


def with_template(text: str | None) -> Callable[[Vocabulary], Vocabulary]:
    return lambda v: replace(v, chat_template=text)


def with_ends(**texts: str) -> Callable[[Vocabulary], Vocabulary]:
    """Other keys for ends, by text; none if there are no texts."""
    names = {"eot": EOT, "eom": END_SLOTS[1]}
    return lambda v: replace(v, end_keys={names[k]: v.tokens.index(t) for k, t in texts.items()})


# what is changed in the file, the check that fails, words of its detail
OTHERS: dict[str, tuple[Callable[[Vocabulary], Vocabulary], str, list[str]]] = {
    "another EOS": (with_ids(eos="!"), "ends", ["EOS is '!' (2)", "the checkpoint ends at '<|end|>'"]),
    "an EOS that is a token, but no end": (with_ids(eos="<tool>"), "ends", ["EOS is '<tool>'"]),
    "no ends but EOS": (with_ends(), "ends", ["would not end at '<a>'", "'<b>'", "'<c>'", "yarn-edge convert"]),
    "without our own key": (with_ends(eot="<a>", eom="<b>"), "ends", ["would not end at '<c>'"]),
    "an end in the middle of text": (with_ends(eot="!", eom="<a>"), "ends", [EOT, "'!' (2), which is text"]),
    "our own key ends at text": (
        lambda v: replace(v, end_keys=v.end_keys | {OWN_ENDS: [*v.end_keys[OWN_ENDS], 2]}),
        "ends",
        [OWN_ENDS, "'!' (2), which is text"],
    ),
    "another BOS": (with_ids(bos="<tool>"), "bos", ["BOS is '<tool>'", "the checkpoint's is '<|start|>' (0)"]),
    "a BOS before texts": (
        lambda v: replace(v, add_bos=True),
        "bos",
        ["a BOS is put before texts", "puts no BOS there"],
    ),
    "no template": (
        with_template(None),
        "template",
        ["no tokenizer.chat_template", f"one of {len(TEMPLATE)} characters"],
    ),
    "another template": (
        with_template(TEMPLATE.replace("content", "role")),
        "template",
        ["from character 28 on", "'role }}", "'content }}"],
    ),
    "a template that goes on": (
        with_template(TEMPLATE + "x"),
        "template",
        [f"from character {len(TEMPLATE) - 1} on", r"has '\nx'", "template ''"],
    ),
    "an empty line that Jinja keeps": (with_template(TEMPLATE + "\n"), "template", [r"has '\n'"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_one_fails_with_both_values(case: str, vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    change, name, words = OTHERS[case]
    checks = checked(write_vocab_gguf(change(vocabulary), tmp_path / "v.gguf"), folder)
    expected = ["tokenizer", "bos"] if case == "a BOS before texts" else [name]  # ids with special tokens differ too
    assert failed(checks) == expected
    assert all(word in checks[name].detail for word in words), checks[name].detail
    assert "\n" not in checks[name].detail
    assert (checks[name].value, checks[name].limit) != (0.0, 0.0)


SAME: dict[str, Callable[[Vocabulary], Vocabulary]] = {
    "another of the ends as EOS": lambda v: replace(
        v,
        special_ids=v.special_ids | {"eos": v.tokens.index("<a>")},
        end_keys=v.end_keys | {EOT: v.tokens.index("<|end|>")},
    ),
    "one line break less": with_template(TEMPLATE.removesuffix("\n")),
    "line breaks of Windows": with_template(TEMPLATE.replace("\n", "\r\n")),
}


@pytest.mark.parametrize("case", SAME)
def test_what_means_the_same_passes(case: str, vocabulary: Vocabulary, folder: Path, tmp_path: Path) -> None:
    assert failed(checked(write_vocab_gguf(SAME[case](vocabulary), tmp_path / "v.gguf"), folder)) == []


def test_an_eos_that_the_template_writes_must_be_the_tokenizers(vocabulary: Vocabulary, copy: Path) -> None:
    template = "{{ messages[0].content }}{{ eos_token }}"
    edit(copy / "tokenizer_config.json", chat_template=template)
    other = replace(SAME["another of the ends as EOS"](vocabulary), chat_template=template)
    checks = checked(write_vocab_gguf(other, copy / "v.gguf"), copy)
    assert failed(checks) == ["ends"]
    assert "which the chat template writes, is '<a>'" in checks["ends"].detail
    assert "the checkpoint's '<|end|>' (1)" in checks["ends"].detail


def test_a_template_that_the_checkpoint_lacks_is_a_remark(vocabulary: Vocabulary, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", chat_template=None)
    for text, told in ((TEMPLATE, "the checkpoint has none"), (None, "neither")):
        checks = checked(write_vocab_gguf(replace(vocabulary, chat_template=text), copy / "v.gguf"), copy)
        assert failed(checks) == []
        assert told in checks["template"].detail


def test_a_token_of_the_checkpoint_may_be_one_more_end(vocabulary: Vocabulary, copy: Path) -> None:
    """CodeLlama's EOT, which llama.cpp's converter writes, is none of its ends."""
    edit(copy / "generation_config.json", eos_token_id=1)
    checks = checked(write_vocab_gguf(with_ends(eot="<tool>")(vocabulary), copy / "v.gguf"), copy)
    assert failed(checks) == []
    assert "the file also ends them at" in checks["ends"].detail
    assert "'<tool>'" in checks["ends"].detail


def test_a_checkpoint_without_bos_accepts_any(vocabulary: Vocabulary, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", bos_token=None)
    checks = checked(write_vocab_gguf(with_ids(bos="<tool>")(vocabulary), copy / "v.gguf"), copy)
    assert failed(checks) == []
    assert checks["bos"].detail == "no BOS, not put before texts"


WRITING = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_token_that_the_checkpoint_does_not_name_is_not_to_be_written(role: str, copy: Path) -> None:
    """config.json has an id of it: another converter writes the id, ours adds that templates read ""."""
    edit(copy / "tokenizer_config.json", chat_template=WRITING, **{f"{role}_token": None})
    edit(copy / "config.json", **{f"{role}_token_id": 1})
    ours = prove(read_vocabulary(copy, SIZE), copy)
    assert failed(checked(write_vocab_gguf(ours, copy / "v.gguf"), copy)) == []
    other = replace(ours, unnamed=())
    checks = checked(write_vocab_gguf(other, copy / "other.gguf"), copy)
    name = {"bos": "bos", "eos": "ends"}[role]
    assert failed(checks) == [name]
    text = ours.tokens[ours.special_ids[role]]
    assert f"writes {role}_token, which is '{text}'" in checks[name].detail
    assert "the checkpoint's is none" in checks[name].detail
    silent = replace(other, chat_template=TEMPLATE)  # a template that does not write it
    assert name not in failed(checked(write_vocab_gguf(silent, copy / "silent.gguf"), copy))


@pytest.mark.parametrize("role", ["bos", "eos"])
def test_a_token_that_the_checkpoint_names_is_to_be_written(role: str, vocabulary: Vocabulary, copy: Path) -> None:
    edit(copy / "tokenizer_config.json", chat_template=WRITING)
    named = replace(vocabulary, chat_template=WRITING)
    assert failed(checked(write_vocab_gguf(named, copy / "v.gguf"), copy)) == []
    checks = checked(write_vocab_gguf(replace(named, unnamed=(role,)), copy / "other.gguf"), copy)
    name = {"bos": "bos", "eos": "ends"}[role]
    assert failed(checks) == [name]
    assert f"writes {role}_token, which is none, the checkpoint's is '<|" in checks[name].detail


def as_llama_cpp_writes(vocabulary: Vocabulary, folder: Path, path: Path) -> Path:
    """A file with the vocabulary, in which gguf's own SpecialVocab chose special tokens and templates."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    gguf.SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


NAMED = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": TEMPLATE}]


@pytest.mark.parametrize("template", [TEMPLATE, NAMED], ids=["one", "named"])
def test_a_file_of_llama_cpps_converter_passes_if_it_is_right(
    template: Any, vocabulary: Vocabulary, copy: Path
) -> None:
    edit(copy / "tokenizer_config.json", chat_template=template)
    edit(copy / "config.json", vocab_size=SIZE)
    path = as_llama_cpp_writes(vocabulary, copy, copy / "theirs.gguf")
    checks = checked(path, copy)
    assert failed(checks) == ["ends"]
    assert "would not end at '<a>'" in checks["ends"].detail
    assert "<|im_end|>" not in checks["ends"].detail  # llama.cpp knows it by its text
    index = vocabulary.tokens.index("<|im_end|>")
    edit(copy / "generation_config.json", eos_token_id=[index, 1])
    assert failed(checked(path, copy)) == []


def test_the_command_fails_on_another_eos_bos_and_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.write_checkpoint(tmp_path / "ck")
    edit(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    path = convert(folder, str(tmp_path / "out.gguf"), "F32")[0]
    good = path.read_bytes()
    changes: dict[str, tuple[str, float | str]] = {
        "ends": ("tokenizer.ggml.eos_token_id", 70),
        "bos": ("tokenizer.ggml.bos_token_id", 70),
        "template": ("tokenizer.chat_template", TEMPLATE.replace("messages", "MESSAGES")),
    }
    for name, change in {"": None, **changes}.items():
        path.write_bytes(good)
        if change is not None:
            edit_key(path, *change)
        code = main(["verify", str(path), "--against", str(folder), "--tokens", "8", "--json"])
        report = json.loads(capsys.readouterr().out)
        assert [c["name"] for c in report["checks"] if c["status"] == "fail"] == ([name] if name else [])
        assert code == bool(name)
