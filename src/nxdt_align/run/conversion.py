"""Conversion, export and description of checkpoints of every kind: ``convert`` and ``export`` are public."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from nxdt_align.config.start import IDENTITY_FILE
from nxdt_align.engines.native.checkpoint import is_checkpoint
from nxdt_align.engines.nxd.checkpoint import is_checkpoint as is_nxd_checkpoint
from nxdt_align.errors import UserError
from nxdt_align.models.adapters import adapter_shapes
from nxdt_align.models.partition import Partition
from nxdt_align.models.presets import DecoderConfig, ModelShape, read_model_json
from nxdt_align.named_tensors import WeightSource
from nxdt_align.run.adapters import adapter_record, export_adapter, open_checkpoint
from nxdt_align.run.locate import companions, locate, shape_of_run
from nxdt_align.run.native_writer import NativeWriter
from nxdt_align.run.shard_sizes import ShardSizes, SourceFlags, listed
from nxdt_align.weights import inspect
from nxdt_align.weights.convert import Conversion, Report, Writer
from nxdt_align.weights.detect import check_weights, find_config_file, layout_of, open_source
from nxdt_align.weights.generation import generation_json
from nxdt_align.weights.hf_writer import MAX_SHARD_BYTES, tokenizer_files, writer_for
from nxdt_align.weights.inspect import to_text
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.nxdt_writer import NxDTWriter
from nxdt_align.weights.peft import MergedWeights, is_peft_folder

__all__ = ["Report", "convert", "describe", "export", "open_weights", "to_text"]

log = logging.getLogger(__name__)

Target = Literal["hf", "nxdt", "native"]
Dtype = Literal["bf16", "fp16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: Target | None = None,
    config: str | Path | None = None,
    tp: int | None = None,
    pp: int | None = None,
    pipeline_cuts: Sequence[int] | None = None,
    kv_multiplier: int | None = None,
    qkv_linear: bool | None = None,
    fuse_qkv: bool | None = None,
    coalesce_qkv: bool | None = None,
    vocab: int | None = None,
    xser: bool = False,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    first_replica: bool = False,
    resume: bool = False,
    verify: bool = True,
    workers: int | None = None,
    quiet: bool = False,
    load_xser: bool | None = None,
    direction: str | None = None,
    n_layers: int | None = None,
) -> Report:
    """Write the weights at ``source`` into a new folder ``destination``, atomically.

    Args:
        source: a Hugging Face folder or one file of weights, NxD Training's shards, Meta's download, or a
            checkpoint of a run.
        to: ``hf``, a folder that transformers loads; ``nxdt``, one that NxD Training's
            ``resume_from_checkpoint`` takes; ``native``, our native engine's. None: shards become ``hf``,
            whole weights ``nxdt``, a run's checkpoint ``nxdt`` where sizes of shards are stated and else
            ``hf``.
        config: config.json of the model, where the source has none.
        tp: tensor-parallel size of the shards written. None: that of the shards read, or 1. Where shards are
            read and none written, this and all that follows up to ``xser`` is checked against them.
        pp: pipeline-parallel size, in the same way.
        pipeline_cuts: layers after which a stage ends, as ``model.pipeline_cuts``. None: even stages.
        kv_multiplier: copies of each kv head. None: as few as fit ``tp``.
        qkv_linear: the attention layer, as NxD Training's setting of this name.
        fuse_qkv: the same.
        coalesce_qkv: the same.
        vocab: rows to pad the vocabulary to. None: the next multiple of ``tp``.
        xser: one file per tensor, as ``save_xser`` writes.
        dtype: cast the weights to it. None keeps each weight's dtype.
        tokenizer: a folder whose tokenizer is copied into a Hugging Face folder. None: that of the run that
            wrote the checkpoint, or of the source's folder, if there is one.
        max_shard_bytes: of a safetensors file.
        first_replica: take the first rank's copy of heads and norms where copies of ranks differ.
        resume: continue an interrupted conversion to ``destination``.
        verify: read back what was written, and compare.
        workers: threads. None: 4.
        quiet: no progress bar.
        load_xser: what NxD's converter must be told about the source; only checked.
        direction: the same.
        n_layers: the same.

    Returns counts, bytes, seconds, and the weights with NaN.

    Raises UserError for anything that the caller can fix: a source that is damaged or does not match its
    configuration, incompatible sizes, an existing destination, a full disk.
    """
    _require_choice("to", to, get_args(Target))
    _require_choice("dtype", dtype, get_args(Dtype))
    counts = {"tp": tp, "pp": pp, "kv_multiplier": kv_multiplier, "vocab": vocab, "workers": workers}
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"{name}: must be a whole number from 1, but is {count}")
    cuts = None if pipeline_cuts is None else tuple(pipeline_cuts)
    sizes = ShardSizes(tp, pp, cuts, kv_multiplier, qkv_linear, fuse_qkv, coalesce_qkv, vocab, xser)
    source = locate(Path(source))
    weights, model = open_weights(source, _path(config), first_replica=first_replica)
    beside = companions(source, _path(config))
    # One that holds adapters opens as a whole model, of either engine.
    is_run_checkpoint = is_checkpoint(source) or (
        is_nxd_checkpoint(source) and isinstance(weights, MergedWeights)
    )
    SourceFlags(load_xser, direction, n_layers).require_true_of(weights, model, is_run_checkpoint)
    target = to or _usual_target(weights, sizes, is_run_checkpoint)
    if target == "nxdt" and not isinstance(model, DecoderConfig):
        raise UserError(
            f"--to nxdt: NxD has no {model.model_type}, which transformers computes; --to hf writes a folder "
            "for transformers, --to native a checkpoint to start training from"
        )
    _check_target(target, weights, sizes, tokenizer)
    if target != "nxdt" and isinstance(weights, NxDTFolder):
        sizes.require_those_of(weights, model)
    stored = None if dtype is None else DTYPES[dtype]

    def dtype_of(name: str) -> torch.dtype:
        return stored or weights.dtype(name)

    make: Callable[[Path], Writer]
    if target == "native":
        make = partial(NativeWriter, config=model, dtype=dtype_of, generation=beside.generation)
    elif target == "hf":
        if tokenizer is None and not beside.tokenizer:
            log.info("no tokenizer is beside %s: --tokenizer DIR copies one", source)
        make = partial(
            writer_for(model),
            config=model,
            dtype=dtype_of,
            tokenizer=beside.tokenizer if tokenizer is None else tokenizer_files(Path(tokenizer)),
            generation=generation_json(model, beside.generation),
            max_shard_bytes=max_shard_bytes,
        )
    else:
        assert isinstance(model, DecoderConfig)
        partition = sizes.partition(model, weights.partition if isinstance(weights, NxDTFolder) else None)
        _log_partition(partition, xser)
        make = partial(
            NxDTWriter, partition=partition, dtype=dtype_of, generation=beside.generation, xser=xser
        )
    report = Conversion(
        weights,
        make,
        Path(destination),
        dtype=stored,
        resume=resume,
        verify=verify,
        workers=workers,
        quiet=quiet,
    ).run()
    log.info(
        "%s -> %s: %d weights, %.2f GB in %.0f s%s",
        weights,
        destination,
        report.weights,
        report.bytes_written / 1e9,
        report.seconds,
        ", verified" if report.verified else "",
    )
    return report


def export(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    config: str | Path | None = None,
    dtype: Dtype | None = None,
    tokenizer: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    first_replica: bool = False,
    resume: bool = False,
    verify: bool = True,
    workers: int | None = None,
    quiet: bool = False,
    merge: bool = False,
) -> Report | None:
    """Write a checkpoint of any kind as a folder that transformers loads: ``convert`` with ``to="hf"``, which
    explains arguments, result and errors.

    Args:
        merge: of adapters, write the whole model with them added in; otherwise a run's are written as PEFT's
            folder, in float32 unless ``dtype`` says otherwise, and None is returned. What is about a whole
            model's files is refused then.
    """
    place = locate(Path(checkpoint))
    record = adapter_record(place) if is_checkpoint(place) or is_nxd_checkpoint(place) else None
    if merge and record is None and not is_peft_folder(place):
        raise UserError(
            f"--merge: adds adapters to their model, but {place} holds a whole model; leave it out"
        )
    if not merge and record is not None:
        _require_choice("dtype", dtype, get_args(Dtype))
        given = {
            "--tokenizer": tokenizer is not None,
            "--max-shard-size": max_shard_bytes != MAX_SHARD_BYTES,
            "--first-replica": first_replica,
            "--resume": resume,
            "--no-verify": not verify,
        }
        unused = [option for option, is_given in given.items() if is_given]
        if unused:
            raise UserError(
                f"{', '.join(unused)}: belongs to --merge, which writes the whole model; {place} holds "
                "adapters, which are written alone, as PEFT's folder: leave it out, or add --merge"
            )
        _export_adapter(place, Path(destination), config, None if dtype is None else DTYPES[dtype])
        return None
    report = convert(
        checkpoint,
        destination,
        to="hf",
        config=config,
        dtype=dtype,
        tokenizer=tokenizer,
        max_shard_bytes=max_shard_bytes,
        first_replica=first_replica,
        resume=resume,
        verify=verify,
        workers=workers,
        quiet=quiet,
    )
    if merge and verify:
        weights, model = open_weights(place, _path(config), first_replica=first_replica)
        if isinstance(weights, MergedWeights) and isinstance(model, DecoderConfig):
            # Here, as it imports transformers.
            from nxdt_align.run.export_check import check_merged

            check_merged(Path(destination), weights, model, None if dtype is None else DTYPES[dtype])
    return report


def _require_choice(name: str, value: str | None, choices: Sequence[str]) -> None:
    if value is not None and value not in choices:
        raise UserError(f"{name}: must be one of {', '.join(choices)}, but is {value!r}")


def _export_adapter(
    checkpoint: Path, destination: Path, config: str | Path | None, dtype: torch.dtype | None
) -> None:
    weights, model = open_weights(checkpoint, _path(config))
    assert isinstance(weights, MergedWeights)
    if destination.exists() and any(destination.iterdir()):
        raise UserError(f"{destination} exists already: choose another folder, or remove it")
    adapter = weights.adapter
    names = [name for name in adapter_shapes(model, adapter.spec) if adapter.spec.trains(name)]
    pairs = ((name, adapter.read(name)) for name in names)
    export_adapter(destination, model, adapter.spec, pairs, weights, dtype or torch.float32)
    log.info(
        "%s -> %s: an adapter of %d tensors; --merge writes the whole model",
        checkpoint,
        destination,
        len(names),
    )


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _usual_target(source: WeightSource, sizes: ShardSizes, is_run_checkpoint: bool) -> Target:
    """The opposite kind: shards become whole weights, whole weights become shards."""
    if is_run_checkpoint:
        return "nxdt" if sizes.are_stated else "hf"
    return "hf" if isinstance(source, NxDTFolder) else "nxdt"


def _check_target(
    target: Target, source: WeightSource, sizes: ShardSizes, tokenizer: str | Path | None
) -> None:
    """Raises UserError for options that do not apply to the target."""
    if target != "nxdt" and not isinstance(source, NxDTFolder) and sizes.are_stated:
        raise UserError(
            f"sizes and forms of shards are given, but the target is {target}, and {source} has none; leave "
            "them out, or write shards with --to nxdt"
        )
    if sizes.vocab is not None and target != "nxdt":
        raise UserError(
            f"--vocab-size pads the vocabulary of shards, but the target is {target}, which takes vocab_size "
            "of config.json; leave it out"
        )
    if tokenizer is not None and target != "hf":
        raise UserError(
            f"--tokenizer is copied into a Hugging Face folder, but the target is {target}; leave it out"
        )


def _log_partition(partition: Partition, xser: bool) -> None:
    vocab_size = partition.config.vocab_size
    if partition.padded_vocab != vocab_size:
        log.info(
            "the vocabulary of %d is padded to %d rows: set vocab_size to that in the config.json that "
            "NxD Training's model.model_config names",
            vocab_size,
            partition.padded_vocab,
        )
    log.info(
        "tensor parallel %d, pipeline parallel %d%s, kv multiplier %d, q, k and v %s%s",
        partition.tp,
        partition.pp,
        "" if partition.cuts is None else f" (cut after layers {listed(partition.cuts)})",
        partition.kv_multiplier,
        partition.qkv,
        ", xser" if xser else "",
    )


def open_weights(
    path: Path, config_file: Path | None = None, *, first_replica: bool = False
) -> tuple[WeightSource, ModelShape]:
    """A reader for weights of any kind, and their model's shape. Raises UserError."""
    path = locate(path)
    is_of_nxd = is_nxd_checkpoint(path)
    if not is_of_nxd and not is_checkpoint(path):
        return open_source(path, config_file, unequal_replicas=first_replica)
    config = shape_of_run(path) if config_file is None else read_model_json(config_file)
    if config is None:
        raise UserError(
            f"no {IDENTITY_FILE} above {path} says what model it is of: give its config.json with --config"
        )
    if is_of_nxd and adapter_record(path) is None:
        assert isinstance(config, DecoderConfig), "engine nxd trains no other"
        sharded = NxDTFolder(path, config, untie=True, unequal_replicas=first_replica)
        return sharded, sharded.config
    native = open_checkpoint(path, config, lambda base: open_weights(base, first_replica=first_replica)[0])
    check_weights(native, config)
    return native, config


def describe(path: Path, config_file: Path | None = None) -> dict[str, Any]:
    """A description of a checkpoint in plain values. Raises UserError if it is none, or is damaged."""
    path = locate(path)
    layout = "native" if is_checkpoint(path) else layout_of(path)
    if layout == "nxdt" and config_file is None and not _says_its_model(path):
        return inspect.describe_bare(path)
    source, config = open_weights(path, config_file)
    return inspect.describe(path, source, config, layout)


def _says_its_model(path: Path) -> bool:
    found = shape_of_run(path) if is_nxd_checkpoint(path) else find_config_file(path)
    return found is not None
