"""Small models on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import CONFIG, SIZES, MakeHF, fresh, run

from nxdt_align.models.presets import DecoderConfig
from nxdt_align.weights.hf_writer import write_hf_folder


@pytest.fixture
def make_hf(tmp_path: Path) -> Callable[..., Path]:
    """Writes a Hugging Face folder of fresh weights."""

    def make(
        config: DecoderConfig, dtype: torch.dtype = torch.float32, name: str = "hf", **more: Any
    ) -> Path:
        write_hf_folder(tmp_path / name, config, fresh(config, 0, dtype), **more)
        return tmp_path / name

    return make


@pytest.fixture
def nxdt(make_hf: MakeHF, tmp_path: Path) -> Path:
    """A sharded checkpoint of CONFIG at SIZES."""
    run(make_hf(CONFIG), tmp_path / "nxdt", **SIZES)
    return tmp_path / "nxdt"
