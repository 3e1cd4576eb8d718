"""`yarn-edge imatrix`: transformers' hooks and a naive reading of every node are the truth; interrupted runs go on."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.convert.imatrix import activations as activation_tap
from yarn_edge.convert.imatrix import command as collecting
from yarn_edge.convert.imatrix.activations import ActivationTap, weight_name
from yarn_edge.convert.imatrix.command import ImatrixSettings, chunks_of, collect
from yarn_edge.convert.imatrix.matrix import ImportanceMatrix, read_imatrix
from yarn_edge.errors import YarnEdgeError
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph.opening import open_context
from yarn_edge.graph.tap import GraphTap
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import TensorStruct, op_number, read_tensor
from yarn_edge.runtime.model import Model
from yarn_edge.sample_text import sample_text
from yarn_edge.text_file import read_text

from support import tiny_gguf
from support.build_note import without_build_note
from support.gguf_files import byte_words

CTX = 64
MODULES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collect")
    (folder / "t.txt").write_text(sample_text()[: 20 * CTX + CTX // 2], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny_model(folder: Path) -> Path:
    return tiny_gguf.write(folder / "llama.gguf", "llama")


def assert_same(one: ImportanceMatrix, other: ImportanceMatrix, rtol: float) -> None:
    assert (one.chunk_count, one.chunk_size) == (other.chunk_count, other.chunk_size)
    assert one.entries.keys() == other.entries.keys()
    for name, entry in one.entries.items():
        np.testing.assert_array_equal(entry.counts, other.entries[name].counts, name)
        np.testing.assert_allclose(entry.sums, other.entries[name].sums, rtol, err_msg=name)


# ---- the values


def hooked_squares(folder: Path, chunks: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What transformers' linear layers are given, squared and summed in float64."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found: dict[str, Any] = {}

    def listen(name: str, module: torch.nn.Module) -> None:
        def hook(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].double().square().flatten(0, -2).sum(0).numpy()
            found[name] = found.get(name, 0) + squares

        module.register_forward_pre_hook(hook)

    for layer, block in enumerate(model.model.layers):
        for theirs, ours in MODULES.items():
            listen(f"blk.{layer}.{ours}.weight", block.get_submodule(theirs))
    with torch.inference_mode():
        for chunk in chunks:
            model(torch.tensor([list(chunk)]), use_cache=False)
    return found


def test_squares_are_those_of_the_checkpoint_in_transformers(
    smol_f32: Path, smol_checkpoint: Path, tmp_path: Path
) -> None:
    """Two chunks side by side, with the checkpoint's YaRN."""
    (tmp_path / "t.txt").write_text(sample_text()[:1500], encoding="utf-8")
    outcome = collect(smol_f32, tmp_path / "t.txt", tmp_path / "m.gguf", ImatrixSettings(ctx=128, chunks=2))
    with Model(smol_f32, vocab_only=True) as model:
        tokens = model.tokenize(sample_text()[:1500], add_special=False, parse_special=False)
    truth = hooked_squares(smol_checkpoint, [tokens[:128], tokens[128:256]])
    found = read_imatrix(tmp_path / "m.gguf")
    assert found.entries.keys() == outcome.matrix.entries.keys() == truth.keys()
    assert (found.datasets, found.chunk_count, found.chunk_size) == ((str(tmp_path / "t.txt"),), 2, 128)
    for name, entry in found.entries.items():
        assert entry.counts.tolist() == [256]
        apart = np.linalg.norm(entry.sums[0] - truth[name]) / np.linalg.norm(truth[name])
        assert apart < 1e-3, (name, apart)  # the cache and flash attention are in half precision


class Naive(GraphTap):
    """Every node is computed on its own, every input is copied and summed row by row, as the C++ code says it."""

    def __init__(self, with_output: bool) -> None:
        super().__init__()
        self.with_output = with_output
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, Any] = defaultdict(int)

    def see(self, address: int, asking: bool) -> bool:
        node = TensorStruct.from_address(address)
        if asking or node.op not in (op_number(b"MUL_MAT"), op_number(b"MUL_MAT_ID")):
            return True
        weight, name = node.src[0].contents, node.src[0].contents.name.decode()
        ne = list(weight.ne)
        if node.op == op_number(b"MUL_MAT_ID"):
            x, ids = read_tensor(node.src[1], np.float32)[0], read_tensor(node.src[2], np.int32)[0, 0]
            sums, counts = np.zeros((ne[2], ne[0])), np.zeros(ne[2], np.int64)
            for token, experts in enumerate(ids):
                for slot, expert in enumerate(experts):
                    sums[expert] += x[token, slot % x.shape[1]].astype(float) ** 2
                    counts[expert] += 1
        elif name.startswith("blk.") or (self.with_output and name == "output.weight"):
            x = read_tensor(node.src[1], np.float32)
            if x.shape[2] < 16:
                return True
            sums, counts = np.zeros((ne[2] * ne[3], ne[0])), np.array([x[..., 0].size // (ne[2] * ne[3])])
            for i3, i2, row in np.ndindex(x.shape[:3]):
                sums[i3 % ne[3] * ne[2] + i2 % ne[2]] += x[i3, i2, row].astype(float) ** 2
        else:
            return True
        self.sums[name] = self.sums[name] + sums
        self.counts[name] = self.counts[name] + counts
        return True


KINDS = {
    "llama": "dense",
    "falcon": "q, k and v in one",
    "gemma2": "no output matrix of its own",
    "qwen3moe": "experts",
    "gpt-oss": "experts with biases",
    "deepseek2": "3-D weights, experts and a shared one",
    "phimoe": "no node of the usual name",
}


@pytest.mark.parametrize("with_output", [False, True], ids=["blocks", "output, too"])
@pytest.mark.parametrize("architecture", KINDS)
def test_squares_are_those_of_a_naive_reading(architecture: str, with_output: bool, folder: Path) -> None:
    path = folder / f"{architecture}.gguf"
    path = path if path.exists() else tiny_gguf.write(path, architecture)
    random = np.random.default_rng(5)
    sequences = random.integers(0, 256, (3, 70)).tolist()  # graphs of 48 tokens, and one of 18
    naive, tap = Naive(with_output), ActivationTap(with_output=with_output)
    advanced: list[float] = []
    found = []
    for which in (naive, tap):
        with (
            Model(path) as model,
            open_context(
                model, ContextSettings(n_ctx=CTX * 2, n_seq=3, n_batch=210, n_ubatch=48, threads=1), which
            ) as context,
        ):
            if which is tap:
                found.append(tap.measure(context, sequences, advanced.append))
            else:
                with naive.watching(context):
                    context.evaluate_side_by_side(sequences)
    assert found[0].keys() == naive.sums.keys()
    assert ("output.weight" in found[0]) == (with_output and architecture != "gemma2")
    assert sum(advanced) == 210
    for name, squares in found[0].items():
        np.testing.assert_array_equal(squares.counts, naive.counts[name], name)
        np.testing.assert_allclose(squares.sums, naive.sums[name], 2e-6, err_msg=name)


class Watched(ActivationTap):
    def __init__(self, with_output: bool) -> None:
        super().__init__(with_output=with_output)
        self.calls: list[tuple[str, bool]] = []

    def see(self, address: int, asking: bool) -> bool:
        self.calls.append((TensorStruct.from_address(address).name.decode(), asking))
        return super().see(address, asking)


@pytest.mark.parametrize("with_output", [False, True])
def test_shared_inputs_are_read_once_and_the_output_matrix_only_if_it_counts(
    with_output: bool, tiny_model: Path
) -> None:
    tap = Watched(with_output)
    with Model(tiny_model) as model, open_context(model, ContextSettings(n_ctx=CTX, threads=1), tap) as context:
        tap.measure(context, [list(range(32))])
    computed = [name for name, asking in tap.calls if not asking]
    inputs = tiny_gguf.N_LAYERS * 4 + with_output  # of q, k, v; of the heads' output; of gate and up; of down
    assert len(computed) == inputs + 1
    assert computed.count("result_norm") == 1
    assert ("result_output" in {name for name, _ in tap.calls}) == with_output


def test_graphs_without_the_last_node_are_read_to_their_end(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in (b"result_norm", b"nowhere"):
        monkeypatch.setattr(activation_tap, "_LAST_NODE", name)
        tap = ActivationTap()
        with (
            Model(tiny_model) as model,
            open_context(model, ContextSettings(n_ctx=CTX, n_batch=20, threads=1), tap) as context,
        ):
            advanced: list[float] = []
            found.append(tap.measure(context, [list(range(40))], advanced.append))
            assert advanced == ([20, 20] if name == b"result_norm" else [40])
    for weight, squares in found[0].items():
        assert squares.sums.tobytes() == found[1][weight].sums.tobytes()


def test_values_on_a_device_are_copied(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for name in (b"CPU", b"CUDA0"):
        ask = {"ggml_backend_buffer_name": lambda _buffer, name=name: name}
        monkeypatch.setattr(activation_tap, "function", ask.__getitem__)
        tap = ActivationTap()
        with Model(tiny_model) as model, open_context(model, ContextSettings(n_ctx=CTX, threads=1), tap) as context:
            found.append(tap.measure(context, [list(range(40))]))
    for weight, squares in found[0].items():
        assert squares.sums.tobytes() == found[1][weight].sums.tobytes()


@pytest.mark.parametrize(
    "name, plain",
    [
        (b"blk.0.attn_k.weight", b"blk.0.attn_k.weight"),
        (b"CUDA0#blk.0.attn_k.weight#0", b"blk.0.attn_k.weight"),
        (b"a#b", b"b"),
    ],
)
def test_names_of_copies(name: bytes, plain: bytes) -> None:
    assert weight_name(name) == plain


def test_a_failure_inside_the_callback_is_raised(tiny_model: Path) -> None:
    class Broken(ActivationTap):
        def see(self, _address: int, _asking: bool) -> bool:
            raise ZeroDivisionError("oh no")

    tap = Broken()
    with Model(tiny_model) as model, open_context(model, ContextSettings(n_ctx=CTX, threads=1), tap) as context:
        for _ in range(2):
            with pytest.raises(YarnEdgeError, match="the graph tap failed: ZeroDivisionError: oh no"):
                tap.measure(context, [list(range(32))])


def test_sequences_side_by_side_do_not_see_each_other(tiny_model: Path) -> None:
    random = np.random.default_rng(2)
    first, second = random.integers(0, 256, (2, 30)).tolist()
    with (
        Model(tiny_model) as model,
        Context(model, ContextSettings(n_ctx=CTX, n_seq=2, n_batch=128, kv_type="f32", threads=1)) as context,
    ):
        logits = []
        for sequences in ([first, second], [first], [second]):
            context.clear()
            context.evaluate_side_by_side(sequences)
            logits.append(context.logits())
        np.testing.assert_allclose(logits[0], np.concatenate(logits[1:]), atol=1e-4)
        with pytest.raises(ValueError, match="must have the same length"):
            context.evaluate_side_by_side([first, second[:-1]])


# ---- the chunks


def test_chunks(tiny_model: Path) -> None:
    """One byte is one token here, 258 is <s>, 260 is <u>."""
    text, table = "x" * 5 + "<u>" + "y" * 12, byte_words()
    x, y, markup = table.index("x"), table.index("y"), [table.index(c) for c in "<u>"]
    plain = [x] * 5 + markup + [y] * 12

    def cut(text: str = text, bos: bool = False, **changes: Any) -> list[list[int]]:
        with Model(tiny_model, overrides={"tokenizer.ggml.add_bos_token": bos}) as model:
            return chunks_of(model, text, ImatrixSettings(**{"ctx": 8, **changes}), Path("t.txt"))

    assert cut() == [plain[:8], plain[8:16]]
    assert cut(chunks=1) == [plain[:8]]
    assert cut(chunks=99, ctx=20) == [plain]
    with_bos = [258, *plain]
    assert cut(bos=True) == [with_bos[:8], [258, *with_bos[9:16]]]
    assert cut(parse_special=True)[0] == [x] * 5 + [260, y, y]
    with pytest.raises(YarnEdgeError, match=r"t\.txt: has 20 tokens, fewer than one chunk of 21"):
        cut(ctx=21)


def test_the_line_break_at_the_end_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes("é\n\n".encode())
    assert read_text(tmp_path / "t") == "é\n"


# ---- the command


def words(model: Path, folder: Path, *more: str, output: str = "m.gguf") -> list[str]:
    return [
        "imatrix",
        str(model),
        "--text",
        str(folder / "t.txt"),
        "-o",
        str(folder / output),
        "--ctx",
        str(CTX),
        "--batch",
        "128",
        "--threads",
        "1",
        *more,
    ]


def test_what_the_command_tells(tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tiny_model, folder, "--json", "--quiet")) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["seconds"] > 0
    assert told["tok_per_s"] == pytest.approx(told["tokens"] / told["seconds"])
    expected = {
        "model": str(tiny_model),
        "output": str(folder / "m.gguf"),
        "chunks": 20,
        "ctx": CTX,
        "tokens": 20 * CTX,
        "entries": 28,
        "experts_without_data": {},
    }
    assert expected.items() <= told.items()
    assert shown.err == ""
    assert main(words(tiny_model, folder, "--force", "--chunks", "3")) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{folder / 'm.gguf'}: 28 matrices, 3 chunks of {CTX}\n"
    assert "192 tokens in" in shown.err


def test_experts_without_a_token_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf.write(tmp_path / "moe.gguf", "qwen3moe")
    (tmp_path / "t.txt").write_text("x" * CTX)
    assert main(words(model, tmp_path, "--json")) == 0
    shown = capsys.readouterr()
    entries = read_imatrix(tmp_path / "m.gguf").entries
    unseen = {n: np.flatnonzero(e.counts == 0).tolist() for n, e in entries.items() if not e.counts.all()}
    assert unseen
    assert json.loads(shown.out)["experts_without_data"] == unseen
    assert f"{sum(map(len, unseen.values()))} experts saw no token ({next(iter(unseen))}" in shown.err
    counted = [e.counts.sum() for n, e in entries.items() if "_exps" in n]
    assert counted == [2 * CTX] * len(counted)  # two experts a token


def test_an_output_matrix_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf", "gemma2")
    done = words(model, folder, "--process-output", "--chunks", "1", output="tied.gguf")
    assert main(done) == 0
    assert "this model has no output.weight" in capsys.readouterr().err


def poisoned(source: Path, target: Path, tensor: str, value: float) -> Path:
    """`source` with one weight replaced."""
    data = bytearray(source.read_bytes())
    at = read_gguf(source).tensors[tensor].offset
    data[at : at + 4] = np.float32(value).tobytes()
    target.write_bytes(data)
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
def test_values_that_are_not_finite_name_the_weight(
    value: float, tiny_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = poisoned(tiny_model, tmp_path / "x.gguf", "blk.2.ffn_norm.weight", value)
    assert main(words(model, folder, output="nan.gguf")) == 2
    told = capsys.readouterr().err
    assert "blk.2.ffn_gate.weight: its input has values that are infinite" in told.replace("ffn_up", "ffn_gate")
    assert told.count("\n") == 1
    assert not list(folder.glob("nan.gguf*"))


def test_bad_input_is_one_line(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"t.txt": b"x" * 1000, "empty": b" \n", "latin": b"caf\xe9", "short": b"x" * (CTX - 1)}
    for name, data in texts.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "there.gguf").write_text("theirs")
    (tmp_path / "unfinished.gguf.progress").write_text("theirs")
    given: dict[str, tuple[list[str], str]] = {
        "no text": (["--text", str(tmp_path / "nowhere")], "nowhere: No such file"),
        "a folder": (["--text", str(tmp_path)], "is not a regular file but a folder"),
        "empty": (["--text", str(tmp_path / "empty")], "empty: holds no text"),
        "not UTF-8": (["--text", str(tmp_path / "latin")], "latin: is not UTF-8: byte 3 is 0xe9"),
        "short": (["--text", str(tmp_path / "short")], "has 63 tokens, fewer than one chunk of 64"),
        "beyond the context": (["--ctx", "1025"], "its context is 1024 tokens, --ctx 1025 exceeds it"),
        "too small": (["--ctx", "15"], "15 is not from 16"),
        "taken": (["-o", str(tmp_path / "there.gguf")], "exists already; --force overwrites it"),
        "no folder": (["-o", str(tmp_path / "no" / "m.gguf")], "no such folder"),
        "the text itself": (["-o", str(tmp_path / "t.txt"), "--force"], "is one of the files that are read"),
        "unfinished": (["-o", str(tmp_path / "unfinished.gguf")], "is an unfinished run: --resume continues it"),
        "nothing to resume": (["--resume"], "m.gguf.progress: does not exist: there is no unfinished run"),
        "resumed from a stranger's": (
            ["-o", str(tmp_path / "unfinished.gguf"), "--resume"],
            "not an importance matrix",
        ),
    }
    before = sorted(tmp_path.iterdir())
    for case, (flags, told) in given.items():
        assert main([*words(tiny_model, tmp_path), *flags]) == 2, case
        shown = capsys.readouterr().err
        assert told in shown, case
        assert shown.count("\n") == 1, case
    for model, told in ((tmp_path / "t.txt", "not a GGUF"), (tmp_path / "nowhere.gguf", "No such file")):
        assert main(words(model, tmp_path)) == 2
        assert told in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_whose_tokens_see_what_follows_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny_gguf.write(tmp_path / "m.gguf", "llama", {"attention.causal": False})
    with pytest.raises(YarnEdgeError, match="is not a causal language model"):
        collect(model, folder / "t.txt", tmp_path / "o.gguf", ImatrixSettings(ctx=CTX))


# ---- interrupted runs


def interrupted(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, *more: str) -> int:
    """The command, ended by Ctrl-C in evaluation number `after`."""
    calls, measure = [0], ActivationTap.measure

    def stops(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return measure(*args)

    with monkeypatch.context() as patched:
        patched.setattr(ActivationTap, "measure", stops)
        return main(words(model, folder, *more))


def test_a_resumed_run_is_one_run(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.txt").write_bytes((folder / "t.txt").read_bytes())
    assert main(words(tiny_model, tmp_path, output="whole.gguf")) == 0
    progress = tmp_path / "m.gguf.progress"
    assert interrupted(tiny_model, tmp_path, monkeypatch, 0) == 130
    assert not progress.exists()
    assert interrupted(tiny_model, tmp_path, monkeypatch, 3) == 130
    assert f"{progress}: 6 of 20 chunks; --resume continues from there" in capsys.readouterr().err
    assert read_imatrix(progress).chunk_count == 6
    assert interrupted(tiny_model, tmp_path, monkeypatch, 2, "--resume") == 130
    assert read_imatrix(progress).chunk_count == 10
    assert not (tmp_path / "m.gguf").exists()
    copy = tmp_path / "renamed.gguf"
    copy.write_bytes(tiny_model.read_bytes())
    assert main(words(copy, tmp_path, "--resume", "--json")) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["chunks"], told["tokens"]) == (20, 10 * CTX)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "renamed.gguf", "t.txt", "whole.gguf"]
    resumed, whole = read_imatrix(tmp_path / "m.gguf"), read_imatrix(tmp_path / "whole.gguf")
    assert_same(resumed, whole, 1e-6)
    assert (resumed.run, resumed.datasets) == ({}, whole.datasets)


def test_another_run_does_not_go_on_from_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcdefghijklmnopqrstuvwxyz" * 40)
    assert interrupted(tiny_model, tmp_path, monkeypatch, 2) == 130
    other = poisoned(tiny_model, tmp_path / "other.gguf", "blk.3.ffn_down.weight", 0.5)
    cases: dict[str, tuple[list[str], str]] = {
        "another model": (words(other, tmp_path), "another model"),
        "another context": ([*words(tiny_model, tmp_path), "--ctx", "32"], "--ctx 64, 15 chunks"),
        "another batch": ([*words(tiny_model, tmp_path), "--batch", "64"], "--batch 128"),
        "the output, too": (words(tiny_model, tmp_path, "--process-output"), "--process-output off"),
        "fewer chunks": (words(tiny_model, tmp_path, "--chunks", "9"), "15 chunks"),
        "markup": (words(tiny_model, tmp_path, "--parse-special"), "--parse-special off"),
    }
    capsys.readouterr()
    for case, (command, told) in cases.items():
        assert main([*command, "--resume"]) == 2, case
        wanted = f"m.gguf.progress: was begun with {told}; --force instead of --resume starts over\n"
        assert capsys.readouterr().err.endswith(wanted), case
    text.write_text(text.read_text().replace("k", "K"))
    assert main([*words(tiny_model, tmp_path), "--resume"]) == 2
    assert "was begun with another text;" in capsys.readouterr().err
    assert main([*words(tiny_model, tmp_path), "--force"]) == 0
    assert not (tmp_path / "m.gguf.progress").exists()


CHILD = """
import sys
from yarn_edge.cli import main
from yarn_edge.convert.imatrix import command
command.SAVE_SECONDS = 0
sys.exit(main(sys.argv[1:]))
"""


def test_ended_at_any_moment_it_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """Real signals: kill -9 after a save, then Ctrl-C, then SIGTERM, each in the run that goes on from the one before."""
    (tmp_path / "t.txt").write_text(sample_text()[: 100 * CTX], encoding="utf-8")
    progress, done = tmp_path / "m.gguf.progress", 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        before = progress.stat().st_mtime_ns if progress.exists() else 0
        resume = ["--resume"] if before else []
        command = [sys.executable, "-c", CHILD, *words(tiny_model, tmp_path, *resume)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            while not progress.exists() or progress.stat().st_mtime_ns == before:
                assert process.poll() is None, "it ended before"
                time.sleep(0.002)
            process.send_signal(number)
            assert process.stderr is not None
            told = process.stderr.read()
        codes = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
        assert process.returncode == codes[number], told
        assert ("--resume continues from there" in told) == (number != signal.SIGKILL)
        assert not (tmp_path / "m.gguf").exists()
        assert done < read_imatrix(progress).chunk_count < 100
        done = read_imatrix(progress).chunk_count
    assert main(words(tiny_model, tmp_path, "--resume")) == 0
    assert main(words(tiny_model, tmp_path, output="whole.gguf")) == 0
    assert_same(read_imatrix(tmp_path / "m.gguf"), read_imatrix(tmp_path / "whole.gguf"), 1e-6)


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))


def test_a_disk_that_refuses_is_one_line_and_no_file(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "yarn_edge", *words(tiny_model, folder), "-o", str(tmp_path / "m.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_limit_files, check=False)
    told = without_build_note(done.stderr)
    assert (done.returncode, told) == (2, f"yarn-edge: error: {tmp_path / 'm.gguf'}: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken_meanwhile_is_left_alone(
    tiny_model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is not lost: it stands in the progress."""
    output, publish = tmp_path / "m.gguf", collecting.publish

    def somebody_is_faster(*args: Any) -> None:
        output.write_text("theirs")
        publish(*args)

    monkeypatch.setattr(collecting, "publish", somebody_is_faster)
    with pytest.raises(YarnEdgeError, match="exists already"):
        collect(tiny_model, folder / "t.txt", output, ImatrixSettings(ctx=CTX))
    assert output.read_text() == "theirs"
    monkeypatch.undo()
    assert collect(tiny_model, folder / "t.txt", output, ImatrixSettings(ctx=CTX), resume=True, force=True).tokens == 0
    assert read_imatrix(output).chunk_count == 20
