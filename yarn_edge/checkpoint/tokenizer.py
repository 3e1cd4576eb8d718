"""A checkpoint's own tokenizer.json as the reference for a GGUF's tokens.

The `tokenizers` library runs it, with the extra special tokens of tokenizer_config.json added as transformers 5 adds
them, but without transformers. `sentencepiece_model` is for checkpoints that have only a tokenizer.model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yarn_edge.checkpoint.added_tokens import left_out_notes, pad_without_row, read_added_tokens
from yarn_edge.checkpoint.config_file import read_json, read_json_if_there
from yarn_edge.checkpoint.tekken import NAMES, TEKKEN, tekken_settings
from yarn_edge.errors import Terminated, YarnEdgeError, one_line
from yarn_edge.regular_file import is_named

SPACE = "▁"  # how SentencePiece writes a space
SPECIAL = ("bos", "eos", "unk", "pad")  # the roles that GGUF has a key for
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_NO_DEFAULTS = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that name no token by themselves
_LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Markup:
    """A token that is cut out of the text before anything else. strips: it swallows white space, or needs word ends."""

    content: str
    special: bool
    strips: bool


def token_text(value: object) -> str | None:
    """The text of a token written as "x" or as {"content": "x", …}; None for null and anything else."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


class Reference:
    """A checkpoint's tokenizer: calling it with (text, add_special) returns token ids.

    source: the file that it was read from. settings: tokenizer.json without its model ({} for a SentencePiece model).
    markup: added tokens by id. vocabulary: ids by text, with the added tokens. ids: of "bos", "eos", "unk" and "pad", as far as
    the tokenizer names them. left_out: `pad_without_row`, in none of the others. notes: decisions that users should know.
    """

    source: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    markup: dict[int, Markup]
    vocabulary: dict[str, int]
    ids: dict[str, int]
    left_out: dict[str, int]
    notes: tuple[str, ...] = ()

    def __call__(self, text: str, add_special: bool) -> list[int]:
        raise NotImplementedError

    @property
    def prepends_space_once(self) -> bool:
        """Whether only the start of the whole text gets a space, and text after a special token does not."""
        raise NotImplementedError

    @property
    def spares_second_space(self) -> bool:
        """Whether a text that begins with a space gets no second one."""
        return False

    @property
    def unnamed(self) -> tuple[str, ...]:
        """Those of "bos" and "eos" that the tokenizer names no token for: templates read "" there, as in transformers.

        null in tokenizer_config.json names none. A key that is not there leaves it to the class.
        """
        keys = {role: f"{role}_token" for role in ("bos", "eos")}
        plain = self.config.get("tokenizer_class") in _NO_DEFAULTS
        return tuple(
            role
            for role, key in keys.items()
            if (token_text(self.config[key]) is None if key in self.config else plain and role not in self.ids)
        )

    def added_around(self) -> tuple[list[int], list[int]]:
        """The ids added before and after a text. llama.cpp can add one BOS and one EOS, so more of them are an error."""
        for text in ("a", "Hello", " the", "1"):
            plain, full = self(text, False), self(text, True)
            starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
            if not plain or not starts:
                continue
            prefix, suffix = full[: starts[0]], full[starts[0] + len(plain) :]
            if len(prefix) > 1 or len(suffix) > 1:
                raise YarnEdgeError(
                    f"{self.source}: post_processor puts {prefix} before and {suffix} after a text; "
                    "llama.cpp can only add one token on each side"
                )
            return prefix, suffix
        raise YarnEdgeError(f"{self.source}: returns no tokens for plain letters; the vocabulary is broken")


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """A panic of the library is written to the descriptor of stderr, with texts of the file, before it becomes an exception."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


class TokenizersReference(Reference):
    """`tokenizer.json`, else `tekken.json`. As in transformers 5, add_bos_token and add_eos_token of the config are ignored."""

    def __init__(self, checkpoint: Path) -> None:
        from tokenizers import Tokenizer

        self.source = checkpoint / "tokenizer.json"
        self.config = tokenizer_config(checkpoint)
        is_tekken = not is_named(self.source) and is_named(checkpoint / TEKKEN)
        if is_tekken:
            self.source = checkpoint / TEKKEN
        self.settings = tekken_settings(self.source) if is_tekken else read_json(self.source)
        whole = ""
        if is_tekken:
            whole = json.dumps(self.settings)
            known = {key: text for key, text in NAMES.items() if text in self.settings["model"]["vocab"]}
            self.config = known | self.config
        model = self.settings.pop("model", None)
        kind = model.get("type", "BPE") if isinstance(model, dict) else None
        if not isinstance(model, dict) or kind != "BPE":
            raise YarnEdgeError(f"{self.source}: model.type is {one_line(repr(kind), 60)}; only BPE can be converted")
        self.model: dict[str, Any] = model
        _check_bpe(self.source, self.model)
        self.left_out = {}
        self._renumbered: dict[str, tuple[int, int | None]] = {}
        try:
            with _panics_unheard():
                self.tokenizer = Tokenizer.from_str(whole) if is_tekken else Tokenizer.from_file(str(self.source))
                self._check_ids()
                self._add_tokens(checkpoint)
                self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
                self.left_out = pad_without_row(checkpoint, named_texts(self.config), self.vocabulary)
                if self.left_out:
                    self.tokenizer = Tokenizer.from_str(json.dumps(self._without_left_out()))
                    self._add_tokens(checkpoint)
                    self.vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        except (YarnEdgeError, KeyboardInterrupt, SystemExit, Terminated):
            raise
        except BaseException as error:  # the library raises nothing narrower, and its panics are not Exceptions
            raise self._refused(error) from error
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        named = {name: token_text(self.config.get(f"{name}_token")) for name in SPECIAL}
        self.ids = {name: self.vocabulary[text] for name, text in named.items() if text in self.vocabulary}
        self.markup = {
            index: Markup(t.content, t.special, bool(t.lstrip or t.rstrip or t.single_word))
            for index, t in self.tokenizer.get_added_tokens_decoder().items()
        }
        self.notes = left_out_notes(self.left_out) + tuple(
            f"a file of the tokenizer gives {one_line(repr(text), 60)} the id {stated}; it gets {given}, as in transformers: if its "
            f"row of the embedding is {stated}, correct tokenizer.json"
            for text, (stated, given) in self._renumbered.items()
        )

    def _refused(self, error: BaseException) -> YarnEdgeError:
        reason = one_line(str(error) or type(error).__name__, 200)
        return YarnEdgeError(f"{self.source}: the tokenizers library refuses it: {reason}; download the file again")

    def _check_ids(self) -> None:
        """The library silently renumbers added tokens whose ids leave a gap, but nothing renumbers the embeddings."""
        for token in self.settings.get("added_tokens") or []:
            index = self.tokenizer.token_to_id(token["content"])
            if index != token["id"]:
                gives = (
                    f"{self.source}: added_tokens gives {one_line(repr(token['content']), 60)} the id {token['id']}, "
                )
                taken = self.tokenizer.id_to_token(token["id"])
                if taken is not None:
                    raise YarnEdgeError(f"{gives}which is {one_line(repr(taken), 60)} too: each token needs its own id")
                raise YarnEdgeError(
                    f"{gives}the tokenizers library {index}; ids must follow the vocabulary without gaps"
                )

    def _without_left_out(self) -> dict[str, Any]:
        """The contents of tokenizer.json without the tokens of `left_out`."""
        added = [t for t in self.settings.get("added_tokens") or [] if t["content"] not in self.left_out]
        vocab = {text: index for text, index in self.model["vocab"].items() if text not in self.left_out}
        return {**self.settings, "added_tokens": added, "model": {**self.model, "vocab": vocab}}

    def _add_tokens(self, checkpoint: Path) -> None:
        """Add what transformers adds after loading: added_tokens_decoder in the order of its ids, then the named tokens."""
        from tokenizers import AddedToken

        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        special = special_texts(self.config)
        decoder = self.config.get("added_tokens_decoder")
        if decoder is None:
            decoder = {
                index: {"content": text, "special": text in special, "normalized": text not in special}
                for text, index in read_added_tokens(checkpoint).items()
            }
        for index, token in sorted(decoder.items(), key=lambda item: int(item[0])):
            if isinstance(token, dict) and (text := token_text(token)) and text not in self.left_out:
                self.tokenizer.add_tokens([AddedToken(text, **{k: bool(token[k]) for k in flags if k in token})])
                if (given := self.tokenizer.token_to_id(text)) != int(index):
                    self._renumbered[text] = (int(index), given)
        for text in special:
            if text not in self.left_out:
                self.tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])

    def __call__(self, text: str, add_special: bool) -> list[int]:
        try:
            with _panics_unheard():
                return list(self.tokenizer.encode(text, add_special_tokens=add_special).ids)
        except BaseException as error:  # a panic of the library
            if type(error).__name__ == "PanicException":
                raise self._refused(error) from error
            raise

    @property
    def prepends_space_once(self) -> bool:
        return any(step.get("prepend_scheme") == "first" for step in steps(self.settings.get("pre_tokenizer")))

    @property
    def spares_second_space(self) -> bool:
        metaspace = [step for step in steps(self.settings.get("pre_tokenizer")) if step.get("type") == "Metaspace"]
        return any(step.get("prepend_scheme", "always") != "never" for step in metaspace)


def tokenizer_config(checkpoint: Path) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json on top if it has no added_tokens_decoder (transformers 5)."""
    config = read_json_if_there(checkpoint / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= read_json_if_there(checkpoint / "special_tokens_map.json")
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict) or not all(str(key).isdecimal() for key in decoder):
        raise YarnEdgeError(
            f"{checkpoint / 'tokenizer_config.json'}: added_tokens_decoder is not a table of tokens by id; "
            "download the file again"
        )
    return config


def named_texts(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The texts of NAMED in tokenizer_config.json."""
    return {name: token_text(config.get(name)) for name in NAMED}


def special_texts(config: Mapping[str, Any]) -> list[str]:
    """The texts that tokenizer_config.json declares special: the named tokens, further `*_token` keys, and the lists."""
    further = [key for key in config if key.endswith("_token") and key not in NAMED and isinstance(config[key], str)]
    values: list[object] = [config.get(key) for key in (*NAMED, *further)]
    for key in _LISTS:
        listed = config.get(key)
        values += list(listed.values()) if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    texts = (token_text(value) for value in values)
    return list(dict.fromkeys(text for text in texts if text))


def steps(component: object) -> Iterator[dict[str, Any]]:
    """The steps of a pre_tokenizer or normalizer in tokenizer.json, with every Sequence flattened."""
    if not isinstance(component, dict):
        return
    if component.get("type") == "Sequence":
        for step in component.get("pretokenizers") or component.get("normalizers") or []:
            yield from steps(step)
    else:
        yield component


def _check_bpe(source: Path, model: Mapping[str, Any]) -> None:
    """Refuse what the tokenizers library rejects with a message that names neither key nor value."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise YarnEdgeError(f"{source}: model.vocab is not a table of ids by token; download the file again")
    if not isinstance(merges, list) or not merges:
        raise YarnEdgeError(f"{source}: model.merges is not a list of merges; download the file again")
    if len(set(vocab.values())) != len(vocab):
        seen: dict[int, str] = {}
        for text, index in vocab.items():
            if index in seen:
                raise YarnEdgeError(
                    f"{source}: model.vocab gives id {index} to {one_line(repr(seen[index]), 40)} and to "
                    f"{one_line(repr(text), 40)}; each token needs its own id"
                )
            seen[index] = text
