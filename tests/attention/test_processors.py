"""The same source for other processors: narrower vectors give the same answers, and LLVM makes NEON of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

HERE = Path(__file__).parent

RUN = """
import re
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from yarn_edge.attention.kernel import build_kernel
from yarn_edge.attention.vectors import WIDTH
from support.attention_node import random_node
assert WIDTH == int(sys.argv[2])
for kind in sys.argv[3].split(","):
    kernel = None
    for queries, cells in ((1, 320), (7, 128), (40, 256)):
        node = random_node(kind, queries=queries, cells=cells, sinks=queries == 7)
        kernel = kernel or build_kernel(node.shape, 1, False)
        found, exact = node.computed(kernel, 2), node.exact()
        error = np.sqrt(np.square(found - exact).sum() / np.square(exact).sum())
        assert error < 2e-6, (kind, queries, error)
if WIDTH == 4:
    import llvmlite.binding as llvm
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu="neoverse-n1", opt=3)
    text = re.sub(r'"(target-cpu|target-features|tune-cpu)"="[^"]*"', "", kernel.inspect_llvm())
    lines = [line for line in text.splitlines() if not line.startswith(("target triple", "target datalayout"))]
    module = llvm.parse_assembly("\\n".join(lines))
    module.triple, module.data_layout = target.triple, str(target.target_data)
    code = target.emit_assembly(module)
    print(code.count("fmla"), code.count("fcvtl"))
    assert code.count("fmla") > 200, "no NEON"
"""


@pytest.mark.parametrize("width", [4, 8])
def test_another_width(width: int) -> None:
    """8 is what AVX2 has, 4 what NEON has: their blocks of registers and their transpositions differ."""
    env = {**os.environ, "YARN_EDGE_VECTOR_WIDTH": str(width), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RUN, str(HERE.parent), str(width), "f16"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
