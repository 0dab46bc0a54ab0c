"""scripts/train.sh with a recorder in the interpreter's place: what it starts, where it logs, how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# Stands for python: answers "processes", and writes down every call.
RECORDER = """#!{python}
import json, os, signal, sys, time
with open({calls!r}, "a") as file:
    file.write(json.dumps({{"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}) + "\\n")
if "processes" in sys.argv:
    if os.environ.get("FAKE_CONFIG_ERROR"):
        sys.exit("error: trainer.devices must be positive")
    print(os.environ.get("FAKE_PROCESSES", "1"))
    sys.exit(0)
print("training on stdout", flush=True)
print("training on stderr", file=sys.stderr, flush=True)
if os.environ.get("FAKE_SLEEP"):
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: (print("asked to stop", flush=True), sys.exit(17)))
    print("ready", flush=True)
    time.sleep(600)
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""


def write_script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@dataclass
class Result:
    status: int
    stdout: str
    stderr: str
    calls: list[dict[str, Any]]

    @property
    def trained(self) -> list[str]:
        """Arguments of the call that starts training, which must be the last."""
        return list(self.calls[-1]["argv"])


class Trainer:
    """Runs train.sh from a folder of its own, with nothing of this process's environment but PATH."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo, self.folder = repo, folder
        self.script = str(repo / "examples" / "train.sh")
        self.calls = folder / "calls.jsonl"
        self.bin = folder / "bin"
        self.bin.mkdir()
        recorder = RECORDER.format(python=sys.executable, calls=str(self.calls))
        self.python = write_script(self.bin / "recorder", recorder)
        self.cwd = folder / "work"
        self.cwd.mkdir()

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "NXDT_ALIGN_PYTHON": str(self.python), **variables}

    def __call__(self, *arguments: str, **variables: str) -> Result:
        done = subprocess.run(
            [self.script, *arguments],
            cwd=self.cwd,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return Result(done.returncode, done.stdout, done.stderr, [json.loads(line) for line in lines])


@pytest.fixture
def train(repo: Path, tmp_path: Path) -> Trainer:
    return Trainer(repo, tmp_path)


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def test_one_process_runs_the_trainer_itself(train: Trainer) -> None:
    result = train()
    assert result.status == 0
    conf = str(train.repo / "conf")
    common = ["--config-path", conf, "--config-name", "hf_llama3_8B_DPO_config", "trainer.num_nodes=1"]
    assert [call["argv"] for call in result.calls] == [
        ["-m", "nxdt_align", "processes", *common],
        ["-m", "nxdt_align", "train", *common],
    ]
    assert result.calls[-1]["cwd"] == str(train.cwd), "experiments go under the current folder"
    assert result.calls[-1]["env"]["PYTHONPATH"] == str(train.repo / "src")


def test_no_dated_version_reaches_the_trainer(train: Trainer) -> None:
    """A dated NEMO_EXPM_VERSION is what keeps NxD Training's auto-resume from ever finding its run."""
    assert "NEMO_EXPM_VERSION" not in train().calls[-1]["env"]


def test_examples_holds_the_same_script_and_configs(repo: Path) -> None:
    assert (repo / "examples" / "train.sh").resolve() == repo / "scripts" / "train.sh"
    assert (repo / "examples" / "conf").resolve() == repo / "conf"


@pytest.mark.parametrize("name", ["hf_llama3_8B_ORPO_config", "hf_llama3_8B_ORPO_config.yaml"])
def test_config_by_name(train: Trainer, name: str) -> None:
    arguments = train(CONF_FILE=name).trained
    assert after(arguments, "--config-path") == str(train.repo / "conf")
    assert after(arguments, "--config-name") == "hf_llama3_8B_ORPO_config"


@pytest.mark.parametrize(
    "given", ["{folder}/my conf/run 1.yaml", "../my conf/run 1", "../my conf/run 1.yaml"]
)
def test_config_by_path(train: Trainer, given: str) -> None:
    folder = train.folder / "my conf"
    folder.mkdir()
    (folder / "run 1.yaml").write_text("name: x\n")
    arguments = train(CONF_FILE=given.format(folder=train.folder)).trained
    assert after(arguments, "--config-path") == str(folder)
    assert after(arguments, "--config-name") == "run 1"


def test_config_in_the_current_folder(train: Trainer) -> None:
    (train.cwd / "mine.yaml").write_text("name: x\n")
    assert after(train(CONF_FILE="mine").trained, "--config-path") == str(train.cwd)


def test_runs_from_examples(train: Trainer) -> None:
    train.script = "./train.sh"
    train.cwd = train.repo / "examples"
    result = train(LOG_PATH=str(train.folder / "logs"), CONF_FILE="hf_llama3_8B_ORPO_config")
    assert result.status == 0
    assert result.calls[-1]["cwd"] == str(train.repo / "examples")


def test_readmes_commands_as_written(train: Trainer) -> None:
    readme = (train.repo / "README.md").read_text()
    (block,) = re.findall(r"^```bash\n(cd examples\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    environment = train.environment(LOG_PATH=str(train.folder / "logs"))
    subprocess.run(["bash", "-euc", block], cwd=train.repo, env=environment, check=True, timeout=300)
    arguments = json.loads(train.calls.read_text().splitlines()[-1])["argv"]
    assert arguments[2] == "train" and after(arguments, "--config-name") == "hf_llama3_8B_DPO_config"
    assert arguments[-2:] == ["data.train_dir=/data/my_pairs.jsonl", "trainer.max_steps=100"]


def test_unknown_config_is_named_with_the_known_ones(train: Trainer) -> None:
    result = train(CONF_FILE="no_such_config")
    assert result.status == 1
    assert "CONF_FILE=no_such_config" in result.stderr
    assert "hf_llama3_8B_DPO_config" in result.stderr
    assert result.calls == []


def test_overrides_arrive_as_given_and_last(train: Trainer) -> None:
    overrides = ["exp_manager.name=a b; $(touch oops)", "+model.x='*'", "trainer.max_steps=7"]
    assert train(*overrides).trained[-4:] == ["trainer.num_nodes=1", *overrides]
    assert not (train.cwd / "oops").exists()


@pytest.mark.parametrize("value", ["yes", "2"])
def test_compile_is_0_or_1(train: Trainer, value: str) -> None:
    result = train(COMPILE=value)
    assert result.status == 1
    assert f"COMPILE must be 0 or 1, but is '{value}'" in result.stderr
    assert result.calls == []


def test_number_of_steps_reaches_the_trainer(train: Trainer) -> None:
    assert train(TRAIN_ITERS="3").calls[-1]["env"]["TRAIN_ITERS"] == "3"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["trainer.devises=2"], {}, "trainer.devices"),
        ([], {"TRAIN_ITERS": "ten"}, "TRAIN_ITERS"),
    ],
)
def test_fault_of_the_config_is_one_message(
    train: Trainer, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    """With the real command line: it checks the config before anything is started."""
    result = train(*arguments, NXDT_ALIGN_PYTHON=sys.executable, **variables)
    assert result.status == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("status", ["0", "1", "3"])
def test_exits_with_the_trainers_status(train: Trainer, status: str) -> None:
    assert train(FAKE_STATUS=status).status == int(status)


def test_logs_to_the_terminal_and_to_a_file(train: Trainer) -> None:
    result = train(FAKE_STATUS="3")
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    assert log.read_text() == "training on stdout\ntraining on stderr\n"
    assert "training on stdout\ntraining on stderr\n" in result.stdout
    assert "nemo_experiments/logs/log" in result.stdout
    train(LOG_PATH="elsewhere")
    assert "training on stdout" in (train.cwd / "elsewhere" / "log").read_text()


def test_a_second_run_keeps_the_first_ones_log(train: Trainer) -> None:
    train()
    train()
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    assert log.read_text().count("training on stdout") == 2


def test_config_error_starts_nothing(train: Trainer) -> None:
    result = train(FAKE_CONFIG_ERROR="1")
    assert result.status == 1
    assert result.stderr == "error: trainer.devices must be positive\n"
    assert len(result.calls) == 1


def test_a_count_that_is_no_number_is_refused(train: Trainer) -> None:
    result = train(FAKE_PROCESSES="auto")
    assert result.status == 1
    assert "number of processes, got: auto" in result.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_reaches_the_trainer(train: Trainer, stop: signal.Signals) -> None:
    process = subprocess.Popen(
        [train.script],
        cwd=train.cwd,
        env=train.environment(FAKE_SLEEP="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = train.cwd / "nemo_experiments" / "logs" / "log"
    deadline = time.monotonic() + 300
    while not (log.exists() and "ready" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline, "the trainer did not start"
        time.sleep(0.05)
    process.send_signal(stop)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 17, "the trainer's own status"
    assert "asked to stop" in output
    assert "asked to stop" in log.read_text()


def test_several_processes_run_under_torchrun(train: Trainer) -> None:
    arguments = train("trainer.devices=4", FAKE_PROCESSES="4").trained
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    assert after(arguments, "--nproc_per_node") == "4"
    assert "--standalone" in arguments
    at = arguments.index("nxdt_align")
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
    expected = "-m torch.distributed.run --nproc_per_node 32 --nnodes 4 --node_rank 2"
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
    assert "--standalone" in result.trained
    assert (train.cwd / "nemo_experiments/logs/78/0/0/log").exists()


MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


def test_mpi_node(train: Trainer) -> None:
    result = train(MASTER_ADDR="10.0.0.1", FAKE_PROCESSES="32", **MPI)
    expected = "-m torch.distributed.run --nproc_per_node 32 --nnodes 2 --node_rank 1"
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


def test_compile_without_neuron_is_the_trainers_own(train: Trainer) -> None:
    result = train(COMPILE="1")
    assert result.calls[-1]["env"]["COMPILE"] == "1"
    assert result.trained[:3] == ["-m", "nxdt_align", "train"]


def test_compile_runs_under_the_compiler(train: Trainer) -> None:
    write_script(train.bin / "neuron_parallel_compile", "#!/bin/sh\n")
    arguments = train(COMPILE="1", FAKE_PROCESSES="32").trained
    assert arguments[:4] == ["-m", "nxdt_align", "precompile", "neuron_parallel_compile"]
    assert arguments[4:7] == [str(train.python), "-m", "torch.distributed.run"]
    assert arguments[arguments.index("train") - 2 : arguments.index("train") + 1] == [
        "-m",
        "nxdt_align",
        "train",
    ]
    assert train(COMPILE="0").trained[:3] == ["-m", "nxdt_align", "train"]


@pytest.mark.parametrize(("failed", "status"), [(0, 0), (2, 1)])
def test_totals_of_the_compiler_decide(train: Trainer, failed: int, status: int) -> None:
    """With the real command line between train.sh and a compiler that prints what the real one does."""
    program = "echo TRIAL $COMPILE\n" + "".join(
        f"echo '2026-08-01 INFO ||NEURON_PARALLEL_COMPILE||: Total {what}: {count}'\n"
        for what, count in (
            ("graphs", 5),
            ("successful compilations", 5 - failed),
            ("failed compilations", failed),
        )
    )
    write_script(train.bin / "neuron_parallel_compile", f"#!/bin/sh\n{program}")
    # As a worker of torchrun, so that no configuration of this machine's is asked for.
    result = train(COMPILE="1", NXDT_ALIGN_PYTHON=sys.executable, TORCHELASTIC_RUN_ID="job")
    assert result.status == status, result.stdout + result.stderr
    assert "TRIAL 1" in result.stdout and f"Total failed compilations: {failed}" in result.stdout
    log = (train.cwd / "nemo_experiments/logs/job/rank_0/log").read_text()
    assert ("error: COMPILE=1: 2 of 5 graphs did not compile" in log) == bool(failed)
    assert "Traceback" not in log


@pytest.mark.usefixtures("scontrol")
def test_print_env_is_one_process_that_sees_the_nodes_environment(train: Trainer) -> None:
    result = train("trainer.max_steps=3", "--print-env", SLURM_JOB_NODELIST="trn[1-4]", **SLURM)
    (call,) = result.calls
    arguments = call["argv"]
    assert arguments[:3] == ["-m", "nxdt_align", "train"]
    assert arguments[-3:] == ["trainer.num_nodes=4", "trainer.max_steps=3", "--print-env"]
    assert call["env"]["FI_PROVIDER"] == "efa"
    assert not (train.cwd / "nemo_experiments").exists(), "nothing is logged"


def test_print_env_with_the_real_command_line(train: Trainer) -> None:
    result = train("distributed_strategy.engine=nxd", "--print-env", NXDT_ALIGN_PYTHON=sys.executable)
    assert result.status == 0, result.stderr
    assert "export NEURON_RT_EXEC_TIMEOUT=100  # YAML (neuron_rt_exec_timeout)" in result.stdout
    assert "export MALLOC_ARENA_MAX=128  # already set" in result.stdout


def test_what_nxd_training_exports_for_efa_is_set_and_may_be_overridden(train: Trainer) -> None:
    exports = {"FI_EFA_USE_DEVICE_RDMA": "1", "FI_PROVIDER": "efa", "FI_EFA_FORK_SAFE": "1"}
    environment = train(MASTER_ADDR="h", **MPI).calls[-1]["env"]
    assert {name: environment[name] for name in exports} == exports
    environment = train(MASTER_ADDR="h", FI_PROVIDER="tcp", **MPI).calls[-1]["env"]
    assert environment["FI_PROVIDER"] == "tcp"
    assert "FI_PROVIDER" not in train().calls[-1]["env"], "one node needs no EFA"


def test_interpreter_of_the_active_environment(train: Trainer) -> None:
    environment = train.folder / "env"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(train.python)
    result = train(NXDT_ALIGN_PYTHON="", VIRTUAL_ENV=str(environment))
    assert result.status == 0
    assert len(result.calls) == 2


def test_interpreter_that_is_not_there_is_refused(train: Trainer) -> None:
    result = train(NXDT_ALIGN_PYTHON="/no/such/python")
    assert result.status == 1
    assert "NXDT_ALIGN_PYTHON=/no/such/python" in result.stderr
