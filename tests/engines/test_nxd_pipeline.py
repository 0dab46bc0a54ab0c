"""The NxD engine's pipeline: unequal stages, other shapes and numbers of micro-batches, every rank told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import (
    CONFIG,
    Case,
    batches_of,
    engine,
    examples,
    gradients_of,
    objective,
    plain,
    require_nxd,
    run_ranks,
    start,
    weights,
    whole,
)
from oracle import gradients, orpo_loss, pair_logps

from nxdt_align.batch import Batch, TokenStatistic
from nxdt_align.engines.base import EngineError
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.partition import even_cuts
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.logprobs import token_logps
from nxdt_align.weights.nxdt import NxDTFolder

pytestmark = pytest.mark.nxd
STATISTICS: tuple[TokenStatistic, ...] = ("collisions", "entropy", "mean_logit", "is_top1", "top1")
CASE, CUT = Case(pp=2), Case(pp=2, cuts=(1,))
THREE_LAYERS = replace(CONFIG, num_hidden_layers=3)
SIZES = [(3, 2), (7, 3), (8, 3), (32, 6), (4, 4)]
"""Layers, stages."""
ROUNDS: list[tuple[Any, int | None]] = [
    ("packed", None),
    ("none", None),
    ("none", 75),
    ("shared_prompt", 75),
    ("packed", None),
]
"""Layout and tokens of a row: another shape at the same count, other counts, and the first again."""


def rounds() -> dict[str, Any]:
    built = start(CASE, THREE_LAYERS)
    steps, sizes = [], []
    for layout, row in ROUNDS:
        batches = batches_of(built, layout, row)
        sizes.append((len(batches), *batches[0].input_ids.shape))
        output = built.step(batches, objective("orpo"))
        found = gradients_of(built)
        steps.append((output.loss, found, built.evaluate(batches, objective("orpo")).loss))
        left = {name: p.grad for name, p in built.named_parameters()}
        assert all(torch.equal(found[name], left[name]) for name in found)
    return {
        "steps": steps,
        "sizes": sizes,
        "sent": [
            len(received)
            for model in built._runner._models.values()
            for received in model.stage_id_to_IO_input_names.values()
        ],
        "held": sum(not p.is_meta for p in built._policy.decoder.parameters()),
        "whole": list(built.whole_parameters()),
    }


def cut_otherwise(folder: str) -> dict[str, Any]:
    """Two layers, and one in the last stage; a checkpoint of it, met by stages of even shares."""
    built = start(CUT, THREE_LAYERS)
    output = built.step(batches_of(built), objective("orpo"))
    built.save(Path(folder), None, {"global_step": 1})
    every = list(built.whole_parameters())
    again = engine(CUT, THREE_LAYERS)
    again.load(Path(folder), None)
    saved, read = dict(built.named_parameters()), dict(again.named_parameters())
    with pytest.raises(EngineError) as error:
        engine(CASE, THREE_LAYERS).load(Path(folder), None)
    from neuronx_distributed.pipeline.partition import create_partitions

    return {
        "loss": output.loss,
        "gradients": gradients_of(built),
        "whole": every,
        "read": saved.keys() == read.keys() and all(torch.equal(saved[n], read[n]) for n in saved),
        "refusal": str(error.value),
        "nxds own": {sizes: tuple(create_partitions(sizes[1], list(range(sizes[0])))) for sizes in SIZES},
    }


def logps() -> dict[str, Any]:
    """Of the policy, of another reference, of a copy of the policy; and what else is read."""
    built = start(CASE, THREE_LAYERS)
    batches = batches_of(built, "none")
    policy = [built.response_logps(b) for b in batches]
    built.load_reference(weights(1, THREE_LAYERS))
    other = [built.response_logps(b, reference=True) for b in batches]
    built.load_reference(None)
    copied = [built.response_logps(b, reference=True) for b in batches]
    statistics = built._runner.forward(batches, wanted=STATISTICS)
    with pytest.raises(EngineError) as error:
        odd = batches_of(built, "none", 75)
        built.evaluate([batches[0], odd[0]], objective("orpo"))
    return {
        "batches": batches,
        "policy": policy,
        "other": other,
        "copied": copied,
        "statistics": [result[:2] for result in statistics],
        "refusal": str(error.value),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    require_nxd()
    folder = tmp_path_factory.mktemp("ranks")
    jobs = {"rounds": (rounds, ()), "logps": (logps, ()), "cut": (cut_otherwise, (str(folder / "step=1"),))}
    found = dict(zip(jobs, run_ranks(2, list(jobs.values()), folder / "files"), strict=True))
    return {**found, "folder": folder / "step=1"}


def test_each_shape_and_count_trains_as_the_plain_model(results: Any) -> None:
    """Through one engine that meets them in turn. Loss to 1e-6; gradients to 2e-6 of the largest entry: over
    three layers they round to 1.3e-6, without a pipeline, too."""
    ranks = results["rounds"]
    sizes = ranks[0]["sizes"]
    assert sizes == [(4, 1, 64), (6, 2, 96), (6, 2, 75), (3, 1, 75), (4, 1, 64)]
    model = plain(0, THREE_LAYERS)
    value = orpo_loss(model, examples().examples, 0.1)
    gradient = gradients(value, model)
    largest = max(float(g.abs().max()) for g in gradient.values())
    for turn in range(len(ROUNDS)):
        for rank in ranks:
            loss, _, validation = rank["steps"][turn]
            assert float(loss) == pytest.approx(float(value), rel=1e-6)
            assert float(validation) == pytest.approx(float(value), rel=1e-6)
        got = whole(CASE, THREE_LAYERS, [rank["steps"][turn][1] for rank in ranks])
        for name, tensor in gradient.items():
            assert float((got[name] - tensor).abs().max()) <= 2e-6 * largest, name


def test_stages_of_chosen_sizes_train_as_the_plain_model(results: Any) -> None:
    """``pipeline_cuts`` after the second of three layers: loss to 1e-6, gradients to 2e-6 (see above)."""
    ranks = results["cut"]
    model = plain(0, THREE_LAYERS)
    value = orpo_loss(model, examples().examples, 0.1)
    gradient = gradients(value, model)
    largest = max(float(g.abs().max()) for g in gradient.values())
    assert {n.split(".")[2] for n in ranks[0]["gradients"] if ".layers." in n} == {"0", "1"}
    assert {n.split(".")[2] for n in ranks[1]["gradients"] if ".layers." in n} == {"2"}
    got = whole(CUT, THREE_LAYERS, [rank["gradients"] for rank in ranks])
    for name, tensor in gradient.items():
        assert float((got[name] - tensor).abs().max()) <= 2e-6 * largest, name
    for rank in ranks:
        assert float(rank["loss"]) == pytest.approx(float(value), rel=1e-6)
    for name, tensor in ranks[0]["whole"]:
        assert torch.equal(tensor, model.get_parameter(name)), name


def test_a_checkpoint_goes_on_with_the_same_cuts_alone(results: Any) -> None:
    """The optimizer's state is numbered within a stage; the weights can be read whatever the cuts."""
    for rank in results["cut"]:
        assert rank["read"] and "pipeline_cuts [1] (now [0])" in rank["refusal"]
        assert "model.pipeline_cuts as they were" in rank["refusal"]
    source = NxDTFolder(results["folder"], THREE_LAYERS)
    wanted = dict(plain(0, THREE_LAYERS).named_parameters())
    assert source.partition.cuts == (1,) and set(source.names()) == set(wanted)
    for name in source.names():
        assert torch.equal(source.read(name), wanted[name]), name


def test_even_shares_are_where_nxd_cuts_by_itself(results: Any) -> None:
    assert results["cut"][0]["nxds own"] == {sizes: even_cuts(*sizes) for sizes in SIZES}


def test_a_rank_holds_its_stage_alone(results: Any) -> None:
    """Three layers on two stages: one, and two in the last, as NxD cuts."""
    first, last = results["rounds"]
    layer = len([name for name in first["steps"][0][1] if ".layers.0." in name])
    assert first["held"] == len(first["steps"][0][1]) == 1 + layer
    assert last["held"] == len(last["steps"][0][1]) == 2 * layer + 2


def test_stages_send_hidden_states_alone(results: Any) -> None:
    """No masks, and no rotary angles: each stage has the tokens' positions and bounds."""
    for rank in results["rounds"]:
        assert rank["sent"] == [0, 1] * 4, "a model for each shape and count"


def test_the_first_rank_gets_every_stages_weights(results: Any) -> None:
    first, last = results["rounds"]
    wanted = dict(plain(0, THREE_LAYERS).named_parameters())
    assert last["whole"] == [] and {name for name, _ in first["whole"]} == set(wanted)
    for name, tensor in first["whole"]:
        assert torch.equal(tensor, wanted[name]), name


def test_every_stage_knows_the_log_probs(results: Any) -> None:
    wanted = {key: scores(plain(seed, THREE_LAYERS)) for key, seed in (("policy", 0), ("other", 1))}
    wanted["copied"] = wanted["policy"]
    for rank in results["logps"]:
        for key, scored in wanted.items():
            seen = 0
            for batch, found in zip(rank["batches"], rank[key], strict=True):
                for row, slot in batch.slot_valid.nonzero().tolist():
                    place = int(batch.record_index[row, slot]), int(batch.slot_role[row, slot])
                    assert float(found[row, slot]) == pytest.approx(scored[place], rel=2e-6)
                    seen += 1
            assert seen == len(scored)


def scores(model: Decoder) -> dict[tuple[int, int], float]:
    with torch.no_grad():
        pairs = [pair_logps(model, example) for example in examples().examples]
    return {(i, role): float(value) for i, pair in enumerate(pairs) for role, value in enumerate(pair)}


def test_what_else_is_read_comes_with_them(results: Any) -> None:
    model = Decoder(THREE_LAYERS, DenseAttention())
    model.load_state_dict(plain(0, THREE_LAYERS).state_dict())
    for rank in results["logps"]:
        for batch, (logps, statistics) in zip(rank["batches"], rank["statistics"], strict=True):
            wanted_logps, wanted = reference(model, batch)
            assert torch.allclose(logps, wanted_logps, atol=2e-6, rtol=1e-6)
            assert len(statistics) == len(STATISTICS)
            for got, want in zip(statistics, wanted, strict=True):
                assert torch.allclose(got, want, atol=2e-6, rtol=1e-6)


@torch.no_grad()
def reference(model: Decoder, batch: Batch) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    context = DenseAttention().prepare(batch.key_start, batch.key_stop)
    hidden = model(batch.input_ids, batch.position_ids, context)
    index = batch.response_positions[:, :, None].expand(-1, -1, hidden.shape[-1])
    return token_logps(hidden.gather(1, index), model.head_weight, batch.labels, wanted=STATISTICS)


def test_micro_batches_of_several_shapes_are_refused(results: Any) -> None:
    for rank in results["logps"]:
        assert rank["refusal"].endswith("micro-batches of one shape at a time, but got [(2, 75), (2, 96)]")
