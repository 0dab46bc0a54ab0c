"""A file per tensor: written by the NxD engine on torch_xla's CPU device, read in CPU mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nxd_fixture import CONFIG, Case, engine, optimizer_of, require_nxd, run_ranks, snapshot, weights

pytestmark = [pytest.mark.nxd, pytest.mark.xla]


def write(folder: str) -> Any:
    """A checkpoint with moments that are not zero, and what is in it."""
    from nxdt_align.engines.nxd import compat

    platform = compat.start("xla")
    from nxdt_align.engines.nxd.engine import NxDEngine
    from nxdt_align.engines.nxd.mesh import make_mesh
    from nxdt_align.engines.nxd.settings import Parallel, SaveOptions

    mesh = make_mesh(Parallel(qkv="split"), platform)
    built = NxDEngine(CONFIG, mesh, save_options=SaveOptions(xser=True))
    built.load_weights(weights(0))
    optimizer = optimizer_of(built)
    for index, (_, parameter) in enumerate(built.named_parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * index)
    optimizer.step()
    built.save(Path(folder), optimizer, {"global_step": 1})
    return {name: tensor.cpu() for name, tensor in snapshot(built).items()}, moments(optimizer)


def moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state["exp_avg"].cpu() for state in optimizer.state_dict()["state"].values()]


def read(case: Case, folder: str) -> Any:
    built = engine(case)
    optimizer = optimizer_of(built)
    built.load(Path(folder), optimizer)
    return snapshot(built), moments(optimizer)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    require_nxd()
    folder = tmp_path_factory.mktemp("xser")
    ((content,),) = run_ranks(1, [(write, (str(folder / "step=1"),))], folder / "writer", gloo=False)
    assert list((folder / "step=1" / "model").glob("*.pt.tensors/tensor_0.pt"))
    return folder / "step=1", content


@pytest.mark.parametrize("ranks", [1, 2])
def test_data_parallel_ranks_in_cpu_mode_read_it(written: tuple[Path, Any], ranks: int) -> None:
    """NxD's own reader sums over the ranks."""
    folder, (tensors, wanted_moments) = written
    (found,) = run_ranks(ranks, [(read, (Case(dp=ranks), str(folder)))], folder.parent / f"readers-{ranks}")
    for weights_of_rank, moments_of_rank in found:
        assert set(weights_of_rank) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(weights_of_rank[name], tensor), name
        assert len(moments_of_rank) == len(wanted_moments) and any(m.any() for m in wanted_moments)
        assert all(torch.equal(a, b) for a, b in zip(moments_of_rank, wanted_moments, strict=True))
