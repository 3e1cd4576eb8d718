"""Tokens and rows of the embedding: a hole, a pad token beyond the rows, and any other token without one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from yarn_edge.convert.vocab import read_vocabulary
from yarn_edge.convert.vocab_proof import prove, write_vocab_gguf
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import check_tokens, reference_encoder

from support.tiny_tokenizers import BYTE_LEVEL, save, sentence_model, train

N = 1101  # tokens of the byte-level tokenizer
PIECES = 700  # tokens of the SentencePiece model
UNUSED = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("made"), train(BYTE_LEVEL))


@pytest.fixture
def bpe(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ck"
    shutil.copytree(made, folder)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == N
    return folder


@pytest.fixture
def sentencepiece(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(sentence_model())
    edit(tmp_path / "tokenizer_config.json", lambda c: c.update(add_bos_token=True, eos_token="</s>"))
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def in_tokenizer_json(text: str) -> Callable[[Path], None]:
    def change(values: dict[str, Any]) -> None:
        values["added_tokens"].append(values["added_tokens"][0] | {"id": N, "content": text})

    return lambda folder: edit(folder / "tokenizer.json", change)


def in_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "tokenizer_config.json", lambda c: c.update(values))


def in_added(**ids: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "added_tokens.json", lambda c: c.update(ids))


def with_rows(folder: Path, rows: int, *changes: Callable[[Path], None]) -> Path:
    edit(folder / "config.json", lambda c: c.update(vocab_size=rows))
    for change in changes:
        change(folder)
    return folder


def proved(folder: Path, rows: int) -> Any:
    """The vocabulary, which a second reading of the checkpoint, as in verify, agrees with."""
    vocabulary = prove(read_vocabulary(folder, rows), folder)
    with Model(write_vocab_gguf(vocabulary, folder / "v.gguf"), vocab_only=True) as model:
        assert check_tokens(model, reference_encoder(folder)).mismatch is None
    return vocabulary


PAD = in_config(pad_token="[PAD]")
PADS: dict[str, list[Callable[[Path], None]]] = {
    "named": [PAD],
    "named as an object": [in_config(pad_token={"__type": "AddedToken", "content": "[PAD]", "lstrip": False})],
    "in tokenizer.json": [PAD, in_tokenizer_json("[PAD]")],
    "in added_tokens.json": [PAD, in_added(**{"[PAD]": N})],
    "in added_tokens_decoder": [
        in_config(pad_token="[PAD]", added_tokens_decoder={N: {"content": "[PAD]", "special": True}})
    ],
    "in special_tokens_map.json": [
        lambda f: edit(f / "special_tokens_map.json", lambda c: c.update(pad_token="[PAD]"))
    ],
    "its id in generation_config.json": [
        PAD,
        lambda f: edit(f / "generation_config.json", lambda c: c.update(pad_token_id=N)),
    ],
}


@pytest.mark.parametrize("case", PADS)
def test_a_pad_token_without_a_row_is_left_out_with_a_note(case: str, bpe: Path) -> None:
    vocabulary = proved(with_rows(bpe, N, *PADS[case]), N)
    assert len(vocabulary.tokens) == N
    assert "[PAD]" not in vocabulary.tokens
    assert "pad" not in vocabulary.special_ids
    note = f"the pad token '[PAD]' (id {N}) has no row in the embedding: left out"
    assert note in vocabulary.notes


@pytest.mark.parametrize("case", PADS)
def test_a_pad_token_with_a_row_stays(case: str, bpe: Path) -> None:
    vocabulary = proved(with_rows(bpe, N + 2, *PADS[case]), N + 2)
    theirs = AutoTokenizer.from_pretrained(bpe)
    assert vocabulary.special_ids["pad"] == theirs.pad_token_id == N
    assert vocabulary.tokens[N:] == ["[PAD]", f"[PAD{N + 1}]"]
    assert not any("left out" in note for note in vocabulary.notes)


# rows, changes, and the words of the message
ROWLESS: dict[str, tuple[list[Callable[[Path], None]], list[str]]] = {
    "a named token": (
        [in_config(eos_token="<|stop|>")],
        ["tokenizer_config.json: eos_token brings", f"'<|stop|>' (id {N})"],
    ),
    "a listed token": (
        [in_config(additional_special_tokens=["<tool>"])],
        ["additional_special_tokens brings", f"'<tool>' (id {N})"],
    ),
    "the map's token": (
        [lambda f: edit(f / "special_tokens_map.json", lambda c: c.update(sep_token="<sep>"))],
        ["special_tokens_map.json: sep_token brings"],
    ),
    "tokenizer.json's": ([in_tokenizer_json("<tool>")], ["tokenizer.json: added_tokens brings", f"'<tool>' (id {N})"]),
    "added_tokens.json's": ([in_added(tool=N)], ["added_tokens.json: brings", "'tool'"]),
    "added_tokens_decoder's": (
        [in_config(added_tokens_decoder={9: {"content": "<tool>"}})],
        ["tokenizer_config.json: added_tokens_decoder.9 brings", "'<tool>'"],
    ),
    "pad is eos": ([in_config(eos_token="<|stop|>", pad_token="<|stop|>")], ["'<|stop|>'"]),
    "pad and another": (
        [in_config(pad_token="[PAD]", mask_token="[MASK]")],
        ["pad_token brings", "'[PAD]'", "nor have 1 more", f"({N + 2})"],
    ),
}


@pytest.mark.parametrize("case", ROWLESS)
def test_another_token_without_a_row_is_named_with_its_file(case: str, bpe: Path) -> None:
    changes, words = ROWLESS[case]
    with_rows(bpe, N, *changes)
    with pytest.raises(YarnEdgeError) as error:
        read_vocabulary(bpe, N)
    message = str(error.value)
    assert [word for word in [str(bpe), "resize_token_embeddings", *words] if word not in message] == []
    assert "\n" not in message
    assert str(N) in message


def test_tokens_of_another_model(bpe: Path) -> None:
    with pytest.raises(YarnEdgeError, match=r"1101 tokens, but the embedding has 900 rows.*another model"):
        read_vocabulary(with_rows(bpe, 900), 900)


def test_a_hole_in_the_ids_becomes_an_unused_token(bpe: Path) -> None:
    def gap(values: dict[str, Any]) -> None:
        values["model"]["vocab"]["new"] = values["added_tokens"].pop()["id"] + 2

    edit(bpe / "tokenizer.json", gap)
    vocabulary = proved(with_rows(bpe, N + 5), N + 5)
    theirs = AutoTokenizer.from_pretrained(bpe)
    assert vocabulary.tokens.index("new") == theirs.get_vocab()["new"] == N + 1
    holes = [N - 1, N, N + 2, N + 3, N + 4]
    assert [vocabulary.tokens[i] for i in holes] == [f"[PAD{i}]" for i in holes]
    assert [i for i, kind in enumerate(vocabulary.token_types) if kind == UNUSED] == holes


def test_a_hole_before_an_added_token_of_sentencepiece(sentencepiece: Path) -> None:
    vocabulary = proved(with_rows(sentencepiece, 704, in_added(**{"<a>": 700, "<b>": 703})), 704)
    assert vocabulary.tokens[PIECES:] == ["<a>", "[PAD701]", "[PAD702]", "<b>"]
    assert vocabulary.token_types[PIECES:] == [4, UNUSED, UNUSED, 4]


@pytest.mark.parametrize(
    "changes", [[PAD], [PAD, in_added(**{"[PAD]": PIECES})]], ids=["named", "in added_tokens.json"]
)
@pytest.mark.parametrize("rows", [PIECES, PIECES + 1])
def test_a_pad_token_of_sentencepiece(rows: int, changes: list[Callable[[Path], None]], sentencepiece: Path) -> None:
    vocabulary = proved(with_rows(sentencepiece, rows, *changes), rows)
    kept = rows > PIECES
    assert ("[PAD]" in vocabulary.tokens) is kept
    assert vocabulary.special_ids.get("pad") == (PIECES if kept else None)
    assert any("'[PAD]' (id 700) has no row" in note for note in vocabulary.notes) is not kept


def test_other_tokens_of_sentencepiece_without_a_row(sentencepiece: Path) -> None:
    with_rows(sentencepiece, PIECES, in_added(**{"<new>": PIECES}))
    with pytest.raises(YarnEdgeError, match=r"added_tokens.json: brings the token '<new>' \(id 700\).*or remove"):
        read_vocabulary(sentencepiece, PIECES)


def test_two_files_that_give_one_id_to_two_tokens(sentencepiece: Path) -> None:
    decoder = {str(PIECES): {"content": "<b>", "special": True}}
    with_rows(sentencepiece, 704, in_added(**{"<a>": PIECES}), in_config(added_tokens_decoder=decoder))
    with pytest.raises(YarnEdgeError, match="id 700 is both '<a>' and '<b>': each token needs its own id"):
        read_vocabulary(sentencepiece, 704)
