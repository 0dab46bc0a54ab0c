"""COMPILE=1 under neuron_parallel_compile, with programs in its place; and manifests of graphs."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nxdt_align.neuron.compile import (
    CompileError,
    Totals,
    precompile,
    read_manifest,
    read_steps,
    read_totals,
    write_manifest,
)

LOG = """\
2026-08-01 10:00:00.000123:  4711  INFO ||NEURON_PARALLEL_COMPILE||: Running trial run
training on stdout
2026-08-01 10:05:00.000123:  4711  INFO ||NEURON_PARALLEL_COMPILE||: {
2026-08-01 10:05:00.000124:  4711  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 12
2026-08-01 10:05:00.000125:  4711  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 11
2026-08-01 10:05:00.000126:  4711  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 1
"""


def program(graphs: int, successful: int, failed: int, status: int = 0) -> list[str]:
    text = str(Totals(graphs, successful, failed))
    code = f"import sys; print('the dry run says'); print({text!r}, file=sys.stderr); sys.exit({status})"
    return [sys.executable, "-c", code]


def test_totals_are_read_off_the_log() -> None:
    assert read_totals(LOG.splitlines()) == Totals(12, 11, 1)


def test_the_last_totals_count() -> None:
    again = LOG + str(Totals(3, 3, 0))
    assert read_totals(again.splitlines()) == Totals(3, 3, 0)


@pytest.mark.parametrize("missing", ["graphs", "successful", "failed"])
def test_totals_are_all_three(missing: str) -> None:
    assert read_totals([line for line in LOG.splitlines() if f"Total {missing}" not in line]) is None


def test_output_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    assert precompile(program(4, 4, 0)) == Totals(4, 4, 0)
    assert capsys.readouterr().out.splitlines() == ["the dry run says", *str(Totals(4, 4, 0)).splitlines()]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (program(4, 3, 1), "1 of 4 graphs did not compile"),
        (program(4, 3, 1, status=1), "1 of 4 graphs did not compile"),
        (program(0, 0, 0), "found no graph to compile"),
        (program(4, 4, 0, status=7), "compiled 4 graphs but ended with status 7"),
        ([sys.executable, "-c", "print('Total graphs: 3')"], "ended with status 0 and without its totals"),
        ([sys.executable, "-c", "raise SystemExit(3)"], "ended with status 3 and without its totals"),
        (["/no/such/neuron_parallel_compile"], "cannot be started: No such file or directory"),
    ],
)
def test_what_was_not_compiled_is_an_error(command: list[str], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        precompile(command)


@dataclass(frozen=True)
class SomeGraph:
    key: str
    name: str = "training step"
    shapes: tuple[tuple[int, ...], ...] = ((1, 128, 64, 6),)


def test_manifest_says_hash_name_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "compile" / "run_dpo.json"
    assert read_manifest(path) is None
    write_manifest(path, [SomeGraph("17"), SomeGraph("4", "weights", ())], {"torch": "2.9.0"})
    content = json.loads(path.read_text())
    assert content["torch"] == "2.9.0"
    assert content["graphs"] == [
        {"hash": "17", "name": "training step", "shapes": [[1, 128, 64, 6]]},
        {"hash": "4", "name": "weights", "shapes": []},
    ]
    assert read_manifest(path) == {"17", "4"} and read_steps(path) == set()
    steps = [("training step", ((1, 128, 64, 6),) * 2), ("weights", ())]
    write_manifest(path, [SomeGraph("17")], {}, steps)
    assert read_steps(path) == set(steps)
    earlier = {key: value for key, value in json.loads(path.read_text()).items() if key != "steps"}
    path.write_text(json.dumps(earlier))
    assert read_steps(path) is None and read_manifest(path) == {"17"}
    # Another compiler's hashes say nothing of this one's graphs.
    write_manifest(path, [SomeGraph("17")], {}, steps, compiler="torch.compile")
    assert read_steps(path) is None and read_manifest(path) is None
    assert read_steps(path, "torch.compile") == set(steps)
    assert [file.name for file in path.parent.iterdir()] == ["run_dpo.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other", "graphs": []}', "{}", "[" * 100_000])
def test_a_file_that_is_no_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(CompileError, match="is not a manifest of compiled graphs"):
        read_manifest(path)
