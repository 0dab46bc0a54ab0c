"""Every key of the configuration: type, default and, below each field, its meaning.

The tree is NxDT's YAML; keys that NxDT lacks are marked "(ours)". Sections in separate files:
``exp_manager`` in experiment.py, ``data`` in data.py, ``model`` in model.py,
``model_alignment_strategy`` in alignment.py. For a key that
cannot be null, ``null`` in a YAML means the default.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nxdt_align.config.alignment import (
    DPOConfig,
    ModelAlignmentStrategyConfig,
    ORPOConfig,
    PEFTConfig,
    SFTConfig,
    TruncationMode,
)
from nxdt_align.config.data import PACKING, DataConfig, DataSource, Packing, TokenizerConfig
from nxdt_align.config.experiment import CheckpointCallbackConfig, ExpManagerConfig
from nxdt_align.config.faults import Fault
from nxdt_align.config.fields import AUTO, INTERNAL, PATH, name_fault, number, reads_as
from nxdt_align.config.model import FusionsConfig, ModelConfig, OptimConfig, SchedConfig

__all__ = [
    "CheckpointCallbackConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "DataSource",
    "DistributedStrategyConfig",
    "ExpManagerConfig",
    "FusionsConfig",
    "ModelAlignmentStrategyConfig",
    "ModelConfig",
    "ORPOConfig",
    "OptimConfig",
    "PEFTConfig",
    "Packing",
    "PrecisionConfig",
    "PrecisionType",
    "ProfilerConfig",
    "SFTConfig",
    "SchedConfig",
    "TokenizerConfig",
    "TrainerConfig",
    "TruncationMode",
]

Accelerator = Literal["auto", "neuron", "cpu", "cuda", "xla"]
Switch = Literal["0", "1"]
_ZERO_OR_ONE = reads_as(**{"0": "0", "1": "1"})
"""A YAML may write the number, as the environment variables of these names do."""
PrecisionType = Literal[
    "fp32",
    "bf16SR",
    "mixed_precision",
    "mixed_precisionSR",
    "mixed_precision_SR",
    "autocast",
    "manual",
    "fp16",
]


@dataclass(frozen=True, kw_only=True)
class OwnPart:
    """A user-supplied class."""

    path: str = ""
    """Dotted path, module.name; modules of the current folder are found first."""
    settings: Mapping[str, Any] | None = None
    """Keyword arguments of the class."""


@dataclass(frozen=True, kw_only=True)
class ProfilerConfig:
    """(ours) torch.profiler over a few training steps; {} takes the defaults. Each cycle is one trace."""

    wait: int = number(2, at_least=0)
    """Steps of a cycle that are left out: the first ones allocate and compile."""
    warmup: int = number(1, at_least=0)
    """Steps after those that are profiled and dropped."""
    active: int = number(3, at_least=1)
    """Steps after those that are in the trace."""
    repeat: int = number(1, at_least=0)
    """Cycles; 0: until training ends."""
    record_shapes: bool = False
    """Record the shapes of operators' inputs."""
    profile_memory: bool = False
    """Record what is allocated."""
    with_stack: bool = False
    """Record where in the source an operator was called."""
    all_ranks: bool = False
    """Profile every process, not the first alone."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Lightning's Trainer: devices, length of the run, validation."""

    accelerator: Accelerator = "auto"
    """(ours) Device to run on. auto: Neuron if its packages are installed, else CUDA if there is a
    device, else the CPU. xla: torch_xla's CPU device, in one process."""
    devices: int = number(1, at_least=1)
    """Processes on each node, one per device: a trn1.32xlarge has 32 NeuronCores."""
    num_nodes: int = number(1, at_least=1)
    """Nodes. train.sh sets it from Slurm or MPI."""
    lnc: int | None = None
    """Physical NeuronCores per logical one: 1 or 2 (trn2), to whose memory plan compares; null: trn1."""
    sequential_move_factor: int = number(11, at_least=1)
    """Ranks per node that load their start weights at the same time, with a pipeline (engine nxd)."""
    max_epochs: int = number(-1, at_least=-1)
    """Epochs after which training ends; -1 for no limit."""
    max_steps: int = number(-1, at_least=-1)
    """Optimizer steps after which training ends; -1 for no limit. TRAIN_ITERS overrides it."""
    max_time: str | None = None
    """Wall-clock time after which training ends, as DD:HH:MM:SS."""
    log_every_n_steps: int = number(1, at_least=1)
    """Steps between two log entries. NxDT's YAMLs have 1 or 10."""
    val_check_interval: int | float = number(1.0, above=0)
    """Validate every N training steps (an integer) or every fraction of an epoch (a float)."""
    check_val_every_n_epoch: int | None = number(1, at_least=1)
    """Validate every N epochs; null: val_check_interval counts steps across epochs."""
    val_check_interval_examples: int | None = number(None, at_least=1)
    """(ours) Validate every N training examples, across epochs, instead of the two keys above: eval_every of
    the reference implementation. Rounded down to whole steps of data.global_batch_size."""
    num_sanity_val_steps: int = 0
    """Validation batches to run before training starts."""
    limit_train_batches: int | float = number(1.0, above=0)
    """Training batches per epoch: a number (an integer) or a fraction (a float)."""
    limit_val_batches: int | float = number(1.0, at_least=0)
    """Validation batches: a number (an integer) or a fraction (a float); 0 turns validation off."""
    limit_test_batches: int | float = 1.0
    """As limit_val_batches, for test runs; there are none here."""
    gradient_clip_val: float | None = number(None, at_least=0)
    """Maximum global L2 norm of the gradients; null for no clipping."""
    gradient_clip_algorithm: Literal["norm"] = "norm"
    """How gradients are clipped."""
    accumulate_grad_batches: int = 1
    """Must be 1: accumulation follows from data.global_batch_size and data.micro_batch_size."""
    enable_progress_bar: bool = True
    """Show how far the run is: one line on a terminal, elsewhere a line every so many steps."""
    callbacks: tuple[OwnPart, ...] | None = None
    """(ours) Custom Lightning callbacks: a list of dotted paths, or of {path, settings}. They are imported
    when training starts and called after this package's callbacks."""
    profiler: ProfilerConfig | None = None
    """Traces of a few steps, in profile/ of the run's folder, for Perfetto."""
    detect_anomaly: bool = False
    """Stop at the first backward function that gives NaN, naming it and the forward call that it belongs to
    (torch's anomaly mode); steps become much slower."""
    logger: bool | None = None
    """Lightning's logger; exp_manager creates the loggers instead."""
    enable_checkpointing: bool | None = None
    """Lightning's checkpoint callback; exp_manager creates it instead."""
    use_distributed_sampler: bool | None = None
    """Lightning's sampler; the data module has a resumable one instead."""


@dataclass(frozen=True, kw_only=True)
class DistributedStrategyConfig:
    """How the model is spread over devices."""

    engine: Literal["auto", "nxd", "native"] = "auto"
    """(ours) Implementation of the parallelism. nxd: neuronx-distributed on trn1; native: PyTorch's own (CPU,
    CUDA); auto: nxd if the real Neuron packages are installed, else native."""
    tensor_model_parallel_size: int = number(1, at_least=1)
    """Devices that share each layer's matrices."""
    pipeline_model_parallel_size: int = number(1, at_least=1)
    """Pipeline stages: devices that hold a share of the layers each."""
    virtual_pipeline_model_parallel_size: int = number(1, at_least=1)
    """Shares of the layers that each pipeline device holds (interleaved schedule)."""
    context_parallel_size: int = number(1, at_least=1)
    """Devices that share a sequence's tokens; above 1, model.fusions.ring_attention must be True."""
    expert_model_parallel_size: int = 1
    """Devices that share a layer's experts; the models here have none."""
    token_shuffle_group_size: int = 1
    """Token shuffling of mixtures of experts; the models here have none."""
    zero1: bool = False
    """Shard the optimizer state over data-parallel ranks; on engine native also the fp32 master weights
    and the reduced gradients."""
    fsdp: bool | Literal["full"] = False
    """(ours) full (or True): shard parameters, gradients and optimizer state over data-parallel ranks
    (FSDP2)."""
    sequence_parallel: bool = False
    """Shard activations along the sequence over the tensor-parallel ranks."""
    compile: Literal["auto", "none", "blocks"] = "auto"
    """(ours) Graphs of a step on engine native. blocks: one for the decoder layer, shared by all layers, one
    for the embedding, one for norm, head and log-probabilities, one for the loss (torch.compile); none: op by
    op; auto: blocks on neuron and CUDA, none on the CPU."""
    timeout_minutes: float = number(30.0, above=0, at_most=525_600)
    """(ours) How long a process waits for the others before it gives up, e.g. if one of them hangs."""
    kv_replicator: int = number(1, at_least=1, at_most=128)
    """Copies of each key-value head, for more tensor-parallel ranks than key-value heads."""


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats of weights, gradients and optimizer state."""

    type: PrecisionType = field(default="mixed_precision", metadata=AUTO)
    """mixed_precision: bf16 with master weights and gradient sums in fp32; mixed_precisionSR (also
    mixed_precision_SR): that with stochastic rounding; bf16SR: bf16 with stochastic rounding;
    autocast: torch.autocast; fp32; manual: by the keys below; fp16 (ours, engine native alone): fp16 with
    master weights and gradient sums in fp32 and a dynamic loss scale; auto (ours): mixed_precision on
    Neuron and CUDA, but fp16 where the device does not compute in bf16; fp32 elsewhere."""
    master_weights: bool = False
    """Keep a copy of the weights in fp32 (read with type manual)."""
    fp32_grad_acc: bool = False
    """Accumulate gradients in fp32 (read with type manual)."""
    fp32_grads_cc: bool = False
    """Reduce gradients over ranks in fp32 (read with type manual)."""
    xla_use_bf16: Switch = field(default="0", metadata=_ZERO_OR_ONE)
    """'1': XLA computes fp32 tensors in bf16 (read with type manual)."""
    xla_downcast_bf16: Switch = field(default="0", metadata=_ZERO_OR_ONE)
    """'1': XLA treats fp32 tensors as bf16 and fp64 tensors as fp32 (read with type manual)."""
    neuron_rt_stochastic_rounding_en: Switch = field(default="0", metadata=_ZERO_OR_ONE)
    """'1': round stochastically on the device (read with type manual)."""
    parallel_layers_reduce_dtype: Literal["fp32", "bf16"] | None = None
    """Number format of the reductions inside parallel layers; null: fp32 with type fp32, else bf16."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole configuration."""

    name: str = "nxdt_align"
    """Name of the experiment; exp_manager.name takes precedence as the folder's name."""
    model_source: Literal["hf", "megatron"] = "hf"
    """Origin of the model's code. Only hf (a Hugging Face config.json) is supported."""
    seed: int = number(1234, at_least=0, below=2**32)
    """Seed of the data order, dropout and random initial weights."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    distributed_strategy: DistributedStrategyConfig = field(default_factory=DistributedStrategyConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    model_alignment_strategy: ModelAlignmentStrategyConfig = field(
        default_factory=ModelAlignmentStrategyConfig
    )
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    compiler_flags: str = "--model-type transformer"
    """Flags of the Neuron compiler."""
    compiler_cache_url: str | None = field(default=None, metadata=PATH)
    """Folder, or s3:// address, of the Neuron compiler's cache; null: its own default."""
    aync_exec_max_inflight_requests: int = 5
    """Length of the Neuron runtime's queue (NxDT's spelling; async_exec_... is accepted too)."""
    bucket_size_collectives: int = 1024
    """Megabytes of tensors per collective."""
    neuron_rt_exec_timeout: int = 100
    """Seconds after which the Neuron runtime gives up on a request."""
    neuron_experimental_compress_rg: bool = False
    """Pass replica groups to the Neuron runtime in compressed form."""
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False, metadata=INTERNAL)
    """Paths of the keys that the YAML or an override sets; all others have their defaults."""
    auto: frozenset[str] = field(default=frozenset(), compare=False, repr=False, metadata=INTERNAL)
    """Paths of the keys that are auto: the run chooses their values."""
    overridden: tuple[str, ...] = field(default=(), compare=False, repr=False, metadata=INTERNAL)
    """Paths of the keys that overrides name, in their order."""
    source: str = field(default="", compare=False, repr=False, metadata=INTERNAL)
    """The file that this was read from."""
    secrets: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False, metadata=INTERNAL)
    """Path -> text of the YAML, ``${oc.env:NAME}``, for values that must not be shown."""

    def faults(self) -> Iterator[Fault]:
        yield from name_fault("name", self.name)

    @property
    def world_size(self) -> int:
        """Processes of the run: devices of all nodes."""
        return self.trainer.devices * self.trainer.num_nodes

    @property
    def model_parallel_size(self) -> int:
        """Devices that hold one copy of the model: tensor x pipeline x context parallel."""
        parallel = self.distributed_strategy
        return (
            parallel.tensor_model_parallel_size
            * parallel.pipeline_model_parallel_size
            * parallel.context_parallel_size
        )

    @property
    def data_parallel_size(self) -> int:
        """Copies of the model; check() ensures that the division is exact."""
        return self.world_size // self.model_parallel_size

    @property
    def layout(self) -> Packing:
        """How examples are laid into rows: ``data.packing``, or the objective's default, also where it is
        auto and not chosen yet."""
        if self.data.packing is not None:
            return self.data.packing
        sft = self.model_alignment_strategy.sft
        if sft is None:
            return "shared_prompt"
        return "packed" if sft.packing else "none"

    def with_layout(self, layout: Packing) -> Config:
        """With this ``data.packing``, which is then no longer auto."""
        data = dataclasses.replace(self.data, packing=layout)
        return dataclasses.replace(self, data=data, auto=self.auto - {PACKING})

    @property
    def exports_adapter(self) -> bool:
        """Whether the export at the end is of adapters alone: always where the base is quantised, into which
        none can be merged."""
        peft, export = self.model_alignment_strategy.peft, self.exp_manager.export_hf
        is_quantized = peft is not None and peft.quantize_base is not None
        return export == "adapter" or (is_quantized and export is True)

    @property
    def experiments(self) -> Path:
        """The folder of all experiments, absolute."""
        return Path(self.exp_manager.exp_dir or "nemo_experiments").absolute()

    @property
    def validation_interval(self) -> tuple[int | float, int | None]:
        """Lightning's ``val_check_interval`` and ``check_val_every_n_epoch``, also where examples are
        counted."""
        trainer = self.trainer
        if trainer.val_check_interval_examples is None:
            return trainer.val_check_interval, trainer.check_val_every_n_epoch
        return trainer.val_check_interval_examples // self.data.global_batch_size, None

    @property
    def validates(self) -> bool:
        """Whether the run ever validates."""
        return self.data.val_dir is not None and self.trainer.limit_val_batches != 0
