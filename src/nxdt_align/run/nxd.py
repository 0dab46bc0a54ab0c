"""The NxD engine's part of a run. Imports NxD only when a run uses that engine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from nxdt_align.config.neuron_packages import find_missing_neuron_packages
from nxdt_align.config.pipeline import cut_layers
from nxdt_align.config.schema import Config
from nxdt_align.engines import xla
from nxdt_align.engines.base import Compiler, Engine
from nxdt_align.engines.nxd import checkpoint, compat
from nxdt_align.engines.nxd.flash import (
    BIASED_TILE,
    MAX_HEAD,
    BiasedKernels,
    CausalFlashAttention,
    IntervalFlashAttention,
    Kernel,
    nki_kernel,
    nki_kernels,
)
from nxdt_align.engines.nxd.settings import (
    Parallel,
    Precision,
    SaveOptions,
    StaggeredLoad,
    check_adapters,
)
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import QKV, PartitionError
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.planning.kernels import why_not_causal
from nxdt_align.run.adapters import spec_of
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode

log = logging.getLogger(__name__)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check(config: Config, model: DecoderConfig) -> None:
    """Raise UserError if NxD is not there, or if layout, precision, attention or adapters are not its."""
    parallel, _ = _layout(config, model, _backend_of(config))
    check_adapters(parallel.partition(model, spec_of(config, model)))


def _backend_of(config: Config) -> compat.Backend:
    backend = compat.backend_of(config.trainer.accelerator)
    missing = find_missing_neuron_packages(cpu_mode=backend != "neuron")
    if missing is not None:
        raise UserError(missing)
    return backend


def _layout(config: Config, model: DecoderConfig, backend: compat.Backend) -> tuple[Parallel, Precision]:
    parallel, precision = parallel_of(config, model, backend), precision_of(config, backend)
    _check_sizes(parallel, model)
    if config.data.attention not in ("auto", "dense"):
        raise UserError(
            f"data.attention: must be auto or dense with engine nxd, but is {config.data.attention}"
        )
    return parallel, precision


class NxDParts:
    """Joins the run's processes and builds its engine.

    Raises UserError for incompatible sizes, and if NxD cannot be imported.
    """

    checkpoints = checkpoint

    def __init__(self, config: Config, env: RunEnv, model: DecoderConfig, mode: RunMode) -> None:
        self._config, self._env, self._model = config, env, model
        backend = self._backend()
        parallel, self.precision = _layout(config, model, backend)
        self.reference_precision = reference_precision_of(config, self.precision)
        self.platform = self._start(backend)
        self.device = self.platform.device
        self._compiler = _compiler_of(backend, mode)
        from nxdt_align.engines.nxd.mesh import make_mesh

        self.mesh = make_mesh(parallel, self.platform)
        self.topology = self.mesh.topology

    def _backend(self) -> compat.Backend:
        return _backend_of(self._config)

    def _start(self, backend: compat.Backend) -> compat.Platform:
        return compat.start(backend, self._env.rank, self._env.world_size)

    @property
    def on_trainium(self) -> bool:
        return self.platform.backend == "neuron"

    def settle(self, config: Config) -> None:
        self._config = config

    def engine(self, adapters: AdapterSpec | None = None) -> Engine:
        from nxdt_align.engines.nxd.engine import NxDEngine

        # Again, as an adapter that training starts from settles them.
        check_adapters(self.mesh.parallel.partition(self._model, adapters))
        # As in NxDT, which staggers loading only with a pipeline.
        trainer, is_piped = self._config.trainer, self.mesh.parallel.pipeline > 1
        at_once = trainer.sequential_move_factor if is_piped else None
        engine = NxDEngine(
            self._model,
            self.mesh,
            attention=self._attention(),
            precision=self.precision,
            reference_precision=self.reference_precision,
            save_options=save_options_of(self._config, self.precision),
            configure_model=self._configure,
            staggered=StaggeredLoad(self._env.local_rank, trainer.devices, at_once),
            adapters=adapters,
            seed=self._config.seed,
        )
        engine.compiler = self._compiler
        return engine

    def notes_on(self, folder: Path) -> list[str]:
        return form_notes(self._config, folder)

    def _configure(self, decoder: Decoder) -> None:
        model = self._config.model
        decoder.set_checkpointing(
            model.activations_checkpoint_granularity,
            tuple(model.activations_checkpoint_recompute or ()),
            self.platform.recompute(),
        )

    def _attention(self) -> Attention:
        config, fusions = self._config, self._config.model.fusions
        if not fusions.flash_attention or self.platform.backend != "neuron":
            return DenseAttention()
        fault = why_not_causal(config, self._model)
        if fault is None:
            return CausalFlashAttention(self._kernel(), transpose_inputs=config.model.transpose_nki_inputs)
        if fusions.flash_attention_packed:
            fault = why_not_biased(config, self._model)
            if fault is None:
                # A chosen response stands before its prompt there, and sees the tokens behind it.
                return IntervalFlashAttention(self._kernels(), causal=config.layout != "shared_prompt")
            log.log(NOTICE, "model.fusions.flash_attention_packed: a mask is used, %s", fault)
        else:
            log.log(NOTICE, "model.fusions.flash_attention: a mask is used, %s", fault)
        return DenseAttention()

    def _kernel(self) -> Kernel:
        return nki_kernel()

    def _kernels(self) -> BiasedKernels:
        return nki_kernels(transposes=self._config.model.transpose_nki_inputs)


def why_not_biased(config: Config, model: DecoderConfig) -> str | None:
    """Why the kernel with a bias cannot be had; None where it can."""
    if config.data.attention == "dense":
        return "as data.attention is dense"
    if model.attention_softcap is not None:
        return f"as the kernel does not cap scores, as this model does (at {model.attention_softcap:g})"
    if model.head_dim > MAX_HEAD:
        return f"as the kernel takes heads of {MAX_HEAD} at most, but this model's have {model.head_dim}"
    return None


def row_multiple(config: Config, model: DecoderConfig) -> int:
    """Tokens that rows have to be a multiple of on Neuron. NxD's own call of the kernel says on the first
    batch what rows it takes."""
    fusions = config.model.fusions
    is_biased = (
        fusions.flash_attention
        and fusions.flash_attention_packed
        and why_not_causal(config, model) is not None
        and why_not_biased(config, model) is None
    )
    return BIASED_TILE if is_biased else 1


def _compiler_of(backend: compat.Backend, mode: RunMode) -> Compiler | None:
    """On Neuron, graphs are only counted: its compiler keeps them in the cache of neuron_parallel_compile."""
    if backend != "cpu":
        return xla.compiler(tells_keys=backend == "xla")
    mode.note_no_graphs(
        "neuronx-distributed's CPU mode has no graphs (trainer.accelerator=xla has, in one process)"
    )
    return None


def parallel_of(config: Config, model: DecoderConfig, backend: compat.Backend) -> Parallel:
    """The layout of the model."""
    strategy = config.distributed_strategy
    if strategy.zero1 and backend == "cpu":
        log.log(
            NOTICE,
            "distributed_strategy.zero1: neuronx-distributed shards the optimizer on XLA devices only; "
            "in CPU mode each rank keeps all of it, with the same result",
        )
    return Parallel(
        tensor=strategy.tensor_model_parallel_size,
        pipeline=strategy.pipeline_model_parallel_size,
        sequence_parallel=strategy.sequence_parallel and strategy.tensor_model_parallel_size > 1,
        kv_multiplier=strategy.kv_replicator,
        qkv=_qkv(config, model),
        zero1=strategy.zero1 and backend != "cpu",
        pipeline_cuts=cut_layers(config),
    )


def _qkv(config: Config, model: DecoderConfig) -> QKV:
    if config.model.qkv_linear:
        return "fused" if config.model.fuse_qkv else "split"
    return "coalesced" if model.num_attention_heads == model.num_key_value_heads else "separate"


def _check_sizes(parallel: Parallel, model: DecoderConfig) -> None:
    try:
        parallel.partition(model)
    except PartitionError as error:
        raise UserError(
            "distributed_strategy (tensor_model_parallel_size, pipeline_model_parallel_size, kv_replicator), "
            f"model.qkv_linear and model.pipeline_cuts do not fit the model: {error}"
        ) from error
    if parallel.pipeline > 1 and model.tie_word_embeddings:
        raise UserError(
            "distributed_strategy.pipeline_model_parallel_size: must be 1 for a model whose head is tied to "
            f"its embedding, as these are in the last and the first stage, but is {parallel.pipeline}"
        )


def precision_of(config: Config, backend: compat.Backend) -> Precision:
    """``precision`` in this engine's terms. Raises UserError for unsupported types."""
    kind, settings = config.precision.type, config.precision
    if kind == "autocast":
        raise UserError(
            "precision.type: autocast is not in engine nxd; mixed_precision computes in bf16, with master "
            "weights, gradients and log-probabilities in fp32"
        )
    is_low = settings.xla_use_bf16 == "1" or settings.xla_downcast_bf16 == "1"
    if kind == "fp32" or (kind == "manual" and not is_low):
        return Precision()
    if kind == "manual" and settings.master_weights:
        sums = settings.fp32_grad_acc
        return Precision(
            torch.bfloat16,
            masters=True,
            float32_sums=sums,
            float32_reductions=sums or settings.fp32_grads_cc,
        )
    if kind.startswith("mixed_precision"):
        return Precision(torch.bfloat16, masters=True)
    rounds = kind == "bf16SR" or settings.neuron_rt_stochastic_rounding_en == "1"
    if rounds and backend != "neuron":
        log.log(NOTICE, "stochastic rounding needs Neuron hardware; fp32 master weights are used instead")
    return Precision(torch.bfloat16, masters=rounds and backend != "neuron")


def reference_precision_of(config: Config, policy: Precision) -> Precision:
    """The frozen reference's precision: ``reference_dtype``, or the policy's. The policy's object if the
    dtypes agree, since masters do not affect log-probabilities."""
    chosen = config.model_alignment_strategy.reference_dtype
    dtype = policy.compute if chosen is None else _DTYPES[chosen]
    return policy if dtype == policy.compute else Precision(dtype)


def reference_precision_ahead(config: Config) -> Precision:
    """The same, before any process joins, and on a machine without NxD."""
    return reference_precision_of(config, precision_of(config, compat.backend_of(config.trainer.accelerator)))


def save_options_of(config: Config, precision: Precision) -> SaveOptions:
    """The form of checkpoints."""
    settings = config.exp_manager
    low = None
    if settings.save_bf16:
        low = torch.bfloat16
    elif precision.masters and not settings.checkpoint_callback_params.use_master_weights_in_ckpt:
        low = precision.compute
    return SaveOptions(xser=settings.save_xser, low_precision=low)


def form_notes(config: Config, folder: Path) -> list[str]:
    """A note if ``load_xser`` is set and differs from the form of ``folder``. As in NxDT, the form is
    detected anyway."""
    key, wanted = "exp_manager.load_xser", config.exp_manager.load_xser
    shards = [*folder.glob("model/dp_rank_*.pt*"), *folder.glob("dp_rank_*.pt*")]
    is_xser = any(shard.suffix == ".tensors" for shard in shards)
    if key not in config.given or not shards or is_xser == wanted:
        return []
    held = "a file per tensor (xser)" if is_xser else "plain files, one per rank"
    return [
        f"{key}: is {wanted}, but {folder} holds {held}, which is detected and read. {key}={is_xser} "
        "matches them"
    ]
