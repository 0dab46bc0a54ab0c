"""f-divergences between policy and reference: what stands for the log-ratio in DPO's margin.

f-DPO (https://arxiv.org/abs/2309.16240) replaces log(policy / reference) by f'(policy /
reference), f being the divergence that is held small. Written with TRL's names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_EXPONENT = 40.0
"""Exponents above stop here, with gradient 0: e^40 squared is still a float32."""

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def divergence_score(log_ratio: Tensor, kind: str, alpha: float = 0.5) -> Tensor:
    """f'(u) for u = exp(``log_ratio``), same shape, float32.

    - reverse_kl: log u (plus a constant that cancels in a margin), DPO's own;
    - forward_kl: 1 - 1/u;
    - js_divergence: log(2u / (1 + u));
    - alpha_divergence: (u^(alpha - 1) - 1) / (alpha - 1), TRL's alpha: 1 less that of the paper. At 1 it
      is reverse_kl, at 0 forward_kl.

    By hand: u = 2 gives 0.6931, 0.5, 0.2877 and, with alpha 0.5, 0.5858. Raises ValueError for an
    unknown ``kind``.
    """
    log_ratio = log_ratio.float()
    if kind == "reverse_kl":
        return log_ratio
    if kind == "forward_kl":
        return 1 - torch.exp((-log_ratio).clamp(max=LARGEST_EXPONENT))
    if kind == "js_divergence":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    if kind == "alpha_divergence":
        if abs(alpha - 1.0) < 1e-6:
            return log_ratio
        return torch.expm1(((alpha - 1) * log_ratio).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    raise ValueError(f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}, but is {kind!r}")
