"""NxD's checkpoint folder as a source of whole weights under the plain model's names.

Sizes, layout and kv multiplier follow from the files and the model's shape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nxdt_align.messages import NOTICE
from nxdt_align.models.partition import (
    EMBEDDING,
    HEAD,
    QKV,
    Partition,
    PartitionError,
    even_cuts,
    local_tensors,
)
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.models.sharding import KV_HEADS, split_of
from nxdt_align.named_tensors import Spec, WeightSource, require_fit
from nxdt_align.weights.digests import Digests
from nxdt_align.weights.extents import Extent, WeightsError, empty, read_into, read_region, same_bytes
from nxdt_align.weights.names import is_recomputed
from nxdt_align.weights.nxdt_files import (
    MODEL,
    Files,
    find_shards,
    is_xser,
    layers_of,
    model_folder,
    open_shard,
    qkv_style,
    refuse_unfinished,
    shard_name,
)

log = logging.getLogger(__name__)
_OR_MISSING = "or shards of the highest ranks are missing"


class NxDTFolder(WeightSource):
    """The weights of a sharded checkpoint; whole tensors are assembled on demand.

    Args:
        config: the model's shape; ``tie_word_embeddings`` becomes false if ``untie`` is set and the folder
            holds a head that differs from the embedding.
        unequal_replicas: use the first rank's copy if replicas differ between ranks.

    Where ``conversion.json`` has checksums, all that is read is compared with them.

    Raises WeightsError naming every shard or tensor that is missing, surplus or misshapen, or the file that
    has changed.
    """

    path: Path

    def __init__(
        self,
        path: str | Path,
        config: DecoderConfig,
        *,
        untie: bool = False,
        unequal_replicas: bool = False,
        shards: Path | None = None,
    ) -> None:
        self.path = Path(path)
        folder = shards or model_folder(self.path)
        if folder is None:
            raise WeightsError(f"{self.path} holds no shards of NxD (dp_rank_00_tp_rank_00_pp_rank_00.pt)")
        self._digests = None
        if shards is None:
            refuse_unfinished(folder)
            self._digests = Digests.read(folder.parent if folder.name == MODEL else folder)
            if self._digests is None:
                said = "%s has no checksums: whether its bytes have changed cannot be verified"
                log.log(NOTICE, said, self)
            else:
                self._digests.check_beside_parts()
        grid = find_shards(folder)
        self._files = {place: open_shard(file) for place, file in grid.items()}
        self.is_xser = is_xser(grid.values())
        self._unequal = unequal_replicas
        self.partition = self._partition(config)
        self._tensors = self._check()
        if self._digests is not None:
            self._digests.check_parts_but(chain.from_iterable(map(self._pieces, self._tensors)))
        self._require_padding_of_zeros()
        if config.tie_word_embeddings and HEAD in self._tensors:
            self._resolve_tie(untie)

    def __str__(self) -> str:
        return f"the NxD checkpoint {self.path}"

    @property
    def has_checksums(self) -> bool:
        return self._digests is not None

    @property
    def config(self) -> DecoderConfig:
        return self.partition.config

    def names(self) -> list[str]:
        tied = self.config.tie_word_embeddings
        return sorted(name for name in self._tensors if not (tied and name == HEAD))

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole weight's shape, without the vocabulary's padding."""
        shape = self.partition.whole_shape(name)
        return (self.config.vocab_size, *shape[1:]) if name in (HEAD, EMBEDDING) else shape

    def dtype(self, name: str) -> torch.dtype:
        return self._place(name)[0][0].dtype

    def read(self, name: str) -> Tensor:
        """The whole tensor, assembled from the ranks' shares.

        Raises WeightsError if replicas of heads or norms differ between ranks.
        """
        extents, first_row = self._place(name)
        whole = empty(self.shape(name), extents[0].dtype)
        spare = empty(extents[0].shape, whole.dtype)  # for shares that cannot be read in place
        seen: set[tuple[int, int]] = set()
        for rank, extent in enumerate(extents):
            dim, ranges = self.partition.ranges(name, rank)
            if dim == 1:
                read_into(extent, spare)
                self._compare(extent, 0, spare)
                _fill_columns(whole, spare, ranges)
                continue
            row = first_row
            for start, stop in ranges:
                # Rows beyond the whole tensor pad the vocabulary.
                kept = max(0, min(stop, len(whole)) - start)
                target = whole[start : start + kept]
                if (start, stop) not in seen:
                    read_into(extent, target, row)
                    self._compare(extent, row, target)
                elif not self._unequal:
                    read_into(extent, spare[:kept], row)
                    self._compare(extent, row, spare[:kept])
                    self._require_same(name, rank, spare[:kept], target)
                seen.add((start, stop))
                row += stop - start
        return whole

    def read_slice(self, name: str, region: Sequence[slice]) -> Tensor:
        """Uses the first of several replicas, so that only bytes of the part are read; ``read`` and
        ``fingerprint`` compare replicas and checksums, as this does where the part is all."""
        extents, first_row = self._place(name)
        cut = [slice(*part.indices(size)) for part, size in zip(region, self.shape(name), strict=True)]
        if all(part == slice(0, size, 1) for part, size in zip(cut, self.shape(name), strict=True)):
            return self.read(name)
        part = empty([max(0, each.stop - each.start) for each in cut], extents[0].dtype)
        seen: set[tuple[int, int]] = set()
        for rank, extent in enumerate(extents):
            dim, ranges = self.partition.ranges(name, rank)
            held = first_row if dim == 0 else 0
            for start, stop in ranges:
                low, high = max(start, cut[dim].start), min(stop, cut[dim].stop)
                if low < high and (start, stop) not in seen:
                    there = list(cut)
                    there[dim] = slice(held + low - start, held + high - start)
                    target = part.narrow(dim, low - cut[dim].start, high - low)
                    target.copy_(read_region(extent, there))
                seen.add((start, stop))
                held += stop - start
        return part

    def _pieces(self, name: str) -> Iterator[tuple[Path, int, int]]:
        """File, offset and bytes of each stretch that ``read`` reads."""
        extents, first_row = self._place(name)
        for rank, extent in enumerate(extents):
            dim, ranges = self.partition.ranges(name, rank)
            if dim == 1:
                yield extent.path, extent.offset, extent.nbytes
                continue
            row = first_row
            for start, stop in ranges:
                kept = max(0, min(stop, self.shape(name)[0]) - start)
                yield extent.path, extent.offset + row * extent.row_bytes, kept * extent.row_bytes
                row += stop - start

    def _compare(self, extent: Extent, row: int, held: Tensor) -> None:
        if self._digests is not None:
            self._digests.check(extent.path, extent.offset + row * extent.row_bytes, held)

    def _require_same(self, name: str, rank: int, again: Tensor, first: Tensor) -> None:
        if not same_bytes(again, first):
            doubt = ""
            if split_of(name) == KV_HEADS:
                heads = self.config.num_key_value_heads
                doubt = f"The config.json may be another model's (num_key_value_heads is {heads}); else c"
            raise WeightsError(
                f"{self}: tensor-parallel rank {rank} holds another copy of {name} than an earlier rank, "
                f"though copies must be equal. {doubt or 'C'}onvert another checkpoint, or take the first "
                "copy with --first-replica"
            )

    def _place(self, name: str) -> tuple[list[Extent], int]:
        if name not in self._tensors:
            raise WeightsError(f"{self} has no weight {name}")
        return self._tensors[name]

    def _partition(self, config: DecoderConfig) -> Partition:
        tp, pp = 1 + max(t for t, _ in self._files), 1 + max(p for _, p in self._files)
        local = {name: extent for p in range(pp) for name, extent in self._files[0, p].items()}
        # Counts what is there; the comparison with the model below names a lost rank as such.
        layers = 1 + max(layers_of(local), default=-1)
        qkv = qkv_style(self.path, local)
        if layers != config.num_hidden_layers:
            raise WeightsError(
                f"{self.path} does not fit the model configuration: the shards hold {layers} layers, but "
                f"num_hidden_layers is {config.num_hidden_layers}, {_OR_MISSING}"
            )
        multiplier = _kv_multiplier(self.path, config, local, tp, qkv)
        vocab = next((e.shape[0] * tp for n, e in local.items() if n == EMBEDDING), None)
        if vocab is not None and vocab < config.vocab_size:
            raise WeightsError(
                f"{self.path}: the shards hold {vocab} rows of {EMBEDDING}, but the model's vocab_size is "
                f"{config.vocab_size}; give the config.json that belongs to them, {_OR_MISSING}"
            )
        try:
            return Partition(config, tp, pp, multiplier, qkv, vocab, _cuts(self._files, layers, pp))
        except PartitionError as error:
            raise WeightsError(
                f"{self.path} does not fit the model configuration, {_OR_MISSING}: {error}"
            ) from error

    def _check(self) -> dict[str, tuple[list[Extent], int]]:
        """Weight -> each tensor-parallel rank's tensor, and the weight's first row in it."""
        found: dict[str, tuple[list[Extent], int]] = {}
        wanted: dict[str, Spec] = {}
        for stage in range(self.partition.pp):
            for local, names in local_tensors(self.partition, stage).items():
                held = [self._files[rank, stage].get(local) for rank in range(self.partition.tp)]
                extents = [extent for extent in held if extent is not None]
                if names == [HEAD] and self.partition.config.tie_word_embeddings and len(extents) < len(held):
                    continue  # the embedding stands for it
                shape = list(self.partition.local_shape(names[0]))
                shape[0] = sum(self.partition.local_shape(name)[0] for name in names)
                dtype = extents[0].dtype if extents else None
                for rank in range(self.partition.tp):
                    wanted[f"{local} in {shard_name(rank, stage)}"] = tuple(shape), dtype
                row = 0
                for name in names:
                    found[name] = (extents, row)
                    row += self.partition.local_shape(name)[0]
        require_fit(
            self,
            {
                f"{name} in {shard_name(*place)}": (extent.shape, extent.dtype)
                for place, tensors in self._files.items()
                for name, extent in tensors.items()
                if not is_recomputed(name)
            },
            wanted,
            error=WeightsError,
            hint="num_hidden_layers, hidden_size and the other sizes must be those of the weights, "
            + _OR_MISSING,
        )
        return found

    def _require_padding_of_zeros(self) -> None:
        """Rows of the embedding beyond the vocabulary get no gradient and stay 0; the head's rows do not."""
        vocab = self.config.vocab_size
        for rank, extent in enumerate(self._tensors[EMBEDDING][0] if EMBEDDING in self._tensors else ()):
            _, [(start, stop)] = self.partition.ranges(EMBEDDING, rank)
            padding = slice(min(max(vocab, start), stop) - start, stop - start)
            if (read_region(extent, (padding, slice(0, extent.shape[1]))) != 0).any():
                padded = self.partition.padded_vocab
                raise WeightsError(
                    f"{self}: the shards hold {padded} rows of {EMBEDDING}, and those after the model's "
                    f"vocab_size ({vocab}) are not 0, as padding is: give the config.json that belongs to "
                    f"them, or set its vocab_size to {padded} to keep all rows"
                )

    def _resolve_tie(self, untie: bool) -> None:
        if torch.equal(self.read(HEAD).view(torch.uint8), self.read(EMBEDDING).view(torch.uint8)):
            return
        if not untie:
            raise WeightsError(
                f"{self}: the model configuration ties lm_head.weight to {EMBEDDING}, but they differ: set "
                "tie_word_embeddings to false"
            )
        self.partition = replace(self.partition, config=replace(self.config, tie_word_embeddings=False))


def _kv_multiplier(path: Path, config: DecoderConfig, local: Mapping[str, Extent], tp: int, qkv: QKV) -> int:
    if qkv in ("separate", "coalesced"):
        return 1
    suffix = ".qkv_proj.weight_k" if qkv == "split" else ".qkv_proj.weight_qkv"
    rows = next((e.shape[0] for n, e in local.items() if n.endswith(suffix)), 0) * tp
    if qkv == "fused":
        rows = (rows - config.num_attention_heads * config.head_dim) // 2
    one = config.num_key_value_heads * config.head_dim
    if rows <= 0 or rows % one:
        raise WeightsError(
            f"{path}: the shards hold {rows} rows of keys, but the model has {config.num_key_value_heads} kv "
            f"heads of {config.head_dim}: {one} rows, or a multiple of it. Give the config.json that belongs "
            f"to the shards, {_OR_MISSING}"
        )
    return rows // one


def _cuts(files: Files, layers: int, pp: int) -> tuple[int, ...] | None:
    """The last layer of each stage but the last; None if the stages are even, or not contiguous."""
    held = [sorted(layers_of(files[0, stage])) for stage in range(pp)]
    if not all(held) or list(chain.from_iterable(held)) != list(range(layers)):
        return None
    ends = tuple(numbers[-1] for numbers in held[:-1])
    return None if ends == even_cuts(layers, pp) else ends


def _fill_columns(whole: Tensor, share: Tensor, ranges: Sequence[tuple[int, int]]) -> None:
    column = 0
    for start, stop in ranges:
        whole[:, start:stop] = share[:, column : column + stop - start]
        column += stop - start
