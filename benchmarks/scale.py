"""Preparing preference data at scale: time and memory per process, cold and from the cache.

    python benchmarks/scale.py [--sizes 10000 200000 1000000] [--folder FOLDER] [--kto] [--trl]

Each measurement is a process of its own, from the imports on (which are measured apart): it builds the data
module of a run, as ``train`` does, and lays out the first step. Memory is peak resident memory, and what the
process has for itself when the step is there (private pages), over a process that has only imported.
The reference pass is measured without a model, whose log-probabilities a stand-in makes up: what planning,
laying out, gathering and storing take of it, and a start that finds all values stored.
``--kto`` takes each pair as two labelled completions, each beside another prompt's.
``--trl`` prepares the same file by `datasets` and TRL's DPOTrainer, cold and from their cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TOKENS = {"132 tokens": (34, 34, 30), "short": (8, 5, 5)}
"""Words per prompt, chosen and rejected, on average."""
YAML = "tiny_llama_DPO_config"
KTO = ("~model_alignment_strategy.dpo", "model_alignment_strategy.kto.beta=0.1", "data.packing=packed")


def write_pairs(path: Path, count: int, words: tuple[int, int, int]) -> None:
    """``count`` pairs of words drawn as a language's are: the n-th most common 1/n times as often."""
    rng = random.Random(5)
    letters = "etaoinshrdlu"
    known = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(20_000)]
    weights = [1 / rank for rank in range(1, len(known) + 1)]
    drawn = rng.choices(known, weights, k=1_000_000)
    at = 0

    def text(mean: int) -> str:
        nonlocal at
        at = (at + rng.randint(1, 2 * mean)) % (len(drawn) - 2 * mean)
        return " ".join(drawn[at : at + rng.randint(max(mean // 2, 1), mean * 3 // 2)])

    with open(path, "w") as file:
        for number in range(count):
            prompt, chosen, rejected = map(text, words)
            row = {"prompt": f"{number} {prompt}?", "chosen": f" {chosen}.", "rejected": f" {rejected}!"}
            file.write(json.dumps(row) + "\n")


def memory() -> dict[str, float]:
    """Private and proportional memory of this process, MB."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        found[name] = int(value.split()[0]) / 1000
    return {"private": found["Private_Clean"] + found["Private_Dirty"], "pss": found["Pss"]}


def measured(started: float, cpu: float, before: dict[str, float], **more: Any) -> None:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    after = memory()
    print(
        json.dumps(
            {
                "wall_s": round(time.perf_counter() - started, 2),
                "cpu_s": round(_cpu() - cpu, 2),
                "peak_mb": round(own.ru_maxrss / 1000),
                "peak_of_workers_mb": round(children.ru_maxrss / 1000),
                "private_mb": round(after["private"] - before["private"], 1),
                **more,
            }
        ),
        flush=True,
    )


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


class StandIn:
    """An engine of one rank without a model."""

    def __init__(self, topology: Any, device: Any) -> None:
        self.topology, self.device = topology, device

    def response_logps(self, batch: Any, *, reference: bool = False) -> Any:
        return -1.0 - batch.record_index.float() % 100

    def broadcast_object(self, value: Any) -> Any:
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        """There is no other rank."""


def prepare(file: Path, folder: Path, step: int, reference: bool, kto: bool) -> None:
    """What a rank does before its first step, but for the model. ``reference``: the reference pass, too,
    or, once it is done, what finds its values."""
    began, cpu = time.perf_counter(), _cpu()
    from nxdt_align.batch import Topology
    from nxdt_align.config.load import load_config
    from nxdt_align.data.module import ModelAlignmentDataModule
    from nxdt_align.data.tokenize import Tokenization, Truncation
    from nxdt_align.data.tokenizer import load_tokenizer
    from nxdt_align.planning.rows import row_reports

    config = load_config(
        YAML,
        [
            f"data.train_dir={file}",
            "data.val_dir=null",
            *("data.global_batch_size=32", "data.micro_batch_size=1", "data.seq_length=1024"),
            *(KTO if kto else ()),
        ],
    )
    tokenization = Tokenization(load_tokenizer(str(folder / "tokenizer")), Truncation(1024, 512))
    imports = {
        "imports_wall_s": round(time.perf_counter() - began, 2),
        "imports_cpu_s": round(_cpu() - cpu, 2),
    }
    before, started, cpu = memory(), time.perf_counter(), _cpu()
    module = ModelAlignmentDataModule(
        config, tokenization, Topology(data_parallel_size=2), cache_dir=folder / "cache" / "tokens"
    )
    row_reports(module.splits, config.data)
    module.fingerprint("train")
    dataset, sampler = module.splits["train"], module._train_sampler
    steps = sampler.steps(0, step % len(sampler))
    more: dict[str, Any] = dict(imports)
    if reference:
        more |= reference_values(module, folder)
    first = module.on_before_batch_transfer(dataset[next(steps)], 0)
    assert (first[0].reference_logps is not None) == reference
    measured(started, cpu, before, examples=len(dataset.examples), rows=len(first), **more)
    sys.stdin.readline()  # until the other rank has been measured


def reference_values(module: Any, folder: Path) -> dict[str, Any]:
    """Compute the values that are not stored yet, and hand all of them to the data."""
    import torch

    from nxdt_align.batch import Topology
    from nxdt_align.reference.cache import ReferenceStore, fingerprint_of
    from nxdt_align.reference.precompute import precompute

    made_from = {"values": "made up", "data": module.fingerprint("train")}
    root = folder / "cache" / "reference"
    store = ReferenceStore(root, fingerprint_of(made_from), 2, description=made_from)
    dataset, began = module.splits["train"], time.perf_counter()
    table, summary = precompute(
        StandIn(Topology(), torch.device("cpu")),  # type: ignore[arg-type]
        *(dataset.reference_plan(), dataset.collate_planned, module.ids("train"), store),
        records_of=lambda planned: planned.records,
        progress=False,
    )
    module.set_reference("train", table)
    seconds = time.perf_counter() - began
    return {
        "reference_s": round(seconds, 2),
        "records_computed": summary.computed,
        "records_per_s": round(summary.computed / seconds),
    }


def prepare_by_trl(file: Path, folder: Path) -> None:
    """The same file by `datasets` and what TRL's DPOTrainer does with it before its first step."""
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    datasets.disable_progress_bars()
    before, started, cpu = memory(), time.perf_counter(), _cpu()
    data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "hf"))
    arguments = DPOConfig(
        output_dir=str(folder / "out"),
        max_length=1024,
        dataset_num_proc=len(os.sched_getaffinity(0)),
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    trainer = DPOTrainer.__new__(DPOTrainer)
    for name, value in {"_is_vlm": False, "_tokenizer": tokenizer}.items():
        setattr(trainer, name, value)
    made = trainer._prepare_dataset(data, tokenizer, arguments, "train")
    order = datasets.Dataset.shuffle(made, seed=1)
    first = [order[index] for index in range(32)]
    measured(started, cpu, before, examples=len(made), rows=len(first))


def child(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(HERE / "scale.py"), "--one", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if not os.environ.get("SCALE_VERBOSE") else None,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit(f"a measurement failed; SCALE_VERBOSE=1 shows why ({process.args!r})")


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def measure(name: str, count: int, folder: Path, kto: bool, trl: bool) -> None:
    file = folder / f"{name.split()[0]}-{count}.jsonl"
    if not file.exists():
        write_pairs(file, count, TOKENS[name])
    if not (folder / "tokenizer").exists():
        from workload import trained_tokenizer

        sample = folder / "sample.jsonl"
        write_pairs(sample, 5000, TOKENS["132 tokens"])
        made = trained_tokenizer(sample, folder)
        made.save_pretrained(folder / "tokenizer")
    title = f"{count:,} pairs, {name}{', as labelled completions' * kto}"
    ours, middle = ("kto" if kto else "ours", str(file), str(folder)), str(count // 64)
    for what, *arguments in (
        ("cold", "0"),
        ("cached", "0"),
        ("cached, mid-epoch", middle),
        ("cached, and the reference pass without a model", "0", "reference"),
        ("cached, values stored", "0", "reference"),
        ("cached, values stored, mid-epoch", middle, "reference"),
    ):
        process = child(*ours, *arguments)
        print(f"{title}, {what}: {result(process)}", flush=True)
        if what in ("cached", "cached, values stored"):
            other = child(*ours, *arguments)
            print(f"{title}, {what}, a second rank beside it: {result(other)}", flush=True)
            let_go(other)
        let_go(process)
    if trl:
        for what in ("cold", "cached"):
            process = child("trl", str(file), str(folder))
            print(f"{title}, datasets + TRL, {what}: {result(process)}", flush=True)
            let_go(process)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 200_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--folder", type=Path, help="keep data and caches here")
    parser.add_argument("--kto", action="store_true", help="labelled completions")
    parser.add_argument("--trl", action="store_true", help="also by datasets and TRL")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        what, file, folder, *more = chosen.one
        if what != "trl":
            prepare(Path(file), Path(folder), int(more[0]), "reference" in more, what == "kto")
        else:
            prepare_by_trl(Path(file), Path(folder))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for kind in chosen.kinds:
            for size in chosen.sizes:
                measure(kind, size, folder, chosen.kto, chosen.trl)


if __name__ == "__main__":
    main(sys.argv[1:])
