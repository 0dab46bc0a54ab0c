"""Pairs per second: our layouts, TRL's DPOTrainer and rows padded to 4,096, interleaved in one run.

    python benchmarks/bench.py [--data FILE] [--model 24m|24m-qwen3|100m|1b|8b] [--batch N] [--steps N]
        [--peft lora] [--out FILE.json]

Each round gives every contender the same pairs, one optimizer step and one reference pass, and measures
the machine's matrix-multiply rate beside each. Medians over rounds; ratios are medians of each round's.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from contenders import (
    BY_TRANSFORMERS,
    NAMES,
    ON_A_CARD,
    OURS_LORA,
    TRL_LORA,
    WITH_LORA,
    build,
    trl_settings,
)
from workload import MODELS, Workload, load_workload

from nxdt_align.data.packing import example_tokens
from nxdt_align.files import atomic_write
from nxdt_align.models.presets import DecoderConfig, parameter_count
from nxdt_align.planning.devices import card_flops

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / "shared" / "data"
STANDARD = {
    "hh": (SHARED / "hh_harmless_base.jsonl.gz", 8),
    "chat": (SHARED / "dpo_mix_en_sharegpt.json.gz", 4),
}
PADDED_PAIRS = 1
"""The padded baseline takes so many pairs of each batch: its cost per pair does not depend on them."""


def forward_flops(workload: Workload, shape: DecoderConfig, indices: Sequence[int]) -> float:
    """Floating-point operations (2 a multiply-add) of one forward pass over what carries information.

    Each prompt once, responses once; the head at response tokens alone; attention between tokens that
    see each other. No padding, no recomputation, no optimizer, nothing elementwise. A training step is
    three times that.
    """
    chosen = list(indices)
    prompts = workload.examples.prompt_lengths[chosen].astype(float) - 1
    responses = workload.examples.response_lengths[chosen].astype(float)
    heads = 2 * shape.num_attention_heads + 2 * shape.num_key_value_heads
    layer = shape.hidden_size * (shape.head_dim * heads + 3 * shape.intermediate_size)
    seen = prompts * (prompts + 1) / 2
    seen += (responses * prompts[:, None] + responses * (responses + 1) / 2).sum(1)
    attention = 4 * seen.sum() * shape.num_attention_heads * shape.head_dim
    head = 2 * shape.hidden_size * shape.vocab_size * responses.sum()
    tokens = prompts.sum() + responses.sum()
    return float(shape.num_hidden_layers * (2 * layer * tokens + attention) + head)


def matmul_rate(device: torch.device) -> float:
    """Floating-point operations a second of a square product in the dtype that is computed in."""
    size, repeats = (1536, 6) if device.type == "cpu" else (8192, 20)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    left, right = torch.randn(2, size, size, device=device, dtype=dtype)
    left @ right
    seconds = _timed(lambda: [left @ right for _ in range(repeats)], device)
    return 2 * size**3 * repeats / seconds


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]
"""``cpu`` counts this process's own time: what a shared machine can measure, with one thread."""


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


TRAINED_BYTES = 18
"""Of a weight that is trained in bf16: itself, float32 master, gradient and AdamW's two states."""


def memory_fault(model: str, names: Sequence[str], memory: int) -> str | None:
    """Why ``names`` do not fit a card of ``memory`` bytes, by their weights and states alone, and what to do;
    None where they may."""
    parameters, gib = parameter_count(MODELS[model]), 2**30
    sizes = [2 if name in (OURS_LORA, TRL_LORA) else TRAINED_BYTES for name in names]
    need = sum(sizes) * parameters
    if need <= memory:
        return None
    alone = max(sizes) * parameters <= memory
    advice = (
        f"--only {names[0]!r} measures one of them" if alone else "PEFT=lora (--peft lora) trains adapters"
    )
    return (
        f"{' and '.join(names)} of {model} take {need / gib:.0f} GiB for weights and states alone, but the "
        f"card has {memory / gib:.0f}; {advice}"
    )


def measure(workload: Workload, model: str, steps: int, names: Sequence[str]) -> list[dict[str, object]]:
    """One line a contender: medians over ``steps`` rounds, none of which is the first or compiled a graph."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = MODELS[model]
    rate = card_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    contenders = {name: build(name, workload, shape, device) for name in names}
    order = np.random.default_rng(1).permutation(len(workload.examples))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    counted, step = 0, 0
    while counted < steps:
        pairs = np.roll(order, -step * workload.batch_size)[: workload.batch_size].tolist()
        first_losses, before_round = {}, sum(c.graphs() for c in contenders.values())
        found: dict[str, dict[str, float]] = {}
        for name, contender in contenders.items():
            mine = pairs[:PADDED_PAIRS] if name == "padded" else pairs
            flops = forward_flops(workload, shape, mine)
            before = matmul_rate(device)
            precompute = _timed(lambda c=contender, p=mine: c.precompute(p), device)  # type: ignore[misc]
            between = matmul_rate(device)
            losses: list[torch.Tensor] = []
            train = _timed(lambda c=contender, p=mine, out=losses: out.append(c.train(p)), device)  # type: ignore[misc]
            after = matmul_rate(device)
            first_losses[name] = float(losses[0])
            found[name] = {
                "trained": len(mine) / train,
                "precomputed": len(mine) / precompute,
                "tokens": float(example_tokens(workload.examples, "shared_prompt")[mine].sum()) / train,
                "train_share": _passes(name) * flops / train / ((between + after) / 2),
                "precompute_share": flops / precompute / ((before + between) / 2),
            }
            if rate is not None:
                found[name]["mfu"] = _passes(name) * flops / train / rate
        if step == 0:
            _check_losses(first_losses, device)
        elif sum(c.graphs() for c in contenders.values()) == before_round:
            counted += 1
            for name, values in found.items():
                rounds[name].append(values)
        step += 1
        print(f"  round {counted}/{steps} done", file=sys.stderr, flush=True)
        if step > 10 * (steps + 1):
            raise SystemExit(
                f"after {step} rounds graphs are still compiled: the rows' lengths keep changing"
            )
    ours, trl = (
        next((rounds[name] for name in wanted if name in rounds), None)
        for wanted in ((OURS_LORA, NAMES[0]), (TRL_LORA, "trl"))
    )
    return [_line(workload, model, name, values, ours, trl) for name, values in rounds.items()]


def _passes(name: str) -> int:
    """What a training step does, in forward passes: frozen weights have no gradients of their own."""
    return 2 if name in (OURS_LORA, TRL_LORA) else 3


def _check_losses(losses: dict[str, float], device: torch.device) -> None:
    """All contenders do the same sum: same weights, same pairs, same loss (the padded one has a slice)."""
    whole = [loss for name, loss in losses.items() if name != "padded"]
    tolerance = 1e-3 if device.type == "cpu" else 5e-2
    if max(whole) - min(whole) > tolerance * max(1.0, max(whole)):
        raise SystemExit(f"the contenders' first losses differ, so they do not do the same work: {losses}")


def _line(
    workload: Workload,
    model: str,
    name: str,
    rounds: list[dict[str, float]],
    ours: list[dict[str, float]] | None,
    trl: list[dict[str, float]] | None,
) -> dict[str, object]:
    values: dict[str, object] = {
        "data": workload.name,
        "model": model,
        "batch": workload.batch_size,
        "contender": name,
    }
    values |= {key: median(r[key] for r in rounds) for key in rounds[0]}
    for key in ("trained", "precomputed") if ours is not None else ():
        assert ours is not None
        values[f"{key}_gain"] = median(o[key] / r[key] for o, r in zip(ours, rounds, strict=True))
    if trl is not None:
        values["over_trl"] = median(r["trained"] / t["trained"] for r, t in zip(rounds, trl, strict=True))
    return values


def peak_memory(data: str, batch: int, model: str, name: str, cache: Path) -> float:
    """MiB at the peak of two training steps, in a process of its own: beyond what is held before the
    first step for a CPU, in all for CUDA."""
    command = [sys.executable, __file__, "--data", data, "--batch", str(batch), "--model", model]
    done = subprocess.run(
        [*command, "--memory-of", name, "--cache", str(cache)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"measuring the memory of {name} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _measure_memory(workload: Workload, model: str, name: str) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contender = build(name, workload, MODELS[model], device)
    sizes = example_tokens(workload.examples, "shared_prompt")
    pairs = np.argsort(sizes)[len(sizes) // 2 :][: workload.batch_size].tolist()
    pairs = pairs[:PADDED_PAIRS] if name == "padded" else pairs
    before = _peak_rss()
    for _ in range(2):
        contender.train(pairs)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _peak_rss() - before


def _peak_rss() -> float:
    """MiB, on Linux. Not getrusage's: that starts from the peak of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


COLUMNS = (
    ("data", "{}"),
    ("model", "{}"),
    ("contender", "{}"),
    ("trained", "{:.2f}"),
    ("precomputed", "{:.2f}"),
    ("tokens", "{:,.0f}"),
    ("train_share", "{:.0%}"),
    ("precompute_share", "{:.0%}"),
    ("mfu", "{:.0%}"),
    ("peak_mib", "{:,.0f}"),
    ("trained_gain", "{:.1f}x"),
    ("precomputed_gain", "{:.1f}x"),
    ("over_trl", "{:.1f}x"),
)


def table(lines: Sequence[dict[str, object]]) -> str:
    """Markdown. trained, precomputed: pairs per second; tokens: those that carry information, a second, in
    training; shares: of the measured matrix-multiply rate; mfu: of the card's rate on its data sheet; gains:
    ours with a shared prompt (and LoRA, where there is some) over this line; over_trl: pairs trained per
    second over TRL's."""
    rows = [[name for name, _ in COLUMNS], ["---"] * len(COLUMNS)]
    rows += [[form.format(line[name]) if name in line else "" for name, form in COLUMNS] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="", help="file of pairs, or hh or chat (default: both of ../shared/data)"
    )
    parser.add_argument("--batch", type=int, default=0, help="pairs per step (default: 8; 4 for chat)")
    parser.add_argument("--model", default="24m", choices=MODELS)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument(
        "--peft", choices=("lora",), help="ours with LoRA, ours with every weight, and TRL with PEFT"
    )
    parser.add_argument(
        "--only", default="", help=f"contenders, separated by commas; {BY_TRANSFORMERS} for 24m-qwen3 alone"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: one thread, its CPU time, for a busy machine"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="tokenizers and tokens")
    parser.add_argument("--out", type=Path, default=Path("build/bench/result.json"))
    parser.add_argument("--memory-of", choices={*NAMES, *WITH_LORA}, help=argparse.SUPPRESS)
    return parser.parse_args()


def _workloads(arguments: argparse.Namespace) -> list[tuple[str, Path, int]]:
    chosen = [arguments.data] if arguments.data else list(STANDARD)
    found = []
    for name in chosen:
        path, batch = STANDARD.get(name, (Path(name), 8))
        if path.is_file():
            found.append((name, path, arguments.batch or batch))
        else:
            print(f"{name}: {path} is not here, so it is left out; DATA=pairs.jsonl.gz names a file of yours")
    return found


def main() -> int:
    arguments = _arguments()
    global clock
    clock = CLOCKS[arguments.clock]
    if arguments.clock == "cpu":
        torch.set_num_threads(1)
    lines: list[dict[str, object]] = []
    every = NAMES if arguments.peft is None else WITH_LORA
    usual = [name for name in every if name != BY_TRANSFORMERS or arguments.model == "24m-qwen3"]
    usual = [name for name in usual if name in ON_A_CARD or not torch.cuda.is_available()]
    names = [name for name in every if name in (arguments.only.split(",") if arguments.only else usual)]
    if torch.cuda.is_available() and not arguments.memory_of:
        fault = memory_fault(arguments.model, names, torch.cuda.mem_get_info()[1])
        if fault is not None:
            raise SystemExit(fault)
    for name, path, batch in _workloads(arguments):
        workload = load_workload(Path(name).name, path, batch, arguments.cache)
        if arguments.memory_of:
            print(_measure_memory(workload, arguments.model, arguments.memory_of))
            return 0
        found = measure(workload, arguments.model, arguments.steps, names)
        for line in [] if arguments.no_memory else found:
            contender = str(line["contender"])
            line["peak_mib"] = peak_memory(name, batch, arguments.model, contender, arguments.cache)
        lines += found
    if not lines:
        return 1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "clock": arguments.clock,
        "steps": arguments.steps,
        "parameters": parameter_count(MODELS[arguments.model]),
        "matmul_flops_a_second": matmul_rate(device),
        "card_flops_a_second": card_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None,
        "trl": trl_settings(device),
    }
    print(table(lines))
    print(json.dumps(setting))
    atomic_write(
        arguments.out, (json.dumps({"setting": setting, "results": lines}, indent=1) + "\n").encode()
    )
    return 0


if __name__ == "__main__":
    # The report of bad records is not this script's business.
    logging.getLogger("nxdt_align").setLevel(logging.ERROR)
    sys.exit(main())
