"""Mistral's tekken.json against tiktoken, which is mistral-common's encoder (tokens/tokenizers/tekken.py), and llama.cpp."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiktoken

from yarn_edge.checkpoint.tekken import byte_alphabet
from yarn_edge.convert.vocab import read_vocabulary
from yarn_edge.convert.vocab_proof import prove, write_vocab_gguf
from yarn_edge.errors import YarnEdgeError
from yarn_edge.runtime.model import Model
from yarn_edge.verify.tokenizer import STRESS_TEXTS, reference_encoder

from support import depth
from support.tiny_tokenizers import TEKKEN, split, train

SPECIAL = 24  # four more than files before version 11 have names for


def small() -> dict[str, Any]:
    """A file of this format, from a vocabulary trained on the spot."""
    trained = train(split(TEKKEN)).get_vocab(with_added_tokens=False)
    pieces = [text for text, _id in sorted(trained.items(), key=lambda item: item[1]) if not text.startswith("<|")]
    found = [bytes(byte_alphabet()[c] for c in text) for text in pieces]
    tokens = [bytes([b]) for b in range(256)] + [token for token in found if len(token) > 1]
    return {
        "config": {
            "pattern": TEKKEN,
            "num_vocab_tokens": len(tokens),
            "default_vocab_size": len(tokens) - 10 + SPECIAL,  # the last ones are not in the model
            "default_num_special_tokens": SPECIAL,
            "version": "v3",
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(t).decode(), "token_str": None} for i, t in enumerate(tokens)
        ],
    }


def encoder(contents: dict[str, Any]) -> Callable[[str], list[int]]:
    """mistral-common's own: the ranks in tiktoken, behind the special tokens."""
    config = contents["config"]
    special = config["default_num_special_tokens"]
    vocab = contents["vocab"][: config["default_vocab_size"] - special]
    ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in vocab}
    encoding = tiktoken.Encoding("tekken", pat_str=config["pattern"], mergeable_ranks=ranks, special_tokens={})
    return lambda text: [special + rank for rank in encoding.encode(text, disallowed_special=())]


def write(folder: Path, contents: dict[str, Any]) -> Path:
    (folder / "tekken.json").write_text(json.dumps(contents))
    return folder


def check_ids(folder: Path, contents: dict[str, Any], names: tuple[str, ...]) -> None:
    reference, own = reference_encoder(folder), encoder(contents)
    texts = [text for text in STRESS_TEXTS if not any(name in text for name in names)]
    assert len(texts) > 190
    assert [reference(text, False) for text in texts] == [own(text) for text in texts]
    bos = reference.vocabulary["<s>"]
    assert reference("Hello", True) == [bos, *own("Hello")]
    vocabulary = prove(read_vocabulary(folder, contents["config"]["default_vocab_size"]), folder)
    assert (vocabulary.pre, vocabulary.add_bos, vocabulary.add_eos) == ("tekken", True, False)
    assert vocabulary.chat_template is None
    assert any("there is no chat template" in note for note in vocabulary.notes)
    with Model(write_vocab_gguf(vocabulary, folder / "written.gguf"), vocab_only=True) as model:
        for text in ("We'll see 20250 of THEM", "def f(x):\n\treturn x  # été", "今天 2024", "[INST]Hi[/INST]</s>"):
            ids = model.tokenize(text, add_special=False, parse_special=True)
            assert ids == (own(text) if "[INST]" not in text else reference(text, False))
    assert reference("[INST]", False) == [3]


def test_the_ids_are_those_of_mistral_common(tmp_path: Path) -> None:
    contents = small()
    check_ids(write(tmp_path, contents), contents, ("<unk>", "<s>", "</s>"))
    vocabulary = read_vocabulary(tmp_path, contents["config"]["default_vocab_size"])
    assert vocabulary.special_ids == {"unk": 0, "bos": 1, "eos": 2, "pad": 11}
    assert vocabulary.tokens[20:24] == [f"<SPECIAL_{i}>" for i in range(20, 24)]
    assert set(vocabulary.token_types[:SPECIAL]) == {3}


def test_special_tokens_of_newer_files(tmp_path: Path) -> None:
    contents = small()
    names = ["<unk>", "<s>", "</s>", "[THINK]"]
    contents["special_tokens"] = [
        {"rank": i, "token_str": n, "is_control": n != "[THINK]"} for i, n in enumerate(names)
    ]
    vocabulary = read_vocabulary(write(tmp_path, contents), contents["config"]["default_vocab_size"])
    assert vocabulary.tokens[:5] == [*names, "<SPECIAL_4>"]
    assert vocabulary.token_types[:5] == [3, 3, 3, 4, 3]
    assert "pad" not in vocabulary.special_ids


def test_tokenizer_json_goes_before_it(tmp_path: Path) -> None:
    write(tmp_path, small())
    train(split(TEKKEN)).save(str(tmp_path / "tokenizer.json"))
    assert reference_encoder(tmp_path).source.name == "tokenizer.json"


def with_tokens(contents: dict[str, Any], tokens: list[bytes]) -> None:
    """Put `tokens` behind the bytes, in place of all others."""
    listed = contents["vocab"][:256]
    listed += [{"rank": 256 + i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]
    contents["vocab"] = listed
    contents["config"]["default_vocab_size"] = len(listed) + SPECIAL


# name -> (what is changed, what is said)
WRONG: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no config": (lambda c: c.pop("config"), "config is missing"),
    "no pattern": (lambda c: c["config"].pop("pattern"), "config.pattern is None, not text"),
    "a rank twice": (lambda c: c["vocab"][300].update(rank=299), r"vocab\[300\] .* expected rank 300"),
    "no base64": (lambda c: c["vocab"][300].update(token_bytes="?"), r"vocab\[300\] .* and 1 to 1024 token_bytes"),
    "too long": (
        lambda c: c["vocab"][300].update(token_bytes=base64.b64encode(b"a" * 1025).decode()),
        r"vocab\[300\] .* 1 to 1024 token_bytes",
    ),
    "empty": (lambda c: c["vocab"][300].update(token_bytes=""), r"vocab\[300\] .* 1 to 1024 token_bytes"),
    "too many special": (lambda c: c["config"].update(default_num_special_tokens=10**9), "more than 100000"),
    "no bytes": (lambda c: c["vocab"][0].update(token_bytes="AQ=="), "does not begin with the 256 bytes"),
    "too few": (lambda c: c["vocab"].__delitem__(slice(500, None)), "is not a list of at least"),
    "too many long ones": (
        lambda c: with_tokens(c, [b"a" * n for n in range(2, 1025)]),
        "has too many long tokens: .* add up to 3[0-9]{8} bytes",
    ),
    "an empty special token": (
        lambda c: c.update(special_tokens=[{"rank": 0, "token_str": ""}]),
        r"special_tokens\[0\].token_str has 0 characters",
    ),
    "a long special token": (
        lambda c: c.update(special_tokens=[{"rank": 0, "token_str": "x" * 10**6}]),
        r"special_tokens\[0\].token_str has 1000000 characters, expected 1 to 1024",
    ),
    "a token twice": (lambda c: c["vocab"][400].update(c["vocab"][399] | {"rank": 400}), "different tokens, expected"),
    "no BOS": (
        lambda c: c.update(special_tokens=[{"rank": 0, "token_str": "<unk>", "is_control": True}]),
        "special_tokens does not have <s>",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_of_this_format(case: str, tmp_path: Path) -> None:
    contents = small()
    change, message = WRONG[case]
    change(contents)
    with pytest.raises(YarnEdgeError, match=rf"tekken.json: .*{message}"):
        reference_encoder(write(tmp_path, contents))


@pytest.mark.skipif(not depth.full, reason="needs --full")
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_the_published_vocabularies(name: str, tmp_path: Path) -> None:
    package = importlib.util.find_spec("mistral_common")
    if package is None or package.origin is None:
        pytest.skip("needs: pip install --no-deps mistral-common==1.13.1 (its numpy is older than ours)")
    contents = json.loads((Path(package.origin).parent / "data" / name).read_text())
    check_ids(write(tmp_path, contents), contents, ("<unk>", "<s>", "</s>"))
