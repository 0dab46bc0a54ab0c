"""What two processes do with a model that transformers computes: a step, whole weights, a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from backend_fixture import StateDict, config_of, drawn
from layouts import ATTENTIONS
from oracle import random_examples
from torch.distributed.tensor import DTensor

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.checkpoint import NativeCheckpoint
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective

BETA = 0.3


def step(rank: int, world: int, name: str, kind: str, folder: Path) -> dict[str, Any]:
    """Loss, whole gradients, and what is read back from a checkpoint of all ranks."""
    config, examples = config_of(name), random_examples(6, 1)
    topology = Topology.of_rank(rank, world)
    planner = RowPlanner(
        examples,
        "shared_prompt",
        examples_per_step=6,
        seq_length=96,
        ranks=world,
        window=config.sliding_window,
        only_local=config.layer_types is None,
    )
    data = StepDataset(examples, planner, "shared_prompt", topology)
    made = NativeEngine(
        config,
        ATTENTIONS["blocks"],
        parallel=Parallel(zero1=kind == "zero1", fsdp=kind == "fsdp"),
        topology=topology,
        configure_model=lambda model: model.set_checkpointing("full"),
    )
    policy = StateDict(config, drawn(config, 0))
    made.load_weights(policy)
    made.load_reference(StateDict(config, drawn(config, 1)))
    output = made.step(data[list(range(6))], GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=BETA))))
    gradients = {}
    for key, parameter in made.named_parameters():
        if parameter.grad is not None:
            whole = parameter.grad
            gradients[key] = whole.full_tensor() if isinstance(whole, DTensor) else whole
    made.save(folder / kind, None, {})
    saved = NativeCheckpoint(folder / kind)
    is_same = all(torch.equal(saved.read(key), policy.read(key)) for key in policy.names())
    is_divided = any(isinstance(p, DTensor) for _, p in made.named_parameters())
    return {
        "loss": float(output.loss),
        "gradients": gradients,
        "is_same": is_same and sorted(saved.names()) == sorted(policy.names()),
        "is_divided": is_divided,
    }
