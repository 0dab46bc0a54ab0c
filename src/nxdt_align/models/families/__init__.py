"""The families of models that the decoder covers, by the ``model_type`` of their ``config.json``."""

from __future__ import annotations

from nxdt_align.models.families.base import Family
from nxdt_align.models.families.gemma2 import GEMMA2
from nxdt_align.models.families.gemma3 import GEMMA3
from nxdt_align.models.families.llama import LLAMA
from nxdt_align.models.families.mistral import MISTRAL
from nxdt_align.models.families.olmo2 import OLMO2
from nxdt_align.models.families.phi3 import PHI3
from nxdt_align.models.families.qwen2 import QWEN2
from nxdt_align.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}
