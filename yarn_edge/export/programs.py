"""The programs that a GGUF can be exported for, one row each, and how each is told.

Sources: llama.cpp's common/arg.cpp; Ollama's docs/modelfile.mdx and parser/parser.go; LM Studio's documentation of model.yaml and
its VirtualModelDefinition.ts and schema.ts; vLLM's documentation of engine arguments.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from yarn_edge.errors import YarnEdgeError
from yarn_edge.export.rope_parameters import config_overrides
from yarn_edge.export.subject import ExportSubject, shortest
from yarn_edge.llama_rules.effective import FROM_MODEL, ROPE_SCALING_TYPES

# A field of llama_context_params -> the flag of llama-server
LLAMA_SERVER_FLAGS = {
    "rope_scaling_type": "--rope-scaling",
    "rope_freq_base": "--rope-freq-base",
    "rope_freq_scale": "--rope-freq-scale",
    "yarn_ext_factor": "--yarn-ext-factor",
    "yarn_attn_factor": "--yarn-attn-factor",
    "yarn_beta_fast": "--yarn-beta-fast",
    "yarn_beta_slow": "--yarn-beta-slow",
    "yarn_orig_ctx": "--yarn-orig-ctx",
}
# The first Ollama that runs llama.cpp's own server for every GGUF. The engines before it read rope.freq_scale and no YaRN key.
OLLAMA_VERSION = "0.30.0"
_NAME = re.compile(r"[^/\s]+/[^/\s]+")


@dataclass(frozen=True)
class ExportNames:
    """What the file cannot say. output: the file to write, None for stdout. name: publisher/model. repository: ORG/NAME on the Hub."""

    output: Path | None = None
    name: str | None = None
    repository: str | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--name", self.name), ("--repo", self.repository)):
            if value is not None and not (_NAME.fullmatch(value) and value.isprintable()):
                raise YarnEdgeError(f"{flag} {value!r} is not of the form PUBLISHER/MODEL")


@dataclass(frozen=True)
class ExportProgram:
    """title: in messages. write: its text. sampling: general.sampling.NAME of a GGUF -> its own name; None if it reads the GGUF's.

    named: whether it uses ExportNames beyond the output. without_template: what it does with a GGUF that has no chat template.
    """

    title: str
    write: Callable[[ExportSubject, ExportNames], str]
    sampling: Mapping[str, str] | None
    without_template: str
    named: bool = False
    notes: tuple[str, ...] = field(default=())


def _ollama(subject: ExportSubject, names: ExportNames) -> str:
    subject.arguments("Ollama's Modelfile", takes_arguments=False)
    lines = [f"FROM {_for_modelfile(path, names.output)}" for path in subject.shards]
    lines += [f"REQUIRES {OLLAMA_VERSION}", f"PARAMETER num_ctx {subject.n_ctx}"]
    lines += [f"PARAMETER {name} {shortest(value)}" for name, value in _renamed(subject, "ollama").items()]
    return "\n".join(lines) + "\n"


def _for_modelfile(path: Path, output: Path | None) -> str:
    """The path beside the Modelfile, or the whole one."""
    whole = path.absolute()
    return f"./{path.name}" if output is not None and output.absolute().parent == whole.parent else str(whole)


def _lm_studio(subject: ExportSubject, names: ExportNames) -> str:
    subject.arguments("LM Studio's model.yaml", takes_arguments=False)
    stem = re.sub(r"[^a-z0-9.]+", "-", subject.file.path.stem.lower()).strip("-.") or "model"
    repository = names.repository
    key = (repository or f"local/{stem}-gguf").lower()
    model = names.name or f"local/{stem}"
    if model == key:
        raise YarnEdgeError(f"--name {model} is also the key of its own base: give another name")
    lines = [f"model: {_quoted(model)}", "base:", f"  - key: {_quoted(key)}"]
    if repository is None:
        lines.append("    sources: []")
    else:
        user, _, repo = repository.partition("/")
        lines += [
            "    sources:",
            "      - type: huggingface",
            f"        user: {_quoted(user)}",
            f"        repo: {_quoted(repo)}",
        ]
    lines += ["metadataOverrides:", "  domain: llm", f"  architectures: [{_quoted(subject.file.architecture)}]"]
    lines += [
        "  compatibilityTypes: [gguf]",
        f"  contextLengths: [{subject.file.required_int('context_length')}]",
        "config:",
    ]
    lines += ["  load:", "    fields:", "      - key: llm.load.contextLength", f"        value: {subject.n_ctx}"]
    sampling = _renamed(subject, "lmstudio")
    if sampling:
        lines += ["  operation:", "    fields:"]
    for name, value in sampling.items():
        lines += [f"      - key: llm.prediction.{name}", "        value:"]
        plain = name in _LM_STUDIO_PLAIN
        lines[-1] += f" {shortest(value)}" if plain else f" {{checked: true, value: {shortest(value)}}}"
    return "\n".join(lines) + "\n"


_LM_STUDIO_PLAIN = frozenset({"temperature", "topKSampling"})  # the others can be switched off


def _quoted(text: str) -> str:
    return json.dumps(text)  # which is YAML too


def _llama_server(subject: ExportSubject, _names: ExportNames) -> str:
    arguments = subject.arguments("llama-server", takes_arguments=True)
    words = ["llama-server", "-m", str(subject.file.path.absolute()), "-c", str(subject.n_ctx)]
    if arguments != FROM_MODEL:
        kinds = {number: name for name, number in ROPE_SCALING_TYPES.items()}
        for field_name, value in arguments.context_params.items():
            text = kinds[int(value)] if field_name == "rope_scaling_type" else shortest(value)
            words += [LLAMA_SERVER_FLAGS[field_name], text]
    return shlex.join(words) + "\n"


def _vllm(subject: ExportSubject, _names: ExportNames) -> str:
    overrides = config_overrides(subject)
    words = ["vllm", "serve", str(subject.file.path.absolute()), "--hf-overrides", json.dumps(overrides)]
    words += ["--max-model-len", str(subject.n_ctx)]
    sampling = _renamed(subject, "vllm")
    if sampling:
        values = {
            name: float(shortest(value)) if isinstance(value, float) else value for name, value in sampling.items()
        }
        words += ["--override-generation-config", json.dumps(values)]
    return shlex.join(words) + "\n"


def _renamed(subject: ExportSubject, program: str) -> dict[str, float]:
    """The file's sampling defaults by the program's own names."""
    names = EXPORT_PROGRAMS[program].sampling or {}
    return {names[name]: value for name, value in subject.sampling.items() if name in names}


def untold(subject: ExportSubject, program: str) -> list[str]:
    """The keys of the file's sampling defaults for which the program has no name."""
    names = EXPORT_PROGRAMS[program].sampling
    return [] if names is None else [name for name in subject.sampling if name not in names]


EXPORT_PROGRAMS: dict[str, ExportProgram] = {
    "ollama": ExportProgram(
        "Ollama",
        _ollama,
        {
            "temp": "temperature",
            "top_k": "top_k",
            "top_p": "top_p",
            "min_p": "min_p",
            "penalty_repeat": "repeat_penalty",
            "penalty_last_n": "repeat_last_n",
        },
        "Ollama sends the prompt as it is",
        notes=(f"Ollama before {OLLAMA_VERSION}, whose own engines ignore YaRN's keys, refuses this Modelfile",),
    ),
    "lmstudio": ExportProgram(
        "LM Studio",
        _lm_studio,
        {
            "temp": "temperature",
            "top_k": "topKSampling",
            "top_p": "topPSampling",
            "min_p": "minPSampling",
            "penalty_repeat": "repeatPenalty",
            "xtc_probability": "llama.xtcProbability",
            "xtc_threshold": "llama.xtcThreshold",
        },
        "LM Studio guesses one",
        named=True,
    ),
    "llama-server": ExportProgram("llama-server", _llama_server, None, "llama-server takes ChatML"),
    "vllm": ExportProgram(
        "vLLM",
        _vllm,
        {
            "temp": "temperature",
            "top_k": "top_k",
            "top_p": "top_p",
            "min_p": "min_p",
            "penalty_repeat": "repetition_penalty",
        },
        "vLLM refuses chats",
        notes=("vLLM needs its GGUF plugin, and advises --tokenizer with the name of the base model",),
    ),
}
