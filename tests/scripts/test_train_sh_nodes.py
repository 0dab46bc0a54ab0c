"""scripts/train.sh as one node of a Slurm or MPI job, as a worker of torchrun, and with several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_sh_fixture import Trainer, after, write_script


@pytest.fixture
def train(repo: Path, tmp_path: Path) -> Trainer:
    return Trainer(repo, tmp_path)


def test_several_processes_run_under_torchrun(train: Trainer) -> None:
    arguments = train("trainer.devices=4", FAKE_PROCESSES="4").trained
    assert arguments[:4] == ["-m", "nxdt_align", "workers", "torchrun"]
    assert after(arguments, "--nproc_per_node") == "4"
    assert after(arguments, "--master_addr") == "localhost"
    assert after(arguments, "--master_port") == "41000-41031"
    at = arguments.index("train") - 1
    assert arguments[at - 1 : at + 2] == ["-m", "nxdt_align", "train"]
    assert arguments[-1] == "trainer.devices=4"


SLURM = {"SLURM_NNODES": "4", "SLURM_NTASKS": "4", "SLURM_NODEID": "2", "SLURM_JOB_ID": "77"}


@pytest.fixture
def scontrol(train: Trainer) -> None:
    script = '#!/bin/sh\n[ "$*" = "show hostnames trn[1-4]" ] && printf "trn1\\ntrn2\\ntrn3\\ntrn4\\n"\n'
    write_script(train.bin / "scontrol", script)


@pytest.mark.usefixtures("scontrol")
def test_slurm_node(train: Trainer) -> None:
    result = train(FAKE_PROCESSES="32", SLURM_JOB_NODELIST="trn[1-4]", SLURM_RESTART_COUNT="1", **SLURM)
    assert result.status == 0
    expected = "-m nxdt_align workers torchrun --nproc_per_node 32 --nnodes 4 --node_rank 2"
    expected += " --master_addr trn1 --master_port 41000 -m nxdt_align train"
    assert " ".join(result.trained).startswith(expected)
    assert "trainer.num_nodes=4" in result.trained
    assert "trainer.num_nodes=4" in result.calls[0]["argv"], (
        "the process count is that of the whole job's config"
    )
    assert result.calls[-1]["env"]["FI_PROVIDER"] == "efa"
    assert (train.cwd / "nemo_experiments/logs/77/1/2/log").exists()


@pytest.mark.usefixtures("scontrol")
def test_slurm_one_process_a_node_still_meets_the_others(train: Trainer) -> None:
    result = train(SLURM_JOB_NODELIST="trn[1-4]", MASTER_PORT="5000", **SLURM)
    assert after(result.trained, "--nproc_per_node") == "1"
    assert after(result.trained, "--master_port") == "5000"


@pytest.mark.usefixtures("scontrol")
def test_slurm_step_on_some_of_the_nodes(train: Trainer) -> None:
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "trn[1-4]"}
    result = train(**SLURM, **step)
    assert after(result.trained, "--nnodes") == "2"


def test_slurm_with_several_tasks_a_node_is_refused(train: Trainer) -> None:
    result = train(**{**SLURM, "SLURM_NTASKS": "128"})
    assert result.status == 1
    assert "128 tasks on 4 nodes" in result.stderr
    assert result.calls == []


def test_slurm_without_host_names_is_refused(train: Trainer) -> None:
    write_script(train.bin / "scontrol", "#!/bin/sh\nexit 1\n")
    result = train(**SLURM)
    assert result.status == 1
    assert "set MASTER_ADDR" in result.stderr


def test_slurm_on_one_node_needs_no_rendezvous(train: Trainer) -> None:
    result = train(SLURM_NNODES="1", SLURM_JOB_ID="78", FAKE_PROCESSES="2")
    assert after(result.trained, "--master_addr") == "localhost"
    assert (train.cwd / "nemo_experiments/logs/78/0/0/log").exists()


MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


def test_mpi_node(train: Trainer) -> None:
    result = train(MASTER_ADDR="10.0.0.1", FAKE_PROCESSES="32", **MPI)
    expected = "-m nxdt_align workers torchrun --nproc_per_node 32 --nnodes 2 --node_rank 1"
    expected += " --master_addr 10.0.0.1 --master_port 41000 -m nxdt_align train"
    assert " ".join(result.trained).startswith(expected)
    assert result.calls[-1]["env"]["CCOM_SOCKET_IFNAME"] == "eth0"


@pytest.mark.skipif(Path("/nodelist_helper.py").exists(), reason="this machine can name the job's hosts")
def test_mpi_without_master_address_is_refused(train: Trainer) -> None:
    result = train(**MPI)
    assert result.status == 1
    assert "MASTER_ADDR" in result.stderr
    assert result.calls == []


def test_mpi_with_several_tasks_a_node_is_refused(train: Trainer) -> None:
    result = train(MASTER_ADDR="h", OMPI_COMM_WORLD_LOCAL_SIZE="32", **MPI)
    assert result.status == 1
    assert "32 tasks on one node" in result.stderr


def test_worker_of_torchrun_trains_as_the_rank_that_it_is(train: Trainer) -> None:
    result = train(TORCHELASTIC_RUN_ID="job", GROUP_WORLD_SIZE="2", RANK="5")
    assert [call["argv"][:3] for call in result.calls] == [["-m", "nxdt_align", "train"]]
    assert result.trained[-1] == "trainer.num_nodes=2"
    assert (train.cwd / "nemo_experiments/logs/job/rank_5/log").exists()


@pytest.mark.usefixtures("scontrol")
def test_print_env_is_one_process_that_sees_the_nodes_environment(train: Trainer) -> None:
    result = train("trainer.max_steps=3", "--print-env", SLURM_JOB_NODELIST="trn[1-4]", **SLURM)
    (call,) = result.calls
    arguments = call["argv"]
    assert arguments[:3] == ["-m", "nxdt_align", "train"]
    assert arguments[-3:] == ["trainer.num_nodes=4", "trainer.max_steps=3", "--print-env"]
    assert call["env"]["FI_PROVIDER"] == "efa"
    assert not (train.cwd / "nemo_experiments").exists(), "nothing is logged"


def test_what_nxd_training_exports_for_efa_is_set_and_may_be_overridden(train: Trainer) -> None:
    exports = {"FI_EFA_USE_DEVICE_RDMA": "1", "FI_PROVIDER": "efa", "FI_EFA_FORK_SAFE": "1"}
    environment = train(MASTER_ADDR="h", **MPI).calls[-1]["env"]
    assert {name: environment[name] for name in exports} == exports
    environment = train(MASTER_ADDR="h", FI_PROVIDER="tcp", **MPI).calls[-1]["env"]
    assert environment["FI_PROVIDER"] == "tcp"
    assert "FI_PROVIDER" not in train().calls[-1]["env"], "one node needs no EFA"
