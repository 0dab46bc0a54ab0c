"""The tables of docs/performance.md: what a step of Llama-3-8B DPO takes on one trn2.48xlarge, on paper.

    python scripts/performance_table.py          # write them into docs/performance.md
    python scripts/performance_table.py --print  # only print them

No weights, data or device: the step-time model (planning/step_time.py) prices the rows that training would
lay.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from nxdt_align.batch import Topology  # noqa: E402
from nxdt_align.config.load import load_config  # noqa: E402
from nxdt_align.config.schema import Config  # noqa: E402
from nxdt_align.models.presets import LLAMA3_8B  # noqa: E402
from nxdt_align.planning.devices import DEVICES, Device  # noqa: E402
from nxdt_align.planning.step_time import RowSeconds  # noqa: E402
from nxdt_align.run.rows import row_needs  # noqa: E402
from nxdt_align.run.standing import standing_for_data  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
START, END = "<!-- performance_table -->\n", "<!-- /performance_table -->\n"
PRESET = "hf_llama3_8B_DPO_config"
TRN2 = (
    "trainer.accelerator=neuron",
    "trainer.devices=64",
    "trainer.lnc=2",
    "distributed_strategy.engine=native",
    "distributed_strategy.tensor_model_parallel_size=4",
    "data.global_batch_size=256",
)
"""What each run of the tables has."""


@dataclass(frozen=True)
class Layout:
    name: str
    overrides: tuple[str, ...]


SHORT_ROWS = ("data.seq_length=512", "model_alignment_strategy.dpo.max_prompt_length=256")
NONE = Layout("`none`, flash", ("data.packing=none",))
PACKED = (
    Layout("`packed`, a mask", ("data.packing=packed", "data.attention=dense")),
    Layout("`packed`, intervals (NKI)", ("data.packing=packed", "data.attention=nki")),
    Layout("`shared_prompt`, a mask", ("data.packing=shared_prompt", "data.attention=dense")),
    Layout("`shared_prompt`, intervals (NKI)", ("data.packing=shared_prompt", "data.attention=nki")),
)
DATA: dict[str, tuple[tuple[int, ...], tuple[Layout, ...]]] = {
    "HH-like pairs: a prompt of 136 tokens, responses of 44 and 55": (
        (136, 44, 55),
        (
            NONE,
            Layout("`none`, flash, `data.seq_length=512`", (*NONE.overrides, *SHORT_ROWS)),
            *PACKED,
        ),
    ),
    "Long pairs: 2,048 tokens of prompt, 2,048 of each response": ((2048, 2048, 2048), (NONE, *PACKED)),
}


@dataclass(frozen=True)
class Figure:
    """A line of a table."""

    tokens: int
    """Of a row."""
    rows: int
    """Of a rank and step."""
    seconds: float
    """Of forward and backward passes of a rank's rows of a step."""
    pairs: float
    """Per second."""
    fits: bool


def figure(config: Config, lengths: tuple[int, ...]) -> Figure:
    """On paper. Raises UserError for lengths that do not fit."""
    needs = row_needs(config, "native", LLAMA3_8B, "neuron", needs_reference=True)
    topology = Topology(data_parallel_size=config.data_parallel_size)
    dataset, _ = standing_for_data(
        *(config, topology, lengths), with_prompts=False, fixed_micro_batches=False, **needs
    )
    planner, batch = dataset.planner, config.data.global_batch_size
    plan = planner.plan(range(batch))
    each = planner.responses_per_example if planner.layout == "none" else 1
    (option,) = needs["layouts"].options
    assert isinstance(option.row_cost, RowSeconds) and option.memory_fault is not None
    rows = each * len(plan.rows) // planner.ranks
    seconds = rows * option.row_cost(plan.bucket)
    return Figure(
        plan.bucket.tokens, rows, seconds, batch / seconds, option.memory_fault(plan.bucket) is None
    )


def table(title: str, lengths: tuple[int, ...], layouts: tuple[Layout, ...]) -> str:
    lines = [
        f"{title}.",
        "",
        "| layout, attention | rows of a rank and step | seconds per step | pairs per second | |",
        "|---|---|---|---|---|",
    ]
    first: float | None = None
    for layout in layouts:
        found = figure(load_config(PRESET, [*TRN2, *layout.overrides]), lengths)
        first = found.pairs if first is None else first
        fits = "" if found.fits else ", more than the memory"
        lines.append(
            f"| {layout.name} | {found.rows} of {found.tokens} tokens{fits} | {found.seconds:.3g} | "
            f"{found.pairs:,.3g} | {found.pairs / first:.3g} times |"
        )
    return "\n".join(lines) + "\n"


def constants(device: Device) -> str:
    tera, giga = 10**12, 10**9
    return (
        f"Of a logical core of {device.name}: {device.flops / tera:.3g} TFLOP/s in bf16, "
        f"{device.memory_bandwidth / giga:.3g} GB/s of memory,\n{device.link_bandwidth / giga:.3g} GB/s over "
        f"the links of its node in each direction, {device.memory / 2**30:.3g} GiB.\n"
    )


def tables() -> str:
    parts = [table(title, *of) for title, of in DATA.items()]
    each = f"Each with `{' '.join(TRN2[:4])}`\n`{' '.join(TRN2[4:])}`.\n"
    return "\n".join([constants(DEVICES["trn2"]), *parts, each])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="only print the tables")
    if parser.parse_args().print:
        print(tables(), end="")
        return 0
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(before + START + tables() + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
