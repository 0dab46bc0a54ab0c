"""TRL's own loss code, called on tensors that a test owns. TRL is a test dependency only.

The trainers are made without their constructor, which would want a model, a tokenizer and a data
set; what their loss methods read is set by hand. TRL imports slowly.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

trl = pytest.importorskip("trl")
takes_log_probs = pytest.mark.skipif(
    tuple(map(int, trl.__version__.split(".")[:2])) < (1, 16),
    reason="before 1.16 (Python 3.10), TRL's DPO trainer computes log-probabilities from logits itself",
)

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


class TensorModel(nn.Module):
    """A model whose output is a tensor that the test owns."""

    def __init__(self, **outputs: Tensor) -> None:
        super().__init__()
        self.outputs = SimpleNamespace(**outputs)

    def forward(self, *args: Any, **kwargs: Any) -> SimpleNamespace:
        return self.outputs


def accelerator() -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"), gather=lambda t: t, gather_for_metrics=lambda t: t, num_processes=1
    )


def trl_dpo(
    token_logps: Tensor, mask: Tensor, reference: Tensor, beta: float, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    """TRL's DPO loss and metrics; (2P, T) tokens, all chosen rows first, then all rejected.

    ``settings`` are attributes of TRL's trainer; ``collisions`` are (2P, T) log sums of squares.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = DPOTrainer.__new__(DPOTrainer)
    zeros = torch.zeros_like(token_logps.detach())
    outputs = {"log_probs": token_logps, "log_sum_sq_probs": settings.pop("collisions", zeros)}
    trainer.model = TensorModel(**outputs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    trainer.args = SimpleNamespace(discopop_tau=0.05)
    trainer.accelerator = accelerator()
    trainer.aux_loss_enabled = trainer.use_weighting = False
    trainer.ld_alpha = None
    trainer.precompute_ref_logps = True
    trainer.f_divergence_type = "reverse_kl"
    trainer.loss_types, trainer.loss_weights = ["sigmoid"], [1.0]
    trainer.beta, trainer.label_smoothing = beta, 0.0
    for name, value in settings.items():
        setattr(trainer, name, value)
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    completion = torch.cat([torch.zeros(len(mask), 1), mask], 1).long()
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.ones_like(completion),
        "attention_mask": torch.ones_like(completion),
        "completion_mask": completion,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def trl_orpo(
    logits: Tensor, ids: Tensor, lengths: Tensor, beta: float, prompt: int = 1
) -> tuple[Tensor, dict[str, float]]:
    """TRL's ORPO loss and metrics; (2P, S, V) logits, all chosen rows first; ``prompt`` tokens each, then
    ``lengths`` tokens of response."""
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator = accelerator()
    trainer.aux_loss_enabled = trainer.is_encoder_decoder = False
    trainer.padding_value, trainer.beta = 0, beta
    columns = torch.arange(ids.shape[1])
    attention = (columns < lengths[:, None] + prompt).long()
    labels = torch.where((attention == 1) & (columns >= prompt), ids, -100)
    half = len(ids) // 2
    batch: dict[str, Any] = {}
    for name, rows in (("chosen", slice(0, half)), ("rejected", slice(half, None))):
        batch[f"{name}_input_ids"] = ids[rows]
        batch[f"{name}_attention_mask"] = attention[rows]
        batch[f"{name}_labels"] = labels[rows]
    result: tuple[Tensor, dict[str, float]] = trainer.get_batch_loss_metrics(
        TensorModel(logits=logits), batch
    )
    return result


def interleave(values: Tensor) -> Tensor:
    """From all chosen, then all rejected, to pair by pair."""
    return torch.stack(values.chunk(2), 1).flatten(0, 1)
