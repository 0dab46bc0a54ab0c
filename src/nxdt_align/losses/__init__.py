"""Losses: pure functions of log-probabilities, and the objective that an engine runs."""

from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.preference import DPOLoss
from nxdt_align.losses.reference_free import CPOLoss, ORPOLoss, SimPOLoss, log1mexp
from nxdt_align.losses.registry import build_loss
from nxdt_align.losses.supervised import SFTLoss
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps
from nxdt_align.losses.unpaired import KTOLoss

__all__ = [
    "CPOLoss",
    "DPOLoss",
    "GlobalMeanObjective",
    "KTOLoss",
    "Loss",
    "LossOutput",
    "ORPOLoss",
    "ResponseLogps",
    "SFTLoss",
    "SimPOLoss",
    "build_loss",
    "log1mexp",
]
