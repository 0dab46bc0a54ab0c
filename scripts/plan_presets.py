"""The table of docs/memory.md on the configs of known models: what `nxdt-align plan` says of each.

    python scripts/plan_presets.py          # write it into docs/memory.md
    python scripts/plan_presets.py --print  # only print it

No weights, data or network: --lengths stands for the data, and the models' sizes are known.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from nxdt_align.cli import main as nxdt_align  # noqa: E402

PAGE = ROOT / "docs" / "memory.md"
START, END = "<!-- plan_presets -->\n", "<!-- /plan_presets -->\n"
H200_GIB = 139
"""What CUDA gives of an H200's memory."""
USABLE = 0.9
"""As in nxdt_align.planning.device_memory."""
TENSOR = "distributed_strategy.tensor_model_parallel_size"
PIPELINE = "distributed_strategy.pipeline_model_parallel_size"
TRN2 = (
    "trainer.accelerator=neuron",
    "trainer.devices=64",
    "trainer.lnc=2",
    "distributed_strategy.engine=native",
)
H200 = (
    "trainer.accelerator=cuda",
    "trainer.devices=8",
    "distributed_strategy.fsdp=full",
    "distributed_strategy.zero1=False",
    "distributed_strategy.sequence_parallel=False",
    f"{TENSOR}=1",
    f"{PIPELINE}=1",
)


@dataclass(frozen=True)
class Machine:
    """Nodes of one kind, and the overrides with which a preset runs there."""

    name: str
    of_kind: tuple[str, ...] = ()
    """Of all presets on such nodes."""
    own: tuple[str, ...] = ()
    gib: int = H200_GIB
    """Of a device that is no NeuronCore."""


ONE_TRN1, ONE_H200 = Machine("trn1.32xlarge"), Machine("8 x H200", H200)
ONE_CARD = Machine("one card of 24 GiB", ("trainer.accelerator=cuda",), gib=24)


def trn2(tensor: int) -> Machine:
    return Machine("trn2.48xlarge", TRN2, (f"{TENSOR}={tensor}",))


PRESETS: dict[str, tuple[str, tuple[Machine, ...]]] = {
    "hf_llama3_2_1B_DPO_config": ("512,512,512", (ONE_TRN1, trn2(1), ONE_H200)),
    "hf_llama3_8B_DPO_LoRA_config": ("2048,2048,2048", (ONE_TRN1, ONE_H200)),
    "hf_mistral_7B_DPO_config": ("512,512,512", (ONE_TRN1, trn2(4), ONE_H200)),
    "hf_qwen3_8B_DPO_config": ("1536,512,512", (ONE_TRN1, trn2(4), ONE_H200)),
    "hf_llama3_8B_QLoRA_DPO_config": ("1024,512,512", (ONE_CARD,)),
    "hf_qwen3_8B_QLoRA_DPO_config": ("512,256,256", (ONE_CARD,)),
    "hf_gemma3_12B_DPO_config": ("512,512,512", (ONE_TRN1, trn2(8), ONE_H200)),
    "hf_llama3_1_70B_DPO_config": (
        "1536,512,512",
        (
            Machine("4 x trn1.32xlarge"),
            Machine("2 x trn2.48xlarge", TRN2, ("trainer.num_nodes=2", f"{TENSOR}=8", f"{PIPELINE}=8")),
            Machine("16 x H200", H200, ("trainer.num_nodes=2",)),
        ),
    ),
}
"""Config -> tokens of its longest prompt and of the responses that are left room for, and machines."""


def plan(name: str, lengths: str, machine: Machine) -> str:
    """What the command line prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        arguments = [
            "plan",
            "--config-path",
            str(ROOT / "src" / "nxdt_align" / "conf"),
            "--config-name",
            name,
        ]
        status = nxdt_align([*arguments, "--lengths", lengths, *machine.of_kind, *machine.own])
    if status:
        raise SystemExit(f"plan of {name} on {machine.name} ended with status {status}")
    return out.getvalue()


def memory_of(text: str, machine: Machine) -> tuple[float, float]:
    """GiB that a device needs, and those that it has."""
    found = re.search(r"total +([\d.]+) GiB(?: of (\d+) GiB)?", text)
    if found is None:
        raise SystemExit(f"no total in the plan of {machine.name}:\n{text}")
    return float(found[1]), float(found[2] or machine.gib)


def row(name: str, lengths: str, machine: Machine) -> str:
    """A line of the table."""
    text = plan(name, lengths, machine)
    tokens = re.search(r"rows of (\d+) tokens", text)
    assert tokens is not None
    need, there = memory_of(text, machine)
    verdict = "" if need <= there * USABLE else ", **does not fit**"
    own = f"`{' '.join(machine.own)}`" if machine.own else ""
    return f"| `{name}` | {machine.name} | {tokens[1]} | {need:.1f} of {there:.0f}{verdict} | {own} |"


def table() -> str:
    head = ["| config | machine | rows | GiB per device | overrides |", "|---|---|---|---|---|"]
    body = [row(name, lengths, m) for name, (lengths, machines) in PRESETS.items() for m in machines]
    kinds = ["", f"On trn2 also `{' '.join(TRN2)}`,", f"on H200 `{' '.join(H200)}`."]
    return "\n".join([*head, *body, *kinds]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", help="only print the table")
    if parser.parse_args().print:
        print(table(), end="")
        return 0
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(START)
    PAGE.write_text(before + START + table() + END + rest.split(END)[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
