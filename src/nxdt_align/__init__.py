"""Preference alignment of language models on AWS Trainium, CPU and CUDA.

    import nxdt_align as na

    config = na.load_config("run.yaml", "trainer.max_steps=100")
    result = na.train(config)                          # folder, step, metrics, checkpoint, export
    policy = na.load_policy(result.folder)
    pairs = na.load_pairs("val.jsonl", config.data.tokenizer.type)
    na.DPOLoss()(policy.logps(pairs), na.load_policy("start").logps(pairs)).losses

``__all__`` is the public API. Its names are imported on first use (PEP 562), so that the command line stays
fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdt_align.api import load_config as load_config
    from nxdt_align.api import train as train
    from nxdt_align.losses import CPOLoss as CPOLoss
    from nxdt_align.losses import DPOLoss as DPOLoss
    from nxdt_align.losses import KTOLoss as KTOLoss
    from nxdt_align.losses import ORPOLoss as ORPOLoss
    from nxdt_align.losses import ResponseLogps as ResponseLogps
    from nxdt_align.losses import SFTLoss as SFTLoss
    from nxdt_align.losses import SimPOLoss as SimPOLoss
    from nxdt_align.run.comparison import compare as compare
    from nxdt_align.run.contracts import Result as Result
    from nxdt_align.run.conversion import convert as convert
    from nxdt_align.run.conversion import export as export
    from nxdt_align.run.generation import generate as generate
    from nxdt_align.run.policy import Policy as Policy
    from nxdt_align.run.policy import load_pairs as load_pairs
    from nxdt_align.run.policy import load_policy as load_policy

__version__ = "0.1.0"
PYTHON = ((3, 10), (3, 13))
"""The oldest and the newest Python that the tests were run on."""
TORCH = ((2, 9), (2, 15))
"""The same of torch: 2.9 is the last one of PyTorch/XLA, to which trn1 is bound."""

_PLACES = {
    **dict.fromkeys(("load_config", "train"), "api"),
    **dict.fromkeys(("DPOLoss", "ORPOLoss", "CPOLoss", "SimPOLoss", "KTOLoss", "SFTLoss"), "losses"),
    "ResponseLogps": "losses",
    "compare": "run.comparison",
    "Result": "run.contracts",
    **dict.fromkeys(("convert", "export"), "run.conversion"),
    "generate": "run.generation",
    **dict.fromkeys(("Policy", "load_policy", "load_pairs"), "run.policy"),
}
"""Public name -> module of this package."""
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
