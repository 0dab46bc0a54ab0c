"""Cells of the table of families for models that transformers computes, against their own forward pass."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from backend_adapters import BackendCase, peft_oracle
from backend_fixture import StateDict, dpo_loss, drawn
from checkpoint_fixture import run as convert
from layouts import ATTENTIONS, LAYOUTS
from oracle import random_examples
from parallel_fixture import BETA, LOSSES, adamw, merged, whole, worst
from rank_processes import run_parallel
from torch import Tensor
from torch.nn import functional as F

from nxdt_align.batch import Topology
from nxdt_align.config.load import load_config
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.model import check_parallel
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.errors import UserError
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.backend.model import StockAttention, TransformersModel
from nxdt_align.ops.attention import Attention
from nxdt_align.run.assemble import check_engine
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode

EXAMPLES = random_examples(6, 1)
"""Up to 50 tokens, so beyond every window."""
TOKENS = 40
Theirs = Mapping[str, TransformersConfig]


class Refused(Exception):
    """What a family is refused with."""


def takes_layouts(config: TransformersConfig) -> bool:
    return config.findings.refusal is None


def engine_of(config: TransformersConfig, attention: str, **settings: Any) -> NativeEngine:
    """With the policy's weights, and another model's as the reference."""
    attend: Attention = ATTENTIONS[attention] if takes_layouts(config) else StockAttention()
    made = NativeEngine(config, attend, **settings)
    made.load_weights(StateDict(config, drawn(config, 0)))
    made.load_reference(StateDict(config, drawn(config, 1)))
    return made


# One text


def _forward(config: TransformersConfig) -> tuple[TransformersModel, Any, Tensor, Tensor, Tensor]:
    """The model as an engine has it, and transformers' own; ids, and the logits of both."""
    stock = drawn(config, 0)
    attend: Any = ATTENTIONS["dense"] if takes_layouts(config) else StockAttention()
    model = TransformersModel(config, attend).to_empty(device="cpu")
    model.fill_buffers()
    model.causal.load_state_dict(stock.state_dict(), strict=False)
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    index = torch.arange(TOKENS, dtype=torch.int32)[None]
    context = model.prepare(torch.zeros_like(index), index + 1, attend.prepare)
    ours = model.logits(model(ids, index.long(), context))
    return model, stock, ids, ours, stock(input_ids=ids, use_cache=False).logits


def logits(config: TransformersConfig) -> float:
    *_, ours, theirs = _forward(config)
    return float((ours - theirs).detach().abs().max())


def gradients(config: TransformersConfig) -> float:
    model, stock, ids, ours, theirs = _forward(config)
    for found in (ours, theirs):
        torch.autograd.backward(F.cross_entropy(found.float().flatten(0, 1), ids.flatten()))
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return max(float((got[name] - gradient).abs().max()) for name, gradient in wanted.items())


# A step


@functools.cache
def true_step(config: TransformersConfig) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients, and weights after AdamW's step, of transformers' own model, a response at a time."""
    model = drawn(config, 0)
    loss = dpo_loss(model, drawn(config, 1), EXAMPLES, BETA)
    torch.autograd.backward(loss)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    adamw(list(model.parameters())).step()
    return float(loss), found, {name: p.detach() for name, p in model.named_parameters()}


Found = tuple[float, dict[str, Tensor], dict[str, Tensor]]


def step(
    config: TransformersConfig, layout: Layout, attention: str, rank: int = 0, ranks: int = 1, **spread: bool
) -> Found:
    """The same on engine native."""
    topology = Topology.of_rank(rank, ranks, tensor_parallel_size=1, pipeline_parallel_size=1)
    planner = RowPlanner(
        EXAMPLES,
        layout,
        examples_per_step=len(EXAMPLES),
        seq_length=96,
        ranks=ranks,
        micro_batch_size=1,
        window=config.sliding_window,
        only_local=config.layer_types is None,
    )
    batches = StepDataset(EXAMPLES, planner, layout, topology)[list(range(len(EXAMPLES)))]
    made = engine_of(config, attention, parallel=Parallel(**spread), topology=topology)
    optimizer = adamw([p for _, p in made.named_parameters()])
    output = made.step(batches, GlobalMeanObjective(LOSSES["dpo"]))
    found = {name: whole(p.grad) for name, p in made.named_parameters() if p.grad is not None}
    optimizer.step()
    return float(output.loss), found, {name: whole(p) for name, p in made.named_parameters()}


def off(config: TransformersConfig, found: Sequence[Found], *, after: bool = False) -> float:
    """The largest of the loss's relative difference, which is at most 2e-6, and of the gradients', each of
    its weight's largest; of the weights ``after`` the step, too."""
    loss, wanted, weights = true_step(config)
    furthest = max(abs(each[0] - loss) / loss for each in found)
    assert furthest <= 2e-6, f"loss {furthest:.1e}"
    got = merged([each[1] for each in found])
    # Of an expert that no token reaches, one has no gradient and the other zeros.
    reached = {name: g for name, g in wanted.items() if g.abs().max() > 0}
    furthest = max(furthest, worst({n: got[n] for n in reached}, reached, relative=True)[0])
    if after:
        furthest = max(furthest, worst({n: found[0][2][n] for n in weights}, weights, relative=True)[0])
    return furthest


def dpo_step(config: TransformersConfig) -> float:
    return off(config, [step(config, "none", "dense")], after=True)


def layouts(config: TransformersConfig) -> float:
    if not takes_layouts(config):
        raise Refused(f"data.packing is none, with a notice: {config.findings.refusal}")
    return max(
        off(config, [step(config, layout, attention)]) for layout in LAYOUTS for attention in ATTENTIONS
    )


def fsdp_steps(rank: int, world: int, configs: Theirs) -> list[Found]:
    """For ``run_parallel``."""
    return [
        step(config, "shared_prompt" if takes_layouts(config) else "none", "dense", rank, world, fsdp=True)
        for config in configs.values()
    ]


def fsdp(configs: Theirs) -> dict[str, float]:
    ranks = run_parallel(2, fsdp_steps, configs)
    return {name: off(c, [rank[i] for rank in ranks]) for i, (name, c) in enumerate(configs.items())}


# Refusals, and folders


def divided(**sizes: int) -> Any:
    def measure(config: TransformersConfig) -> float:
        check_parallel(config, Parallel(**sizes))
        raise AssertionError(f"engine native divides a {config.model_type}")

    return measure


def on_nxd(config: TransformersConfig) -> float:
    check_engine(load_config("tiny_llama_DPO_config"), "nxd", RunEnv(), config, RunMode())
    raise AssertionError(f"engine nxd runs a {config.model_type}")


def with_adapters(config: TransformersConfig) -> float:
    """Loss and gradients of every factor, off PEFT's own layers in transformers' own model."""
    case = BackendCase(config)
    got, want = case.run(), peft_oracle(case)
    loss = abs(got.loss - want.loss) / max(1.0, want.loss)
    assert loss <= 2e-6, f"loss {loss:.1e}"
    # Of an expert that no token reaches, one has no gradient and the other zeros.
    reached = {name: g for name, g in want.gradients.items() if g.abs().max() > 0}
    assert set(want.gradients) == set(case.started(drawn(config)).shapes)
    return max(loss, worst({name: got.gradients[name] for name in reached}, reached, relative=True)[0])


def to_nxdt(config: TransformersConfig) -> float:
    with tempfile.TemporaryDirectory() as folder:
        drawn(config).save_pretrained(Path(folder) / "hf")
        convert(Path(folder) / "hf", Path(folder) / "nxdt", to="nxdt", tp=2)
    raise AssertionError(f"a {config.model_type} is converted to NxD's shards")


def exported(config: TransformersConfig) -> float:
    """Logits of the folder that ``convert --to hf`` writes, which transformers loads, against the model's."""
    import transformers

    model = drawn(config)
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    auto: Any = transformers.AutoModelForCausalLM
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "hf")
        convert(Path(folder) / "hf", Path(folder) / "again", to="hf")
        loaded, report = auto.from_pretrained(Path(folder) / "again", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        found, wanted = (m.eval()(ids, use_cache=False).logits for m in (loaded, model))
    return float((found - wanted).abs().max())


def each(measure: Any) -> Any:
    """``measure`` of each model: a figure, or the message that it is refused with."""

    def measured(configs: Theirs) -> dict[str, float | str]:
        found: dict[str, float | str] = {}
        for name, config in configs.items():
            try:
                found[name] = measure(config)
            except (Refused, UserError) as refusal:
                found[name] = str(refusal)
        return found

    return measured
