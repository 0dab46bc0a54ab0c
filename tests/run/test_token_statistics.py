"""What TRL logs of the responses' tokens, against whole logits of one response at a time."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS, dataset, engine
from oracle import ModuleWeights, plain_model, random_examples

from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.data.packing import Layout
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.types import Loss

LOSSES: dict[str, Loss] = {
    "dpo": DPOLoss(DPOConfig(kl_beta=0.3)),
    "orpo": ORPOLoss(ORPOConfig(beta=0.1)),
    "aot": DPOLoss(DPOConfig(kl_beta=0.3, loss_type=("aot",))),
    "wpo": DPOLoss(DPOConfig(kl_beta=0.3, use_weighting=True)),
}
NAMES = {"logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy"}


@torch.no_grad()
def wanted_statistics(count: int, seed: int) -> dict[str, float]:
    """As TRL 1.16 takes them: means over the tokens of all chosen responses (accuracy too), of all rejected
    ones, and of both."""
    model = plain_model(0)
    means: list[list[float]] = [[], []]
    entropies: list[float] = []
    hits: list[bool] = []
    for example in random_examples(count, seed=seed).examples:
        for role, response in enumerate(example.responses):
            ids = torch.tensor([*example.prompt, *response])[None]
            logits = model.logits(model(ids, torch.arange(ids.shape[1])[None], None))[0]
            logits = logits[len(example.prompt) - 1 : -1].double()
            logps = logits.log_softmax(-1)
            means[role] += logits.mean(-1).tolist()
            entropies += (-(logps.exp() * logps).sum(-1)).tolist()
            hits += (logits.argmax(-1) == ids[0, len(example.prompt) :]).tolist() if role == 0 else []
    return {
        "logits/chosen": sum(means[0]) / len(means[0]),
        "logits/rejected": sum(means[1]) / len(means[1]),
        "entropy": sum(entropies) / len(entropies),
        "mean_token_accuracy": sum(hits) / len(hits),
    }


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("micro", [1, 3])
def test_they_are_means_over_the_global_batch(name: str, layout: Layout, micro: int) -> None:
    policy = engine()
    policy.load_reference(ModuleWeights(plain_model(1)))
    batches = dataset(random_examples(7, seed=3), layout, micro)[tuple(range(7))]
    objective = GlobalMeanObjective(LOSSES[name], token_statistics=True)
    plain = GlobalMeanObjective(LOSSES[name])
    wanted = wanted_statistics(7, seed=3)
    without = policy.step(batches, plain)
    gradients = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    for _, parameter in policy.named_parameters():
        parameter.grad = None
    for output in (policy.evaluate(batches, objective), policy.step(batches, objective)):
        got = objective.finish(output.metrics)
        assert {key: float(got[key]) for key in NAMES} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert got.keys() - NAMES == plain.finish(without.metrics).keys()
        assert torch.equal(output.loss, without.loss)
    assert all(torch.equal(p.grad, gradients[n]) for n, p in policy.named_parameters() if p.grad is not None)
