"""Engines whose steps are measured: what torch's allocator hands out on a CPU."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from bounds import key_bounds
from torch import Tensor
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from nxdt_align.batch import Batch, SlotRole, Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Parallel, Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.planning.workload import Formats
from nxdt_align.training.adamw import AdamWFP32OptState
from nxdt_align.weights.hf import FreshWeights
from nxdt_align.weights.peft import AdaptedWeights

DEEP = DecoderConfig(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
)
"""Activations of the layers outweigh the head."""
WIDE_HEAD = replace(
    DEEP,
    vocab_size=8000,
    hidden_size=128,
    intermediate_size=352,
    num_attention_heads=4,
    num_key_value_heads=4,
    tie_word_embeddings=True,
)
"""The head outweighs the layers; it is the embedding."""

PRECISIONS = {
    "fp32": (Precision(), Formats(weight=4, gradient=4, master=0, state=8, activation=4)),
    "bf16": (
        Precision(compute=torch.bfloat16),
        Formats(weight=2, gradient=4, master=4, state=8, activation=2),
    ),
    "autocast": (
        Precision(autocast=True),
        Formats(weight=4, gradient=4, master=0, state=8, activation=2, autocast=True),
    ),
}
RECOMPUTE = [
    (),
    ("full",),
    ("CoreAttention",),
    ("LlamaMLP",),
    ("LlamaRMSNorm", "ActivationMultiplyMLP"),
]


def batch(rows: int, tokens: int, responses: int, vocabulary: int) -> Batch:
    """A pair per row; ``responses`` of its tokens are the two responses', around the prompt."""
    half = responses // 2
    generator = torch.Generator().manual_seed(0)

    def of_rows(values: Tensor) -> Tensor:
        return values.expand(rows, -1).contiguous()

    def ids(columns: int) -> Tensor:
        return torch.randint(0, vocabulary, (rows, columns), generator=generator)

    key_start, key_stop = key_bounds([[(half, tokens - responses, responses - half)]] * rows)
    chosen, rejected = torch.arange(half).flip(0), torch.arange(tokens - responses + half, tokens)
    return Batch(
        input_ids=ids(tokens),
        position_ids=of_rows(torch.arange(tokens)),
        key_start=key_start,
        key_stop=key_stop,
        response_positions=of_rows(torch.cat((chosen, rejected))),
        labels=ids(responses),
        slot_index=of_rows((torch.arange(responses) >= half).long()),
        slot_valid=torch.ones(rows, 2, dtype=torch.bool),
        slot_role=of_rows(torch.tensor([SlotRole.CHOSEN, SlotRole.REJECTED])),
        desirable=torch.ones(rows, 2, dtype=torch.bool),
        record_index=torch.zeros(rows, 2, dtype=torch.long),
        global_pairs=torch.tensor(float(rows)),
        global_tokens=torch.tensor(float(rows * responses)),
        reference_logps=torch.zeros(rows, 2),
    )


def peak_of(function: Callable[[], object]) -> int:
    """Most bytes that torch's allocator has handed out and not got back, since ``function`` began."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    allocations = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU
    )
    assert allocations, "torch reported no allocation"
    now = most = 0
    for _, size in allocations:
        now += size
        most = max(most, now)
    return most


class Run:
    """An engine in its steady state: its optimizer has made a step, its gradients are gone."""

    def __init__(
        self, config: DecoderConfig, precision: Precision, recompute: tuple[str, ...], **engine: Any
    ) -> None:
        full = recompute == ("full",)

        def configure(model: Decoder) -> None:
            granularity = "full" if full else "selective" if recompute else None
            model.set_checkpointing(granularity, () if full else recompute)

        self.engine = NativeEngine(
            config, DenseAttention(), precision=precision, configure_model=configure, **engine
        )
        start, adapters = FreshWeights(config, 0), engine.get("adapters")
        self.engine.load_weights(start if adapters is None else AdaptedWeights(start, config, adapters, 0))
        self.parameters = [p for _, p in self.engine.named_parameters()]
        self.optimizer = AdamWFP32OptState(self.parameters)
        self.objective = GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=0.1)), token_statistics=True)

    def step(self, batches: list[Batch]) -> None:
        self.engine.step(batches, self.objective)
        self.engine.clip_gradients(1.0)
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Of this rank."""
        values = [v for state in self.optimizer.state.values() for v in state.values()]
        return sum(local(v).nbytes for v in values if isinstance(v, Tensor) and v.ndim > 0)

    def parameter_bytes(self) -> int:
        return sum(local(p).nbytes for p in self.parameters)

    def peak_of_a_step(self, batches: list[Batch]) -> int:
        """Beyond what lies there between two steps."""
        self.step(batches)
        for parameter in self.parameters:
            parameter.grad = None
        return peak_of(lambda: self.step(batches))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def bytes_of_a_rank(ranks: int, parallel: Parallel) -> tuple[int, int, int]:
    """Optimizer state, parameters, and the peak of a step of the first of ``ranks``, in a process of its own.

    Its process group's collectives return at once, and their results are not right. torch remembers the
    groups of a mesh, so that a process can have one such group in its life.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_bytes_of_a_rank, (ranks, parallel))


def _bytes_of_a_rank(ranks: int, parallel: Parallel) -> tuple[int, int, int]:
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    topology = Topology.of_rank(0, ranks, tensor_parallel_size=parallel.tensor, pipeline_parallel_size=1)
    run = Run(DEEP, PRECISIONS["bf16"][0], (), topology=topology, parallel=parallel)
    peak = run.peak_of_a_step([batch(2, 256, 64, DEEP.vocab_size)] * 2)
    return run.state_bytes(), run.parameter_bytes(), peak
