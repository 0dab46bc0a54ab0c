"""Engine nxd's tokens are those of engine native, over its layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nxd_fixture import CONFIG, Case, require_nxd, run_ranks, start, weights

from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.ops.attention import DenseAttention

pytestmark = pytest.mark.nxd
PROMPTS = [[1, 17, 40, 5, 22], [1, 9], [1, *range(3, 21)]]
SETTINGS: dict[str, Any] = {"length": 32, "max_tokens": 8, "ends": ()}


def tokens(case: Case) -> Any:
    """The policy's, and those of a frozen copy of it."""
    engine = start(case)
    engine.load_reference(None)
    return [engine.greedy(PROMPTS, **SETTINGS, reference=reference) for reference in (False, True)]


@pytest.mark.parametrize("case", [Case(tp=2), Case(pp=2)], ids=["tp2", "pp2"])
def test_as_engine_native(case: Case, tmp_path: Path) -> None:
    require_nxd()
    native = NativeEngine(CONFIG, DenseAttention())
    native.load_weights(weights(0))
    (found,) = run_ranks(2, [(tokens, (case,))], tmp_path)
    wanted = native.greedy(PROMPTS, **SETTINGS)
    assert all(rank == [wanted, wanted] for rank in found)
