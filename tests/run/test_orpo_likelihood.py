"""ORPO's likelihood over prompt and response, as TRL has it, in every layout, and from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import ATTENTIONS, CASES, GRADIENT_TOLERANCE, LAYOUTS, dataset, engine
from oracle import Decoder, Example, assert_gradients_close, gradients, plain_model, random_examples
from torch import Tensor
from training_fixture import Project, scalars
from trl_losses import trl_orpo

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import ORPOConfig
from nxdt_align.data.packing import Layout
from nxdt_align.losses.modifiers import nll
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.losses.types import ResponseLogps

BETA = 0.1


def trl_loss(model: Decoder, example: Example) -> tuple[Tensor, float]:
    """TRL's loss of a batch of one pair, from the model's whole logits, and its nll_loss."""
    sequences = [np.concatenate([example.prompt, response]) for response in example.responses]
    longest = max(map(len, sequences))
    ids = torch.stack(
        [torch.from_numpy(np.pad(s, (0, longest - len(s))).astype(np.int64)) for s in sequences]
    )
    logits = model.logits(model(ids, torch.arange(longest).expand(2, -1), None))
    lengths = torch.tensor([len(response) for response in example.responses])
    loss, metrics = trl_orpo(logits, ids, lengths, BETA, prompt=len(example.prompt))
    return loss, float(metrics["nll_loss"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_value_and_gradient_are_trls(layout: Layout, case: str, attention: str) -> None:
    """To 1e-6. A prompt of one token has nothing to predict, so there both likelihoods are the same."""
    examples = random_examples(6, seed=len(case), **CASES[case])
    policy, model = engine(attention=attention), plain_model(0)
    objective = GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=BETA, nll_tokens="prompt_and_response")))
    data = dataset(examples, layout, 2, with_prompts=True)
    output = policy.step(data[tuple(range(6))], objective)
    losses, likelihoods = zip(*(trl_loss(model, e) for e in examples.examples), strict=True)
    wanted = torch.stack(losses).mean()
    assert float(output.loss) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(output.metrics["nll_loss"]) == pytest.approx(sum(likelihoods) / 6, rel=1e-6)
    got = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert_gradients_close(got, gradients(wanted, model), GRADIENT_TOLERANCE)
    alone = engine(attention=attention).step(
        dataset(examples, layout, 2)[tuple(range(6))], GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=BETA)))
    )
    assert (abs(float(alone.loss - output.loss)) < 1e-5) == (case == "single-token prompts")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_add_up(layout: Layout) -> None:
    examples = random_examples(5, seed=3)
    objective = GlobalMeanObjective(ORPOLoss(ORPOConfig(beta=BETA, nll_tokens="prompt_and_response")))
    whole = engine().step(dataset(examples, layout, 1, with_prompts=True)[tuple(range(5))], objective)
    total = 0.0
    for rank in range(2):
        topology = Topology(world_size=2, rank=rank, data_parallel_size=2, data_parallel_rank=rank)
        data = dataset(examples, layout, 1, topology, with_prompts=True)
        total += float(engine().step(data[tuple(range(5))], objective).loss)
    assert total == pytest.approx(float(whole.loss), abs=2e-6)


def test_a_likelihood_by_hand() -> None:
    """Response of 2 tokens with sum -3, prompt of 2 predicted tokens with sum -5: 8 / 4 = 2 a token."""
    ones = torch.ones(2)
    policy = ResponseLogps(
        sums=torch.tensor([-3.0, -9.0]),
        counts=torch.tensor([2.0, 1.0]),
        valid=ones > 0,
        desirable=ones > 0,
        roles=ones.long(),
        prompt_sums=torch.tensor([-5.0, 0.0]),
        prompt_counts=torch.tensor([2.0, 0.0]),
    )
    assert nll(policy).tolist() == [1.5]
    assert nll(policy, with_prompt=True).tolist() == [2.0]


def test_prompts_that_were_not_asked_for_are_named() -> None:
    ones = torch.ones(2)
    policy = ResponseLogps(-ones, ones, ones > 0, ones > 0, ones.long())
    with pytest.raises(ValueError, match="a likelihood of the prompt needs its tokens' log-probabilities"):
        ORPOLoss(ORPOConfig(beta=BETA, nll_tokens="prompt_and_response"))(policy, None)
    with pytest.raises(
        ValueError, match="nll_tokens: must be one of response, prompt_and_response, but is 'all'"
    ):
        ORPOLoss(ORPOConfig(beta=BETA, nll_tokens="all"))


def test_every_layout_trains_alike_from_the_command_line(tmp_path: Path) -> None:
    project = Project.create(tmp_path)
    orpo = ["~model_alignment_strategy.dpo", "model_alignment_strategy.orpo.nll_tokens=prompt_and_response"]
    curves = []
    for layout in LAYOUTS:
        folder = tmp_path / layout
        assert project.train(*orpo, f"data.packing={layout}", f"exp_manager.exp_dir={folder}") == 0
        (run,) = (folder / "run").glob("20*")
        curves.append([value for _, value in scalars(run)["nll_loss"]])
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)
    assert curves[0][-1] < curves[0][0]
