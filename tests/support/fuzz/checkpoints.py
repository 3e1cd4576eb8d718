"""Hostile checkpoint folders: valid tiny ones of several forms with changed values, headers, indexes, templates and bytes, and with
files removed, exchanged, or turned into folders, pipes and links.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yarn_edge.convert.hf_to_gguf import convert_job
from yarn_edge.convert.outputs import OutputOptions
from yarn_edge.errors import YarnEdgeError
from yarn_edge.inspect.command import inspect_checkpoint
from yarn_edge.progress import set_quiet
from yarn_edge.stdout import json_text

from support import tiny, tiny_tokenizers
from support.fuzz.mutations import VALUES, mutate_bytes
from support.fuzz.runner import Case

Files = Mapping[str, bytes]

_OWN: tuple[Any, ...] = (
    "<s>",
    "</s>",
    ["<s>", "</s>"],
    {"content": "<s>", "special": True},
    {"content": "\x1b[777m\u202e\x00", "lstrip": True, "id": 5},
    "\ud800",
    "\x1b]52;c;aGk=\x07",
    "\u0120the",
    -1,
    299,
    300,
    2**31,
    2**70,
    "Unigram",
    "WordPiece",
    {"type": "Sequence", "pretokenizers": []},
    {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False},
    {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
    {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{{ '\x1b[777m' }}",
    [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": ""}],
    "F64",
    "F8_E4M3",
    "BF16",
    [320, 64],
    [0, 8],
    [2**62, 2**62],
    "../model.safetensors",
    "model-00001-of-00002.safetensors",
    "a\nb\x1b[777m.safetensors",
)


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """One to three changes of a JSON value, anywhere in its objects and lists."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        node = tree
        while rng.random() < 0.7:
            inner = [child for child in _children(node) if isinstance(child, (dict, list)) and child]
            if not inner:
                break
            node = rng.choice(inner)
        if isinstance(node, dict) and node:
            _change_object(rng, node)
        elif isinstance(node, list) and node:
            _change_list(rng, node)
        else:
            tree = _value(rng)
    return tree


def _children(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, dict) else node if isinstance(node, list) else []


def _value(rng: random.Random) -> Any:
    return copy.deepcopy(rng.choice(_OWN if rng.random() < 0.6 else VALUES))


def _change_object(rng: random.Random, node: dict[str, Any]) -> None:
    key, kind = rng.choice(list(node)), rng.random()
    if kind < 0.2:
        del node[key]
    elif kind < 0.35:
        node[rng.choice(("\x1b[777m", "", "\ud800", "x" * 3000, "<s>", "0", "-1", "99999999999999999999"))] = node[key]
    elif kind < 0.5:
        node[key] = copy.deepcopy(node[rng.choice(list(node))])
    else:
        node[key] = _value(rng)


def _change_list(rng: random.Random, node: list[Any]) -> None:
    at, kind = rng.randrange(len(node)), rng.random()
    if kind < 0.2:
        del node[at]
    elif kind < 0.4:
        node.insert(at, copy.deepcopy(rng.choice(node)))
    elif kind < 0.5:
        rng.shuffle(node)
    else:
        node[at] = _value(rng)


def mutate_safetensors(rng: random.Random, data: bytes) -> bytes:
    """The header as JSON, its length, or bytes."""
    length = int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.7 and (changed := _other_json(rng, data[8 : 8 + length])) is not None:
        return struct.pack("<Q", len(changed)) + changed + data[8 + length :]
    if kind < 0.8:
        return struct.pack("<Q", rng.choice((0, 1, 8, len(data) - 8, len(data), 2**32, 2**63, 2**64 - 1))) + data[8:]
    return mutate_bytes(rng, data, min(8 + length, len(data)))


def _other_json(rng: random.Random, data: bytes) -> bytes | None:
    try:
        return json.dumps(mutate_tree(rng, json.loads(data))).encode()
    except ValueError:  # an earlier mutation
        return None


def _mutated(rng: random.Random, name: str, data: bytes) -> bytes:
    if name.endswith(".safetensors"):
        return mutate_safetensors(rng, data)
    changed = _other_json(rng, data) if name.endswith(".json") and rng.random() < 0.9 else None
    return mutate_bytes(rng, data, len(data)) if changed is None else changed


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def seeds(scratch: Path) -> list[Files]:
    """Valid checkpoints: whole and in shards, BPE and SentencePiece, with and without files beside them; and an adapter."""
    extra = {
        "generation_config.json": {"eos_token_id": [1, 5], "bos_token_id": 0, "max_length": 100},
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}},
        "added_tokens.json": {"<tool>": 300, "<pad>": 301},
    }
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    whole = _tree(tiny.write_checkpoint(scratch / "whole"))
    settings = json.loads(whole["tokenizer_config.json"]) | {
        "pad_token": "<pad>",
        "chat_template": template,
        "additional_special_tokens": ["<tool>"],
        "added_tokens_decoder": {
            "300": {"content": "<tool>", "special": True},
            "301": {"content": "<pad>", "special": True},
        },
    }
    full = whole | {name: json.dumps(values).encode() for name, values in extra.items()}
    full |= {"tokenizer_config.json": json.dumps(settings).encode(), "chat_template.jinja": template.encode()}
    shards = _tree(tiny.write_checkpoint(scratch / "shards", "qwen2", form="shards"))
    pieces = _tree(tiny.write_checkpoint(scratch / "pieces", vocab_size=720))
    del pieces["tokenizer.json"]
    pieces["tokenizer.model"] = tiny_tokenizers.sentence_model()
    adapter = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base", "target_modules": ["q_proj"]}
    adapted = full | {
        "adapter_config.json": json.dumps(adapter).encode(),
        "adapter_model.safetensors": whole["model.safetensors"],
    }
    config = json.loads(whole["config.json"]) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}
    }
    return [whole, full, full, shards, pieces, adapted, full | {"config.json": json.dumps(config).encode()}]


class Checkpoints:
    """Folders, through `inspect`, the plan of `convert` and its proof of the tokenizer. No library may write on stderr."""

    name, in_process = "checkpoints", True

    def __init__(self, scratch: Path) -> None:
        self.checkpoints = seeds(scratch)
        set_quiet(True)
        use_everywhere(scratch / "whole")  # imports are not of an input

    def case(self, rng: random.Random, scratch: Path) -> Case:
        folder = self.write(rng, scratch / "ck")
        set_quiet(True)

        def read() -> None:
            with _stderr_of_libraries() as said:
                use_everywhere(folder)
            assert not said, f"a library wrote on stderr: {said[0]!r}"

        return Case(sum(path.stat().st_size for path in folder.iterdir() if path.is_file()), read)  # type: ignore[arg-type]

    def write(self, rng: random.Random, folder: Path) -> Path:
        """A mutated folder."""
        files = dict(rng.choice(self.checkpoints))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            name, kind = rng.choice(sorted(files)), rng.random()
            if kind < 0.9:
                files[name] = _mutated(rng, name, files[name])
            elif kind < 0.95 and len(files) > 1:
                del files[name]
            else:
                files[name] = files[rng.choice(sorted(files))]
        for name, data in files.items():
            (folder / name).write_bytes(data)
        if rng.random() < 0.05:
            odd = folder / rng.choice(sorted(files))
            odd.unlink()
            links = (odd, "/nowhere", "/dev/zero", "/dev/stdin", "/proc/self/mem")
            rng.choice((odd.mkdir, odd.touch, lambda: os.mkfifo(odd), lambda: odd.symlink_to(rng.choice(links))))()
        return folder


@contextmanager
def _stderr_of_libraries() -> Iterator[list[bytes]]:
    """What is written to the descriptor while this is open, if anything, known at the end."""
    said: list[bytes] = []
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said += [data] if (data := file.read(300)) else []


def use_everywhere(folder: Path) -> None:
    """What `inspect` and `convert --dry-run` do with a checkpoint. Raises what `convert` does."""
    try:
        outcome = inspect_checkpoint(folder)
        json_text(outcome.as_json())
        outcome.text()
    except YarnEdgeError as error:
        if not str(error).isprintable():
            raise ValueError(f"a message of several lines: {error}") from error
    job = convert_job(folder, OutputOptions(str(folder.with_suffix(".gguf")), "F16"))
    json_text(job.as_json(0.0, 1))
