#!/usr/bin/env python3
"""Time, memory and disk traffic of a conversion to NxD's layout and back, against a plain copy.

benchmarks/conversion.py FOLDER [--layers 32 | --gb 16] [--tp 32] [--kv-replicator 4] [--repeat 1]
    [--xser] [--through-cache] [--json FILE]

Makes random bf16 weights of Llama-3-8B's shape in FOLDER (16 GB at its 32 layers; FOLDER needs a little
more than three times that) and, in each round, copies them, converts them, copies them again and converts
back, with verification and without, each in a process of its own with its input out of the system's cache.
A copy, too, ends when its bytes are on the device. With ``--through-cache`` each verified conversion is
done once more without weights/direct_io.py, to see what that file gains. Prints a table, and writes JSON on
request. Removes what it made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nxdt_align.models.presets import LLAMA3_8B, DecoderConfig, weight_shapes
from nxdt_align.weights.hf_writer import HFWriter

Figures = dict[str, float]


def make_weights(folder: Path, config: DecoderConfig) -> int:
    """A Hugging Face folder of random bf16 weights; returns their bytes."""
    writer = HFWriter(folder, config, lambda name: torch.bfloat16)
    writer.create()
    writer.open()
    for name, shape in weight_shapes(config).items():
        writer.write(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02))
    writer.finish()
    return writer.total_bytes()


def forget(folder: Path) -> None:
    """Flush a folder and drop it from the system's cache."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, destination: Path) -> Figures:
    """A plain copy, flushed to the device as a conversion is, and removed."""
    forget(source)
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    shutil.copytree(source, destination)
    for file in (f for f in destination.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    figures = _figures(time.monotonic() - began, before, resource.getrusage(resource.RUSAGE_SELF))
    shutil.rmtree(destination)
    os.sync()
    return figures


THROUGH_CACHE = """
import contextlib, sys
from nxdt_align.weights import convert
convert.direct_transfers = contextlib.nullcontext
from nxdt_align.cli import main
sys.exit(main())
"""


def convert(source: Path, destination: Path, *options: str, through_cache: bool = False) -> Figures:
    """One conversion in a process of its own, with its largest resident memory (GB)."""
    forget(source)
    program = ["-c", THROUGH_CACHE] if through_cache else ["-m", "nxdt_align"]
    command = [sys.executable, *program, "convert", "--quiet", str(source), str(destination)]
    began = time.monotonic()
    _, status, usage = os.wait4(subprocess.Popen([*command, *options]).pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return _figures(seconds, None, usage) | {"peak_gb": usage.ru_maxrss * 1024 / 1e9}


def _figures(seconds: float, before: resource.struct_rusage | None, after: resource.struct_rusage) -> Figures:
    def spent(field: str) -> float:
        value: float = getattr(after, field) - (0 if before is None else getattr(before, field))
        return value

    return {
        "seconds": seconds,
        "cpu_seconds": spent("ru_utime") + spent("ru_stime"),
        "read_gb": spent("ru_inblock") * 512 / 1e9,
        "written_gb": spent("ru_oublock") * 512 / 1e9,
        "load": os.getloadavg()[0],
    }


def one_round(folder: Path, sizes: list[str], through_cache: bool) -> dict[str, Figures]:
    """Each run with its time as a multiple of that of the copy just before it."""
    ways = [(", not verified", ["--no-verify"], False), ("", [], False)]
    ways += [(", through the cache", [], True)] if through_cache else []
    hf, nxdt, back = (folder / name for name in ("hf", "nxdt", "back"))
    runs: dict[str, Figures] = {}
    for label, source, target, options in (("to NxD", hf, nxdt, sizes), ("back", nxdt, back, [])):
        copied = copy(hf, folder / "copy")
        runs[f"copy before {label}"] = copied
        for suffix, extra, cached in ways:
            if target.exists():
                shutil.rmtree(target)
                os.sync()
            run = convert(source, target, *options, *extra, through_cache=cached)
            runs[label + suffix] = run | {"times_a_copy": run["seconds"] / copied["seconds"]}
    shutil.rmtree(nxdt)
    shutil.rmtree(back)
    os.sync()
    return runs


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    layers = arguments.layers
    if arguments.gb is not None:
        layer, rest = (8_030_261_248 - 1_050_677_248) / 32, 1_050_677_248
        layers = max(1, round((arguments.gb * 1e9 / 2 - rest) / layer))
    config = replace(LLAMA3_8B, num_hidden_layers=layers)
    # In a process of its own: a child's peak would count its parent's memory at the start.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        size = pool.submit(make_weights, folder / "hf", config).result()
    sizes = ["--tp", str(arguments.tp), "--kv-replicator", str(arguments.kv_replicator)]
    sizes += ["--save_xser"] if arguments.xser else []
    rounds = [one_round(folder, sizes, arguments.through_cache) for _ in range(arguments.repeat)]
    return {
        "layers": layers,
        "gb": size / 1e9,
        "largest_weight_gb": 2 * config.vocab_size * config.hidden_size / 1e9,
        "options": sizes,
        "cores": os.cpu_count(),
        "rounds": rounds,
    }


def table(result: dict[str, Any]) -> str:
    """Medians over the rounds; times a copy with the range."""
    rounds = result["rounds"]
    lines = [
        f"{result['gb']:.1f} GB, {result['layers']} layers, {' '.join(result['options'])}, "
        f"{len(rounds)} rounds, {result['cores']} cores",
        "",
        "| run | seconds | times a copy | CPU seconds | peak GB | read GB | written GB | GB/s | load |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label in rounds[0]:
        runs = [each[label] for each in rounds]

        def typical(key: str, runs: list[Figures] = runs) -> float:
            return median(run.get(key, 0.0) for run in runs)

        times = [run["times_a_copy"] for run in runs if "times_a_copy" in run]
        shown = f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if times else ""
        rate = median((run["read_gb"] + run["written_gb"]) / run["seconds"] for run in runs)
        peak = f"{typical('peak_gb'):.2f}" if times else ""
        lines.append(
            f"| {label} | {typical('seconds'):.1f} | {shown} | {typical('cpu_seconds'):.1f} | {peak} | "
            f"{typical('read_gb'):.1f} | {typical('written_gb'):.1f} | {rate:.2f} | {typical('load'):.1f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, default=32)
    size.add_argument("--gb", type=float, help="as many layers as come to about this")
    parser.add_argument("--tp", type=int, default=32)
    parser.add_argument("--kv-replicator", type=int, default=4)
    parser.add_argument("--xser", action="store_true")
    parser.add_argument("--through-cache", action="store_true", help="also without weights/direct_io.py")
    parser.add_argument("--repeat", type=int, default=1, help="rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every figure of every round")
    arguments = parser.parse_args(argv)
    work = arguments.folder / "conversion_benchmark"
    work.mkdir(parents=True)
    try:
        result = measure(work, arguments)
    finally:
        shutil.rmtree(work)
    print(table(result))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
