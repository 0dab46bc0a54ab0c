"""Conversion and description of checkpoints: options of the command line -> readers and writers."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nxdt_align.engines.native.checkpoint import NativeCheckpoint, is_checkpoint
from nxdt_align.engines.nxd.checkpoint import is_checkpoint as is_nxd_checkpoint
from nxdt_align.errors import UserError
from nxdt_align.models.partition import (
    QKV,
    Partition,
    default_multiplier,
    default_qkv,
)
from nxdt_align.models.presets import LlamaConfig, from_hf_dict
from nxdt_align.run.native_destination import NativeDestination
from nxdt_align.run.resume import IDENTITY_FILE
from nxdt_align.weights import inspect
from nxdt_align.weights.convert import Conversion, Report
from nxdt_align.weights.destinations import Destination, HFDestination, NxDTDestination
from nxdt_align.weights.detect import check_names, find_config_file, layout_of, open_source, read_shape
from nxdt_align.weights.inspect import to_text
from nxdt_align.weights.nxdt import NxDTFolder
from nxdt_align.weights.source import Source

__all__ = ["ConvertOptions", "convert", "describe", "open_weights", "to_text"]

log = logging.getLogger(__name__)

_SOURCES = {
    "convert_from_full_state": ("whole weights",),
    "convert_to_full_state": ("plain shards", "xser shards"),
    "convert_from_xser": ("xser shards",),
    "convert_to_xser": ("plain shards",),
}
"""What the flags of NxD's converter are for."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class ConvertOptions:
    """What ``nxdt-align convert`` was asked; None: to be worked out."""

    source: Path
    destination: Path
    to: str | None = None
    """hf, nxdt or native; by the source where None."""
    config: Path | None = None
    tp: int | None = None
    pp: int | None = None
    cuts: tuple[int, ...] | None = None
    """Layers after which a pipeline stage ends."""
    kv_multiplier: int | None = None
    qkv_linear: bool | None = None
    fuse_qkv: bool | None = None
    coalesce_qkv: bool | None = None
    vocab: int | None = None
    """Rows to pad the vocabulary to."""
    xser: bool = False
    load_xser: bool | None = None
    direction: str | None = None
    """That flag of NxD's converter which was given; what it says of the source is checked."""
    n_layers: int | None = None
    dtype: str | None = None
    tokenizer: Path | None = None
    max_shard_bytes: int = 5_000_000_000
    resume: bool = False
    verify: bool = True
    first_replica: bool = False
    workers: int | None = None
    quiet: bool = False


def convert(options: ConvertOptions) -> Report:
    """Convert one checkpoint. Raises UserError for what the user can mend."""
    source, config = open_weights(options.source, options.config, first_replica=options.first_replica)
    _check_stated(options, source, config)
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    report = Conversion(
        source,
        _destination(options, source, config, dtype),
        options.destination,
        dtype=dtype,
        resume=options.resume,
        verify=options.verify,
        workers=options.workers,
        quiet=options.quiet,
    ).run()
    log.info(
        "%s -> %s: %d weights, %.2f GB in %.0f s%s",
        source,
        options.destination,
        report.weights,
        report.bytes_written / 1e9,
        report.seconds,
        ", verified" if report.verified else "",
    )
    return report


def open_weights(
    path: Path, config_file: Path | None = None, *, first_replica: bool = False
) -> tuple[Source, LlamaConfig]:
    """A reader for weights of any kind, and their model's shape. Raises UserError."""
    is_of_nxd = is_nxd_checkpoint(path)
    if not is_of_nxd and not is_checkpoint(path):
        return open_source(path, config_file, unequal_replicas=first_replica)
    config = _run_model(path) if config_file is None else read_shape(config_file)
    if config is None:
        raise UserError(
            f"no {IDENTITY_FILE} above {path} says what model it is of: give its config.json with --config"
        )
    if is_of_nxd:
        sharded = NxDTFolder(path, config, untie=True, unequal_replicas=first_replica)
        return sharded, sharded.config
    native = NativeCheckpoint(path)
    check_names(native, config)
    return native, config


def _run_model(checkpoint: Path) -> LlamaConfig | None:
    """The shape in the record that a run keeps in its folder, above its checkpoints; that of a converted
    one is in it."""
    if (checkpoint / "config.json").is_file():
        return read_shape(checkpoint)
    for folder in list(checkpoint.absolute().parents)[:2]:
        file = folder / IDENTITY_FILE
        if file.is_file():
            values = json.loads(file.read_text())["of"]["model"]
            return from_hf_dict(values, sequence_length=1, where=str(file))  # as ``read_shape``
    return None


def _check_stated(options: ConvertOptions, source: Source, config: LlamaConfig) -> None:
    """Sizes that the user gave for the source must be those that it has."""
    _check_direction(options, source)
    _check_target(options, source)
    if options.n_layers not in (None, 0, config.num_hidden_layers):
        raise UserError(
            f"--n_layers is {options.n_layers}, but {source} has {config.num_hidden_layers}; leave it out"
        )
    if not isinstance(source, NxDTFolder):
        if options.load_xser:
            raise UserError(f"--load_xser is set, but {source} is no sharded checkpoint; leave it out")
        return
    if options.load_xser is not None and options.load_xser != source.is_xser:
        stored = "xser files" if source.is_xser else "plain files"
        raise UserError(f"--load_xser is {options.load_xser}, but {source} holds {stored}; leave it out")
    if _target(options, source) == "nxdt":
        return
    held = source.partition
    stated = {"tp_size": options.tp, "pp_size": options.pp, "kv_size_multiplier": options.kv_multiplier}
    found = {"tp_size": held.tp, "pp_size": held.pp, "kv_size_multiplier": held.kv_multiplier}
    wrong = [f"--{k} is {v}, but it is {found[k]}" for k, v in stated.items() if v not in (None, found[k])]
    if options.cuts not in (None, held.stage_ends):
        wrong.append(f"--pipeline-cuts is {_listed(options.cuts)}, but it is {_listed(held.stage_ends)}")
    if wrong:
        raise UserError(
            f"{source}: {'; '.join(wrong)}. Shards are missing or surplus, or leave the sizes out"
        )
    qkv = _stated_qkv(options, config)
    if qkv not in (None, held.qkv):
        raise UserError(
            f"--qkv_linear, --fuse_qkv and --coalesce_qkv say that q, k and v are {qkv}, but {source} holds "
            f"them {held.qkv}; leave them out"
        )


def _listed(layers: Iterable[int] | None) -> str:
    return ",".join(map(str, layers or ())) or "none"


def _check_direction(options: ConvertOptions, source: Source) -> None:
    """A run's own checkpoint is neither whole nor in shards to whoever reads it."""
    if options.direction is None or isinstance(source, NativeCheckpoint):
        return
    held = "whole weights"
    if isinstance(source, NxDTFolder):
        held = "xser shards" if source.is_xser else "plain shards"
    wanted = _SOURCES[options.direction]
    if held not in wanted:
        raise UserError(
            f"--{options.direction} is for {' or '.join(wanted)}, but {source} holds {held}; leave it out, "
            "and say with --to what to write (hf or nxdt)"
        )


def _check_target(options: ConvertOptions, source: Source) -> None:
    """Options that have no place in what is written."""
    target = _target(options, source)
    if target != "nxdt" and not isinstance(source, NxDTFolder) and _states_shards(options):
        raise UserError(
            f"sizes and forms of shards are given, but the target is {target}, and {source} has none; leave "
            "them out, or write shards with --to nxdt"
        )
    if options.vocab is not None and target != "nxdt":
        raise UserError(
            f"--vocab-size pads the vocabulary of shards, but the target is {target}, which takes vocab_size "
            "of config.json; leave it out"
        )
    if options.tokenizer is not None and target != "hf":
        raise UserError(
            f"--tokenizer is copied into a Hugging Face folder, but the target is {target}; leave it out"
        )


def _target(options: ConvertOptions, source: Source) -> str:
    """hf, nxdt or native: as asked; else away from what the source is."""
    if options.to is not None:
        return options.to
    if isinstance(source, NativeCheckpoint):
        return "nxdt" if _states_shards(options) else "hf"
    return "hf" if isinstance(source, NxDTFolder) else "nxdt"


def _states_shards(options: ConvertOptions) -> bool:
    """Whether anything is said that shards alone have."""
    said = (options.tp, options.pp, options.cuts, options.kv_multiplier, options.vocab)
    styles = (options.qkv_linear, options.fuse_qkv, options.coalesce_qkv)
    return options.xser or any(value is not None for value in (*said, *styles))


def _destination(
    options: ConvertOptions, source: Source, config: LlamaConfig, dtype: torch.dtype | None
) -> Destination:
    def dtypes(name: str) -> torch.dtype:
        return dtype or source.dtype(name)

    if _target(options, source) == "native":
        return NativeDestination(config, dtypes)
    if _target(options, source) == "hf":
        return HFDestination(
            config, dtypes, tokenizer=options.tokenizer, max_shard_bytes=options.max_shard_bytes
        )
    held = source.partition if isinstance(source, NxDTFolder) else None
    partition = _partition(options, config, held)
    if partition.padded_vocab != config.vocab_size:
        log.info(
            "the vocabulary of %d is padded to %d rows: set vocab_size to that in the config.json that "
            "NxD Training's model.model_config names",
            config.vocab_size,
            partition.padded_vocab,
        )
    log.info(
        "tensor parallel %d, pipeline parallel %d%s, kv multiplier %d, q, k and v %s%s",
        partition.tp,
        partition.pp,
        "" if partition.cuts is None else f" (cut after layers {_listed(partition.cuts)})",
        partition.kv_multiplier,
        partition.qkv,
        ", xser" if options.xser else "",
    )
    return NxDTDestination(partition, dtypes, xser=options.xser)


def _partition(options: ConvertOptions, config: LlamaConfig, held: Partition | None) -> Partition:
    """``held``: that of the shards that are the source, of which what is not stated stays as it is."""
    tp, pp = (held.tp, held.pp) if held else (1, 1)
    if options.cuts is not None:
        pp = len(options.cuts) + 1
    tp, pp = options.tp or tp, options.pp or pp
    unstated = held.kv_multiplier if held and tp == held.tp else default_multiplier(config, tp)
    multiplier = options.kv_multiplier or unstated
    qkv = _stated_qkv(options, config) or _usual_qkv(config, tp, multiplier, held)
    if options.kv_multiplier is None and qkv in ("separate", "coalesced"):
        multiplier = 1
    vocab = options.vocab
    if vocab is None and held and held.padded_vocab % tp == 0:
        vocab = held.padded_vocab
    cuts = held.cuts if options.cuts is None and held and pp == held.pp else options.cuts
    return Partition(config, tp, pp, multiplier, qkv, vocab, cuts)


def _stated_qkv(options: ConvertOptions, config: LlamaConfig) -> QKV | None:
    """The layer that NxD Training builds from the same settings; None where nothing is stated."""
    is_mha = config.num_attention_heads == config.num_key_value_heads
    if options.qkv_linear is options.fuse_qkv is options.coalesce_qkv is None:
        return None
    if options.qkv_linear:
        return "fused" if options.fuse_qkv else "split"
    if options.coalesce_qkv or (options.fuse_qkv and is_mha):
        return "coalesced"
    return "fused" if options.fuse_qkv else "separate"


def _usual_qkv(config: LlamaConfig, tp: int, multiplier: int, held: Partition | None) -> QKV:
    """That of the source's shards where NxD loads it at these sizes, or they have not changed."""
    if held is None:
        return default_qkv(config, tp, multiplier)
    is_linear = held.qkv in ("split", "fused")
    fits = tp == config.num_key_value_heads * multiplier if is_linear else multiplier == 1
    is_same = (tp, multiplier) == (held.tp, held.kv_multiplier)
    return held.qkv if fits or is_same else default_qkv(config, tp, multiplier)


def describe(path: Path, config_file: Path | None = None) -> dict[str, Any]:
    """What a checkpoint is, as plain values. Raises UserError where it is none, or is damaged."""
    layout = "native" if is_checkpoint(path) else layout_of(path)
    if layout == "nxdt" and config_file is None and not _says_its_model(path):
        return inspect.describe_bare(path)
    source, config = open_weights(path, config_file)
    return inspect.describe(source, config, layout)


def _says_its_model(path: Path) -> bool:
    found = _run_model(path) if is_nxd_checkpoint(path) else find_config_file(path)
    return found is not None
