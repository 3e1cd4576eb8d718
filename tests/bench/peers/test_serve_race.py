"""The verdict of the race of servers, and its table."""

from __future__ import annotations

from typing import Any

import pytest

from yarn_edge.bench.peers.serve import OURS, PEER, passed, race_tables


def results(**changed: Any) -> dict[str, Any]:
    document = {"tokens": 1000.0, "evaluated": 1010.0, "cells": 1050.0, "first_s": 20.0, "again_s": 0.9}
    waits = {"alone": 0.1, "beside": changed.get("beside", 0.7), "document": 20.0}
    speeds = {OURS: {1: 10.0, 4: changed.get("four", 25.0)}, PEER: {1: 12.0, 4: 26.0}}
    return {
        "speeds": speeds,
        "ratios": {1: 0.8, 4: changed.get("ratio", 0.96)},
        "first_token_s": {OURS: waits},
        "document": {**document, **{key: value for key, value in changed.items() if key in document}},
    }


def test_what_is_good_enough_passes() -> None:
    assert passed(results())
    table = race_tables(results())
    assert "| ratio of neighboring turns | 0.800 | 0.960 |" in table
    assert "first token after 20.00 s, 0.90 s after a restart" in table


@pytest.mark.parametrize(
    "changed",
    [{"ratio": 0.94}, {"four": 19.0}, {"beside": 1.1}, {"evaluated": 1100.0}, {"cells": 1200.0}, {"again_s": 1.1}],
    ids=lambda changed: next(iter(changed)),
)
def test_what_falls_short_does_not(changed: dict[str, float]) -> None:
    assert not passed(results(**changed))
