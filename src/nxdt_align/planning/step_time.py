"""How long a micro-batch takes on Trainium, on paper, from sizes alone, as ``graph_cost`` says of a graph.

The products of each layer and of the head, the scores' softmax, norms, and tensor parallelism's collectives,
each as ``graph_cost`` prices it. ``workload.py`` has the legend. A test holds it to recorded graphs.
"""

from __future__ import annotations

from nxdt_align.config.schema import Config
from nxdt_align.data.packing import Bucket
from nxdt_align.models.config import DecoderConfig
from nxdt_align.planning.devices import Device, device_of
from nxdt_align.planning.graph_cost import Cost, collective_seconds, roofline
from nxdt_align.planning.kernels import share_at_work
from nxdt_align.planning.workload import FLOAT, Workload, workload


class RowSeconds:
    """What a training row takes on paper, in seconds, on the Trainium that ``config`` runs on: trn1 with
    engine nxd, trn2 with native, of ``trainer.lnc`` cores. A RowCost that goes to other processes, as a data
    loader's workers."""

    def __init__(self, config: Config, model: DecoderConfig) -> None:
        self._config, self._model = config, model
        chip = "trn2" if config.distributed_strategy.engine == "native" else "trn1"
        self._device = device_of(chip, config.trainer.lnc)
        self._known: dict[Bucket, float] = {}

    @property
    def device(self) -> str:
        """trn1, trn2, or trn2 with other cores."""
        return self._device.name

    def __call__(self, bucket: Bucket) -> float:
        if bucket not in self._known:
            layout = self._config.layout
            responses = 1 if self._config.model_alignment_strategy.sft is not None else 2
            work = workload(self._config, self._model, layout, responses, bucket, needs_reference=False)
            self._known[bucket] = micro_batch_cost(work, self._device).seconds / work.rows
        return self._known[bucket]


def micro_batch_cost(work: Workload, device: Device) -> Cost:
    """Forward and backward of one micro-batch over all layers of the stage that has most of them."""
    layers = max(work.layers_of_stages)
    # The backward pass has two products for each of the forward's; what is recomputed, the forward's again.
    again = 1 if "full" in work.recompute else 0
    attention_again = again or "CoreAttention" in work.recompute
    layer = _projections(work, device).times(3 + again) + _norms(work, device).times(2 + again)
    layer += _attention(work, device, forward=1 + attention_again)
    outside = _head(work, device) + _around(work, device, gathers=2, scatters=1)
    # Each weight's gradient is read and written where it is added to the micro-batches' before.
    weights = layers * _layer_weights(work) + 2 * _vocabulary(work) * work.model.hidden_size
    added = 2 * work.formats.gradient * weights
    return (layer + _collectives(work, device, again)).times(layers) + outside + _moved(added, device)


def _moved(nbytes: float, device: Device) -> Cost:
    return Cost(memory=nbytes / device.memory_bandwidth)


def _vocabulary(work: Workload) -> int:
    return -(-work.model.vocab_size // work.tensor_parallel)


def _kv_width(work: Workload) -> int:
    return (work.kv_heads or work.own_kv_heads) * work.model.head_dim


def _layer_weights(work: Workload) -> int:
    attention = 2 * (work.heads * work.model.head_dim + _kv_width(work))
    return work.model.hidden_size * (attention + 3 * work.width)


def _product(work: Workload, device: Device, rows: int, inner: int, columns: int, count: int = 1) -> Cost:
    size = work.formats.activation
    peak = device.float32_flops if size == FLOAT else device.flops
    nbytes = (rows * inner + inner * columns + rows * columns) * size
    return roofline(2 * rows * inner * columns, nbytes, peak, device).times(count)


def _projections(work: Workload, device: Device) -> Cost:
    n, D, q, kv = work.positions, work.model.hidden_size, work.heads * work.model.head_dim, _kv_width(work)
    cost = (
        _product(work, device, n, D, q)
        + _product(work, device, n, D, kv, 2)
        + _product(work, device, n, q, D)
    )
    return cost + _product(work, device, n, D, 2 * work.width) + _product(work, device, n, work.width, D)


def _norms(work: Workload, device: Device) -> Cost:
    """Mean squares read their input in float32."""
    places = 4 if work.model.norms == "both" else 2
    return _moved(places * work.residual_positions * work.model.hidden_size * FLOAT, device)


def _attention(work: Workload, device: Device, forward: int) -> Cost:
    """``forward``: times that it is computed."""
    n, H, heads = work.positions, work.model.head_dim, work.heads
    if work.attention != "scores":
        size = work.formats.activation
        one = n * heads * H * work.tokens * (1 if work.attention == "flash" else 2)
        mask = n * heads * work.tokens * size if work.attention == "masked" else 0
        peak, nbytes = device.flops, 4 * n * heads * H * size
        of_backward = peak
        if work.attention == "intervals":
            of_backward *= share_at_work(heads, work.own_kv_heads, device.physical_cores)
        ahead = roofline(2 * one, nbytes + mask, peak, device)
        return ahead.times(forward) + roofline(5 * one, 2 * nbytes + mask, of_backward, device)
    rows = n // work.tokens * heads
    scores = _product(work, device, work.tokens, H, work.tokens, rows)
    values = _product(work, device, work.tokens, work.tokens, H, rows)
    # Of the softmax, maximum and sum; of its gradient, one sum; each reads the scores in float32.
    read = _moved(n * heads * work.tokens * FLOAT, device)
    return (scores + values).times(forward + 2) + read.times(2 * forward + 1)


def _collectives(work: Workload, device: Device, again: int) -> Cost:
    """Of a layer: before and after attention and MLP; and gradients of keys and values that several ranks
    hold copies of."""
    cost = _around(work, device, gathers=2 * (3 + again), scatters=2 * (2 + again))
    copies = work.tensor_parallel * (work.kv_heads or work.own_kv_heads) // work.model.num_key_value_heads
    if work.kv_heads is None or copies < 2:
        return cost
    nbytes = 2 * work.positions * _kv_width(work) * work.formats.activation
    return cost + Cost(collectives=collective_seconds("all-reduce", nbytes, range(copies), device))


def _around(work: Workload, device: Device, *, gathers: int, scatters: int) -> Cost:
    """With sequence parallel, activations are gathered before a part and scattered after it, and gathered
    once more for its weights' gradients; without, as many as are scattered are all-reduced."""
    ranks = range(work.tensor_parallel)
    nbytes = work.positions * work.model.hidden_size * work.formats.activation
    kinds = {"all-gather": gathers, "reduce-scatter": scatters}
    if not work.sequence_parallel:
        kinds = {"all-reduce": scatters}
    return Cost(
        collectives=sum(n * collective_seconds(kind, nbytes, ranks, device) for kind, n in kinds.items())
    )


def _head(work: Workload, device: Device) -> Cost:
    """At the response positions: logits, and gradients of hidden states and head; for log-probabilities three
    passes over the logits in float32."""
    n, D = work.rows * work.responses, work.model.hidden_size
    read = _moved(3 * n * _vocabulary(work) * FLOAT, device)
    nbytes = n * D * work.formats.activation
    reduced = collective_seconds("all-reduce", nbytes, range(work.tensor_parallel), device)
    return _product(work, device, n, D, _vocabulary(work), 3) + read + Cost(collectives=reduced)
