"""The configs of known models pass the checks of the machines that docs/memory.md lists, and fit there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nxdt_align.config.check import find_faults
from nxdt_align.config.load import load_config
from nxdt_align.config.start import hub_models
from nxdt_align.engines.native.model import check_parallel
from nxdt_align.losses.objective import build_loss
from nxdt_align.models.presets import KNOWN_MODELS
from nxdt_align.run import assemble
from nxdt_align.run.nxd import parallel_of
from scripts.plan_presets import END, H200_GIB, PAGE, PRESETS, START, USABLE, Machine, plan, row

CASES = [
    pytest.param(name, lengths, machine, id=f"{name}, {machine.name}")
    for name, (lengths, machines) in PRESETS.items()
    for machine in machines
]


@pytest.mark.parametrize(("name", "lengths", "machine"), CASES)
def test_a_config_passes_the_checks_of_the_machine(
    repo: Path, name: str, lengths: str, machine: Machine
) -> None:
    config = load_config(name, [*machine.of_kind, *machine.own], repo / "conf")
    engine = "native" if machine.of_kind else "nxd"
    faults = find_faults(config, config.world_size, engine)
    assert [fault.path for fault in faults] == ["data.train_dir"]
    (known,) = hub_models(config)
    model = KNOWN_MODELS[known.name]
    build_loss(config.model_alignment_strategy)
    if engine == "nxd":
        parallel_of(config, model, "neuron").partition(model)
    else:
        check_parallel(model, assemble.parallel(config))


def shown() -> list[str]:
    """Rows of the table in docs/memory.md."""
    table = PAGE.read_text().partition(START)[2].partition(END)[0]
    return [line for line in table.splitlines() if line.startswith("| `")]


def test_everything_in_the_table_fits() -> None:
    rows = shown()
    assert len(rows) == len(CASES)
    for line in rows:
        found = re.search(r"\| ([\d.]+) of (\d+) \|", line)
        assert found is not None, line
        assert float(found[1]) <= USABLE * float(found[2])
        assert int(found[2]) in (16, 24, H200_GIB)


@pytest.mark.parametrize(
    ("name", "lengths", "machine"),
    [
        case if index == 6 else pytest.param(*case.values, marks=pytest.mark.full)
        for index, case in enumerate(CASES)
    ],
)
def test_the_table_is_what_plan_says(name: str, lengths: str, machine: Machine) -> None:
    assert row(name, lengths, machine) in shown()


def test_a_plan_without_a_download_needs_known_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths that the configuration does not allow are refused before anything is planned."""
    with pytest.raises(SystemExit):
        plan("hf_qwen3_8B_DPO_config", "2000,100,100", Machine("trn1"))
    assert "--lengths must be tokens of a prompt and of 2 response(s)" in capsys.readouterr().err
