"""docs/objectives.md: the walk-through's loss loads, and the table has every objective and form."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nxdt_align.config.alignment import OBJECTIVES, DPOConfig
from nxdt_align.config.keys import all_keys
from nxdt_align.losses.custom import load_loss
from nxdt_align.losses.forms import FORMS
from nxdt_align.losses.types import ResponseLogps

DOC = Path(__file__).resolve().parents[2] / "docs" / "objectives.md"


def test_the_walk_through_is_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-ratios 0: -log sigmoid(-margin) = ln(1 + e^0.5)."""
    (code,) = re.findall(r"```python\n# my_losses.py\n(.*?)```", DOC.read_text(), re.DOTALL)
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    loss = load_loss("my_losses.MarginDPO", {"beta": 0.2, "margin": 0.5})
    sums = torch.tensor([-1.0, -2.0])
    ones = torch.ones(2)
    slots: Callable[[], ResponseLogps] = lambda: ResponseLogps(sums, ones, ones > 0, ones > 0, ones.long())  # noqa: E731
    assert loss(slots(), slots()).losses.item() == pytest.approx(math.log1p(math.exp(0.5)))
    assert len([line for line in code.splitlines() if line.strip()]) <= 20


def test_every_form_and_objective_is_in_the_table() -> None:
    rows = [line for line in DOC.read_text().splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named >= set(FORMS) | set(OBJECTIVES)


def test_keys_that_the_page_names_exist() -> None:
    keys = {path.rpartition(".")[2] for path in all_keys()}
    named = set(re.findall(r"`(\w+)`:? ?(?:True|False|null|\d)", DOC.read_text()))
    assert named <= keys | set(vars(DPOConfig())), named - keys
