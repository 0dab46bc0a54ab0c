"""Checkpoints of the NxD engine: written through NxD, gone on from, and read by the converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_fixture
import pytest
import torch
from native_checkpoint_fixture import as_earlier_version
from nxd_fixture import (
    CONFIG,
    Case,
    dataset,
    engine,
    examples,
    one_copy,
    optimizer_of,
    plain,
    require_nxd,
    run_ranks,
    settings_of,
    snapshot,
    start,
    train,
    whole,
)

from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.checkpoint import SUMMARY, checkpoint_step, is_checkpoint, read_extra
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.nxdt import NxDTFolder

pytestmark = pytest.mark.nxd
CASES = [
    Case(tp=2, dp=2, sp=True),
    Case(tp=4, kv=2, sp=True, qkv="fused"),
    Case(tp=2, dp=2, qkv="separate"),
    Case(tp=2, pp=2, sp=True),
]
PRECISIONS = ["fp32", "bf16"]
CONVERTED = Case(tp=4, kv=2, sp=True)
LAST = 4


def straight(case: Case, precision: str) -> Any:
    built = start(case, **settings_of(precision))
    losses = train(built, optimizer_of(built), LAST)
    return losses, snapshot(built)


def stop_and_go_on(case: Case, precision: str, folder: str) -> Any:
    settings = settings_of(precision)
    first = start(case, **settings)
    optimizer = optimizer_of(first)
    losses = train(first, optimizer, 2)
    extra = {"global_step": 2, "tensor": torch.arange(3), "nested": {"a": [1, 2.5, None, "x"]}}
    first.save(Path(folder), optimizer, extra)
    second = engine(case, **settings)
    optimizer = optimizer_of(second)
    assert second.load(Path(folder), None)["global_step"] == 2
    found = second.load(Path(folder), optimizer)
    losses += train(second, optimizer, LAST - 2)
    return losses, snapshot(second), found, snapshot(first)


def refusals(case: Case, other: Case, folder: str) -> list[str]:
    """What ``load`` says of folders that do not fit: cut short, damaged, of other sizes, not there."""
    first = start(case)
    first.save(Path(folder), optimizer_of(first), {})
    shard = Path(folder) / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt"
    if first.topology.rank == 0:
        shard.write_bytes(shard.read_bytes()[:-5])
    first.barrier()
    found = [refusal(first, Path(folder))]
    if first.topology.rank == 0:
        as_earlier_version(Path(folder), SUMMARY)
    first.barrier()
    found += [refusal(first, Path(folder)), refusal(first, Path(folder) / "no")]
    return [*found, refusal(engine(other), Path(folder))]


def refusal(built: Any, folder: Path) -> str:
    with pytest.raises(EngineError) as error:
        built.load(folder, None)
    return str(error.value)


def unwritable(case: Case, folder: str) -> str:
    """A file where a folder is wanted: every rank is told."""
    built = start(case)
    with pytest.raises(EngineError) as error:
        built.save(Path(folder) / "step=1", None, {})
    return str(error.value)


def read_converted(case: Case, shards: str) -> Any:
    """The converter's shards: by NxD's own loader, and as a source of weights."""
    built = engine(case)
    import neuronx_distributed as nxd

    tensors: dict[str, torch.Tensor] = {}
    nxd.load_checkpoint(shards, tag=".", model=tensors)
    built.load_weights(NxDTFolder(shards, CONFIG))
    parameters = dict(built.named_parameters())
    equal = set(tensors) == set(parameters) and all(torch.equal(tensors[n], parameters[n]) for n in tensors)
    data = dataset(built.topology)
    return equal, [(b, built.response_logps(b)) for b in data[tuple(range(len(examples())))]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[Any, Any]:
    """Everything that four ranks are asked, in one go: they take long to start."""
    require_nxd()
    write_hf_folder(folder / "hf", CONFIG, [(n, p.detach()) for n, p in plain(0).named_parameters()])
    checkpoint_fixture.run(folder / "hf", folder / "shards", to="nxdt", tp=4, kv_multiplier=2)
    (folder / "file").write_text("")
    jobs: dict[Any, Any] = {
        "refusals": (refusals, (CASES[0], CONVERTED, str(folder / "bad"))),
        "unwritable": (unwritable, (CASES[0], str(folder / "file"))),
        "converted": (read_converted, (CONVERTED, str(folder / "shards"))),
    }
    for index, case in enumerate(CASES):
        for precision in PRECISIONS:
            jobs["once", case, precision] = straight, (case, precision)
            place = str(folder / f"{index}{precision}" / "step=2")
            jobs["twice", case, precision] = stop_and_go_on, (case, precision, place)
    return dict(zip(jobs, run_ranks(4, list(jobs.values()), folder / "ranks"), strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_bit_for_bit(results: Any, folder: Path, case: Case, precision: str) -> None:
    ranks = zip(results["once", case, precision], results["twice", case, precision], strict=True)
    for (losses, final), (resumed_losses, resumed, extra, _) in ranks:
        assert losses == resumed_losses
        for name, tensor in final.items():
            assert torch.equal(tensor, resumed[name]), name
        assert extra["nested"] == {"a": [1, 2.5, None, "x"]} and torch.equal(extra["tensor"], torch.arange(3))
    written = folder / f"{CASES.index(case)}{precision}" / "step=2"
    assert [f.name for f in written.parent.iterdir()] == [written.name], "leftovers"
    assert is_checkpoint(written) and checkpoint_step(written) == 2
    assert read_extra(written)["global_step"] == 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_converter_reads_it(results: Any, folder: Path, case: Case, precision: str) -> None:
    source = NxDTFolder(folder / f"{CASES.index(case)}{precision}" / "step=2", CONFIG)
    assert source.partition.tp == case.tp and source.partition.kv_multiplier == case.kv
    assert source.partition.pp == case.pp
    saved = [rank[3] for rank in results["twice", case, precision]]
    wanted = whole(case, CONFIG, one_copy(case, saved, 0))
    for name in source.names():
        assert source.dtype(name) == (torch.float32 if precision == "fp32" else torch.bfloat16)
        assert torch.equal(source.read(name), wanted[name].to(source.dtype(name))), name


def test_what_does_not_fit_is_refused(results: Any, folder: Path) -> None:
    cut, damaged, missing, sizes = results["refusals"][0]
    assert all(rank == results["refusals"][0] for rank in results["refusals"])
    assert "incomplete: model/dp_rank_00_tp_rank_01_pp_rank_00.pt has" in cut
    assert "is damaged" in damaged and "missing" in missing
    assert "tensor 2 (now 4)" in sizes and "kv_multiplier 1 (now 2)" in sizes
    assert checkpoint_step(folder / "file") is None


def test_every_rank_is_told_that_a_save_failed(results: Any) -> None:
    assert len(set(results["unwritable"])) == 1
    assert "cannot write checkpoint" in results["unwritable"][0]


def test_the_converters_shards_give_transformers_log_probs(results: Any, folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    wanted = {}
    for index, example in enumerate(examples().examples):
        for role, response in enumerate(example.responses):
            ids = torch.cat([torch.from_numpy(example.prompt), torch.from_numpy(response)]).long()[None]
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
            wanted[index, role] = float(logps[len(example.prompt) - 1 :].sum())
    for equal, scored in results["converted"]:
        assert equal
        seen = 0
        for batch, logps in scored:
            for row, slot in batch.slot_valid.nonzero().tolist():
                key = int(batch.record_index[row, slot]), int(batch.slot_role[row, slot])
                assert float(logps[row, slot]) == pytest.approx(wanted[key], rel=2e-6)
                seen += 1
        assert seen == len(wanted)
