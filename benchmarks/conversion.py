#!/usr/bin/env python3
"""Time and memory of a conversion to NxD's layout and back, against a plain copy of the same bytes.

benchmarks/conversion.py FOLDER [--layers 32] [--tp 32] [--kv-replicator 4] [--xser]

Makes random bf16 weights of Llama-3-8B's shape in FOLDER (16 GB at its 32 layers; the folder needs
three times that), copies them, converts them there and back, each in a process of its own and with
the inputs out of the system's cache, and prints one JSON object. Removes what it made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nxdt_align.checkpoint.hf_writer import CONFIG, UNFINISHED_CONFIG, HFWriter
from nxdt_align.models.presets import LLAMA3_8B, LlamaConfig, weight_shapes


def make_weights(folder: Path, config: LlamaConfig) -> int:
    """A Hugging Face folder of random bf16 weights; returns their bytes."""
    writer = HFWriter(folder, config, lambda name: torch.bfloat16)
    list(writer.create())
    writer.open()
    for name, shape in weight_shapes(config).items():
        writer.write(name, torch.randn(shape).mul_(0.02).bfloat16())
    os.rename(folder / UNFINISHED_CONFIG, folder / CONFIG)
    return writer.total_bytes()


def forget(folder: Path) -> None:
    """Flush a folder and drop it from the system's cache."""
    for file in (f for f in folder.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copy(source: Path, destination: Path) -> None:
    """A plain copy, flushed to the device as a conversion is."""
    shutil.copytree(source, destination)
    for file in (f for f in destination.rglob("*") if f.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def timed(act: Callable[[], Any]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def convert(*arguments: str) -> dict[str, float]:
    """One conversion in a process of its own: seconds, CPU seconds, and the largest resident memory."""
    command = [sys.executable, "-m", "nxdt_align", "convert", "--quiet", *arguments]
    began = time.monotonic()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gb": round(peak / 1e9, 2)}


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    config = replace(LLAMA3_8B, num_hidden_layers=arguments.layers)
    hf, nxdt, back, plain = (folder / name for name in ("hf", "nxdt", "back", "copy"))
    # In a process of its own: a child's peak would count its parent's memory at the start.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        size = pool.submit(make_weights, hf, config).result()
    largest = 2 * config.vocab_size * config.hidden_size
    forget(hf)
    copied = timed(lambda: copy(hf, plain))
    shutil.rmtree(plain)
    sizes = ["--tp", str(arguments.tp), "--kv-replicator", str(arguments.kv_replicator)]
    extra = ["--save_xser"] if arguments.xser else []
    extra += [] if arguments.verify else ["--no-verify"]
    forget(hf)
    there = convert(str(hf), str(nxdt), *sizes, *extra)
    forget(nxdt)
    again = convert(str(nxdt), str(back), *([] if arguments.verify else ["--no-verify"]))
    for run in (there, again):
        run["times_a_copy"] = round(run["seconds"] / copied, 2)
        run["gb_per_second"] = round(size / 1e9 / run["seconds"], 2)
    return {
        "layers": arguments.layers,
        "gb": round(size / 1e9, 2),
        "largest_weight_gb": round(largest / 1e9, 2),
        "copy_seconds": round(copied, 1),
        "to_nxdt": there,
        "back": again,
        "verified": arguments.verify,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tp", type=int, default=32)
    parser.add_argument("--kv-replicator", type=int, default=4)
    parser.add_argument("--xser", action="store_true")
    parser.add_argument("--no-verify", dest="verify", action="store_false")
    arguments = parser.parse_args(argv)
    work = arguments.folder / "conversion_benchmark"
    work.mkdir(parents=True)
    try:
        print(json.dumps(measure(work, arguments), indent=2))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
