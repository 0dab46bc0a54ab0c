"""Losses: pure functions of log-probabilities, and the objective that an engine runs."""

from nxdt_align.losses.cpo import CPOLoss, SimPOLoss
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.kto import KTOLoss
from nxdt_align.losses.objective import GlobalMeanObjective, build_loss
from nxdt_align.losses.orpo import ORPOLoss, log1mexp
from nxdt_align.losses.sft import SFTLoss
from nxdt_align.losses.types import Loss, LossOutput, ResponseLogps

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
