"""Digests of the tensors that llama.cpp's own converter writes for the tiny families, recorded for tests/convert/families.

    python -m support.upstream_bytes LLAMA_CPP     # in tests/; LLAMA_CPP: the source tree of the pinned version

prints the table UPSTREAM. The converter needs no tokenizer for tensors, so it gets none.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import torch

from support import tiny_bailing, tiny_families, tiny_mistral3, tiny_mxfp4, tiny_qwen3_vl

_WITHOUT_VOCABULARY = """
import runpy, sys
sys.path[:0] = [sys.argv[1] + "/gguf-py", sys.argv[1]]
import importlib, conversion.base

def every(kind):
    kind.set_vocab = lambda self: None
    for below in kind.__subclasses__():
        every(below)

for room in (
    "bailingmoe", "command_r", "deepseek", "gemma", "glm", "gpt_oss", "granite", "laguna", "llama", "mellum", "mistral3", "olmo", "phi",
    "qwen", "qwen3vl",
):
    importlib.import_module("conversion." + room)
every(conversion.base.TextModel)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TYPES = ("BF16", "Q8_0")
# Without layers that predict further tokens the converter stops, unless it is told.
FLAGS = dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), ("--no-mtp",))


def digest(path: Path) -> str:
    """Of the names, types, shapes (without a last dimension of 1) and bytes of all tensors but those of positions."""
    found = hashlib.sha256()
    for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda t: t.name):
        if not tensor.name.startswith("rope_"):
            shape = ",".join(map(str, tensor.shape.tolist())).removesuffix(",1")
            found.update(f"{tensor.name} {tensor.tensor_type.name} {shape}".encode())
            found.update(tensor.data.tobytes())
    return found.hexdigest()[:16]


def upstream(source: str, folder: Path, *flags: str) -> tuple[str, ...]:
    """The digests of what llama.cpp's converter makes of a checkpoint, one for each of TYPES."""
    found = []
    for kind in TYPES:
        output = folder.parent / "upstream.gguf"
        script = [source, f"{source}/convert_hf_to_gguf.py", str(folder), "--outtype", kind.lower()]
        command = [sys.executable, "-c", _WITHOUT_VOCABULARY, *script, *flags, "--outfile", str(output)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        found.append(digest(output))
    return tuple(found)


def main(source: str) -> None:
    makers: dict[str, Callable[[Path], Path]] = {
        name: partial(tiny_families.write, name=name, dtype=torch.bfloat16) for name in tiny_families.FAMILIES
    }
    makers["gpt_oss, MXFP4"] = tiny_mxfp4.write
    makers["bailing_moe_v2"] = partial(tiny_bailing.write, dtype=torch.bfloat16)
    for experts in (False, True):
        makers["qwen3_vl_moe" if experts else "qwen3_vl"] = partial(tiny_qwen3_vl.write_bfloat16, experts=experts)
    makers["mistral4"] = partial(tiny_mistral3.write_mistral4, dtype=torch.bfloat16)
    for name, make in makers.items():
        with tempfile.TemporaryDirectory() as place:
            bf16, q8_0 = upstream(source, make(Path(place) / "ck"), *FLAGS.get(name, ()))
            sys.stdout.write(f'    "{name}": ("{bf16}", "{q8_0}"),\n')
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
