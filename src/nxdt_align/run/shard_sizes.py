"""Sizes of NxD's shards that the user states: checked against shards that are read, completed for shards to
write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nxdt_align.errors import UserError
from nxdt_align.models.partition import QKV, Partition, default_multiplier, default_qkv
from nxdt_align.models.presets import DecoderConfig, ModelShape
from nxdt_align.named_tensors import WeightSource
from nxdt_align.weights.nxdt import NxDTFolder

_SOURCES = {
    "convert_from_full_state": ("whole weights",),
    "convert_to_full_state": ("plain shards", "xser shards"),
    "convert_from_xser": ("xser shards",),
    "convert_to_xser": ("plain shards",),
}
"""What the flags of NxD's converter are for."""


@dataclass(frozen=True)
class ShardSizes:
    """Sizes and forms of shards, arguments of ``conversion.convert``; None: to be derived."""

    tp: int | None
    pp: int | None
    pipeline_cuts: tuple[int, ...] | None
    kv_multiplier: int | None
    qkv_linear: bool | None
    fuse_qkv: bool | None
    coalesce_qkv: bool | None
    vocab: int | None
    xser: bool

    @property
    def are_stated(self) -> bool:
        sizes = (self.tp, self.pp, self.pipeline_cuts, self.kv_multiplier, self.vocab)
        styles = (self.qkv_linear, self.fuse_qkv, self.coalesce_qkv)
        return self.xser or any(value is not None for value in (*sizes, *styles))

    def require_those_of(self, source: NxDTFolder, config: ModelShape) -> None:
        """Raises UserError if the shards that are read have other sizes."""
        held = source.partition
        stated = {"tp_size": self.tp, "pp_size": self.pp, "kv_size_multiplier": self.kv_multiplier}
        found = {"tp_size": held.tp, "pp_size": held.pp, "kv_size_multiplier": held.kv_multiplier}
        wrong = [
            f"--{k} is {v}, but it is {found[k]}" for k, v in stated.items() if v not in (None, found[k])
        ]
        cuts = self.pipeline_cuts
        if cuts not in (None, held.stage_ends):
            wrong.append(f"--pipeline-cuts is {listed(cuts)}, but it is {listed(held.stage_ends)}")
        if wrong:
            raise UserError(
                f"{source}: {'; '.join(wrong)}. Shards are missing or surplus, or leave the sizes out"
            )
        assert isinstance(config, DecoderConfig), "shards are of no other"
        qkv = self._qkv(config)
        if qkv not in (None, held.qkv):
            raise UserError(
                f"--qkv_linear, --fuse_qkv and --coalesce_qkv say that q, k and v are {qkv}, but {source} "
                f"holds them {held.qkv}; leave them out"
            )

    def partition(self, config: DecoderConfig, held: Partition | None) -> Partition:
        """The partition of the shards to write. ``held``: that of source shards, the default for what is not
        stated. Raises PartitionError for incompatible sizes."""
        tp, pp = (held.tp, held.pp) if held else (1, 1)
        if self.pipeline_cuts is not None:
            pp = len(self.pipeline_cuts) + 1
        tp, pp = tp if self.tp is None else self.tp, pp if self.pp is None else self.pp
        multiplier = self.kv_multiplier
        if multiplier is None:
            multiplier = held.kv_multiplier if held and tp == held.tp else default_multiplier(config, tp)
        qkv = self._qkv(config) or _usual_qkv(config, tp, multiplier, held)
        # Column-parallel layers have no copies of heads: only GQAQKVColumnParallelLinear makes them.
        if self.kv_multiplier is None and qkv in ("separate", "coalesced"):
            multiplier = 1
        vocab = self.vocab
        # Padding stays as it is, so that a config.json whose vocab_size was set to it keeps fitting.
        if vocab is None and held and held.padded_vocab % tp == 0:
            vocab = held.padded_vocab
        cuts = held.cuts if self.pipeline_cuts is None and held and pp == held.pp else self.pipeline_cuts
        return Partition(config, tp, pp, multiplier, qkv, vocab, cuts)

    def _qkv(self, config: DecoderConfig) -> QKV | None:
        """The layer that NxD Training builds from the same settings; None if none is stated."""
        is_mha = config.num_attention_heads == config.num_key_value_heads
        if self.qkv_linear is self.fuse_qkv is self.coalesce_qkv is None:
            return None
        if self.qkv_linear:
            return "fused" if self.fuse_qkv else "split"
        if self.coalesce_qkv or (self.fuse_qkv and is_mha):
            return "coalesced"
        return "fused" if self.fuse_qkv else "separate"


def listed(layers: Iterable[int] | None) -> str:
    return ",".join(map(str, layers or ())) or "none"


def _usual_qkv(config: DecoderConfig, tp: int, multiplier: int, held: Partition | None) -> QKV:
    """The style of the source's shards if NxD loads it at these sizes or the sizes are unchanged."""
    if held is None:
        return default_qkv(config, tp, multiplier)
    is_linear = held.qkv in ("split", "fused")
    fits = tp == config.num_key_value_heads * multiplier if is_linear else multiplier == 1
    is_same = (tp, multiplier) == (held.tp, held.kv_multiplier)
    return held.qkv if fits or is_same else default_qkv(config, tp, multiplier)


@dataclass(frozen=True)
class SourceFlags:
    """NxD's converter flags that describe the source, which is detected here; they are only checked."""

    load_xser: bool | None
    direction: str | None
    """The one ``convert_*`` flag that was given."""
    n_layers: int | None

    def require_true_of(self, source: WeightSource, config: ModelShape, is_run_checkpoint: bool) -> None:
        """Raises UserError. A run's own checkpoint counts as neither whole weights nor shards."""
        held = "whole weights"
        if isinstance(source, NxDTFolder):
            held = "xser shards" if source.is_xser else "plain shards"
        wanted = (held,) if self.direction is None or is_run_checkpoint else _SOURCES[self.direction]
        if held not in wanted:
            raise UserError(
                f"--{self.direction} is for {' or '.join(wanted)}, but {source} holds {held}; leave it out, "
                "and say with --to what to write (hf or nxdt)"
            )
        if self.n_layers not in (None, 0, config.num_hidden_layers):
            raise UserError(
                f"--n_layers is {self.n_layers}, but {source} has {config.num_hidden_layers}; leave it out"
            )
        if not isinstance(source, NxDTFolder):
            if self.load_xser:
                raise UserError(f"--load_xser is set, but {source} is no sharded checkpoint; leave it out")
        elif self.load_xser not in (None, source.is_xser):
            stored = "xser files" if source.is_xser else "plain files"
            raise UserError(f"--load_xser is {self.load_xser}, but {source} holds {stored}; leave it out")
