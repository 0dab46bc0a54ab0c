"""Every layout of the oracle's examples: what a test of layouts needs to lay them out and run them."""

from __future__ import annotations

from oracle import TINY, ExampleSet, ModuleWeights, plain_model

from nxdt_align.batch import Topology
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention

LAYOUTS: list[Layout] = ["none", "packed", "shared_prompt"]
ATTENTIONS: dict[str, Attention] = {
    "dense": DenseAttention(),
    "blocks": BlockAttention(),
}
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2e-6, 2e-5
CASES = {
    "mixed": {"prompt": (1, 30), "response": (1, 20)},
    "single-token responses": {"prompt": (1, 5), "response": (1, 1)},
    "single-token prompts": {"prompt": (1, 1), "response": (2, 9)},
    "long prompts": {"prompt": (40, 60), "response": (1, 4)},
}


def dataset(
    examples: ExampleSet,
    layout: Layout,
    micro: int,
    topology: Topology | None = None,
    *,
    with_prompts: bool = False,
) -> StepDataset:
    planner = RowPlanner(
        examples,
        layout,
        examples_per_step=len(examples),
        seq_length=96,
        ranks=1 if topology is None else topology.data_parallel_size,
        micro_batch_size=micro,
        with_prompts=with_prompts,
    )
    return StepDataset(examples, planner, layout, topology or Topology(), with_prompts=with_prompts)  # type: ignore[arg-type]


def engine(seed: int = 0, attention: str = "dense") -> NativeEngine:
    built = NativeEngine(TINY, ATTENTIONS[attention])
    built.load_weights(ModuleWeights(plain_model(seed)))
    return built
