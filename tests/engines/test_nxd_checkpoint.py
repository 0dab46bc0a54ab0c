"""Checkpoints of the NxD engine: written through NxD, gone on from, and read by the converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoint_fixture
import pytest
import torch
from nxd_fixture import (
    CONFIG,
    Case,
    dataset,
    engine,
    examples,
    objective,
    plain,
    require_nxd,
    run_ranks,
    weights,
    whole,
)

from nxdt_align.checkpoint.hf import write_hf_folder
from nxdt_align.checkpoint.nxdt import NxDTFolder
from nxdt_align.engines.base import EngineError
from nxdt_align.engines.nxd.checkpoint import checkpoint_step, is_checkpoint, read_extra

pytestmark = pytest.mark.nxd
CASES = [
    Case(tp=2, dp=2, sp=True),
    Case(tp=4, kv=2, sp=True, qkv="fused"),
    Case(tp=2, qkv="separate"),
]
LAST = 4


def optimizer_of(built: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in built.named_parameters()], lr=1e-2)


def train(built: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    losses = []
    data = dataset(built.topology)
    for _ in range(steps):
        output = built.step(data[tuple(range(len(examples())))], objective("orpo"))
        built.clip_gradients(1.0)
        optimizer.step()
        losses.append(output.loss)
    return losses


def start(case: Case, **settings: Any) -> Any:
    built = engine(case, **settings)
    built.load_weights(weights(0))
    return built


def snapshot(built: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in built.named_parameters()}


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


def settings_of(precision: str) -> dict[str, Any]:
    if precision == "fp32":
        return {}
    from nxdt_align.engines.nxd.precision import Precision
    from nxdt_align.engines.nxd.saving import SaveOptions

    return {
        "precision": Precision(torch.bfloat16, masters=True),
        "save_options": SaveOptions(low_precision=torch.bfloat16),
    }


def refusals(case: Case, other: Case, folder: str) -> list[str]:
    """What ``load`` says of folders that do not fit."""
    built = engine(case)
    found = [refusal(built, Path(folder)), refusal(built, Path(folder) / "no")]
    return [found[0], refusal(engine(other), Path(folder)), found[1]]


def refusal(built: Any, folder: Path) -> str:
    with pytest.raises(EngineError) as error:
        built.load(folder, None)
    return str(error.value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_goes_on_bit_for_bit(case: Case, precision: str, tmp_path: Path) -> None:
    require_nxd()
    folder = tmp_path / "run" / "step=2"
    jobs = [(straight, (case, precision)), (stop_and_go_on, (case, precision, str(folder)))]
    once, twice = run_ranks(case.world, jobs, tmp_path / "ranks")
    for (losses, final), (resumed_losses, resumed, extra, _) in zip(once, twice, strict=True):
        assert losses == resumed_losses
        for name, tensor in final.items():
            assert torch.equal(tensor, resumed[name]), name
        assert extra["nested"] == {"a": [1, 2.5, None, "x"]} and torch.equal(extra["tensor"], torch.arange(3))
    assert [f.name for f in folder.parent.iterdir()] == [folder.name], "leftovers"
    assert is_checkpoint(folder) and checkpoint_step(folder) == 2
    assert read_extra(folder)["global_step"] == 2

    source = NxDTFolder(folder, CONFIG)
    assert source.partition.tp == case.tp and source.partition.kv_multiplier == case.kv
    saved = [rank[3] for rank in twice][: case.tp]
    for name in source.names():
        assert source.dtype(name) == (torch.float32 if precision == "fp32" else torch.bfloat16)
    wanted = whole(case, CONFIG, saved)
    for name in source.names():
        assert torch.equal(source.read(name), wanted[name].to(source.dtype(name))), name


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    require_nxd()
    case, folder = CASES[0], tmp_path / "step=2"
    run_ranks(case.world, [(stop_and_go_on, (case, "fp32", str(folder)))], tmp_path / "first")
    shard = folder / "model" / "dp_rank_00_tp_rank_01_pp_rank_00.pt"
    shard.write_bytes(shard.read_bytes()[:-5])
    job = (refusals, (case, Case(tp=4, kv=2), str(folder)))
    (found,) = {tuple(r) for r in run_ranks(4, [job], tmp_path / "second")[0]}
    assert "incomplete: model/dp_rank_00_tp_rank_01_pp_rank_00.pt has" in found[0]
    assert checkpoint_step(folder) is None
    summary = json.loads((folder / "nxdt_align.json").read_text())
    summary["files"][str(shard.relative_to(folder))] = shard.stat().st_size
    (folder / "nxdt_align.json").write_text(json.dumps(summary))
    (found,) = {tuple(r) for r in run_ranks(4, [job], tmp_path / "third")[0]}
    assert "is damaged" in found[0]
    assert "tensor 2 (now 4)" in found[1] and "kv_multiplier 1 (now 2)" in found[1]
    assert "missing" in found[2]


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


def test_the_converters_shards_give_transformers_log_probs(tmp_path: Path) -> None:
    require_nxd()
    transformers = pytest.importorskip("transformers")
    case = Case(tp=4, kv=2, sp=True)
    write_hf_folder(tmp_path / "hf", CONFIG, [(n, p.detach()) for n, p in plain(0).named_parameters()])
    checkpoint_fixture.run(tmp_path / "hf", tmp_path / "shards", to="nxdt", tp=4, kv_multiplier=2)
    (ranks,) = run_ranks(case.world, [(read_converted, (case, str(tmp_path / "shards")))], tmp_path / "ranks")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    wanted = {}
    for index, example in enumerate(examples().examples):
        for role, response in enumerate(example.responses):
            ids = torch.cat([torch.from_numpy(example.prompt), torch.from_numpy(response)]).long()[None]
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
            wanted[index, role] = float(logps[len(example.prompt) - 1 :].sum())
    for equal, scored in ranks:
        assert equal
        seen = 0
        for batch, logps in scored:
            for row, slot in batch.slot_valid.nonzero().tolist():
                key = int(batch.record_index[row, slot]), int(batch.slot_role[row, slot])
                assert float(logps[row, slot]) == pytest.approx(wanted[key], rel=2e-6)
                seen += 1
        assert seen == len(wanted)
