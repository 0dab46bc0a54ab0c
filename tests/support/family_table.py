"""The table of families: what of each runs, found out by running it on a tiny model of the family.

A row is a family, a column something to run. A column's function takes models and returns how far each is off
what it is held to; more than the column's bound is an error, as is a refusal that nothing here expects.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import backend_cells as theirs
import torch
from adapter_fixture import AdapterCase, lora, peft_oracle
from adapter_fixture import outcomes as adapted
from backend_fixture import config_of
from checkpoint_fixture import run as convert
from checkpoint_fixture import same_folders
from families_fixture import BASE, CONFIGS, build, inputs, ours, window
from families_fixture import theirs as model_of_transformers
from oracle import random_examples
from parallel_fixture import Case, Outcome, merged, oracle, outcomes, run_case, worst
from torch.nn import functional as F

from nxdt_align.config.load import load_config
from nxdt_align.errors import UserError
from nxdt_align.models.presets import DecoderConfig, from_hf_dict
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.names import hf_tensors

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "families.json"
PAGES = (ROOT / "README.md", ROOT / "docs" / "native.md")
BEGIN, END = "<!-- families: scripts/family_table.py writes this -->\n", "<!-- /families -->\n"

ROWS: dict[str, DecoderConfig] = {
    "Llama 1 to 3.x": from_hf_dict(BASE | {"model_type": "llama"}),
    "Llama with biases": CONFIGS["llama"],
    "Mistral": CONFIGS["mistral"],
    "Qwen2, Qwen2.5": CONFIGS["qwen2"],
    "Qwen3": CONFIGS["qwen3"],
    "Phi-3, Phi-4": CONFIGS["phi3"],
    "OLMo 2": CONFIGS["olmo2"],
    "Gemma 2": CONFIGS["gemma2"],
    "Gemma 3 (text)": CONFIGS["gemma3"],
}
"""Label -> the tiny model of it; the smallest of a family may have a tied head, as Qwen3's here."""
THEIRS: dict[str, str] = {
    "GPT-2": "gpt2",
    "GPT-J": "gptj",
    "GPT-NeoX, Pythia": "gpt_neox",
    "Phi": "phi",
    "SmolLM3": "smollm3",
    "GLM": "glm",
    "Granite": "granite",
    "Cohere 2": "cohere2",
    "Mixtral": "mixtral",
    "Qwen3-MoE": "qwen3_moe",
    "DeepSeek-V3": "deepseek_v3",
    "StableLM": "stablelm",
    "Falcon": "falcon",
    "Llama 4 (text)": "llama4",
}
"""Label -> the tiny model, of backend_fixture, that transformers computes."""
ALWAYS_TIED = ("Gemma 2", "Gemma 3 (text)")
STD = 0.15
LONG = random_examples(6, 3, prompt=(1, 30), response=(1, 14))

Models = Mapping[str, DecoderConfig]
State = Literal["yes", "refused", "not applicable"]


@dataclass(frozen=True)
class Cell:
    state: State
    off: float | None = None
    """How far from what it is held to; None for what is not run."""
    said: str = ""
    """The message of a refusal, or why it does not apply."""


@dataclass(frozen=True)
class Column:
    title: str
    held_to: str
    """What the figure is, and its bound in words."""
    bound: float
    measure: Callable[[Models], dict[str, float]]
    of_theirs: Callable[[Any], dict[str, float | str]]
    """The same of models that transformers computes; where one is refused, the message."""
    adapt: Callable[[str, DecoderConfig], DecoderConfig | Cell] = lambda _, config: config
    """The model to run of a row, or the cell where none is."""
    needs_nxd: bool = False

    def cells(self, rows: Iterable[str]) -> dict[str, Cell]:
        """A cell for each row. Raises AssertionError where one is over the bound."""
        adapted = {name: self.adapt(name, ROWS[name]) for name in rows if name in ROWS}
        ours = {name: c for name, c in adapted.items() if not isinstance(c, Cell)}
        theirs = {name: config_of(THEIRS[name]) for name in rows if name in THEIRS}
        off = (self.measure(ours) if ours else {}) | (self.of_theirs(theirs) if theirs else {})
        return {name: self._cell(name, adapted.get(name), off.get(name)) for name in rows}

    def _cell(self, name: str, given: DecoderConfig | Cell | None, off: float | str | None) -> Cell:
        if isinstance(given, Cell):
            return given
        if isinstance(off, str):
            return Cell("refused", said=off)
        assert off is not None
        assert off <= self.bound, f"{name}, {self.title}: {off:.1e} is over {self.bound:.0e}"
        return Cell("yes", float(f"{off:.1e}"))


def one_by_one(measure: Callable[[DecoderConfig], float]) -> Callable[[Models], dict[str, float]]:
    return lambda models: {name: measure(config) for name, config in models.items()}


# In one process


def logits(config: DecoderConfig) -> float:
    short = window(config, 7)
    model = build(short)
    ids, positions, *_ = inputs(short)
    with torch.no_grad():
        wanted = model_of_transformers(short, model)(ids, position_ids=positions, use_cache=False).logits
        return float((ours(model) - wanted).abs().max())


def gradients(config: DecoderConfig) -> float:
    short = window(config, 7)
    model = build(short)
    hf = model_of_transformers(short, model)
    ids, positions, *_ = inputs(short)
    for found in (ours(model), hf(ids, position_ids=positions, use_cache=False).logits):
        torch.autograd.backward(F.cross_entropy(found.flatten(0, 1), ids.flatten()))
    own = {name: p.grad for name, p in model.named_parameters()}
    wanted = {name: p.grad for name, p in hf.named_parameters()}
    stacked = {name: torch.cat([own[p] for p in parts]) for name, parts in hf_tensors(short).items()}  # type: ignore[misc]
    return max(float((stacked[name] - g).abs().max()) for name, g in wanted.items())


def off_the_oracle(case: Case, ranks: Sequence[Outcome]) -> float:
    """The largest of the loss's relative difference, which is at most 2e-6, and of the gradients', each of
    its weight's largest."""
    want = oracle(case)
    loss = max(abs(rank.loss - want.loss) / max(1.0, want.loss) for rank in ranks)
    assert loss <= 2e-6, f"loss {loss:.1e}"
    return max(loss, worst(merged([r.gradients for r in ranks]), want.gradients, relative=True)[0])


def dpo_step(config: DecoderConfig) -> float:
    case = Case(shape=window(config, 16), std=STD, layout="none", steps=1, given=LONG)
    outcome = run_case(0, case)
    after = worst(outcome.weights, oracle(case).weights, relative=True)[0]
    return max(off_the_oracle(case, [outcome]), after)


def layouts(config: DecoderConfig) -> float:
    short = window(config, 9 if config.layer_types else 16)
    cases = [
        Case(shape=short, std=STD, layout=layout, attention=attention, steps=1, given=LONG)  # type: ignore[arg-type]
        for layout in ("none", "packed", "shared_prompt")
        for attention in ("dense", "blocks")
    ]
    return max(off_the_oracle(case, [run_case(0, case)]) for case in cases)


def there_and_back(config: DecoderConfig) -> float:
    """0: equal to the last bit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_hf_folder(folder / "hf", config, build(config).state_dict(), max_shard_bytes=20_000)
        sizes = {"tp": 2, "pp": 2, "qkv_linear": True}
        convert(folder / "hf", folder / "nxdt", to="nxdt", **sizes)
        convert(folder / "nxdt", folder / "back", to="hf")
        same_folders(folder / "hf", folder / "back")
        before, after = (json.loads((folder / f / "config.json").read_text()) for f in ("hf", "back"))
        assert before == after
    return 0.0


def exported(config: DecoderConfig) -> float:
    import transformers

    short = window(config, 7)
    model = build(short)
    ids, *_ = inputs(short)
    with tempfile.TemporaryDirectory() as name:
        write_hf_folder(Path(name) / "hf", short, model.state_dict())
        auto: Any = transformers.AutoModelForCausalLM
        loaded, report = auto.from_pretrained(Path(name) / "hf", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return float((ours(model) - loaded.eval()(ids).logits).abs().max())


# In several processes


def native(**spread: Any) -> Callable[[Models], dict[str, float]]:
    def measure(models: Models) -> dict[str, float]:
        cases = {name: Case(shape=config, std=STD, steps=1, **spread) for name, config in models.items()}
        found = outcomes(cases)
        return {name: off_the_oracle(case, found[name]) for name, case in cases.items()}

    return measure


def low_rank(models: Models) -> dict[str, float]:
    """Loss and gradients of every factor, off PEFT's own layers on the plain model."""
    cases = {
        name: AdapterCase(shape=config, std=STD, steps=1, spec=lora(config), tensor=2, sequence_parallel=True)
        for name, config in models.items()
    }
    found, off = adapted(cases), {}
    for name, case in cases.items():
        want, ranks = peft_oracle(case), found[name]
        loss = max(abs(rank.loss - want.loss) / max(1.0, want.loss) for rank in ranks)
        assert loss <= 2e-6, f"{name}: loss {loss:.1e}"
        gradients = merged([rank.gradients for rank in ranks])
        off[name] = max(loss, worst(gradients, want.gradients, relative=True)[0])
    return off


def nxd(loss: str, **spread: Any) -> Callable[[Models], dict[str, float]]:
    """Needs neuronx-distributed."""

    def measure(models: Models) -> dict[str, float]:
        import nxd_fixture
        from nxd_families import off_the_plain_model, step

        nxd_fixture.require_nxd()
        case = nxd_fixture.Case(**spread)
        jobs: list[Any] = [(step, (case, config, loss)) for config in models.values()]
        with tempfile.TemporaryDirectory() as folder:
            ranks = nxd_fixture.run_ranks(case.world, jobs, Path(folder) / "ranks")
        return {
            name: off_the_plain_model(case, config, loss, found)
            for (name, config), found in zip(models.items(), ranks, strict=True)
        }

    return measure


def for_nxd(_: str, config: DecoderConfig) -> DecoderConfig:
    """Eight query heads to two kv heads; windows that some pairs exceed."""
    return replace(window(config, 24), num_attention_heads=8)


def for_stages_of_nxd(name: str, config: DecoderConfig) -> DecoderConfig | Cell:
    """With a head of its own; where the family never has one, the refusal."""
    if name in ALWAYS_TIED:
        return Cell("refused", said=tied_head(config))
    return replace(for_nxd(name, config), tie_word_embeddings=False)


def tied_head(config: DecoderConfig) -> str:
    """What engine nxd says of stages and a tied head."""
    from nxdt_align.run.nxd import check

    assert config.tie_word_embeddings
    engine = ("distributed_strategy.engine=nxd", "trainer.accelerator=cpu", "model.qkv_linear=True")
    stages = "distributed_strategy.pipeline_model_parallel_size=2"
    try:
        # Before it imports neuronx-distributed, so wherever this runs.
        with mock.patch("nxdt_align.config.neuron_packages.has_module", lambda name: True):
            check(load_config("tiny_llama_DPO_config", (*engine, stages)), config)
    except UserError as error:
        return str(error)
    raise AssertionError("engine nxd takes stages of a model with a tied head")


TRANSFORMERS = "transformers' own in float32, largest difference, at most 1e-5"
PLAIN = "the plain model's, one response at a time: loss to 2e-6, gradients to 2e-5 of a weight's largest"
COLUMNS: dict[str, Column] = {
    "logits": Column("logits", TRANSFORMERS, 1e-5, one_by_one(logits), theirs.each(theirs.logits)),
    "gradients": Column(
        "gradients", TRANSFORMERS, 1e-5, one_by_one(gradients), theirs.each(theirs.gradients)
    ),
    "dpo": Column(
        "DPO step",
        f"{PLAIN}, and its weights after the step",
        2e-5,
        one_by_one(dpo_step),
        theirs.each(theirs.dpo_step),
    ),
    "layouts": Column(
        "layouts",
        f"none, packed and shared_prompt: {PLAIN}",
        2e-5,
        one_by_one(layouts),
        theirs.each(theirs.layouts),
    ),
    "native tp": Column(
        "native tp",
        f"2 ranks, sequence parallel: {PLAIN}",
        2e-5,
        native(tensor=2, sequence_parallel=True),
        theirs.each(theirs.divided(tensor=2)),
    ),
    "native pp": Column(
        "native pp", f"2 stages: {PLAIN}", 2e-5, native(pipeline=2), theirs.each(theirs.divided(pipeline=2))
    ),
    "native fsdp": Column("native fsdp", f"2 ranks: {PLAIN}", 2e-5, native(data=2, fsdp=True), theirs.fsdp),
    "lora": Column(
        "LoRA",
        "2 ranks, sequence parallel, or one process where transformers computes the model: PEFT's layers on "
        "the plain model, loss to 2e-6, each factor's gradient to 2e-5 of its largest",
        2e-5,
        low_rank,
        theirs.each(theirs.with_adapters),
    ),
    "nxd tp": Column(
        "nxd tp",
        f"2 ranks, sequence parallel: {PLAIN}",
        2e-5,
        nxd("dpo", tp=2, sp=True),
        theirs.each(theirs.on_nxd),
        for_nxd,
        needs_nxd=True,
    ),
    "nxd pp": Column(
        "nxd pp",
        f"2 stages, ORPO: {PLAIN}",
        2e-5,
        nxd("orpo", pp=2),
        theirs.each(theirs.on_nxd),
        for_stages_of_nxd,
        needs_nxd=True,
    ),
    "conversion": Column(
        "HF → NxDT → HF",
        "the same tensors and config.json, to the last bit",
        0.0,
        one_by_one(there_and_back),
        theirs.each(theirs.to_nxdt),
    ),
    "export": Column(
        "export in transformers",
        f"logits: {TRANSFORMERS}",
        1e-5,
        one_by_one(exported),
        theirs.each(theirs.exported),
    ),
}


# The record, and the pages that show it

Record = dict[str, dict[str, Cell]]


def read(path: Path) -> Record:
    """Row -> column -> cell."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return {row: {column: Cell(**cell) for column, cell in cells.items()} for row, cells in content.items()}


def found(columns: Iterable[str], rows: Iterable[str] = (*ROWS, *THEIRS)) -> Record:
    """What running them finds out."""
    rows = list(rows)
    by_column = {column: COLUMNS[column].cells(rows) for column in columns}
    return {row: {column: cells[row] for column, cells in by_column.items()} for row in rows}


def update(record: Record, new: Record) -> Record:
    """In the order of rows and columns here; what is no longer one is left out."""
    every = {row: record.get(row, {}) | new.get(row, {}) for row in (*ROWS, *THEIRS)}
    return {row: {c: cells[c] for c in COLUMNS if c in cells} for row, cells in every.items()}


def write(record: Record, path: Path) -> None:
    content = {row: {c: asdict(cell) for c, cell in cells.items()} for row, cells in record.items()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(record: Record) -> str:
    """Markdown, with the messages of refusals below."""
    lines = [
        "| | " + " | ".join(column.title for column in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    said: dict[str, int] = {}
    for row in (*ROWS, *THEIRS):
        shown = []
        for column in COLUMNS:
            cell = record[row][column]
            # One note for all models that are refused alike.
            note = re.sub(rf"\b{THEIRS.get(row, row)}(_text)?\b", "MODEL", cell.said)
            number = said.setdefault(note, len(said) + 1) if note else None
            shown.append(cell.state if number is None else f"{cell.state} ({number})")
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    notes = [f"({number}) {note}" for note, number in said.items()]
    return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in notes)


def measures(record: Record) -> str:
    """Markdown: what each column is held to, and the largest figure in it."""
    lines = ["| | held to | furthest off |", "|---|---|---|"]
    for name, column in COLUMNS.items():
        figures = [cells[name].off for cells in record.values()]
        furthest = max(f for f in figures if f is not None)
        lines.append(f"| {column.title} | {column.held_to} | {furthest:.1e} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, content: str) -> str:
    """``page`` with ``content`` between the marks."""
    before, begun, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert begun and ended, f"the page has no {BEGIN.strip()} … {END.strip()}"
    return f"{before}{begun}{content}{ended}{after}"


def page_content(path: Path, record: Record) -> str:
    return table(record) if path.name == "README.md" else f"{table(record)}\n{measures(record)}"
