"""Losses: pure functions of log-probabilities, and the objective that an engine runs."""

from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.preference import DPOLoss, ORPOLoss, log1mexp
from nxdt_align.losses.registry import build_loss
from nxdt_align.losses.supervised import SFTLoss
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps

__all__ = [
    "DPOLoss",
    "GlobalMeanObjective",
    "Loss",
    "LossOutput",
    "ORPOLoss",
    "ResponseLogps",
    "SFTLoss",
    "build_loss",
    "log1mexp",
]
