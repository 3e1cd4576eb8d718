"""What llama.cpp would assert, crash on or never end with is refused in one line; llama.cpp itself says which files those are."""

from __future__ import annotations

import resource
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType

from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.file import GGUFFile
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules import vocabulary_rules
from yarn_edge.llama_rules.decoders import NO_DECODERS, check_decoder
from yarn_edge.llama_rules.loadable import check_loadable
from yarn_edge.runtime import model as runtime
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings

from support import tiny_gguf
from support.gguf_files import BYTE_TOKENIZER, random_tensors, write_gguf
from support.tiny_runs import Ended, in_children

T = "tokenizer.ggml."
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE = {
    T + "model": "llama",
    T + "pre": "default",
    T + "tokens": ["<unk>", "<s>", "</s>", *BYTES, "ab", "abc", "▁a"],
    T + "token_type": [2, 3, 3] + [6] * 256 + [1] * 3,
    T + "scores": [0.0] * 259 + [-1.0, -2.0, -3.0],
    T + "bos_token_id": 1,
    T + "eos_token_id": 2,
    T + "merges": ["a b"],
}
FEW = {T + "tokens": list("abcdefghij"), T + "token_type": [1] * 10, T + "bos_token_id": 0, "llama.vocab_size": 10}


@dataclass(frozen=True)
class Case:
    """A tiny file. keys: with the architecture's prefix, None drops one; full: other keys; said: what the refusal must say."""

    said: str = ""
    architecture: str = "llama"
    keys: dict[str, Any] = field(default_factory=dict)
    full: dict[str, Any] = field(default_factory=dict)
    types: dict[str, GGMLQuantizationType] = field(default_factory=dict)
    alignment: int | None = None
    resized: dict[int, int] = field(default_factory=dict)  # dimensions of tensors

    def write(self, path: Path) -> Path:
        arch = self.architecture
        own = tiny_gguf.model_keys(arch) | self.keys
        keys = {k if k.startswith("xielu.") else f"{arch}.{k}": v for k, v in own.items()}
        everything = {k: v for k, v in (BYTE_TOKENIZER | keys | self.full).items() if v is not None}
        shapes = {n: tuple(self.resized.get(d, d) for d in s) for n, s in tiny_gguf.tensor_shapes(arch).items()}
        tensors: dict[str, npt.NDArray[Any]] = dict(random_tensors(shapes))
        for name in self.types:
            tensors[name] = np.zeros((shapes[name][0], 292), np.uint8)  # a block of 256 Q8_K weights in each row
        return write_gguf(path, arch, everything, tensors, raw_types=self.types, alignment=self.alignment)


MLA = "deepseek2"
ENDS_THE_PROCESS: dict[str, Case] = {
    # gguf.cpp and the mapping of weights
    "alignment 1": Case("general.alignment is 1", alignment=1),
    "alignment 2": Case("maps weights only at multiples of 32 bytes", alignment=2),
    "alignment 8": Case("general.alignment is 8", alignment=8, full={"general.name": "three"}),
    "alignment 16": Case("general.alignment is 16", alignment=16, full={"general.name": "sixteen bytes on"}),
    # experts
    "groups without experts": Case("expert_group_count is 2; 0 experts", keys={"expert_group_count": 2}),
    "groups that do not divide": Case(
        "expert_group_count is 3; 4 experts", "qwen2moe", {"expert_group_count": 3, "expert_group_used_count": 1}
    ),
    "as many groups as experts": Case(
        "expert_group_count is 4", "qwen2moe", {"expert_group_count": 4, "expert_group_used_count": 1}
    ),
    "no group is used": Case("expert_group_used_count is missing", "qwen3moe", {"expert_group_count": 2}),
    "every group is used": Case(
        "expert_group_used_count is 2", "qwen3moe", {"expert_group_count": 2, "expert_group_used_count": 2}
    ),
    "a layer uses more experts than there are": Case("has 4 experts", "qwen3moe", {"expert_used_count": [2, 2, 5, 2]}),
    "an array of experts without experts": Case("has 0 experts", keys={"expert_used_count": [1, 1, 1, 1]}),
    "a layer uses none": Case(
        "granitemoe only with one number for all", "granitemoe", {"expert_used_count": [2, 0, 2, 2]}
    ),
    "a layer uses more than the first": Case(
        "qwen3moe only with one number for all", "qwen3moe", {"expert_used_count": [2, 1, 2, 4]}
    ),
    "no layer uses any": Case("the model has 4 experts", "granitemoe", {"expert_used_count": [0, 0, 0, 0]}),
    "no gating function": Case("no default for dots1", "dots1", {"expert_gating_func": None}),
    "gating function 0": Case("no default for exaone-moe", "exaone-moe", {"expert_gating_func": 0}),
    "gating function 5": Case("expert_gating_func is 5; llama.cpp knows", MLA, {"expert_gating_func": 5}),
    "dense, but it must have experts": Case(
        "expert_count is 0; llama.cpp runs glm4moe only", "glm4moe", {"expert_count": 0, "expert_used_count": 0}
    ),
    "every 0th layer has experts": Case("llama.cpp divides by it", "ernie4_5-moe", {"interleave_moe_layer_step": 0}),
    # heads, rotation, windows
    "latent attention with two key heads": Case("one key-value head only", MLA, {"attention.head_count_kv": 2}),
    "latent attention, key heads by layer": Case("one key-value", MLA, {"attention.head_count_kv": [1, 1, 2, 1]}),
    "latent attention, another key width": Case(
        "key_length is 16; kv_lora_rank and rope.dimension_count are 32", MLA, {"attention.key_length": 16}
    ),
    "scales by position without steps": Case(
        "temperature_length is missing", MLA, {"attention.temperature_scale": 0.1}
    ),
    "heads that cannot be shared": Case("as many as attention.head_count", "dots1", {"attention.head_count_kv": 2}),
    "keys wider than values": Case("the value length, 16", "phi3", {"attention.key_length": 32}),
    "keys narrower than values": Case(
        "the value length, 16", "gptneox", {"attention.key_length": 8, "rope.dimension_count": 8}
    ),
    "sections beyond the head": Case("heads have 16", "glm4", {"rope.dimension_sections": [9, 9, 0, 0]}),
    "a window of a billion": Case("reserves memory", "gemma3", {"attention.sliding_window": 2**31}),
    "no window": Case("afmoe.attention.sliding_window is missing", "afmoe", {"attention.sliding_window": None}),
    "a pattern in which nothing slides": Case(
        "no layer has a sliding window", "gemma2", {"attention.sliding_window_pattern": 1}
    ),
    "sliding layers rotate beyond the head": Case("heads have 16", "gemma3", {"rope.dimension_count_swa": 18}),
    "sliding layers rotate half a pair": Case("dimension_count_swa is 7", "laguna", {"rope.dimension_count_swa": 7}),
    "sliding layers have other keys": Case("key_length, which is 16", "gpt-oss", {"attention.key_length_swa": 8}),
    "sliding layers have other values": Case("which is 16", "exaone-moe", {"attention.value_length_swa": 8}),
    "every 0th layer has full attention": Case("llama.cpp divides by it", "qwen35", {"full_attention_interval": 0}),
    "values of other heads": Case("state_size * ssm.time_step_rank is 32", "qwen35moe", {"ssm.inner_size": 48}),
    "no layer but extra ones": Case("nextn_predict_layers is 4", "glm4moe", {"nextn_predict_layers": 4}),
    # vocabularies
    "WordPiece": Case("is 'bert'; a WordPiece", full=SENTENCEPIECE | {T + "model": "bert"}),
    "no vocabulary": Case("no vocabulary to tokenize", full={T + "model": "none"}),
    "pre-tokenizer whitespace": Case("cannot tokenize two spaces", full={T + "pre": "whitespace"}),
    "one token twice": Case("the same token twice", full={T + "tokens": ["a", *BYTE_TOKENIZER[T + "tokens"][1:]]}),
    "BOS is asked for and beyond the vocabulary": Case(
        "bos_token_id is 10; llama.cpp adds that token to texts, and the vocabulary has 10",
        full=FEW | {T + "bos_token_id": 10, T + "add_bos_token": True},
        resized={262: 10},
    ),
    "EOS is asked for and missing": Case(
        "eos_token_id is missing", full=FEW | {T + "eos_token_id": None, T + "add_eos_token": True}, resized={262: 10}
    ),
    "gemma4 without BOS": Case(
        "bos_token_id is missing", full=SENTENCEPIECE | {T + "model": "gemma4", T + "bos_token_id": None}
    ),
    # tensors
    "weights in the type of activations": Case(
        "is Q8_K, which llama.cpp does not compute with",
        keys={"embedding_length": 256, "feed_forward_length": 128},
        types={"blk.0.attn_q.weight": GGMLQuantizationType.Q8_K},
        resized={64: 256, 32: 128},
    ),
}
LOADS: dict[str, Case] = {
    "alignment 32": Case(alignment=32),
    "alignment 64": Case(alignment=64),
    "experts by layer": Case(architecture="qwen3moe", keys={"expert_used_count": [2, 2, 2, 2]}),
    "two groups": Case(architecture="qwen3moe", keys={"expert_group_count": 2, "expert_group_used_count": 1}),
    "one group": Case(architecture="qwen3moe", keys={"expert_group_count": 1}),
    "gating by default": Case(architecture=MLA, keys={"expert_gating_func": 0}),
    "scales by position": Case(
        architecture=MLA, keys={"attention.temperature_scale": 0.1, "attention.temperature_length": 8}
    ),
    "sections": Case(architecture="glm4", keys={"rope.dimension_sections": [2, 3, 3, 0]}),
    "a wide window": Case(architecture="gemma3", keys={"attention.sliding_window": 2**20}),
    "every layer slides": Case(architecture="gemma2", keys={"attention.sliding_window_pattern": 0}),
    "SentencePiece": Case(full=SENTENCEPIECE),
    "Unigram": Case(full=SENTENCEPIECE | {T + "model": "t5"}),
    "PLaMo 2": Case(full=SENTENCEPIECE | {T + "model": "plamo2"}),
    "gemma4": Case(full=SENTENCEPIECE | {T + "model": "gemma4"}),
    "BOS beyond the vocabulary, and the default is in it": Case(
        full={T + "bos_token_id": 10**6, T + "add_bos_token": True}
    ),
    "merges that are none": Case(full={T + "merges": ["ab", "", "   ", " a  b "]}),
    "pooling": Case(architecture="qwen3", keys={"pooling_type": 3}),
}


def load_each(connection: Connection, _architecture: str, folder: Path, names: list[str]) -> None:
    """In a process of its own: every file, as far as it goes, without our checks."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
    runtime.check_loadable = lambda _file: None  # type: ignore[assignment]
    for name in names:
        signal.alarm(20)
        try:
            with runtime.Model(folder / f"{name}.gguf", trust=True) as model:
                tokens = model.tokenize("Two  spaces\n, 1234 and <s>", add_special=True, parse_special=True)
                with Context(model, ContextSettings(n_ctx=64, n_batch=8, threads=1)) as context:
                    context.evaluate([*tokens, 0][:8], 0)
                    context.evaluate([0], len([*tokens, 0][:8]))
            connection.send((name, "loaded"))
        except YarnEdgeError as error:
            connection.send((name, str(error)))
    connection.close()


def outcomes(cases: dict[str, Case], folder: Path) -> dict[str, Any]:
    for name, case in cases.items():
        case.write(folder / f"{name}.gguf")
    return dict(in_children(load_each, "", folder, list(cases)))


@pytest.mark.parametrize("case", ENDS_THE_PROCESS.values(), ids=ENDS_THE_PROCESS)
def test_what_ends_the_process_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path / "model.gguf")
    with pytest.raises(YarnEdgeError) as refusal:
        check_loadable(read_gguf(path))
    message = str(refusal.value)
    assert case.said in message
    assert message.startswith(str(path))
    assert message.isprintable()


def test_llama_cpp_ends_with_every_file_that_is_refused(tmp_path: Path) -> None:
    """Nothing is refused that llama.cpp runs or reports itself."""
    found = outcomes(ENDS_THE_PROCESS, tmp_path)
    assert {name: result for name, result in found.items() if not isinstance(result, Ended)} == {}


def test_the_neighbors_of_what_is_refused_are_accepted_and_load(tmp_path: Path) -> None:
    assert set(outcomes(LOADS, tmp_path).items()) == {(name, "loaded") for name in LOADS}
    for name in LOADS:
        check_loadable(read_gguf(tmp_path / f"{name}.gguf"))


# llama.cpp runs some files with these vocabularies, and for others never ends, until the memory is full.
NEVER_ENDS: dict[str, Case] = {
    "RWKV": Case("tokenizer.ggml.model is 'rwkv'", full={T + "model": "rwkv"}),
    "RWKV with the newline in a longer token only": Case(
        "is 'rwkv'; llama.cpp never ends",
        full={T + "model": "rwkv", T + "tokens": ["\n\n", *BYTE_TOKENIZER[T + "tokens"][1:]]},
    ),
}


@pytest.mark.parametrize("case", NEVER_ENDS.values(), ids=NEVER_ENDS)
def test_what_never_ends_is_refused_in_one_line(case: Case, tmp_path: Path) -> None:
    path = case.write(tmp_path / "model.gguf")
    with pytest.raises(YarnEdgeError, match=case.said):
        check_loadable(read_gguf(path))


def test_head_counts_by_layer_are_accepted(tmp_path: Path) -> None:
    for architecture, count in ((MLA, 1), ("llama", 2)):
        path = Case(architecture=architecture, keys={"attention.head_count_kv": [count] * 4}).write(tmp_path / "m.gguf")
        check_loadable(read_gguf(path))


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "numbers for the tokenizer": ({T + "model": [1, 2]}, "tokenizer.ggml.model is array([1, 2]"),
    "one number for the tokenizer": ({T + "model": 7}, "tokenizer.ggml.model is 7; expected a name"),
    "strings for the tokenizer": ({T + "model": ["gpt2", "llama"]}, "model is an array of 2 strings; expected a name"),
    "numbers for the pre-tokenizer": ({T + "pre": [0] * 9}, "tokenizer.ggml.pre is array"),
    "a flag for the pre-tokenizer": ({T + "pre": True}, "tokenizer.ggml.pre is True"),
    "a tokenizer that llama.cpp does not know": ({T + "model": "tiktoken"}, "llama.cpp knows llama, gpt2, "),
    "strings for experts": ({"llama.expert_used_count": ["a"]}, "expert_used_count is ['a'], not a finite number"),
    "strings for sections": ({"llama.rope.dimension_sections": ["a"]}, "not a finite number"),
}


@pytest.mark.parametrize("full, said", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_values_of_another_type_are_refused(full: dict[str, Any], said: str, tmp_path: Path) -> None:
    """llama.cpp reports some of them; a comparison of ours must not fall over them first."""
    keys = BYTE_TOKENIZER | {f"llama.{k}": v for k, v in tiny_gguf.model_keys("llama").items()} | full
    path = write_gguf(tmp_path / "m.gguf", "llama", keys, random_tensors(tiny_gguf.tensor_shapes("llama")))
    with pytest.raises(YarnEdgeError) as refusal:
        check_loadable(read_gguf(path))
    assert said in str(refusal.value)


def test_a_vocabulary_that_would_eat_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Case().write(tmp_path / "m.gguf")
    check_loadable(read_gguf(path))
    monkeypatch.setattr(vocabulary_rules, "MAX_TOKENS", 261)
    with pytest.raises(YarnEdgeError, match="tokens is an array of 262 strings; expected 1 to 261"):
        check_loadable(read_gguf(path))


def test_a_vocabulary_without_tokens_is_refused() -> None:
    file = header("llama", tokenizer__ggml__model="gpt2", tokenizer__ggml__tokens=[])
    with pytest.raises(YarnEdgeError, match="tokens is an array of 0 strings; expected 1 to 2097152"):
        check_loadable(file)


def header(architecture: str, **keys: Any) -> GGUFFile:
    metadata = {"general.architecture": architecture, **{k.replace("__", "."): v for k, v in keys.items()}}
    return GGUFFile(Path("m.gguf"), 3, metadata, {}, 32, 0, 0)


@pytest.mark.parametrize("architecture", NO_DECODERS)
def test_models_that_do_not_write_text_are_named(architecture: str) -> None:
    with pytest.raises(YarnEdgeError, match=f"m.gguf: architecture {architecture} is not a causal language model: it "):
        check_decoder(header(architecture))


def test_a_decoder_whose_attention_is_not_causal_is_named() -> None:
    check_decoder(header("qwen3", qwen3__attention__causal=True))
    with pytest.raises(YarnEdgeError, match=r"qwen3\.attention\.causal is false"):
        check_decoder(header("qwen3", qwen3__attention__causal=False))


@pytest.mark.parametrize("named, weights", [("dream", "qwen2"), ("llada", "llama"), ("llama-embed", "llama")])
def test_the_loader_refuses_them_before_llama_cpp_sees_the_file(named: str, weights: str, tmp_path: Path) -> None:
    keys = {f"{named}.{k}": v for k, v in tiny_gguf.model_keys(weights).items()}
    path = write_gguf(
        tmp_path / "m.gguf", named, BYTE_TOKENIZER | keys, random_tensors(tiny_gguf.tensor_shapes(weights))
    )
    with pytest.raises(YarnEdgeError, match=f"architecture {named} is not a causal language model"):
        runtime.Model(path)
