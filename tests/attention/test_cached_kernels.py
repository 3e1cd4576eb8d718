"""Kernels that different processes compiled, loaded by one: none calls another's parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

HERE = Path(__file__).parent

RUN = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from yarn_edge.attention.compiled import kernel_of
from support.attention_node import random_node
for width in map(int, sys.argv[2:]):
    for queries in (1, 30):
        node = random_node(queries=queries, cells=128, widths=(width, width))
        found, exact = node.computed(kernel_of(node.shape)), node.exact()
        error = np.sqrt(np.square(found - exact).sum() / np.square(exact).sum())
        assert error < 2e-6, (width, queries, error)
"""


def test_kernels_of_different_processes(tmp_path: Path) -> None:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    for widths in (["16"], ["32"], ["16", "32"]):
        command = [sys.executable, "-c", RUN, str(HERE.parent), *widths]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, (widths, done.stderr[-2000:])
