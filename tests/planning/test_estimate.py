"""The memory formula against what torch allocates on a CPU, and its parallel sizes against arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bounds import key_bounds
from matrix import but_for
from memory_fixture import DEEP, PRECISIONS, RECOMPUTE, WIDE_HEAD, Run, batch, bytes_of_a_rank, peak_of
from torch import Tensor

from nxdt_align.engines.masters import MasterWeights
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.config import parameter_count
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import LLAMA3_8B, DecoderConfig
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.logprobs import CACHED_BYTES, KEPT_BYTES
from nxdt_align.planning.activations import kept_of_layer
from nxdt_align.planning.device_memory import Memory, estimate
from nxdt_align.planning.workload import Formats, Workload

TOLERANCE = 0.12
"""Of what a step allocates beyond weights, masters and optimizer states, which must be exact."""


def compare(
    config: DecoderConfig,
    kind: str,
    recompute: tuple[str, ...],
    sizes: tuple[int, int, int],
    attention: str,
    adapters: AdapterSpec | None = None,
) -> None:
    precision, formats = PRECISIONS[kind]
    run = Run(config, precision, recompute, adapters=adapters)
    measured = run.peak_of_a_step([batch(*sizes, config.vocab_size)] * 2)
    rows, tokens, responses = sizes
    need = estimate(
        Workload(
            config,
            formats,
            rows,
            tokens,
            responses,
            attention,  # type: ignore[arg-type]
            recompute,
            micro_batches=2,
            tile=CACHED_BYTES,
            kept=KEPT_BYTES,
            adapters=adapters,
        )
    )
    assert need.states == run.state_bytes()
    if need.masters:
        assert need.masters == run.parameter_bytes()
    trained = 0 if adapters is None else sum(parameter.numel() for parameter in run.parameters)
    if adapters is None or adapters.quantize is None:
        assert need.weights == (parameter_count(config) + trained) * formats.weight
    assert need.weights == sum(p.nbytes for _, p in run.engine._policy.named_parameters())
    estimated = need.gradients + need.activations + need.scratch
    assert abs(estimated / measured - 1) <= TOLERANCE, f"estimated {estimated:,}, allocated {measured:,}"


@pytest.mark.parametrize("kind", PRECISIONS)
@pytest.mark.parametrize("recompute", [r for r in RECOMPUTE if r != ("full",)], ids="+".join)
def test_what_a_layer_keeps(kind: str, recompute: tuple[str, ...]) -> None:
    """Storages that autograd saves for one layer's backward pass, weights, rotary and mask aside."""
    precision, formats = PRECISIONS[kind]
    attention = DenseAttention()
    model = Decoder(DEEP, attention)
    model.set_checkpointing("selective" if recompute else None, recompute)
    model.to(precision.compute)
    rotary = model.model.rotary_emb(torch.arange(256).expand(2, -1))
    context = attention.prepare(*key_bounds([[(256,)]] * 2))
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *rotary, context)}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(2, 256, 256, dtype=precision.compute, requires_grad=True)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, precision.context(torch.device("cpu")):
        model.model.layers[0](x, rotary, context)
    kept = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in others)
    work = Workload(DEEP, formats, 2, 256, 64, "masked", recompute)
    assert kept_of_layer(work) == pytest.approx(kept, rel=0.002)


STEPS = {f"{kind}: {'+'.join(names)}": (kind, names) for kind in PRECISIONS for names in RECOMPUTE}


@pytest.mark.parametrize(
    "step", but_for([*(f"fp32: {'+'.join(names)}" for names in RECOMPUTE), "bf16: ", "autocast: full"], STEPS)
)
def test_a_step_allocates_what_is_planned(step: str) -> None:
    compare(DEEP, *STEPS[step], (2, 256, 64), "masked")


@pytest.mark.parametrize("step", but_for(["fp32: ", "bf16: full", "autocast: "], STEPS))
def test_a_large_tied_head(step: str) -> None:
    compare(WIDE_HEAD, *STEPS[step], (1, 384, 256), "masked")


@pytest.mark.parametrize("step", but_for(["fp32: full", "bf16: ", "fp32: CoreAttention"], STEPS))
def test_attention_scores(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention written out, as a device without a kernel that takes a mask runs it."""
    kind, recompute = STEPS[step]
    monkeypatch.setattr("nxdt_align.ops.attention.FUSED_DEVICES", ())
    compare(DEEP, kind, recompute, (2, 256, 64), "scores")


ADAPTERS = {
    "all layers": {"target_modules": ["all-linear"]},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "dropout": {"target_modules": ["all-linear"], "dropout": 0.1},
    "DoRA": {"target_modules": ["all-linear"], "dora": True},
    "the head": {"target_modules": ["all-linear"], "modules_to_save": ["lm_head"]},
}


ADAPTED = {
    f"{name}, {kind}, {'+'.join(recompute)}": (name, kind, recompute)
    for name in ADAPTERS
    for kind in ("fp32", "bf16")
    for recompute in ((), ("full",))
}


@pytest.mark.parametrize(
    "case",
    but_for(
        [
            "all layers, bf16, full",
            "q and v, fp32, ",
            "dropout, fp32, ",
            "DoRA, fp32, full",
            "the head, fp32, full",
        ],
        ADAPTED,
    ),
)
def test_adapters(case: str) -> None:
    """Frozen weights have neither gradients nor masters nor state, and what only they need is not kept."""
    name, kind, recompute = ADAPTED[case]
    adapters = adapter_spec(DEEP, **({"rank": 8, "alpha": 16} | ADAPTERS[name]))  # type: ignore[arg-type]
    compare(DEEP, kind, recompute, (2, 256, 64), "masked", adapters)


@pytest.mark.parametrize("kind", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("recompute", [(), ("full",)], ids="+".join)
def test_a_base_in_4_bits(kind: str, recompute: tuple[str, ...]) -> None:
    """Its bytes are exact; one weight at a time is dequantised."""
    pytest.importorskip("bitsandbytes")
    adapters = adapter_spec(DEEP, target_modules=["all-linear"], rank=8, alpha=16, quantize="nf4")
    compare(DEEP, kind, recompute, (2, 256, 64), "masked", adapters)


def test_llama_3_8b_in_4_bits_fits_a_card_of_24_gib() -> None:
    """By hand: 6,979,321,856 weights of the layers in half a byte, a byte of scale each 64 and 4 more each
    16,384, 1,028 for a weight's offset and code; embedding, head and norms in two."""
    adapters = adapter_spec(LLAMA3_8B, target_modules=["all-linear"], rank=16, alpha=32, quantize="nf4")
    layers, outside = 6_979_321_856, 2 * 128256 * 4096 + 65 * 4096
    work = replace(EIGHT_B, attention="flash", tokens=2048, responses=1024, adapters=adapters)
    need = estimate(work)
    factors = 16 * 32 * (2 * 8192 + 2 * 5120 + 3 * (4096 + 14336))
    held = layers // 2 + layers // 64 + layers // 16384 * 4 + 224 * 1028
    assert need.weights == held + 2 * (outside + factors)
    assert need.states == 8 * factors
    assert need.total < 0.9 * 24 * 2**30
    plain = estimate(replace(work, adapters=replace(adapters, quantize=None)))
    assert plain.weights == 2 * (layers + outside + factors)
    assert need.weights < 0.4 * plain.weights
    shared = estimate(replace(work, fsdp=True, data_parallel=4))
    assert shared.weights < need.weights


# Parallel sizes: one rank of several, whose peers are not there

PARALLEL_TOLERANCE = 0.18
"""FSDP's buffers and what DTensor gathers weigh more in a model as small as this."""


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, Parallel(tensor=2), marks=pytest.mark.full),
        (2, Parallel(tensor=2, sequence_parallel=True)),
        pytest.param(4, Parallel(tensor=4, sequence_parallel=True), marks=pytest.mark.full),
        pytest.param(2, Parallel(zero1=True), marks=pytest.mark.full),
        (2, Parallel(fsdp=True)),
    ],
    ids=["tp2", "tp2-sp", "tp4-sp", "zero1", "fsdp"],
)
def test_a_rank_allocates_what_is_planned(ranks: int, parallel: Parallel) -> None:
    """bf16. On 4 ranks, each has the whole weights of the 2 key-value heads. FSDP gathers within the step."""
    formats = PRECISIONS["bf16"][1]
    states, parameters, measured = bytes_of_a_rank(ranks, parallel)
    is_sharded = parallel.zero1 or parallel.fsdp
    need = estimate(
        Workload(
            DEEP,
            formats,
            *(2, 256, 64),
            "masked",
            tensor_parallel=parallel.tensor,
            kv_heads=2 if ranks == 4 else None,
            sequence_parallel=parallel.sequence_parallel,
            keeps_gathered=True,
            micro_batches=2,
            data_parallel=ranks if is_sharded else 1,
            zero1=parallel.zero1,
            fsdp=parallel.fsdp,
            tile=CACHED_BYTES,
            kept=KEPT_BYTES,
        )
    )
    assert need.states == states
    assert need.masters == parameters
    estimated = need.gradients + need.activations + need.scratch + (need.weights if is_sharded else 0)
    assert abs(estimated / measured - 1) <= PARALLEL_TOLERANCE, f"{estimated:,} for {measured:,}"


# Parallel sizes, by arithmetic

MIXED = PRECISIONS["bf16"][1]
EIGHT_B = Workload(
    LLAMA3_8B, MIXED, rows=1, tokens=4096, responses=2048, attention="scores", recompute=("full",)
)


def test_weights_of_llama_3_8b_at_tp_32() -> None:
    """By hand, a rank of 32 with one of 8 key-value heads, which 4 ranks copy.

    A layer: q and o 2 x 4096 x 128, k and v 2 x 4096 x 128, MLP 3 x 4096 x 448, norms 2 x 4096. Embedding
    and head: 2 x 4008 x 4096. Last norm: 4096.
    """
    layer = 4 * 4096 * 128 + 3 * 4096 * 448 + 2 * 4096
    numbers = 32 * layer + 2 * 4008 * 4096 + 4096
    need = estimate(replace(EIGHT_B, tensor_parallel=32, kv_heads=1))
    assert need.weights == 2 * numbers
    assert need.gradients == need.masters == 4 * numbers
    assert need.states == 8 * numbers


def test_tensor_parallel_divides_all_but_norms_and_residual() -> None:
    one, two = estimate(EIGHT_B), estimate(replace(EIGHT_B, tensor_parallel=2))
    norms = 65 * 4096
    assert two.weights == (one.weights - 2 * norms) // 2 + 2 * norms
    assert two.activations == one.activations, "full recomputation keeps the residual stream alone"
    sharded = estimate(replace(EIGHT_B, tensor_parallel=2, sequence_parallel=True))
    layers = 32 * 4096 * 4096 * 2
    assert one.activations - sharded.activations == layers // 2


def test_more_key_value_copies_take_more_memory() -> None:
    """Four copies of 8 heads: a rank of 32 has one head; of native's whole weights, all 8."""
    copied = estimate(replace(EIGHT_B, tensor_parallel=32, kv_heads=1))
    whole = estimate(replace(EIGHT_B, tensor_parallel=32, kv_heads=8))
    assert whole.weights - copied.weights == 2 * 32 * 2 * 4096 * 128 * 7


def test_pipeline_stages_hold_their_layers_and_what_is_in_flight() -> None:
    """1F1B: the first of 4 stages keeps 4 micro-batches' activations, of 8 layers each; two alone are in
    flight where a step has no more."""
    one = estimate(EIGHT_B)
    four = replace(EIGHT_B, stages=(8, 8, 8, 8), micro_batches=8)
    need = estimate(four)
    assert need.stage in (0, 3)
    assert need.weights < one.weights / 3
    assert need.activations <= one.activations
    per_layer = 4096 * 4096 * 2
    first = estimate(replace(four, stages=(29, 1, 1, 1)))
    assert first.stage == 0
    few = estimate(replace(four, stages=(29, 1, 1, 1), micro_batches=2))
    assert first.activations - few.activations == 2 * 29 * per_layer


def test_a_tied_head_is_a_copy_in_the_last_stage() -> None:
    """fp32: each number of the last stage, the copy's 8,000 x 128 too, is in weights and gradients."""
    tied = replace(EIGHT_B, model=WIDE_HEAD, formats=PRECISIONS["fp32"][1])
    own = replace(tied, model=replace(WIDE_HEAD, tie_word_embeddings=False))
    assert estimate(own).weights - estimate(tied).weights == 8000 * 128 * 4
    own, tied = (replace(work, stages=(1, 3), micro_batches=2) for work in (own, tied))
    assert estimate(own).stage == 1
    assert estimate(own).weights == estimate(tied).weights


def test_zero1_and_fsdp_divide_their_shares() -> None:
    one = estimate(EIGHT_B)
    zero1 = estimate(replace(EIGHT_B, data_parallel=8, zero1=True))
    assert (zero1.masters, zero1.states) == (one.masters // 8, one.states // 8)
    assert (zero1.weights, zero1.gradients) == (one.weights, one.gradients)
    fsdp = estimate(replace(EIGHT_B, data_parallel=8, fsdp=True))
    assert fsdp.masters == one.masters // 8
    outside = 2 * 128256 * 4096 + 4096
    layer = (parameter_count(LLAMA3_8B) - outside) // 32
    assert fsdp.weights == 2 * (outside + 2 * layer)
    assert fsdp.gradients == one.gradients // 8 + fsdp.weights
    alone = estimate(replace(EIGHT_B, data_parallel=1, fsdp=True, zero1=True))
    assert alone == one


def test_a_reference_beside_the_policy_is_one_more_copy_of_the_weights() -> None:
    one, both = estimate(EIGHT_B), estimate(replace(EIGHT_B, reference=2))
    assert both.weights == 2 * one.weights
    assert replace(both, weights=one.weights) == one
    assert estimate(replace(EIGHT_B, reference=4)).weights == 3 * one.weights


@pytest.mark.parametrize(("policy", "reference"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp32", "fp32")])
def test_a_references_weights_are_what_is_planned(policy: str, reference: str) -> None:
    """Of what loading it allocates, to 2% (rotary angles, a weight's copy)."""
    run = Run(DEEP, PRECISIONS[policy][0], (), reference_precision=PRECISIONS[reference][0])
    measured = peak_of(lambda: run.engine.load_reference(None))
    work = Workload(DEEP, PRECISIONS[policy][1], 2, 256, 64, "masked")
    size = PRECISIONS[reference][1].weight
    planned = estimate(replace(work, reference=size)).weights - estimate(work).weights
    assert planned == parameter_count(DEEP) * size
    assert measured == pytest.approx(planned, rel=0.02)


def test_float32_copies_of_gradients_are_what_is_planned() -> None:
    """Sums in bf16 become the masters' gradients. Those sums stay until then, as a graph's inputs do."""
    model = Decoder(DEEP, DenseAttention()).to(torch.bfloat16)
    masters = MasterWeights(model.named_parameters(), float32_sums=False)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    sums = [parameter.grad for parameter in model.parameters()]
    measured = peak_of(masters.take_gradients)
    formats = Formats(weight=2, gradient=2, master=4, state=8, activation=2, float32_copy=4)
    need = estimate(Workload(DEEP, formats, 1, 64, 8, "masked"))
    assert measured == need.activations + need.scratch == 4 * parameter_count(DEEP)
    assert need.gradients == sum(gradient.nbytes for gradient in sums if gradient is not None)


def test_a_shards_gradients_come_to_the_whole_ones() -> None:
    """At the optimizer's step, when there are no activations: a rank's share of them."""
    formats = replace(MIXED, shard_gradient=4)
    work = replace(EIGHT_B, rows=1, tokens=64, responses=8, formats=formats, zero1=True)
    for ranks in (1, 2):
        need = estimate(replace(work, data_parallel=ranks))
        assert need.activations + need.scratch == 4 * parameter_count(LLAMA3_8B) // ranks
    long = replace(work, data_parallel=512, tokens=4096, responses=2048)
    assert estimate(long) == estimate(replace(long, formats=MIXED))


@pytest.mark.parametrize(
    "change",
    [
        {"recompute": ()},
        {"recompute": ("LlamaMLP",)},
        {"tokens": 8192},
        {"rows": 2},
        {"reference": 2},
        {"tile": 2**30, "kept": 2**30},
    ],
    ids=str,
)
def test_what_must_take_more_takes_more(change: dict[str, object]) -> None:
    # Without scores, whose gradients would hide the head's.
    work = replace(EIGHT_B, attention="flash")
    assert total(estimate(replace(work, **change))) > total(estimate(work))  # type: ignore[arg-type]


def total(memory: Memory) -> int:
    return memory.total
