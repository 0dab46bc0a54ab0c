"""PEFT's folders: what is written loads in PEFT, and what PEFT computes otherwise is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TINY
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import AdapterSpec, adapter_shapes
from nxdt_align.weights.peft import read_settings, write_peft_folder

peft = pytest.importorskip("peft")

CONFIG = replace(TINY, vocab_size=64)


def spec(**changes: Any) -> AdapterSpec:
    return adapter_spec(CONFIG, **{"target_modules": ["q_proj"], "rank": 4, "alpha": 8} | changes)


def tensors(chosen: AdapterSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = adapter_shapes(CONFIG, chosen).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes}


@pytest.mark.parametrize(
    ("saved", "written"),
    [
        (["norm"], ["model.norm"]),
        (["norm", "lm_head"], ["lm_head", "model.norm"]),
        (["norm", ".*_layernorm"], ["input_layernorm", "norm", "post_attention_layernorm"]),
        (
            ["layers.1.input_layernorm", "embed_tokens"],
            ["embed_tokens", "model.layers.1.input_layernorm"],
        ),
    ],
)
def test_peft_trains_the_modules_to_save_and_no_others(
    tmp_path: Path, saved: list[str], written: list[str]
) -> None:
    """PEFT takes a name for the end of any path: ``norm`` for every ``input_layernorm``, too."""
    chosen = spec(modules_to_save=saved)
    values = tensors(chosen)
    write_peft_folder(tmp_path / "adapter", CONFIG, chosen, values.items(), base=None)
    assert read_settings(tmp_path / "adapter")["modules_to_save"] == written
    base = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict()))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    wrapper = peft.utils.ModulesToSaveWrapper
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, wrapper)
    }
    assert found.keys() == set(chosen.saved)
    for path, module in found.items():
        assert torch.equal(module.modules_to_save["default"].weight, values[f"{path}.trained_weight"])
