"""Which parts of the plain model's weights a rank's parameters hold, and how to fill and measure them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nxdt_align.engines import xla
from nxdt_align.engines.base import EngineError, WeightSource
from nxdt_align.engines.checkpoint_folder import require_same_shapes
from nxdt_align.engines.nxd.adapters import plain_name
from nxdt_align.engines.nxd.layers import mark
from nxdt_align.engines.nxd.settings import Parallel
from nxdt_align.engines.ranks import Group, Groups
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import Partition, local_tensors
from nxdt_align.models.presets import DecoderConfig, weight_shapes
from nxdt_align.models.sharding import EACH_HEAD, KV_HEADS, is_factor, split_of


@dataclass(frozen=True)
class WeightRows:
    """A plain weight's share, and the rows of a parameter that hold it (all columns)."""

    name: str
    """The plain model's."""
    first_row: int
    rows: int

    def of(self, tensor: Tensor, start: int = 0) -> Tensor:
        """The view of a tensor of the parameter's shape, or of its rows from ``start`` on."""
        first, last = self.first_row - start, self.first_row + self.rows - start
        return tensor[max(first, 0) : max(last, 0)]


class Shards:
    """One rank's parameters, under NxD's names."""

    def __init__(
        self,
        config: DecoderConfig,
        parallel: Parallel,
        groups: Groups,
        adapters: AdapterSpec | None = None,
    ) -> None:
        self.partition = parallel.partition(config, adapters)
        _check_vocabulary(self.partition)
        self._parallel = parallel
        self._groups = groups
        self._parts = {
            local: list(self._stacked(names))
            for local, names in local_tensors(self.partition, groups.pipeline.rank).items()
        }

    def _stacked(self, names: list[str]) -> Iterator[WeightRows]:
        row = 0
        for name in names:
            rows = self.partition.local_shape(name)[0]
            yield WeightRows(name, row, rows)
            row += rows

    def named_parameters(self, decoder: Decoder) -> list[tuple[str, nn.Parameter]]:
        """This stage's, under NxD's names, which are the modules' own but for separate q, k and v."""
        every = ((plain_name(name), parameter) for name, parameter in decoder.named_parameters())
        named = (
            (name.replace(".qkv_proj.", ".") if name not in self._parts else name, parameter)
            for name, parameter in every
        )
        return [(name, parameter) for name, parameter in named if name in self._parts]

    def materialize(self, decoder: Decoder, device: torch.device) -> None:
        """Bring this stage of a decoder that is on the meta device to ``device``, without values; the rest
        stays where it is."""
        mine = {id(parameter) for _, parameter in self.named_parameters(decoder)}
        for module in decoder.modules():
            if any(id(parameter) in mine for parameter in module.parameters(recurse=False)):
                module.to_empty(device=device, recurse=False)
                xla.make_data(dict(module.named_parameters(recurse=False)))
        decoder.model.rotary_emb.to_empty(device=device)

    def mark(self, decoder: Decoder) -> None:
        """Tell NxD how each parameter is split."""
        for name, parameter in self.named_parameters(decoder):
            mark(name, parameter, split_of(self._parts[name][0].name), self._parallel)

    @torch.no_grad()
    def fill(self, parameters: Iterable[tuple[str, nn.Parameter]], source: WeightSource) -> None:
        """Copy this rank's shares of every weight, of which no more than these are read.

        Raises EngineError naming every missing, surplus or misshapen tensor.
        """
        require_same_shapes(source, weight_shapes(self.partition.config) | self.partition.adapter_shapes)
        for local, parameter in parameters:
            with xla.filling({local: parameter}) as filled:
                for part in self._parts[local]:
                    part.of(filled[local]).copy_(self._share(part.name, source))

    def _share(self, name: str, source: WeightSource) -> Tensor:
        """Read in one piece, from the first to the last of what this rank holds."""
        dim, ranges = self.partition.ranges(name, self._groups.tensor.rank)
        first, last = min(start for start, _ in ranges), max(stop for _, stop in ranges)
        region = [slice(0, size) for size in self.partition.whole_shape(name)]
        region[dim] = slice(first, last)
        read = source.read_slice(name, region)
        pieces = [read.narrow(dim, start - first, stop - start) for start, stop in ranges]
        return torch.cat(pieces, dim) if len(pieces) > 1 else pieces[0]

    @torch.no_grad()
    def whole(
        self, parameters: Iterable[tuple[str, nn.Parameter]], *, trainable: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under the plain model's names, on the CPU, on the first rank alone, an adapter's
        before its module's. Every rank iterates to the end.

        Args:
            trainable: those that adapters train alone.
        """
        is_first = torch.distributed.get_rank() == 0
        spec, held = self.partition.adapters, dict(parameters)
        # Masters of what is trained are float32, what is frozen beside them is not.
        like = {self._trains(name): parameter for name, parameter in held.items()}
        for stage in range(self._parallel.pipeline):
            for local, names in local_tensors(self.partition, stage).items():
                is_trained = self._trains(local)
                if trainable and spec is not None and not is_trained:
                    continue
                for part in self._stacked(names):
                    share = self._from(stage, held.get(local), part, like[is_trained])
                    shares = self._groups.tensor.gather(share)
                    if is_first:
                        yield part.name, self._put_together(part.name, shares.cpu())

    def _trains(self, local: str) -> bool:
        spec = self.partition.adapters
        return spec is None or spec.trains(local)

    def _from(self, stage: int, parameter: nn.Parameter | None, part: WeightRows, like: Tensor) -> Tensor:
        """A stage's share of a plain weight, on the same rank of every stage; ``like`` has its dtype."""
        pipeline = self._groups.pipeline
        if stage == pipeline.rank:
            assert parameter is not None
            held = parameter.detach()
            if pipeline.size == self._groups.tensor.size == 1:
                held = held.cpu()  # first: on a lazy device each slice is a graph
            share = part.of(held).contiguous()
        else:
            share = torch.zeros(self.partition.local_shape(part.name), dtype=like.dtype, device=like.device)
        return pipeline.summed(share)

    def _put_together(self, name: str, shares: Tensor) -> Tensor:
        """``shares``: those of all tensor-parallel ranks, on a new first dimension."""
        whole = torch.empty(self.partition.whole_shape(name), dtype=shares.dtype)
        for rank, share in enumerate(shares):
            dim, ranges = self.partition.ranges(name, rank)
            row = 0
            for start, stop in ranges:
                whole.narrow(dim, start, stop - start).copy_(share.narrow(dim, row, stop - start))
                row += stop - start
        return whole

    def copies(self, name: str) -> int:
        """Ranks that hold the same share of the plain weight."""
        split = split_of(name)
        if split.replicated:
            return self._parallel.tensor
        return self._parallel.kv_multiplier if split == KV_HEADS else 1

    @torch.no_grad()
    def norm(self, tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
        """The L2 norm, () float32, of the whole model's tensors, each counted once.

        Args:
            tensors: this rank's, under NxD's names: parameters, or their gradients.
        """
        return self._norm((local, tensor, 0) for local, tensor in tensors)

    @torch.no_grad()
    def norm_of_rows(self, tensors: Iterable[tuple[str, Tensor, int]]) -> Tensor:
        """As ``norm``, where each data-parallel rank has some rows: name, rows, and the first one's number.
        Rows beyond the parameter's are padding."""
        return self._norm(tensors, self._groups.data)

    def _norm(self, tensors: Iterable[tuple[str, Tensor, int]], *further: Group) -> Tensor:
        total: Tensor | None = None
        for local, tensor, start in tensors:
            for part in self._parts[local]:
                square = part.of(tensor, start).float().square().sum() / self.copies(part.name)
                total = square if total is None else total + square
        assert total is not None
        for group in (self._groups.tensor, self._groups.pipeline, *further):
            total = group.summed(total)
        return total.sqrt()

    def partial_gradients(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
        """Gradients of which each tensor-parallel rank has a part: those of the norms of heads, of factors
        beside a weight that is split, and under sequence parallel of all that sees other tokens on each
        rank."""
        found = []
        for local, parameter in parameters:
            split, gradient = split_of(self._parts[local][0].name), _gradient(parameter)
            sees_part = split == EACH_HEAD or self._parallel.sequence_parallel or is_factor(local)
            if split.replicated and sees_part and gradient is not None:
                found.append(gradient)
        return found

    @torch.no_grad()
    def sum_copies(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Give copies of kv heads the gradients of all of them together, of biases, norms and adapters: NxD's
        layers see to those of its own matrices alone."""
        if self._parallel.kv_multiplier == 1:
            return
        shares = []
        for local, parameter in parameters:
            gradient = _gradient(parameter)
            for part in self._parts[local]:
                is_ours = len(self.partition.whole_shape(part.name)) == 1 or is_factor(part.name)
                if is_ours and split_of(part.name) == KV_HEADS and gradient is not None:
                    shares.append((part.name, part.of(gradient)))
        if not shares:
            return
        own = self._own_heads(*shares[0])
        # One tensor of all heads each, in which every rank adds its own.
        wholes = [torch.where(own, share.reshape(1, own.shape[1], -1), 0).sum(1) for _, share in shares]
        self._groups.tensor.sum(wholes)
        for (_, share), whole in zip(shares, wholes, strict=True):
            share.copy_(torch.where(own, whole[:, None], 0).sum(0).view_as(share))

    def _own_heads(self, name: str, share: Tensor) -> Tensor:
        """(kv heads, this rank's, 1): which is which. A comparison of tensors: places that are numbers would
        make each rank's graph another."""
        ranges = self.partition.ranges(name, self._groups.tensor.rank)[1]
        size = self.partition.config.head_dim
        heads = [row // size for start, stop in ranges for row in range(start, stop, size)]
        own = torch.tensor(heads, dtype=torch.int32).to(share.device)
        every = torch.arange(
            self.partition.config.num_key_value_heads, dtype=torch.int32, device=share.device
        )
        return (every[:, None] == own)[..., None]


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    gradient: Tensor | None = getattr(parameter, "main_grad", parameter.grad)
    return gradient


def _check_vocabulary(partition: Partition) -> None:
    vocabulary = partition.config.vocab_size
    if partition.padded_vocab != vocabulary:
        raise EngineError(
            f"distributed_strategy.tensor_model_parallel_size: must divide the model's vocab_size "
            f"({vocabulary}) with engine nxd, but is {partition.tp}"
        )
