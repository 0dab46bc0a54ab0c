"""Compiled steps: what they compute is the plain model's, and how many graphs they are.

``aot_eager`` runs the forward and backward graphs that any backend gets, op by op. Inductor compiles C++.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from adapter_fixture import AdapterCase, lora
from matrix import asked
from oracle import ModuleWeights
from parallel_fixture import (
    LOSSES,
    SHAPE,
    Case,
    Outcome,
    adamw,
    examples_of,
    make_model,
    merged,
    oracle,
    outcomes,
    run_case,
    worst,
)
from rank_processes import run_parallel
from torch import Tensor

from nxdt_align.batch import Batch
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.config.dpo_forms import FORMS
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.native import compiled
from nxdt_align.engines.native.compiled import Compiling
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.settings import Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.presets import DecoderConfig
from nxdt_align.ops.attention import Attention, DenseAttention
from nxdt_align.ops.attention_flex import FlexAttention

TOLERANCE = 1e-6
"""Of the loss, the norm, and each gradient relative to its largest entry, as in test_native_parallel.py."""
WEIGHT_TOLERANCE = 1e-5
TWO_LAYERS = replace(SHAPE, num_hidden_layers=2)
FULL, SELECTIVE = ("full", ()), ("selective", ("CoreAttention", "LlamaMLP", "LlamaRMSNorm"))
SPREADS = {
    "tp2": Case(tensor=2),
    "tp2 sp": Case(tensor=2, sequence_parallel=True),
    "tp4 sp, 2 kv heads": Case(tensor=4, sequence_parallel=True),
    "dp4": Case(data=4),
    "dp4 zero1": Case(data=4, zero1=True),
    "dp4 fsdp": Case(data=4, fsdp=True),
    "tp2 dp2 sp": Case(tensor=2, data=2, sequence_parallel=True),
    "tp2 dp2 sp zero1": Case(tensor=2, data=2, sequence_parallel=True, zero1=True),
    "tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True),
    "pp2": Case(pipeline=2),
    "pp4": Case(pipeline=4, min_micro_batches=4),
    "pp2 dp2 fsdp": Case(pipeline=2, data=2, fsdp=True),
    "pp2 tp2 sp": Case(pipeline=2, tensor=2, sequence_parallel=True),
    "full checkpointing, tp2 dp2 fsdp": Case(
        tensor=2, data=2, sequence_parallel=True, fsdp=True, checkpointing=FULL
    ),
    "selective checkpointing, dp2 fsdp": Case(data=2, fsdp=True, checkpointing=SELECTIVE),
    "tied head, pp2 tp2": Case(
        pipeline=2, tensor=2, sequence_parallel=True, shape=replace(SHAPE, tie_word_embeddings=True)
    ),
    "pp2 x 2 chunks": Case(pipeline=2, virtual_pipeline=2),
    "packed rows, tp2 dp2 sp": Case(tensor=2, data=2, sequence_parallel=True, layout="packed"),
    "padded rows, tp2 dp2 sp fsdp": Case(tensor=2, data=2, sequence_parallel=True, fsdp=True, layout="none"),
}
ORPO = ("tp2 sp", "tp4 sp, 2 kv heads", "dp4 zero1", "tp2 dp2 sp fsdp", "pp2 x 2 chunks", "pp2 dp2 fsdp")
SPREADS |= {f"ORPO, {name}": replace(SPREADS[name], loss="orpo") for name in ORPO}


@cache
def wanted(loss: str, steps: int, shape: DecoderConfig, pairs: int) -> Outcome:
    return oracle(Case(loss=loss, steps=steps, shape=shape, pairs=pairs))


def assert_as_the_plain_model(case: Case, ranks: Sequence[Outcome]) -> None:
    want = wanted(case.loss, case.steps, case.shape, case.pairs)
    for got in ranks:
        for loss in (got.loss, got.evaluated):
            assert abs(loss - want.loss) <= TOLERANCE
        assert got.norm == pytest.approx(want.norm, rel=TOLERANCE)
    gradient = worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)
    weight = worst(merged([r.weights for r in ranks]), want.weights, relative=False)
    print(f"loss {abs(ranks[0].loss - want.loss):.1e}, gradient {gradient[0]:.1e}, weight {weight[0]:.1e}")
    assert gradient[0] <= TOLERANCE, gradient
    assert weight[0] <= WEIGHT_TOLERANCE, weight


@pytest.mark.parametrize(
    ("loss", "checkpointing"),
    [("dpo", FULL), pytest.param("orpo", SELECTIVE, marks=pytest.mark.full)],
)
def test_one_process_as_the_plain_model(loss: str, checkpointing: Any) -> None:
    case = Case(
        loss=loss, shape=TWO_LAYERS, steps=1, checkpointing=checkpointing, pairs=4, compiled="aot_eager"
    )
    assert_as_the_plain_model(case, [run_case(0, case)])


def count_graphs(rank: int, world: int, case: Case, layers: Sequence[int]) -> list[int]:
    """For ``run_parallel``: graphs of a step, for each number of layers."""
    found = []
    for count in layers:
        backend = Counting()
        sized = replace(case, shape=replace(case.shape, num_hidden_layers=count), compiled=backend)
        sized.engine(rank).step(
            sized.micro_batches(rank, sized.examples()), GlobalMeanObjective(LOSSES["orpo"])
        )
        found.append(backend.graphs)
    return found


@pytest.mark.full
def test_tensor_parallel_layers_share_a_graph() -> None:
    """More ranks than key-value heads, norms of heads, sequence parallel: as many graphs as without."""
    shape = replace(SHAPE, num_key_value_heads=1, qk_norm="head", model_type="qwen3")
    case = Case(tensor=2, sequence_parallel=True, loss="orpo", shape=shape, pairs=2)
    for graphs in run_parallel(2, count_graphs, case, (1, 3)):
        assert graphs == [4, 4]


@pytest.fixture(scope="module")
def spread(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    cases = asked(request, SPREADS)
    return outcomes({name: replace(case, compiled="aot_eager") for name, case in cases.items()})


@pytest.mark.full
@pytest.mark.parametrize("name", SPREADS)
def test_spread_as_the_plain_model(spread: dict[str, list[Outcome]], name: str) -> None:
    """The cells of docs/native.md and of docs/pipeline.md, compiled."""
    assert_as_the_plain_model(SPREADS[name], spread[name])


def has_compiler() -> bool:
    try:
        compiled.require_compiler()
    except EngineError:
        return False
    return True


@pytest.mark.full
@pytest.mark.skipif(not has_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_inductor_as_the_plain_model(loss: str) -> None:
    case = Case(loss=loss, compiled="inductor", steps=2)
    assert_as_the_plain_model(case, [run_case(0, case)])


# How many graphs


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def engine_of(
    layers: int, backend: Any, attention: Attention | None = None, precision: Precision | None = None
) -> NativeEngine:
    shape = replace(SHAPE, num_hidden_layers=layers)
    made = NativeEngine(
        shape,
        attention or DenseAttention(),
        precision=precision or Precision(),
        compiling=Compiling(backend),
    )
    made.load_weights(ModuleWeights(make_model(0, shape)))
    return made


def batches_of(length: int) -> list[Batch]:
    return Case(buckets=(length,)).micro_batches(0, examples_of(4, 3))


def train_and_validate(
    engine: NativeEngine,
    lengths: Sequence[int],
    folder: Path,
    batches_of: Callable[[int], list[Batch]] = batches_of,
) -> Iterator[str]:
    """All that a run does, said after each part."""
    objective = GlobalMeanObjective(LOSSES["dpo"])
    engine.load_reference(None)
    for length in lengths:
        for batch in batches_of(length):
            engine.response_logps(batch, reference=True)
        yield f"reference pass, {length}"
    optimizer = adamw([p for _, p in engine.named_parameters()])
    for turn in range(2):
        for length in lengths:
            engine.step(batches_of(length), objective)
            engine.clip_gradients(0.1)
            optimizer.step()
            yield f"training {turn}, {length}"
            engine.evaluate(batches_of(length), objective)
            yield f"validation {turn}, {length}"
    engine.save(folder / "saved", optimizer, {})
    engine.load(folder / "saved", optimizer)
    for length in lengths:
        engine.step(batches_of(length), objective)
        engine.evaluate(batches_of(length), objective)
        yield f"resumed, {length}"


def counted(layers: int, lengths: Sequence[int], folder: Path) -> dict[str, int]:
    """Graphs that each part of a run adds, where it adds any."""
    backend, found, before = Counting(), {}, 0
    for part in train_and_validate(engine_of(layers, backend), lengths, folder):
        if backend.graphs > before:
            found[part], before = backend.graphs - before, backend.graphs
    return found


def test_graphs_follow_from_buckets_and_modes_not_from_depth(tmp_path: Path) -> None:
    """Embedding, layer and head three times (reference, training, validation), the loss twice, for each row
    length at its first use; then none, over further steps and a resume."""
    found = counted(3, (64, 96), tmp_path / "3")
    of_length = {"reference pass": 3, "training 0": 4, "validation 0": 4}
    assert found == {f"{part}, {n}": count for n in (64, 96) for part, count in of_length.items()}
    one = {part: count for part, count in found.items() if part.endswith("64")}
    assert counted(1, (64,), tmp_path / "1") == one


RANKS: dict[str, Case] = {
    "tp2 sp": Case(tensor=2, sequence_parallel=True),
    "tp2 sp, full checkpointing": Case(tensor=2, sequence_parallel=True, checkpointing=FULL),
    "dp2 fsdp": Case(data=2, fsdp=True),
    "dp2 fsdp, full checkpointing": Case(data=2, fsdp=True, checkpointing=FULL),
    "dp2 zero1, selective checkpointing": Case(data=2, zero1=True, checkpointing=SELECTIVE),
    "pp2": Case(pipeline=2),
    "pp2, full checkpointing": Case(pipeline=2, checkpointing=FULL),
    "pp2 x 2 chunks": Case(pipeline=2, virtual_pipeline=2),
    "LoRA, dp2 fsdp": AdapterCase(data=2, fsdp=True),
    "LoRA, tp2 sp": AdapterCase(tensor=2, sequence_parallel=True),
    "LoRA, pp2": AdapterCase(pipeline=2),
}
LENGTHS = (64, 96)


def count_parts(rank: int, world: int, case: Case, folder: Path) -> list[dict[str, int]]:
    """For ``run_parallel``: graphs that each part of a run adds; then of twice the layers, one row length."""
    found = []
    for layers, lengths in ((4, LENGTHS), (8, LENGTHS[:1])):
        backend, counts, before = Counting(), {}, 0
        sized = replace(case, shape=replace(case.shape, num_hidden_layers=layers), compiled=backend, pairs=4)
        if isinstance(sized, AdapterCase):
            sized = replace(sized, spec=lora(sized.shape))  # else the further layers have no adapter

        def batches(length: int, sized: Case = sized) -> list[Batch]:
            return replace(sized, buckets=(length,)).micro_batches(rank, examples_of(4, 3))

        engine = sized.engine(rank)
        for part in train_and_validate(engine, lengths, folder / str(layers), batches):
            if backend.graphs > before:
                counts[part], before = backend.graphs - before, backend.graphs
        found.append(counts)
    return found


@pytest.mark.full
@pytest.mark.parametrize("name", RANKS)
def test_ranks_compile_at_the_first_step_of_a_bucket_alone(name: str, tmp_path: Path) -> None:
    """On each rank: as many graphs with twice the layers, and none over a second round of each length, its
    validation and a resume."""
    firsts = {f"{part}, {n}" for part in ("reference pass", "training 0", "validation 0") for n in LENGTHS}
    for few, deep in run_parallel(2, count_parts, RANKS[name], tmp_path):
        assert few.keys() <= firsts
        of_length = [
            {part.rpartition(",")[0]: count for part, count in few.items() if part.endswith(f", {n}")}
            for n in LENGTHS
        ]
        assert of_length[0] == of_length[1]
        assert of_length[0] == {part.rpartition(",")[0]: count for part, count in deep.items()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "dropout": {"dropout": 0.1},
    "QLoRA": {"quantize": "nf4"},
    "modules whole": {"modules_to_save": ["lm_head", "norm", "input_layernorm"]},
}


@pytest.mark.parametrize(
    "name", [name if name == "LoRA" else pytest.param(name, marks=pytest.mark.full) for name in ADAPTERS]
)
def test_layers_with_adapters_share_their_graphs(name: str) -> None:
    """The first layer's input needs no gradient where the embedding is frozen, which is a graph of its own;
    all further layers share one. No step after the first adds any."""
    if name == "QLoRA":
        pytest.importorskip("bitsandbytes")
    objective, found = GlobalMeanObjective(LOSSES["dpo"]), []
    for layers in (2, 4):
        shape, backend = replace(SHAPE, num_hidden_layers=layers), Counting()
        case = AdapterCase(shape=shape, spec=lora(shape, **ADAPTERS[name]), compiled=backend, pairs=4)
        engine, batches = case.engine(0), case.micro_batches(0, case.examples())
        engine.step(batches, objective)
        found.append(backend.graphs)
        engine.step(batches, objective)
        assert backend.graphs == found[-1]
    assert found == [8, 8]


@pytest.mark.full
@pytest.mark.parametrize("precision", [Precision(torch.bfloat16), Precision(autocast=True)])
def test_masters_and_autocast_compile_no_more(tmp_path: Path, precision: Precision) -> None:
    backend = Counting()
    engine = engine_of(2, backend, precision=precision)
    parts = list(train_and_validate(engine, (64,), tmp_path))
    assert len(parts) == 6 and backend.graphs == 11


def test_flex_attention_is_a_part_of_the_layers_graph() -> None:
    """Without gradients: off CUDA torch has no backward pass of it. A block mask is new at each batch."""
    backend, objective = Counting(), GlobalMeanObjective(LOSSES["orpo"])
    engine = engine_of(2, backend, FlexAttention(compiled=False))
    losses = [float(engine.evaluate(batches_of(128), objective).loss) for _ in range(3)]
    assert backend.graphs == 4
    plain = NativeEngine(replace(SHAPE, num_hidden_layers=2), DenseAttention())
    plain.load_weights(ModuleWeights(make_model(0, TWO_LAYERS)))
    want = float(plain.evaluate(batches_of(128), objective).loss)
    assert losses == pytest.approx([want] * 3, abs=TOLERANCE)


def forms() -> dict[str, DPOLoss]:
    names = [name for name, form in FORMS.items() if not form.sorts]
    return {name: DPOLoss(DPOConfig(kl_beta=0.1, loss_type=(name,))) for name in names}


def test_every_form_of_a_loss_is_one_graph() -> None:
    """Each with the value and the gradient of its own functions, op by op."""
    batch = batches_of(64)[0].with_reference(torch.zeros(1, batches_of(64)[0].slot_valid.shape[1]))
    logps = -torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0))
    for name, loss in forms().items():
        objective, values = GlobalMeanObjective(loss), []
        if objective.couples_examples or objective.wanted:
            continue
        assert not objective.calls_own_code
        for each in (objective, Compiling("eager").objective(objective)):
            given = logps.clone().requires_grad_()
            share, metrics = each(batch, given)
            share.backward()
            values.append((share.detach(), given.grad, metrics))
        assert torch.allclose(values[0][0], values[1][0]), name
        assert torch.allclose(values[0][1], values[1][1]), name
        assert values[0][2].keys() == values[1][2].keys()


# What cannot be compiled


def test_a_users_loss_stays_as_it_is() -> None:
    class Mine(DPOLoss):
        pass

    objective = GlobalMeanObjective(Mine(DPOConfig(kl_beta=0.1)))
    assert objective.calls_own_code
    assert Compiling("eager").objective(objective) is objective


def test_more_shapes_than_graphs_are_refused() -> None:
    with mock.patch.object(compiled, "MOST_GRAPHS", 1):
        engine = engine_of(1, Counting())
        engine.response_logps(batches_of(64)[0])
        with pytest.raises(EngineError) as error:
            engine.response_logps(batches_of(96)[0])
    assert str(error.value) == (
        "distributed_strategy.compile: the embedding has been compiled 1 times, and this step would need one "
        "graph more: shapes or modes keep changing. Give data.buckets fewer row lengths, or set "
        "distributed_strategy.compile=none"
    )


class Breaking(DenseAttention):
    def __call__(self, *args: Any, **named: Any) -> Tensor:
        torch._dynamo.graph_break()
        return super().__call__(*args, **named)


def test_what_is_no_graph_is_refused() -> None:
    engine = engine_of(1, Counting(), Breaking())
    with pytest.raises(EngineError, match=r"compile: the layer cannot be one graph \(.*; set .*compile=none"):
        engine.response_logps(batches_of(64)[0])


def test_what_is_recomputed_by_itself_on_tensor_parallel_ranks() -> None:
    assert compiled.checkpointing_fault(1, SELECTIVE[1]) is None
    assert compiled.checkpointing_fault(2, []) is None
    assert "cannot recompute CoreAttention by itself" in str(
        compiled.checkpointing_fault(2, ["CoreAttention"])
    )


def test_old_torch_and_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"compile: blocks needs torch 2.13 or newer, but torch is 2.9.1"):
        compiled.require_torch("2.9.1+cpu")
    compiled.require_torch("2.13.0")

    def none() -> str:
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler()

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    with pytest.raises(EngineError, match=r"compiles C\+\+ on a CPU, but there is no compiler \(g\+\+"):
        compiled.require_compiler()
