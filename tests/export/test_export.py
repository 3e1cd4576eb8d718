"""What is exported, read back as each program reads it: exactly the file's positions, or one line that refuses."""

from __future__ import annotations

import json
import math
import shlex
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from yarn_edge.cli import main
from yarn_edge.convert.hf_to_gguf import convert
from yarn_edge.errors import YarnEdgeError
from yarn_edge.export.command import export
from yarn_edge.export.programs import EXPORT_PROGRAMS, ExportNames
from yarn_edge.export.rope_parameters import READ_BY_TRANSFORMERS
from yarn_edge.export.subject import ExportSubject
from yarn_edge.flags import ScalingOverrides
from yarn_edge.gguf.read import read_gguf
from yarn_edge.llama_rules.effective import RuntimeArguments
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.positions import rope

from support import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
OWN = YARN | {"attention_factor": 1.35, "beta_fast": 8.0, "beta_slow": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# name -> (family, rope_scaling)
FILES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "plain": ("llama", None),
    "native": ("llama", YARN),
    "linear": ("qwen3", {"rope_type": "linear", "factor": 4.0}),
    "baked": ("llama", OWN),
    "llama3": ("llama", LLAMA3),
    "arguments": ("qwen2", OWN),
    "live": ("qwen2", YARN | {"truncate": False}),
}
EVERYTHING = {"ollama", "lmstudio", "llama-server", "vllm"}
# The programs that can run each file at its own positions
RUN_BY = {
    "plain": EVERYTHING,
    "native": EVERYTHING,
    "linear": EVERYTHING,
    "baked": EVERYTHING,
    "llama3": EVERYTHING - {"vllm"},
    "arguments": {"llama-server", "vllm"},
    "live": {"vllm"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    made = {}
    for name, (family, scaling) in FILES.items():
        checkpoint = tiny.write_checkpoint(folder / name, family, rope_scaling=scaling, rope_theta=50000.0)
        (made[name],) = convert(checkpoint, str(folder / f"{name}.gguf"), "F32")
    return made


def told(path: Path, program: str, **options: Any) -> str:
    return export(path, program, **options)[0]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("program", EXPORT_PROGRAMS)
def test_a_program_gets_a_file_that_it_can_run_and_no_other(name: str, program: str, files: dict[str, Path]) -> None:
    if program in RUN_BY[name]:
        assert told(files[name], program)
        return
    with pytest.raises(
        YarnEdgeError, match=r"positions need yarn-edge: .* has no parameter for|no argument of llama.cpp"
    ):
        export(files[name], program)


def float32(text: str) -> float:
    """std::stof."""
    return float(struct.unpack("<f", struct.pack("<f", float(text)))[0])


@pytest.mark.parametrize("name", sorted(name for name, programs in RUN_BY.items() if "llama-server" in programs))
def test_llama_server_reads_its_flags_as_the_positions_of_the_file(name: str, files: dict[str, Path]) -> None:
    """The flags as common/arg.cpp reads them."""
    program, *words = shlex.split(told(files[name], "llama-server"))
    given = dict(zip(words[::2], words[1::2], strict=True))
    assert (program, given.pop("-m"), given.pop("-c")) == ("llama-server", str(files[name]), "1024")
    kinds = {"none": 0, "linear": 1, "yarn": 2}
    fields: dict[str, Any] = {}
    for flag, text in given.items():
        if flag == "--rope-scaling":
            fields["rope_scaling_type"] = kinds[text]
        elif flag == "--yarn-orig-ctx":
            fields["yarn_orig_ctx"] = int(text)
        else:
            fields[flag.removeprefix("--").replace("-", "_")] = float32(text)
    assert bool(fields) == (name == "arguments")
    assert not FilePositions(read_gguf(files[name])).error(RuntimeArguments(**fields)).any_difference


def parameters_of(text: str) -> dict[str, list[str]]:
    """A Modelfile by Ollama's grammar: a command and its value on each line, and the name of a parameter before its value."""
    commands: dict[str, list[str]] = {}
    for line in text.splitlines():
        command, value = line.split(" ", 1)
        if command == "PARAMETER":
            command, value = value.split(" ", 1)
        assert value.isprintable()
        assert not value.startswith('"')
        commands.setdefault(command, []).append(value)
    return commands


def test_a_modelfile(files: dict[str, Path]) -> None:
    whole = parameters_of(told(files["native"], "ollama"))
    assert whole == {"FROM": [str(files["native"])], "REQUIRES": ["0.30.0"], "num_ctx": ["1024"]}
    beside = ExportNames(files["native"].parent / "Modelfile")
    assert parameters_of(told(files["native"], "ollama", names=beside))["FROM"] == ["./native.gguf"]
    assert parameters_of(told(files["native"], "ollama", ctx=512))["num_ctx"] == ["512"]


def test_model_yaml(files: dict[str, Path]) -> None:
    local = yaml.safe_load(told(files["baked"], "lmstudio"))
    assert local["model"] == "local/baked"
    assert local["base"] == [{"key": "local/baked-gguf", "sources": []}]
    assert local["config"] == {"load": {"fields": [{"key": "llm.load.contextLength", "value": 1024}]}}
    assert local["metadataOverrides"]["contextLengths"] == [1024]
    names = ExportNames(name="me/yes", repository="Org/Name-GGUF")
    (base,) = yaml.safe_load(told(files["baked"], "lmstudio", names=names))["base"]
    assert base["key"] == "org/name-gguf"
    assert base["sources"] == [{"type": "huggingface", "user": "Org", "repo": "Name-GGUF"}]


def overrides_of(path: Path) -> dict[str, Any]:
    words = shlex.split(told(path, "vllm"))
    assert words[:3] == ["vllm", "serve", str(path)]
    given = dict(zip(words[3::2], words[4::2], strict=True))
    assert given.pop("--max-model-len") == "1024"
    overrides: dict[str, Any] = json.loads(given.pop("--hf-overrides"))
    assert not given
    return overrides


@pytest.mark.parametrize("name", sorted(name for name, programs in RUN_BY.items() if "vllm" in programs))
def test_vllms_overrides_are_transformers_formulas(name: str, files: dict[str, Path]) -> None:
    """transformers reads the config from the GGUF itself, as it does inside vLLM, and then gets the overrides."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(files[name].parent, gguf_file=files[name].name)
    overrides = overrides_of(files[name])
    config.update(overrides)
    wanted, block = FilePositions(read_gguf(files[name])).wanted, overrides["rope_parameters"]
    if block["rope_type"] == "default":
        inv_freq, a = wanted.rope_theta ** (-np.arange(0, wanted.dim, 2) / wanted.dim), 1.0
        assert config.rope_parameters["rope_theta"] == wanted.rope_theta
    else:
        theirs, a = ROPE_INIT_FUNCTIONS[block["rope_type"]](config, "cpu")
        inv_freq = theirs.double().numpy()
    np.testing.assert_allclose(rope.inv_freq(wanted), inv_freq, rtol=2e-6)
    assert wanted.attention_factor == pytest.approx(a, rel=1e-6)
    # vLLM's two readings of A (yarn_scaling_rope.py before and after it knew attention_factor)
    if block["rope_type"] == "yarn":
        default = 0.1 * math.log(block["factor"]) + 1
        for reading in (default * block.get("attn_factor", 1.0), block.get("attention_factor", default)):
            assert wanted.attention_factor == pytest.approx(reading, rel=1e-6)


def test_the_architectures_that_transformers_reads_are_those_of_its_own_table() -> None:
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    assert {name.replace("moe", "_moe") for name in READ_BY_TRANSFORMERS} <= GGUF_CONFIG_MAPPING.keys()


SAMPLING = {
    "temp": float32("0.7"),
    "top_k": 20,
    "top_p": float32("0.8"),
    "min_p": 0.0,
    "penalty_repeat": float32("1.05"),
    "mirostat": 2,
}


def with_keys(path: Path, **keys: Any) -> ExportSubject:
    file = read_gguf(path)
    return ExportSubject(replace(file, metadata={**file.metadata, **keys}), 1024)


def test_sampling_defaults_go_along_by_each_programs_names(files: dict[str, Path]) -> None:
    subject = with_keys(files["native"], **{f"general.sampling.{name}": value for name, value in SAMPLING.items()})
    given = {name: row.write(subject, ExportNames()) for name, row in EXPORT_PROGRAMS.items()}
    modelfile = {key: values for key, values in parameters_of(given["ollama"]).items() if key.islower()}
    want = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.0, "repeat_penalty": 1.05, "num_ctx": 1024}
    assert {key: float(value) for key, (value,) in modelfile.items()} == want
    fields = {f["key"]: f["value"] for f in yaml.safe_load(given["lmstudio"])["config"]["operation"]["fields"]}
    assert fields["llm.prediction.temperature"] == 0.7
    assert fields["llm.prediction.topPSampling"] == {"checked": True, "value": 0.8}
    words = shlex.split(given["vllm"])
    assert json.loads(words[-1]) == {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.0,
        "repetition_penalty": 1.05,
    }
    assert "temp" not in given["llama-server"]  # it reads these keys by itself


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "a context beyond the file's": ("native", {}, {"ctx": 2048}, "--ctx 2048 is beyond the 1024 tokens"),
    "a name for Ollama": ("native", {}, {"names": ExportNames(name="a/b")}, "--name and --repo are for lmstudio"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_flags_are_refused(case: str, files: dict[str, Path]) -> None:
    name, _keys, options, message = REFUSED[case]
    with pytest.raises(YarnEdgeError, match=message):
        export(files[name], "ollama", **options)


CANNOT: dict[str, tuple[dict[str, Any], str, str]] = {
    "sampling in words": (
        {"general.sampling.temp": "hot"},
        "ollama",
        "general.sampling.temp is 'hot'; expected a finite number",
    ),
    "sampling without end": ({"general.sampling.temp": math.inf}, "vllm", "expected a finite number"),
    "experts in a llama": ({"llama.expert_count": 4}, "vllm", "no config of a GGUF of architecture llama with experts"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_keys_that_cannot_be_exported_are_refused(case: str, files: dict[str, Path]) -> None:
    keys, program, message = CANNOT[case]
    with pytest.raises(YarnEdgeError, match=message):
        EXPORT_PROGRAMS[program].write(with_keys(files["native"], **keys), ExportNames())


def test_another_converters_file_with_an_open_factor_is_refused(files: dict[str, Path]) -> None:
    """llama.cpp's converter writes a config's attention_factor there, and nobody reads it."""
    file = read_gguf(files["native"])
    keys = {k: v for k, v in file.metadata.items() if not k.startswith("yarn_edge.")}
    subject = ExportSubject(replace(file, metadata={**keys, "llama.rope.scaling.yarn_attn_factor": 1.35}), 1024)
    for row in EXPORT_PROGRAMS.values():
        with pytest.raises(YarnEdgeError, match=r"1\.35, whose meaning is open: .*--yarn-attention-factor"):
            row.write(subject, ExportNames())


@pytest.mark.parametrize("value", ["a", "a/b/c", "a/ b", "a/b\n", ""])
def test_a_name_has_two_parts(value: str) -> None:
    with pytest.raises(YarnEdgeError, match=r"--name .* is not of the form"):
        ExportNames(name=value)


def test_a_file_whose_name_no_text_can_hold(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "a\nPARAMETER num_ctx 9.gguf"
    path.symlink_to(files["native"])
    with pytest.raises(YarnEdgeError, match="rename the file") as caught:
        export(path, "ollama")
    assert str(caught.value).isprintable()


def test_the_command(files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(files["native"]), "--for", "ollama"]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("FROM /")
    assert "the file has no chat template: Ollama sends the prompt as it is" in printed.err
    output = tmp_path / "Modelfile"
    assert main([*words, "-o", str(output)]) == 0
    assert capsys.readouterr().out == ""
    assert output.read_text() == printed.out
    assert main([*words, "-o", str(output)]) == 2
    assert "exists already; --force overwrites it" in capsys.readouterr().err
    assert main([*words, "-o", str(files["native"]), "--force"]) == 2
    assert main([*words, "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == printed.out
    assert main(["export", str(files["live"]), "--for", "ollama", "-o", str(tmp_path / "no")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "positions need yarn-edge" in line
    assert not (tmp_path / "no").exists()


def test_frozen_ntk_is_another_base(tmp_path: Path) -> None:
    checkpoint = tiny.write_checkpoint(
        tmp_path / "ck", rope_scaling={"rope_type": "dynamic", "factor": 2.0}, max_position_embeddings=256
    )
    (path,) = convert(checkpoint, str(tmp_path / "ntk.gguf"), "F32", overrides=ScalingOverrides(freeze_at=1024))
    block = json.loads(shlex.split(told(path, "vllm"))[4])["rope_parameters"]
    wanted = FilePositions(read_gguf(path)).wanted
    plain = block["rope_theta"] ** (-np.arange(0, wanted.dim, 2) / wanted.dim)
    np.testing.assert_allclose(plain, rope.inv_freq(wanted), rtol=1e-6)
    assert block["rope_type"] == "default"
