"""Processes on TorchNeuron's device, with a process group of its name that takes no tensor on the CPU."""

from __future__ import annotations

from pathlib import Path

from rank_processes import run_forked

RANK = """
import logging, os, sys, types, warnings
from dataclasses import replace
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeProcessGroup

torch.utils.rename_privateuse1_backend("neuron")
module = types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, is_initialized=lambda: True)
torch._register_device_module("neuron", module)
moved_to = []
torch.accelerator.set_device_index = lambda index: moved_to.append((index, dist.is_initialized()))
dist.Backend.register_backend(
    "neuron",
    lambda store, rank, size, timeout: FakeProcessGroup._create_internal(rank, size),
    devices=["neuron"],
)
rank = int(os.environ["RANK"])
given = []
join = dist.init_process_group
def joined(*arguments, **settings):
    given.append((arguments, settings))
    return join(*arguments, init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2, **settings)
dist.init_process_group = joined

from nxdt_align.config.schema import Config, DistributedStrategyConfig, TrainerConfig
from nxdt_align.engines.native.mesh import Groups
from nxdt_align.engines.native.settings import Parallel
from nxdt_align.engines.ranks import Ranks
from nxdt_align.run.contracts import RunEnv
from nxdt_align.run.mode import RunMode
from nxdt_align.run.processes import device, end_processes, start_processes

env = RunEnv(rank=rank, world_size=2, local_rank=rank)
config = replace(
    Config(),
    trainer=TrainerConfig(accelerator="neuron"),
    distributed_strategy=DistributedStrategyConfig(timeout_minutes=2, tensor_model_parallel_size=2),
)
where = device(config, env, RunMode())
assert moved_to == [], "the group gives a process its core"
logging.basicConfig(stream=sys.stdout, level=25, format="%(message).43s")
topology = start_processes(config, env, where)
assert given == [(("neuron",), {"timeout": timedelta(minutes=2)})], given
assert moved_to == [(rank, True)], moved_to
ranks = Ranks()
assert dist.get_backend() == "neuron" and dist.get_backend(ranks.group) == "gloo"
print(topology.rank, ranks.gather(f"of {rank}"), ranks.broadcast(rank + 7), ranks.largest(rank), flush=True)
warnings.simplefilter("error")  # torch's, of each group whose timeout it cannot set
groups = Groups.join(Parallel(tensor=2), topology, "neuron", timeout=timedelta(minutes=2))
assert groups.tensor.size == 2 and dist.get_backend(groups.tensor.group) == "neuron"
warnings.simplefilter("default")
ranks.barrier()
end_processes()
assert not dist.is_initialized() and Ranks().group is None
"""


def test_the_devices_group_and_one_for_the_host(tmp_path: Path) -> None:
    """Values on the host travel over gloo: TorchNeuron's group takes no tensor on the CPU, and an object over
    it would be a graph of each size."""
    ended = run_forked(2, str(tmp_path / "rendezvous"), script=RANK)
    ended.well()
    told = "distributed_strategy.timeout_minutes: count\n"
    assert ended.said == [f"{told * (rank == 0)}{rank} ['of 0', 'of 1'] 7 1\n" for rank in range(2)]
