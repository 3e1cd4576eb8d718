"""Reading a checkpoint's tokenizer: what is written for each spelling, and one line for each bad input."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from yarn_edge.convert.vocab import read_vocabulary
from yarn_edge.convert.vocab_proof import write_vocab_gguf
from yarn_edge.errors import Terminated, YarnEdgeError
from yarn_edge.gguf.read import read_gguf

from support.tiny_tokenizers import BYTE_LEVEL, CORPUS, SIZE, save, sentence_model, train


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with GPT-2's pre-tokenizer."""
    return save(tmp_path_factory.mktemp("plain"), train(BYTE_LEVEL))


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed), encoding="utf-8")


def test_special_tokens_padding_and_what_is_written(copy: Path) -> None:
    (copy / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>", "lstrip": false}}')
    (copy / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [5], "pad_token_id": 7}')
    (copy / "generation_config.json").write_text('{"pad_token_id": [9, 10]}')
    vocabulary = read_vocabulary(copy, SIZE)
    assert vocabulary.special_ids == {"bos": 0, "eos": 1, "pad": 9}
    kinds = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert [kinds[t] for t in ("<|start|>", "<|end|>", "!", "<think>", f"[PAD{SIZE - 1}]")] == [3, 3, 1, 4, 5]
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    count = tokenizer.get_vocab_size()
    assert vocabulary.tokens[:count] == [tokenizer.id_to_token(i) for i in range(count)]
    assert vocabulary.tokens[count:] == [f"[PAD{i}]" for i in range(count, SIZE)]
    written = read_gguf(write_vocab_gguf(vocabulary, copy / "v.gguf")).metadata
    assert [key for key in written if key.startswith("tokenizer.")] == list(vocabulary.keys())
    assert written["tokenizer.ggml.token_type"].dtype == "int32"
    ids = {f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")}
    assert {key for key in written if key.endswith("_token_id")} == ids


def test_merges_as_lists_and_as_strings(copy: Path) -> None:
    merges = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    expected = read_vocabulary(copy, SIZE).merges
    for spelling in ([list(m) if isinstance(m, list) else m.split(" ") for m in merges], expected):
        edit(copy / "tokenizer.json", lambda t, s=spelling: t["model"].update(merges=s))
        assert read_vocabulary(copy, SIZE).merges == expected


def named(**templates: object) -> list[dict[str, object]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


MORE = "additional_chat_templates"
CHAT = {
    "none": ({}, {}, None),
    "string": ({"chat_template": "A"}, {}, "A"),
    "named": ({"chat_template": named(tool_use="T", default="D")}, {}, "D"),
    "table": ({"chat_template": {"tool_use": "T", "default": "D"}}, {}, "D"),
    "named twice, equal": ({"chat_template": [*named(default="D"), *named(default="D")]}, {}, "D"),
    "no names": ({"chat_template": []}, {}, None),
    "jinja file wins": ({"chat_template": "A"}, {"chat_template.jinja": "J\nü"}, "J\nü"),
    "json file": ({}, {"chat_template.json": '{"chat_template": "F"}'}, "F"),
    "json file, named": ({}, {"chat_template.json": '{"chat_template": [{"name": "default", "template": "F"}]}'}, "F"),
    "jinja file and others": ({}, {"chat_template.jinja": "J", f"{MORE}/rag.jinja": "R"}, "J"),
    "default among others": ({}, {f"{MORE}/rag.jinja": "R", f"{MORE}/default.jinja": "D"}, "D"),
    "string and others": ({"chat_template": "A"}, {f"{MORE}/rag.jinja": "R"}, "A"),
}
NO_DEFAULT: dict[str, tuple[dict[str, object], dict[str, str], str]] = {
    "named": (
        {"chat_template": named(rag="RAG", tool_use="T")},
        {},
        "tokenizer_config.json: of its chat templates 'rag', 'tool_use' none is named 'default'",
    ),
    "one": ({"chat_template": named(chat="C")}, {}, "tokenizer_config.json: of its chat templates 'chat' none"),
    "table": ({"chat_template": {"rag": "R"}}, {}, "tokenizer_config.json: of its chat templates 'rag' none"),
    "folder": (
        {},
        {f"{MORE}/rag.jinja": "R", f"{MORE}/tool_use.jinja": "T"},
        f"{MORE}: of its chat templates 'rag', 'tool_use' none",
    ),
    "json file": (
        {},
        {"chat_template.json": json.dumps({"chat_template": named(rag="R")})},
        "chat_template.json: of its chat templates 'rag' none",
    ),
    "two defaults": (
        {"chat_template": [*named(default="A"), *named(default="B")]},
        {},
        "two chat templates are named 'default'",
    ),
    "no text": ({"chat_template": named(default=None)}, {}, "chat_template is a NoneType, not text"),
    "no name": ({"chat_template": [{"template": "T"}]}, {}, "chat_template is a NoneType, not text"),
    "a list of texts": ({"chat_template": ["T"]}, {}, "chat_template is a NoneType, not text"),
}


def with_templates(folder: Path, config: dict[str, object], files: dict[str, str]) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(config))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


@pytest.mark.parametrize("case", CHAT)
def test_chat_template(case: str, copy: Path) -> None:
    config, files, expected = CHAT[case]
    with_templates(copy, config, files)
    vocabulary = read_vocabulary(copy, SIZE)
    assert vocabulary.chat_template == expected
    assert vocabulary.keys().get("tokenizer.chat_template") == expected


@pytest.mark.parametrize("config, files, message", NO_DEFAULT.values(), ids=NO_DEFAULT)
def test_of_several_templates_none_is_guessed(
    config: dict[str, object], files: dict[str, str], message: str, copy: Path
) -> None:
    with_templates(copy, config, files)
    with pytest.raises(YarnEdgeError, match=re.escape(message)):
        read_vocabulary(copy, SIZE)


@pytest.mark.parametrize("case", ["none", "named", "jinja file and others", "default among others"])
def test_the_template_is_the_one_of_transformers(case: str, copy: Path) -> None:
    from transformers import AutoTokenizer

    with_templates(copy, *CHAT[case][:2])
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert (tokenizer.get_chat_template() if tokenizer.chat_template else None) == CHAT[case][2]


def model_of(**values: Any) -> Callable[[Any], None]:
    return lambda t: t["model"].update(values)


def grow(*texts: str) -> Callable[[Any], None]:
    """Adds tokens to the vocabulary in place of <think>."""

    def change(tokenizer: dict[str, Any]) -> None:
        first = tokenizer["added_tokens"].pop()["id"]
        tokenizer["model"]["vocab"].update({text: first + i for i, text in enumerate(texts)})

    return change


def space_in_merge(tokenizer: dict[str, Any]) -> None:
    grow("a b", "a bc")(tokenizer)
    tokenizer["model"]["merges"].append(["a b", "c"])


def two_in_front(tokenizer: dict[str, Any]) -> None:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, start, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [0], "tokens": ["<|start|>"]}},
    }


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
# file, what is changed in it, words of the message
BAD: dict[str, tuple[str, Callable[[Any], Any], list[str]]] = {
    "unigram": ("tokenizer.json", model_of(type="Unigram"), ["model.type", "Unigram", "only BPE"]),
    "no vocabulary": ("tokenizer.json", model_of(vocab=[]), ["model.vocab"]),
    "no merges": ("tokenizer.json", model_of(merges=None), ["model.merges"]),
    "merge of three": ("tokenizer.json", model_of(merges=["a b c"]), ["tokenizer.json"]),
    "merge of unknown pieces": ("tokenizer.json", model_of(merges=["a ☃"]), ["tokenizers library refuses"]),
    "id twice": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"new": 9}), ["model.vocab", "id 9", "'new'"]),
    "hole among added": (
        "tokenizer.json",
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 1300, "content": "<new>"}),
        ["added_tokens", "'<new>'", "1300"],
    ),
    "not byte-level": (
        "tokenizer.json",
        lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
        ["Whitespace", "ByteLevel"],
    ),
    "no byte fallback": ("tokenizer.json", lambda t: t.update(pre_tokenizer=METASPACE), ["<0x00>", "byte fallback"]),
    "a space in a merge": ("tokenizer.json", space_in_merge, ["model.merges", "'a b'", "space"]),
    "an added token's id is taken": (
        "tokenizer.json",
        lambda t: t["added_tokens"].append(t["added_tokens"][0] | {"id": 9, "content": "<new>"}),
        ["added_tokens", "'<new>'", "the id 9", "is", "too: each token needs its own id"],
    ),
    "NUL": ("tokenizer.json", grow("a\0"), ["NUL", "a\\x00"]),
    "endless": (
        "tokenizer.json",
        grow("a" * 10**6),
        ["tokenizer.json: token 'aaaa", "has 1000000 characters, more than 262144"],
    ),
    "a list": ("tokenizer.json", lambda _: [1], ["tokenizer.json", "list"]),
    "no eos": ("tokenizer_config.json", lambda c: c.pop("eos_token") and None, ["eos_token", "add it"]),
    "bad decoder": (
        "tokenizer_config.json",
        lambda c: c.update(added_tokens_decoder={"x": 1}),
        ["added_tokens_decoder"],
    ),
    "id out of range": ("config.json", lambda c: c.update(pad_token_id=5000), ["pad_token_id", "5000", "1200"]),
    "two in front": ("tokenizer.json", two_in_front, ["post_processor", "[0, 0]"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, copy: Path) -> None:
    name, change, words = BAD[case]
    edit(copy / name, change)
    with pytest.raises(YarnEdgeError) as error:
        read_vocabulary(copy, SIZE)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in [str(copy), *words]), str(error.value)


def test_bad_files(copy: Path) -> None:
    def fails(size: int, *words: str) -> None:
        with pytest.raises(YarnEdgeError) as error:
            read_vocabulary(copy, size)
        assert all(word in str(error.value) for word in words), str(error.value)

    fails(1000, f"{Tokenizer.from_file(str(copy / 'tokenizer.json')).get_vocab_size()} tokens", "1000 rows")
    for data, word in ((b"{", "not valid JSON"), (b'{"a": "\xff"}', "not valid JSON")):
        (copy / "tokenizer.json").write_bytes(data)
        fails(SIZE, "tokenizer.json", word)
    (copy / "tokenizer.json").unlink()
    fails(SIZE, "no tokenizer.json and no tokenizer.model", "save_pretrained")
    for data in (
        b"",
        b"IQ== 0\nIg== 1\n",
        sentence_model()[:-1000],
        sentence_model()[:40],
    ):  # the second is tiktoken's format
        (copy / "tokenizer.model").write_bytes(data)
        fails(SIZE, "tokenizer.model", "not a SentencePiece model")
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=unigram, vocab_size=300, model_type="unigram", minloglevel=2
    )
    (copy / "tokenizer.model").write_bytes(unigram.getvalue())
    fails(SIZE, "model_type", "Unigram")


@pytest.mark.parametrize("end", [Terminated(15), KeyboardInterrupt()], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_while_the_library_reads_is_no_bad_tokenizer(
    copy: Path, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    def signalled(*_arguments: object) -> None:
        raise end

    monkeypatch.setattr("yarn_edge.checkpoint.tokenizer.pad_without_row", signalled)
    with pytest.raises(type(end)):
        read_vocabulary(copy, SIZE)


def test_a_renumbered_token_is_a_note(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda config: config | {"added_tokens_decoder": {"1150": {"content": "<x>"}}})
    assert "gives '<x>' the id 1150; it gets" in " ".join(read_vocabulary(copy, SIZE).notes)
