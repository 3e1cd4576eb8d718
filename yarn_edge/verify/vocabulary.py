"""The checks of `verify --against` on what surrounds a conversation: token ids, ends, BOS, chat template. Each counts differences.

They ask the loaded file, so that a GGUF made by another converter passes if llama.cpp makes the same of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from yarn_edge.checkpoint.chat_template import chat_template
from yarn_edge.checkpoint.config_file import MAX_INTEGER
from yarn_edge.checkpoint.ends import end_ids
from yarn_edge.checkpoint.tokenizer import Reference
from yarn_edge.errors import YarnEdgeError, one_line
from yarn_edge.llama_rules.ends import END_SLOTS, OWN_ENDS, own_ends, token_names
from yarn_edge.llama_rules.template_tokens import roles_read
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import Check, judge
from yarn_edge.verify.tokenizer import check_tokens, reference_encoder

_EXCERPT = 40  # characters of a template shown from its first difference on


def vocabulary_checks(model: Model, checkpoint: Path) -> Iterator[Check]:
    """The checks of VOCABULARY_CHECKS. Raises YarnEdgeError for files of the checkpoint that cannot be read."""
    reference = reference_encoder(checkpoint)
    for check in VOCABULARY_CHECKS.values():
        yield check(model, checkpoint, reference)


def check_tokenizer(model: Model, _checkpoint: Path, reference: Reference) -> Check:
    """The token ids of stress texts against the checkpoint's own tokenizer."""
    outcome = check_tokens(model, reference)
    same = f"{outcome.n_texts} texts, {outcome.n_tokens} tokens: the same ids"
    detail = "; ".join([str(outcome.mismatch) if outcome.mismatch is not None else same, *outcome.notes])
    return judge("tokenizer", float(outcome.n_different), 0.0, detail)


def check_ends(model: Model, checkpoint: Path, reference: Reference) -> Check:
    """Answers end wherever the checkpoint's do, EOS is one of these ends, and no key adds an end in the middle of text.

    llama.cpp also ends answers at tokens that it knows by their texts; that is noted.
    """
    wanted = end_ids(checkpoint, reference, MAX_INTEGER)
    added = _added_around(reference)[1]
    texts = _tokens(model)
    faults = []
    if missing := [token for token in wanted if not model.is_end(token)]:
        faults.append(
            f"answers would not end at {token_names(texts, missing)}, where the checkpoint's do: make it with yarn-edge convert"
        )
    eos = reference.ids.get("eos")
    if wanted and model.eos not in (*wanted, *added):
        faults.append(f"EOS is {token_names(texts, [model.eos])}, the checkpoint ends at {token_names(texts, wanted)}")
    elif eos is not None and model.eos not in (eos, *added) and "eos_token" in (model.chat_template or ""):
        faults.append(
            f"EOS, which the chat template writes, is {token_names(texts, [model.eos])}, the checkpoint's "
            f"{token_names(texts, [eos])}"
        )
    faults += _written(model, reference, "eos")
    for key, index in _named_ends(model):
        if index not in (*wanted, *added) and index not in reference.markup:
            faults.append(f"{key} ends answers at {token_names(texts, [index])}, which is text to the checkpoint")
    remarks = [f"answers end at {token_names(texts, wanted)}" if wanted else "the checkpoint names no end"]
    if alone := [token for token in wanted if model.is_end(token) and not model.is_end_in_llama_cpp(token)]:
        remarks.append(f"other programs do not end them at {token_names(texts, alone)}")
    if further := [token for token in range(model.n_vocab) if token not in wanted and model.is_end(token)]:
        remarks.append(f"the file also ends them at {token_names(texts, further)}")
    return judge("ends", float(len(faults)), 0.0, "; ".join(faults or remarks))


def check_bos(model: Model, _checkpoint: Path, reference: Reference) -> Check:
    """Texts begin with the checkpoint's BOS, or without one; templates can write it in both cases."""
    added = _added_around(reference)[0]
    texts = _tokens(model)
    bos = added[0] if added else reference.ids.get("bos")
    name = "no BOS" if bos is None else token_names(texts, [bos])
    faults = []
    if bos is not None and model.bos != bos:
        faults.append(f"BOS is {token_names(texts, [model.bos])}, the checkpoint's is {name}")
    if model.add_bos != bool(added):
        does = ("no", "a")
        faults.append(
            f"{does[model.add_bos]} BOS is put before texts, the checkpoint puts {does[bool(added)]} BOS there"
        )
    faults += _written(model, reference, "bos")
    detail = f"{name}, {'put' if added else 'not put'} before texts"
    return judge("bos", float(len(faults)), 0.0, "; ".join(faults) or detail)


def check_template(model: Model, checkpoint: Path, reference: Reference) -> Check:
    """The chat template is the checkpoint's, as Jinja reads both. One that the checkpoint lacks was added on purpose: a remark."""
    wanted, have = chat_template(checkpoint, reference.config), model.chat_template
    if not wanted:
        detail = "the file has one, the checkpoint has none" if have else "neither the file nor the checkpoint has one"
        return judge("template", 0.0, 0.0, detail)
    if have is None:
        detail = f"the file has no tokenizer.chat_template, the checkpoint has one of {len(wanted)} characters"
        return judge("template", 1.0, 0.0, f"{detail}: make it with yarn-edge convert")
    ours, theirs = _as_jinja_reads(have), _as_jinja_reads(wanted)
    if ours == theirs:
        return judge("template", 0.0, 0.0, f"{len(theirs)} characters, the checkpoint's")
    pairs = enumerate(zip(ours, theirs, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    mine, other = (one_line(repr(text[at : at + _EXCERPT]), _EXCERPT + 10) for text in (ours, theirs))
    detail = f"from character {at} on tokenizer.chat_template has {mine}, the checkpoint's template {other}"
    return judge("template", 1.0, 0.0, detail)


# In the order in which they are run.
VOCABULARY_CHECKS: dict[str, Callable[[Model, Path, Reference], Check]] = {
    "tokenizer": check_tokenizer,
    "ends": check_ends,
    "bos": check_bos,
    "template": check_template,
}


def _tokens(model: Model) -> Sequence[str]:
    tokens = model.gguf.metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) else ()


def _added_around(reference: Reference) -> tuple[list[int], list[int]]:
    """What the checkpoint adds before and after a text; of more than llama.cpp can add, check_tokenizer tells."""
    try:
        return reference.added_around()
    except YarnEdgeError:
        return [], []


def _written(model: Model, reference: Reference, role: str) -> Iterator[str]:
    """The fault if the chat template writes a token that the checkpoint's tokenizer does not name, or lacks one that it names."""
    if role not in roles_read(model.chat_template):
        return
    written, named = model.template_token(role), role not in reference.unnamed
    if bool(written) != named and (written or role in reference.ids):
        texts = _tokens(model)
        theirs = token_names(texts, [reference.ids[role]]) if named else "none"
        ours = token_names(texts, [model.bos if role == "bos" else model.eos]) if written else "none"
        yield (
            f"the chat template writes {role}_token, which is {ours}, the checkpoint's is {theirs}: "
            "make it with yarn-edge convert"
        )


def _named_ends(model: Model) -> Iterator[tuple[str, int]]:
    """(key, id) of the ends that the file names besides EOS."""
    for key in END_SLOTS:
        index = model.gguf.metadata.get(key)
        if isinstance(index, int) and model.is_end(index):
            yield key, index
    yield from ((OWN_ENDS, index) for index in sorted(own_ends(model.gguf)))


def _as_jinja_reads(template: str) -> str:
    """Line breaks as \\n, and without one at the end (Jinja2: newline_sequence, keep_trailing_newline)."""
    return template.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
