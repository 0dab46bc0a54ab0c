"""Ranks of the NxD engine as processes, on the real neuronx-distributed in its CPU mode.

``run_ranks`` starts processes that import NxD once and do a list of jobs; what each returns comes back.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nxd_source import supply_neuron_only_modules
from oracle import TINY, ExampleSet, ModuleWeights, causal_attention, random_examples
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.config.alignment import DPOConfig, ORPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.nxd.settings import Parallel, Precision, SaveOptions
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.losses.orpo import ORPOLoss
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import HEAD, Partition, local_tensors
from nxdt_align.models.presets import DecoderConfig, weight_shapes

CONFIG = replace(TINY, vocab_size=64, num_attention_heads=8, head_dim=4)
"""Eight query heads to two kv heads; sizes that four ranks divide."""
PAIRS = 6

NXD = (
    *("distributed_strategy.engine=nxd", "trainer.accelerator=cpu", "trainer.devices=2"),
    *("distributed_strategy.zero1=True", "model.qkv_linear=True", "exp_manager.seconds_to_sleep=0.1"),
)
"""Overrides that run a YAML on engine nxd in CPU mode, in two processes."""
SPREAD = {
    "tensor": (
        "distributed_strategy.tensor_model_parallel_size=2",
        "distributed_strategy.sequence_parallel=True",
    ),
    "pipeline": ("distributed_strategy.pipeline_model_parallel_size=2",),
}
"""How those two processes divide the model."""


def require_nxd() -> None:
    """Skip where neuronx-distributed is not importable; else see to the Neuron-only modules below it."""
    for name in ("neuronx_distributed", "torch_xla"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not here")
    supply_neuron_only_modules()


@dataclass(frozen=True)
class Case:
    """How a test spreads the model."""

    tp: int = 1
    kv: int = 1
    pp: int = 1
    dp: int = 1
    sp: bool = False
    qkv: str = "split"
    cuts: tuple[int, ...] | None = None

    @property
    def config(self) -> DecoderConfig:
        """As many kv heads as query heads where these three are one layer."""
        heads = CONFIG.num_attention_heads if self.qkv == "coalesced" else CONFIG.num_key_value_heads
        return replace(CONFIG, num_key_value_heads=heads)

    @property
    def parallel(self) -> Parallel:
        return Parallel(
            tensor=self.tp,
            pipeline=self.pp,
            sequence_parallel=self.sp,
            kv_multiplier=self.kv,
            qkv=self.qkv,  # type: ignore[arg-type]
            pipeline_cuts=self.cuts,
        )

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


Job = tuple[Callable[..., Any], tuple[Any, ...]]


def run_ranks(world: int, jobs: Sequence[Job], folder: Path, *, gloo: bool = True) -> Any:
    """Results as [job][rank]. A job is a function of this or a test module, and arguments for it.

    Raises what a rank raised first. Without ``gloo`` a job joins a process group itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.spawn(_rank, (world, list(jobs), str(folder), gloo), nprocs=world)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return list(zip(*results, strict=True))


def _rank(rank: int, world: int, jobs: list[Job], folder: str, gloo: bool) -> None:
    torch.set_num_threads(1)
    if gloo:
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = []
    for function, arguments in jobs:
        results.append(function(*arguments))
    torch.save(results, f"{folder}/{rank}.pt")
    if gloo:
        dist.barrier()
        dist.destroy_process_group()


# Models and data


def plain(seed: int, config: DecoderConfig = CONFIG) -> Decoder:
    """A plain model whose every entry counts."""
    model = Decoder(config, causal_attention)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 - config.norm_offset if name.endswith("norm.weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + around)
    return model


def weights(seed: int, config: DecoderConfig = CONFIG) -> ModuleWeights:
    return ModuleWeights(plain(seed, config))


def examples(seed: int = 4) -> ExampleSet:
    return random_examples(PAIRS, seed=seed, prompt=(1, 20), response=(1, 14))


def dataset(
    topology: Any,
    layout: Layout = "packed",
    row: int | None = None,
    window: int | None = None,
    seed: int = 4,
) -> StepDataset:
    """``row``: tokens of a row, where they are not to be chosen."""
    found = examples(seed)
    planner = RowPlanner(
        found,
        layout,
        examples_per_step=PAIRS,
        seq_length=96,
        ranks=topology.data_parallel_size,
        micro_batch_size=1,
        buckets=None if row is None else [row],
        window=window,
    )
    return StepDataset(found, planner, layout, topology)  # type: ignore[arg-type]


def objective(name: str) -> GlobalMeanObjective:
    return GlobalMeanObjective(
        DPOLoss(DPOConfig(kl_beta=0.1)) if name == "dpo" else ORPOLoss(ORPOConfig(beta=0.1))
    )


# On a rank


def engine(case: Case, config: DecoderConfig = CONFIG, **settings: Any) -> Any:
    from nxdt_align.engines.nxd import compat

    platform = compat.start("cpu", dist.get_rank(), dist.get_world_size())
    from nxdt_align.engines.nxd.engine import NxDEngine
    from nxdt_align.engines.nxd.mesh import make_mesh

    forget_groups()
    return NxDEngine(config, make_mesh(case.parallel, platform), **settings)


def forget_groups() -> None:
    """Let NxD make other groups in this process."""
    from neuronx_distributed.parallel_layers import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.destroy_kv_group()


def optimizer_of(built: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in built.named_parameters()], lr=1e-2)


def train(built: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    losses = []
    batches = batches_of(built)
    for _ in range(steps):
        output = built.step(batches, objective("orpo"))
        built.clip_gradients(1.0)
        optimizer.step()
        losses.append(output.loss)
    return losses


def start(case: Case, config: DecoderConfig = CONFIG, **settings: Any) -> Any:
    """An engine with ``plain(0, config)``'s weights."""
    built = engine(case, config, **settings)
    built.load_weights(weights(0, config))
    return built


def batches_of(built: Any, layout: Layout = "packed", row: int | None = None, seed: int = 4) -> list[Batch]:
    """This rank's of one step over all pairs; ``row`` as for ``dataset``."""
    window = built.config.sliding_window
    found: list[Batch] = dataset(built.topology, layout, row, window, seed)[tuple(range(PAIRS))]
    return found


def gradients_of(built: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in built.named_parameters()}


def snapshot(built: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in built.named_parameters()}


def settings_of(precision: str) -> dict[str, Any]:
    if precision == "fp32":
        return {}
    return {
        "precision": Precision(torch.bfloat16, masters=True),
        "save_options": SaveOptions(low_precision=torch.bfloat16),
    }


@contextmanager
def storage(save: Callable[..., None]) -> Iterator[None]:
    """Inside, ``save(real, self, content, filename)`` stands for the call with which NxD writes a file."""
    from neuronx_distributed.trainer.checkpoint_storage import FilesysCheckpointStorage

    real = FilesysCheckpointStorage.save_object
    FilesysCheckpointStorage.save_object = lambda *arguments: save(real, *arguments)
    try:
        yield
    finally:
        FilesysCheckpointStorage.save_object = real


@contextmanager
def held() -> Iterator[threading.Event]:
    """Inside, no file is written before the event is set."""
    go = threading.Event()

    def save(real: Callable[..., None], *arguments: Any) -> None:
        assert go.wait(300), "never let go"
        real(*arguments)

    with storage(save):
        yield go


# Beside the ranks


def one_copy(case: Case, ranks: Sequence[Any], copy: int) -> list[Any]:
    """What the ranks of one copy of the model found, out of all ranks': data-parallel ranks come between
    tensor-parallel ones and stages."""
    stages = range(case.pp)
    return [r for s in stages for r in ranks[(s * case.dp + copy) * case.tp :][: case.tp]]


def whole(
    case: Case,
    config: DecoderConfig,
    shards: Sequence[Mapping[str, Tensor]],
    tolerance: float = 1e-5,
    adapters: AdapterSpec | None = None,
) -> dict[str, Tensor]:
    """Whole tensors under the plain model's names out of each rank's, which must agree where they
    hold the same. ``shards`` are those of the ranks of one copy of the model, tensor-parallel fastest; with
    ``adapters``, of what those train."""
    partition = case.parallel.partition(config, adapters)
    shapes = weight_shapes(config)
    if adapters is not None:
        shapes = {name: shape for name, shape in partition.adapter_shapes.items() if adapters.trains(name)}
    dtype = next(iter(shards[0].values())).dtype
    found = {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}
    for stage in range(case.pp):
        for local, names in local_tensors(partition, stage).items():
            if adapters is not None and not adapters.trains(local):
                continue
            if config.tie_word_embeddings and names == [HEAD]:
                continue  # a parameter of its own in files alone
            for rank in range(case.tp):
                held, row = shards[stage * case.tp + rank][local], 0
                for name in names:
                    rows = partition.local_shape(name)[0]
                    _place(found[name], partition, name, rank, held[row : row + rows], tolerance)
                    row += rows
    assert not any(tensor.isnan().any() for tensor in found.values())
    return found


def _place(
    target: Tensor, partition: Partition, name: str, rank: int, share: Tensor, tolerance: float
) -> None:
    dim, ranges = partition.ranges(name, rank)
    at = 0
    for start, stop in ranges:
        piece = share.narrow(dim, at, stop - start)
        place = target.narrow(dim, start, stop - start)
        is_first = bool(place.isnan().all())
        assert is_first or torch.allclose(place, piece, rtol=tolerance, atol=tolerance / 100), name
        place.copy_(piece)
        at += stop - start
