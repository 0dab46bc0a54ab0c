"""A sweep: what is finished is not run again, a failed run does not stop the others, and the runs share the
reference's values and the tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.config.load import read_config, to_yaml
from nxdt_align.errors import UserError
from nxdt_align.run.sweep import Sweep, SweepRun


def runs(*labels: str, settings: str = "a: 1") -> list[SweepRun]:
    return [SweepRun(label, (f"a={label}",), settings) for label in labels]


class Starts:
    """Runs that write what a run leaves, and end with a status by label."""

    def __init__(self, folder: Path, **statuses: int | None) -> None:
        self.folder, self.statuses = folder, statuses
        self.started: list[str] = []

    def __call__(self, run: SweepRun) -> int | None:
        self.started.append(run.label)
        folder = self.folder / run.label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(run.settings)
        (folder / "run_identity.json").write_text("{}")
        (folder / "metrics.jsonl").write_text('{"step": 1, "reduced_train_loss": 0.5}\n')
        return self.statuses.get(run.label, 0)


def test_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    """y fails at first, z stops the sweep: the same sweep again starts these two alone."""
    start = Starts(tmp_path, y=1, z=None)
    sweep = Sweep(tmp_path, start)
    assert not sweep.run(runs("x", "y", "z")) and start.started == ["x", "y", "z"]
    assert sweep.failed == ["y"]
    again = Starts(tmp_path)
    sweep = Sweep(tmp_path, again)
    assert sweep.run(runs("x", "y", "z")) and again.started == ["y", "z"] and sweep.failed == []
    reported = sweep.report()
    assert reported is not None and reported[0] == tmp_path / "report.html"
    assert [label for label, _ in reported[1]] == ["x", "y", "z"]
    (tmp_path / "x" / "config.yaml").unlink()
    third = Starts(tmp_path)
    Sweep(tmp_path, third).run(runs("x", "y", "z"))
    assert third.started == ["x"], "what has lost its folder is run again"


def test_faults_of_a_folder(tmp_path: Path) -> None:
    Sweep(tmp_path, Starts(tmp_path)).run(runs("x"))
    start = Starts(tmp_path)
    with pytest.raises(UserError, match=r"x is a run of an earlier sweep with other settings: --out names"):
        Sweep(tmp_path, start).run(runs("y", "x", settings="a: 2"))
    assert start.started == []
    (tmp_path / "sweep.json").write_text('{"runs": {"x": ')
    with pytest.raises(UserError, match=r"sweep.json cannot be read: .*; remove it"):
        Sweep(tmp_path, start).run(runs("x"))
    assert Sweep(tmp_path / "new", start).report() is None


def command(project: Project, *more: str) -> list[str]:
    return ["sweep", "--config-path", str(project.root / "conf"), "--config-name", "run", *more]


def test_what_is_refused_before_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All combinations are checked as train checks them; nothing is written."""
    project = Project.create(tmp_path)
    for more, message in (
        (["kl_beta=0.1,-1"], "kl_beta: must be above 0, but is -1"),
        (["kl_beta=0.1"], "no key has several values"),
        (["kl_beat=0.1,0.2"], "kl_beat"),
        (["kl_beta=1,2", f"exp_manager.explicit_log_dir={tmp_path}"], "--out names that of a sweep"),
    ):
        assert main(command(project, *more)) == 1
        assert message in capsys.readouterr().err
    monkeypatch.setenv("COMPILE", "1")
    assert main(command(project, "kl_beta=1,2")) == 1
    assert "COMPILE=1 is for one run at a time" in capsys.readouterr().err
    monkeypatch.delenv("COMPILE")
    monkeypatch.setenv("REFERENCE", "1/1")
    assert main(command(project, "kl_beta=1,2")) == 1
    assert "REFERENCE: train.sh would compute reference values" in capsys.readouterr().err
    monkeypatch.delenv("REFERENCE")
    assert main(command(project, "--list", "kl_beta=1,2", "model.optim.lr=1e-3,1e-4")) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["kl_beta=1,lr=0.001", "kl_beta=1,lr=0.0001"]
    assert main(command(project, "--list", "kl_beta=0.1,0.10,1,1.0")) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-2:] == ["kl_beta=0.1", "kl_beta=1"]
    assert "kl_beta=1.0 is what kl_beta=1 is, and is run once" in said.out + said.err
    assert not (tmp_path / "experiments").exists()


def test_runs_are_told_apart_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One configured name would be every run's. A stand-in for train.sh prints its arguments, as the run's
    own command line reads them."""
    import nxdt_align.cli_sweep as cli_sweep

    (tmp_path / "train.sh").write_text('printf "%s\\n" "$@"\n')
    monkeypatch.setattr(cli_sweep, "__file__", str(tmp_path / "cli_sweep.py"))
    project = Project.create(tmp_path)
    wandb = "exp_manager.wandb_logger_kwargs={{{}}}".format

    def name_given(*given: str, create: bool = True) -> str | None:
        made = read_config("run", given, project.root / "conf")[0]
        manager = dataclasses.replace(made.exp_manager, create_wandb_logger=create)
        run = SweepRun("b=1,c=2", given, to_yaml(dataclasses.replace(made, exp_manager=manager)))
        launcher = cli_sweep._Launcher(tmp_path, tmp_path, {"PATH": os.environ["PATH"]})
        assert launcher.start(run) == 0
        passed = capfd.readouterr().out.splitlines()
        own = read_config("run", passed, project.root / "conf")[0].exp_manager
        assert own.explicit_log_dir == str(tmp_path / "b=1,c=2")
        found: str | None = (own.wandb_logger_kwargs or {}).get("name")
        return found

    assert name_given(wandb('name: "it\'s, mine"')) == "b=1,c=2 it's, mine"
    assert name_given(wandb("project: p")) is None, "it is called as its folder"
    assert name_given() is None
    assert name_given(wandb("name: n"), create=False) == "n"


def test_a_signal_reaches_the_run_and_ends_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for train.sh that signals its parent and ends when it gets the signal itself."""
    import nxdt_align.cli_sweep as cli_sweep

    script = tmp_path / "train.sh"
    script.write_text("trap 'exit 143' TERM\nkill -TERM $PPID\nfor i in $(seq 600); do sleep 0.1; done\n")
    monkeypatch.setattr(cli_sweep, "__file__", str(tmp_path / "cli_sweep.py"))
    project = Project.create(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    assert main(command(project, "kl_beta=1,2")) == 128 + signal.SIGTERM
    assert "sweep: stopped; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == before
    state = json.loads((tmp_path / "experiments" / "sweeps" / "run" / "sweep.json").read_text())["runs"]
    assert {label: known["status"] for label, known in state.items()} == {"kl_beta=1": None}
    # One that came between two runs.
    script.write_text("touch $LOG_PATH.started\n")
    launcher = cli_sweep._Launcher(script, tmp_path, {"PATH": os.environ["PATH"]})
    (tmp_path / "logs").mkdir()
    assert launcher.start(runs("first")[0]) == 0 and (tmp_path / "logs" / "first.started").exists()
    launcher.received.append(signal.SIGTERM)
    assert launcher.start(runs("next")[0]) is None and not (tmp_path / "logs" / "next.started").exists()


@pytest.mark.full
def test_a_sweep_of_runs(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two betas at a learning rate that trains and one that overflows: two runs fail, two are in the report
    with their settings, and the reference's values and the tokens are made once. Again, only what failed is
    started."""
    project = Project.create(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(repo / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    given = (
        "trainer.max_steps=5",
        "kl_beta=0.1,0.3",
        "model.optim.lr=1e-3,1e9",
        "--out",
        str(tmp_path / "out"),
    )
    assert main(command(project, *given)) == 1
    out = capsys.readouterr().out
    assert out.count("failed with status 1") == 2 and out.count("reward accuracy on held-out") == 2
    good = [tmp_path / "out" / f"kl_beta={beta},lr=0.001" for beta in (0.1, 0.3)]
    assert all((folder / "hf_export" / "config.json").is_file() for folder in good)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["settings_that_differ"]["model_alignment_strategy.dpo.kl_beta"] == [0.1, 0.1, 0.3, 0.3]
    cache = tmp_path / "experiments" / "cache"
    assert len(list(cache.glob("reference/*/part-*"))) == 2, "train's and val's, of the first run alone"
    assert len(list(cache.glob("tokens/*"))) == 2
    assert "train: 22 records, 0 computed, 22 from the store" in (good[1] / "run.log").read_text()
    ends = [os.stat(folder / "metrics.jsonl").st_mtime_ns for folder in good]
    assert main(command(project, *given)) == 1
    assert [os.stat(folder / "metrics.jsonl").st_mtime_ns for folder in good] == ends
