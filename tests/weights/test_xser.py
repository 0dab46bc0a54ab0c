"""xser files against torch_xla's own reader and writer, and NxD's, on torch_xla's CPU device.

PYTHONPATH=src:NXD/src pytest -m "xla or nxd" tests/weights   (NXD: neuronx-distributed's source)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_fixture import CONFIG, SIZES, MakeHF, load, run, same_folders
from nxd_source import supply_neuron_only_modules
from torch import Tensor

from nxdt_align.weights.nxdt_files import shard_name

SHARDS = [shard_name(tp, pp) for tp in range(SIZES["tp"]) for pp in range(SIZES["pp"])]


@pytest.fixture
def xser() -> Any:
    if importlib.util.find_spec("torch_xla") is None:
        pytest.skip("torch_xla is not here")
    os.environ.setdefault("PJRT_DEVICE", "CPU")
    import torch_xla.utils.serialization

    return torch_xla.utils.serialization


def on_device(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch_xla

    return {name: tensor.to(torch_xla.device()) for name, tensor in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """The same names in the same order, dtypes and values."""
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name].cpu(), other[name]) for name in one
    )


@pytest.mark.xla
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_xla_reads_what_we_write(
    dtype: torch.dtype, xser: Any, make_hf: MakeHF, tmp_path: Path
) -> None:
    make_hf(CONFIG, dtype)
    run(tmp_path / "hf", tmp_path / "plain", **SIZES)
    run(tmp_path / "hf", tmp_path / "xser", **SIZES, xser=True)
    for name in SHARDS:
        found = xser.load(str(tmp_path / "xser" / "model" / name))
        assert equal(found, load(tmp_path / "plain" / "model" / name))


@pytest.mark.xla
def test_we_read_what_torch_xla_writes(xser: Any, make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG, torch.bfloat16), tmp_path / "plain", **SIZES)
    (tmp_path / "theirs" / "model").mkdir(parents=True)
    for name in SHARDS:
        shard = on_device(load(tmp_path / "plain" / "model" / name))
        xser.save(shard, str(tmp_path / "theirs" / "model" / name), master_only=False)
    assert (tmp_path / "theirs" / "model" / f"{SHARDS[0]}.tensors").is_dir()
    config = tmp_path / "plain" / "config.json"
    run(tmp_path / "theirs", tmp_path / "back", config=config, load_xser=True)
    same_folders(tmp_path / "hf", tmp_path / "back")


def in_a_process(function: Callable[..., None], *arguments: Any) -> None:
    """NxD's process groups and environment stay out of this process. Raises what the function raises."""
    pytest.importorskip("torch_xla")
    if importlib.util.find_spec("neuronx_distributed") is None:
        pytest.skip("neuronx_distributed is not here")
    torch.multiprocessing.spawn(_started, (function, arguments))


def _started(_: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"NXD_CPU_MODE": "0", "PJRT_DEVICE": "CPU", "HOST_WORLD_SIZE": "1"}
    supply_neuron_only_modules()
    import neuronx_distributed.parallel_layers.parallel_state as state
    import torch.distributed as dist
    import torch_xla.distributed.xla_backend  # noqa: F401
    from torch._C._distributed_c10d import HashStore

    dist.init_process_group("xla", store=HashStore(), rank=0, world_size=1)
    state.initialize_model_parallel(tensor_model_parallel_size=1)
    function(*arguments)


def _load_through_nxd(folder: str, plain: str) -> None:
    from neuronx_distributed.parallel_layers.checkpointing import _xser_load
    from neuronx_distributed.trainer.checkpoint import (
        _xser_load_data,
        create_checkpoint_storage,
        load_checkpoint,
    )

    storage, tag = create_checkpoint_storage(folder), "pretrained_ckpt"
    assert storage.is_checkpoint_xser(tag) and storage.list_completed_checkpoint_tags() == [tag]
    for name in SHARDS:
        expected = load(Path(plain) / "model" / name)
        assert equal(_xser_load_data(storage, f"{tag}/model/{name}"), expected)
        assert equal(_xser_load(f"{folder}/{tag}/model/{name}"), expected)
    found: dict[str, Tensor] = {}
    load_checkpoint(folder, tag=None, model=found)  # type: ignore[arg-type]
    assert equal(found, load(Path(plain) / "model" / SHARDS[0]))


@pytest.mark.nxd
def test_nxd_loads_what_we_write(make_hf: MakeHF, tmp_path: Path) -> None:
    """Each rank's file through NxD's two readers, and the first rank's as a run resumes from it."""
    run(make_hf(CONFIG), tmp_path / "plain", **SIZES)
    run(tmp_path / "hf", tmp_path / "run" / "pretrained_ckpt", **SIZES, xser=True)
    in_a_process(_load_through_nxd, str(tmp_path / "run"), str(tmp_path / "plain"))


def _save_through_nxd(folder: str, plain: str) -> None:
    import neuronx_distributed.trainer.checkpoint as nxd

    nxd.save_checkpoint(folder, "step_1", model=on_device(load(Path(plain))), use_xser=True)
    nxd.CheckpointIOState.wait_all(nxd.g_iostate)


@pytest.mark.nxd
def test_we_read_what_nxd_saves(make_hf: MakeHF, tmp_path: Path) -> None:
    run(make_hf(CONFIG), tmp_path / "plain")
    plain = tmp_path / "plain" / "model" / shard_name(0, 0)
    in_a_process(_save_through_nxd, str(tmp_path / "run"), str(plain))
    assert Path(f"{tmp_path}/run/step_1/model/{shard_name(0, 0)}.tensors").is_dir()
    config = tmp_path / "plain" / "config.json"
    run(tmp_path / "run" / "step_1", tmp_path / "back", config=config, load_xser=True)
    same_folders(tmp_path / "hf", tmp_path / "back")
