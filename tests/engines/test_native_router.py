"""The router's balancing loss of a mixture of experts, against transformers' own of one text at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backend_fixture import StateDict, config_of, dpo_loss, drawn
from layouts import ATTENTIONS
from oracle import assert_gradients_close, random_examples
from torch import Tensor

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.steps import ROUTER_LOSS
from nxdt_align.errors import UserError
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.backend.model import StockAttention, TransformersModel
from nxdt_align.models.decoder import CausalModel, Decoder
from nxdt_align.models.presets import TINY

BETA, WEIGHT = 0.3, 0.5
EXAMPLES = random_examples(5, 2)


def balance(model: Any) -> Tensor:
    """transformers' own loss over the tokens of every response with its prompt, each text by itself; a text's
    last token is no input."""
    logits: list[list[Tensor]] = []
    for example in EXAMPLES.examples:
        for response in example.responses:
            ids = torch.tensor([[*example.prompt, *response[:-1]]])
            output = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
            logits.append(list(output.router_logits))
    of_layers = tuple(torch.cat(layer) for layer in zip(*logits, strict=True))
    function = __import__(type(model).__module__, fromlist=["x"]).load_balancing_loss_func
    found: Tensor = function(of_layers, model.num_experts, model.num_experts_per_tok)
    return found


def engine(name: str, configure: Any) -> NativeEngine:
    config = config_of(name)
    made = NativeEngine(config, ATTENTIONS["blocks"], configure_model=configure)
    made.load_weights(StateDict(config, drawn(config, 0)))
    made.load_reference(StateDict(config, drawn(config, 1)))
    return made


def run(made: NativeEngine, layout: Layout, micro: int) -> tuple[Any, dict[str, Tensor]]:
    planner = RowPlanner(
        EXAMPLES, layout, examples_per_step=5, seq_length=96, micro_batch_size=micro, window=None
    )
    data = StepDataset(EXAMPLES, planner, layout, Topology())
    output = made.step(data[list(range(5))], GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=BETA))))
    return output, {n: p.grad for n, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["none", "packed", "shared_prompt"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_one_micro_batch_gives_transformers_loss_in_every_layout(name: str, layout: Layout) -> None:
    """A prompt that two responses share counts twice, padding not at all."""
    model, reference = drawn(config_of(name), 0), drawn(config_of(name), 1)
    objective, balancing = dpo_loss(model, reference, EXAMPLES, BETA), balance(model)
    names, parameters = zip(*model.named_parameters(), strict=True)
    wanted = torch.autograd.grad(objective + WEIGHT * balancing, parameters)

    def configure(model: CausalModel) -> None:
        model.balance_router(WEIGHT)
        model.set_checkpointing("full")

    output, found = run(engine(name, configure), layout, micro=50)
    assert float(output.loss) == pytest.approx(float(objective), rel=2e-6)
    assert float(output.metrics[ROUTER_LOSS]) == pytest.approx(float(balancing), rel=1e-5)
    assert_gradients_close(found, dict(zip(names, wanted, strict=True)), 2e-5)


def test_micro_batches_are_balanced_each_by_itself() -> None:
    made = engine("mixtral", lambda model: model.balance_router(WEIGHT))
    whole, _ = run(made, "none", micro=5)
    parts, _ = run(made, "none", micro=1)
    assert float(parts.loss) == pytest.approx(float(whole.loss), rel=2e-6)
    values = [float(each.metrics[ROUTER_LOSS]) for each in (whole, parts)]
    assert values[0] != pytest.approx(values[1], rel=1e-3) and values[0] == pytest.approx(values[1], rel=0.5)


def test_without_a_weight_there_is_none() -> None:
    output, _ = run(engine("mixtral", lambda model: None), "shared_prompt", micro=2)
    assert ROUTER_LOSS not in output.metrics


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
def test_models_without_such_a_loss_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"router_aux_loss_coef: is 0\.1, but transformers' .*set it to 0"):
        TransformersModel(config_of(name), StockAttention()).balance_router(0.1)
    with pytest.raises(UserError, match="a llama has no experts"):
        Decoder(TINY, ATTENTIONS["dense"]).balance_router(0.1)
