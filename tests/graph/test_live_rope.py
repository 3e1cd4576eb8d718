"""Positions in the live graph: every context gets them, wrong graphs are errors, and verify finds what is left out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from yarn_edge.cli import main
from yarn_edge.errors import YarnEdgeError
from yarn_edge.flags import PlannerOptions
from yarn_edge.gguf.edit_shards import edit_gguf_files
from yarn_edge.gguf.read import read_gguf
from yarn_edge.graph import live_rope
from yarn_edge.graph.callback import GraphCallback
from yarn_edge.graph.live_rope import LiveRopes
from yarn_edge.graph.opening import open_context
from yarn_edge.graph.rope_edit import COUNT, HEAD, ROW_WIDTH
from yarn_edge.graph.tap import GraphTap
from yarn_edge.inspect.command import inspect_model
from yarn_edge.llama_rules.description import SLIDING, canonical_keys
from yarn_edge.llama_rules.effective import FROM_MODEL, as_table
from yarn_edge.llama_rules.file_positions import FilePositions
from yarn_edge.llama_rules.planner import plan_rope
from yarn_edge.llama_rules.rescale import base_scaling, in_memory, with_factor
from yarn_edge.positions.scaling import RopeScaling
from yarn_edge.runtime.context import Context
from yarn_edge.runtime.context_settings import ContextSettings
from yarn_edge.runtime.ggml import TensorStruct, op_number
from yarn_edge.runtime.model import Model
from yarn_edge.verify.checks import check_live_graph, check_metadata
from yarn_edge.verify.command import verify

from support import tiny_gguf
from support.live_files import LIVE_YARN, live_file
from support.tiny_gguf import HEAD_DIM

SETTINGS = ContextSettings(n_ctx=64, n_batch=32, n_ubatch=16, kv_type="f32", threads=1, attention="plain")
TOKENS = list(range(5, 29))
YARN = LIVE_YARN
OTHER = replace(YARN, beta_fast=16.0)


BOTH_WAYS = pytest.mark.usefixtures("way")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return live_file(tmp_path_factory.mktemp("live") / "qwen3.gguf", "qwen3")


@pytest.fixture(scope="module", params=["compiled", "python"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways to change a node."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "python":
            patch.setattr(live_rope, "_compiled", lambda: None)
        yield request.param


def logits(path: Path, **changes) -> np.ndarray:
    with Model(path) as model, open_context(model, replace(SETTINGS, **changes)) as context:
        context.evaluate(TOKENS, 0, "all")
        return context.logits()


def test_it_is_compiled_where_numba_is(qwen3: Path, way: str) -> None:
    with Model(qwen3) as model:
        edit = LiveRopes(model, model.positions.live)
        assert (edit.compiled is not None) == (way == "compiled")
        edit.close()


@BOTH_WAYS
def test_what_runs_is_what_the_same_table_in_the_file_runs(tmp_path: Path) -> None:
    """On llama a file can carry the table: the live graph computes the same bits, in batches and token by token."""
    plain = tiny_gguf.write(tmp_path / "plain.gguf", "llama")
    plans = {
        name: plan_rope(YARN, "llama", PlannerOptions(bake)) for name, bake in (("baked", "auto"), ("live", "never"))
    }
    for name, plan in plans.items():
        assert plan.form == name
        tensors = plan.tensors
        keys = {**plan.keys, **canonical_keys(YARN, plan.form, plan.sliding), "llama.context_length": 1024}
        edit_gguf_files(read_gguf(plain), [tmp_path / f"{name}.gguf"], set_keys=keys, set_tensors=tensors, flush=False)
    np.testing.assert_array_equal(logits(tmp_path / "live.gguf"), logits(tmp_path / "baked.gguf"))
    assert np.abs(logits(tmp_path / "live.gguf") - logits(tmp_path / "live.gguf", arguments=FROM_MODEL)).max() > 1e-3
    found = []
    for name in plans:
        with Model(tmp_path / f"{name}.gguf") as model, open_context(model, SETTINGS) as context:
            rows = []
            for at, token in enumerate(TOKENS):  # llama.cpp reuses the graph
                context.evaluate([token], at)
                rows.append(context.logits()[0])
            found.append(np.array(rows))
    np.testing.assert_array_equal(*found)


def test_a_context_without_the_edit_is_refused(qwen3: Path) -> None:
    with Model(qwen3) as model:
        with pytest.raises(YarnEdgeError, match=r"open its contexts with yarn_edge\.open_context"):
            Context(model, SETTINGS)
        arguments = model.positions.explicit_arguments
        assert arguments.live is not None
        other = LiveRopes(model, replace(arguments.live, full=as_table(OTHER)))
        with pytest.raises(YarnEdgeError, match="must be put into the live graph"):
            Context(model, SETTINGS, hook=GraphCallback([other]))
        other.close()


def test_files_that_need_no_edit_have_no_callback(tmp_path: Path) -> None:
    with Model(tiny_gguf.write(tmp_path / "qwen3.gguf", "qwen3")) as model, open_context(model, SETTINGS) as context:
        assert context._hook is None


class Ropes(GraphTap):
    def __init__(self) -> None:
        self.seen: list[tuple[float, bool]] = []
        self.op = op_number(b"ROPE")

    def see(self, address: int, asking: bool) -> bool:
        node = TensorStruct.from_address(address)
        if node.op != self.op:
            return False
        if not asking:
            attention = np.array(node.op_params, np.int32).view(np.float32)[8]
            self.seen.append((float(attention), bool(node.src[2])))
        return True


@BOTH_WAYS
def test_an_edit_and_a_tap_work_together(qwen3: Path) -> None:
    tap = Ropes()
    with Model(qwen3) as model, open_context(model, SETTINGS, tap) as context:
        context.evaluate(TOKENS, 0, "all")
        tapped = context.logits()
        assert len(tap.seen) == 2 * model.n_layer * 2  # two graphs
    assert set(tap.seen) == {(float(np.float32(YARN.attention_factor)), True)}
    np.testing.assert_array_equal(tapped, logits(qwen3))


@BOTH_WAYS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": 2}, "rotates 16 dimensions, not 2"),
        ({"mode": 0}, "pairs dimensions in mode 2, not 0"),
        ({"layer": 7}, "belongs to layer 0, not 7"),
        ({"nodes": 9}, "ROPE nodes, expected 9 for each evaluation"),
    ],
    ids=str,
)
def test_another_shape_of_graph_is_an_error(qwen3: Path, change: dict, message: str) -> None:
    with Model(qwen3) as model, open_context(model, SETTINGS) as context:
        (edit,) = context._hook.edits
        first = edit._state[HEAD:]
        if "nodes" in change:
            edit._nodes = change["nodes"]
        elif "layer" in change:
            first[0] = 7
        else:
            first[3 if "mode" in change else 4] = next(iter(change.values()))
        with pytest.raises(YarnEdgeError, match=f"has another shape than expected: .*{message}"):
            context.evaluate(TOKENS, 0)


@BOTH_WAYS
def test_layers_with_a_window_have_their_own(tmp_path: Path) -> None:
    """Mellum's and OLMo 3's own base for layers with a window, which llama.cpp does not read."""
    window = RopeScaling("none", 500.0, HEAD_DIM, 1024)
    path = live_file(tmp_path / "mellum.gguf", "mellum", YARN, window)
    checks = {check.name: check for check in verify(path, threads=1)}
    assert [checks[n].status for n in ("metadata", "kernel", "live-graph")] == ["pass"] * 3, checks
    with Model(path) as model:
        assert check_live_graph(model, YARN, 1, sliding_goal=window).status == "pass"
        assert check_live_graph(model, YARN, 1, sliding_goal=replace(window, rope_theta=501.0)).status == "fail"
    assert any(key.startswith(SLIDING) for key in read_gguf(path).metadata)


def spoilt(name: str) -> type[LiveRopes]:
    """`LiveRopes` with a fault."""
    rows = slice(HEAD, None)

    class Spoilt(LiveRopes):
        def __init__(self, model: Model, live) -> None:
            super().__init__(model, live)
            table = self._state[rows].reshape(-1, ROW_WIDTH)
            if name == "left out":
                table[:, 1] = 0
            if name == "one layer left out":
                table[1, 1] = 0
            if name == "factors of another model":
                table[:, 1] = self._tables[None].of(as_table(OTHER))
            if name == "another A":
                table[:, 6] += 64

    return Spoilt


@BOTH_WAYS
@pytest.mark.parametrize("name", ["left out", "one layer left out", "factors of another model", "another A"])
def test_verify_finds_a_wrong_edit(name: str, qwen3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yarn_edge.graph import opening

    with Model(qwen3) as model:
        assert check_live_graph(model, YARN, 1).status == "pass"
        monkeypatch.setattr(opening, "LiveRopes", spoilt(name))
        assert check_live_graph(model, YARN, 1).status == "fail"


@BOTH_WAYS
def test_verify_finds_a_window_treated_as_full_attention(tmp_path: Path) -> None:
    window = RopeScaling("none", 500.0, HEAD_DIM, 1024)
    path = live_file(tmp_path / "mellum.gguf", "mellum", YARN, window)
    swapped = tmp_path / "swapped.gguf"
    keys = canonical_keys(YARN, "live", YARN)
    edit_gguf_files(read_gguf(path), [swapped], set_keys=keys, flush=False)
    with Model(swapped) as model:
        assert check_live_graph(model, YARN, 1, sliding_goal=window).status == "fail"


def test_verify_finds_changed_keys_and_another_description(qwen3: Path, tmp_path: Path) -> None:
    for i, (changes, said) in enumerate(
        [
            ({"qwen3.rope.scaling.factor": 8.0}, "qwen3.rope.scaling.factor is 8.0"),
            ({"qwen3.rope.scaling.type": "none"}, "qwen3.rope.scaling.type is 'none'"),
            ({"yarn_edge.rope.beta_fast": 16.0}, "beta_fast"),
        ]
    ):
        path = tmp_path / f"{i}.gguf"
        edit_gguf_files(read_gguf(qwen3), [path], set_keys=changes, flush=False)
        with Model(path, vocab_only=True) as model:
            check = check_metadata(model.positions, YARN, "the checkpoint")
        assert check.status == "fail"
        assert said in check.detail


def test_a_name_with_a_number_is_read_alike_in_both_ways() -> None:
    from yarn_edge.graph.rope_edit import _layer_of

    for name, layer in {b"Qcur-3": 3, b"k_pe-12": 12, b"": -1, b"node_7": -1, b"Kcur-": -1, b"q-0 (view)": 0}.items():
        node = TensorStruct(name=name)
        memory = np.frombuffer(ctypes.string_at(ctypes.addressof(node), ctypes.sizeof(node)), np.int8)
        assert _layer_of(memory) == layer, name


@pytest.fixture
def mellum(tmp_path: Path) -> Path:
    """Windows have their own base."""
    return live_file(tmp_path / "mellum.gguf", "mellum", YARN, RopeScaling("none", 500.0, HEAD_DIM, 1024))


@pytest.mark.parametrize(
    "flags", [["--repair"], ["--yarn-factor", "8"], ["--yarn-factor", "8", "--allow-approximate-rope"]], ids=str
)
def test_patch_keeps_the_positions_of_windows(flags: list[str], mellum: Path, tmp_path: Path) -> None:
    output = tmp_path / "patched.gguf"
    assert main(["patch", str(mellum), "-o", str(output), *flags]) == 0
    before, after = (FilePositions(read_gguf(path)) for path in (mellum, output))
    assert after.canonical_sliding == before.canonical_sliding
    assert after.live is not None
    assert before.live is not None
    assert after.live.sliding == before.live.sliding
    assert main(["patch", str(mellum), "-o", str(tmp_path / "no.gguf"), *flags[:2], "--positions", "portable"]) == 2


def test_patch_of_a_damaged_description_is_refused(mellum: Path, tmp_path: Path) -> None:
    edit_gguf_files(read_gguf(mellum), [tmp_path / "bad.gguf"], set_keys={SLIDING + "rope_theta": "x"}, flush=False)
    assert main(["patch", str(tmp_path / "bad.gguf"), "-o", str(tmp_path / "out.gguf"), "--repair"]) == 2
    assert main(["inspect", str(tmp_path / "bad.gguf")]) == 0


def test_windows_that_follow_full_attention_follow_another_factor(tmp_path: Path) -> None:
    """gpt-oss: one scaling for all layers, also where its description is for full attention alone."""
    path = live_file(tmp_path / "gpt-oss.gguf", "gpt-oss")
    positions = FilePositions(read_gguf(path))
    assert positions.own_sliding is None
    goal = with_factor(base_scaling(positions), 2.0)
    live = in_memory(positions, goal, "x")[0].live
    assert live is not None
    assert live.sliding == live.full == as_table(goal)
    remove = [key for key in positions.file.metadata if key.startswith(SLIDING)]
    edit_gguf_files(read_gguf(path), [tmp_path / "bare.gguf"], set_keys={}, remove_keys=remove, flush=False)
    bare = FilePositions(read_gguf(tmp_path / "bare.gguf")).live
    assert bare is not None
    assert bare.sliding == bare.full == as_table(YARN)


def test_inspect_sees_windows_that_only_the_live_graph_runs(mellum: Path) -> None:
    report = inspect_model(mellum)
    assert report["runtime_arguments"] is None
    (finding,) = report["findings"]
    assert finding["name"] == "other positions"
    assert "puts the file's own positions into the running graph" in finding["remedy"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"yarn_edge.rope.form": 3}, "yarn_edge.rope.form is 3, expected one of"),
        ({"yarn_edge.rope.version": True}, "yarn_edge.rope.version is True"),
        (canonical_keys(YARN, "live", YARN), "architecture qwen3 has no layers with a sliding window"),
    ],
    ids=["form", "version", "windows"],
)
def test_descriptions_that_cannot_apply_are_refused(changes: dict, said: str, qwen3: Path, tmp_path: Path) -> None:
    edit_gguf_files(read_gguf(qwen3), [tmp_path / "bad.gguf"], set_keys=changes, flush=False)
    with Model(tmp_path / "bad.gguf") as model, pytest.raises(YarnEdgeError, match=said):
        open_context(model, SETTINGS)


def test_an_interruption_inside_python_is_raised_and_nothing_is_computed_without_it(qwen3: Path) -> None:
    with Model(qwen3) as model:
        live = model.positions.live
        assert live is not None

        class Interrupted(LiveRopes):
            def edit(self, address: int) -> bool:
                if self._state[COUNT] == 3:
                    raise KeyboardInterrupt
                return super().edit(address)

        hook = GraphCallback([Interrupted(model, live, compiled=False)])
        with Context(model, SETTINGS, hook=hook) as context, pytest.raises(KeyboardInterrupt):
            context.evaluate(TOKENS, 0)


def test_a_tap_does_not_hide_what_is_wrong_with_the_graph(qwen3: Path, tmp_path: Path) -> None:
    narrow = replace(YARN, dim=8)
    keys = canonical_keys(narrow, "live")
    edit_gguf_files(read_gguf(qwen3), [tmp_path / "narrow.gguf"], set_keys=keys, flush=False)
    with Model(tmp_path / "narrow.gguf") as model, pytest.raises(YarnEdgeError, match="rotates 16 dimensions, not 8"):
        check_live_graph(model, YARN, 1)
