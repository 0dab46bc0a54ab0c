"""What neuronx-distributed's source needs besides torch_xla to be imported where there is no Neuron."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch.fx

STUBS = Path(__file__).parent / "nxd_stubs"


def supply_neuron_only_modules() -> None:
    """Placeholders for AWS's packages, and for a tracer that transformers 5 no longer has and NxD uses
    for transformers' own models alone; nothing where its source is not there to need them."""
    if importlib.util.find_spec("neuronx_distributed") is None:
        return
    if importlib.util.find_spec("torch_neuronx") is None and STUBS.is_dir():
        sys.path.append(str(STUBS))
    if importlib.util.find_spec("transformers") is None or "transformers.utils.fx" in sys.modules:
        return
    if importlib.util.find_spec("transformers.utils.fx") is None:
        module = ModuleType("transformers.utils.fx")
        module.HFTracer = torch.fx.Tracer  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
