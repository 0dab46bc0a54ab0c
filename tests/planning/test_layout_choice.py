"""``data.packing: auto``: what it chooses, what it leaves out, and that plan, dry run and training agree."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from row_plans import FakeLengths
from training_fixture import Project

from nxdt_align.cli import main
from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config
from nxdt_align.data.layouts import LayoutOptions, RowOption
from nxdt_align.data.packing import ROUNDING, Bucket, Layout, RowPlanner
from nxdt_align.errors import UserError
from nxdt_align.models.presets import LLAMA3_8B, TINY
from nxdt_align.planning.devices import device_of
from nxdt_align.planning.step_time import RowSeconds, micro_batch_cost
from nxdt_align.planning.workload import workload
from nxdt_align.run.rows import layout_faults, row_needs, with_possible_layout

NAME = "hf_llama3_8B_DPO_config"
TRN2 = (
    *("trainer.accelerator=neuron", "trainer.devices=64", "trainer.lnc=2"),
    *("distributed_strategy.engine=native", "distributed_strategy.tensor_model_parallel_size=8"),
    "data.global_batch_size=64",
)
AUTO = "data.packing=auto"
SHAPE: tuple[str, ...] = ()


def on_paper(*overrides: str, lengths: str) -> list[str]:
    return ["plan", "--config-name", NAME, "--lengths", lengths, *SHAPE, AUTO, *overrides]


@pytest.fixture(autouse=True)
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA3_8B.to_hf_dict()))
    monkeypatch.setattr(f"{__name__}.SHAPE", (f"model.model_config={tmp_path}/config.json",))


def plans(lengths: FakeLengths, layout: Layout, **options: object) -> RowPlanner:
    settings: dict[str, object] = {"examples_per_step": 4, "seq_length": 100, **options}
    return RowPlanner(lengths, layout, **settings)  # type: ignore[arg-type]


def test_prices_counted_by_hand() -> None:
    """4 pairs of 31 prompt and 20 + 10 response tokens, 60 positions with a shared prompt: by price 1 per
    position, one row of 256 holds all (240); apart they are 90, so 4 x 90 = 360 in one row of 384 or two of
    192. Without packing each response has a row of 100."""
    data = FakeLengths(np.full(4, 31), np.array([[20, 10]] * 4))
    shared, packed, none = (plans(data, layout) for layout in ("shared_prompt", "packed", "none"))
    assert shared.cost_per_step() == 256
    assert packed.cost_per_step() == 384
    assert none.cost_per_step() == 4 * 2 * 100
    halved = plans(data, "none", ranks=2)
    assert halved.cost_per_step() == 400
    fixed = plans(data, "packed", fixed_micro_batches=True)
    assert fixed.cost_per_step() == packed.cost_per_step()


def chosen(options: list[RowOption], data: FakeLengths) -> tuple[Layout, str]:
    planner, choice = LayoutOptions(options).choose(lambda o: plans(data, o.layout, row_cost=o.row_cost))
    assert choice is not None and planner.layout == choice.layout
    return choice.layout, choice.summary


def test_the_cheapest_is_taken_and_the_others_prices_are_told() -> None:
    data = FakeLengths(np.full(4, 31), np.array([[20, 10]] * 4))
    layouts: tuple[Layout, ...] = ("shared_prompt", "packed", "none")
    layout, told = chosen([RowOption(each) for each in layouts], data)
    assert layout == "shared_prompt"
    assert told == (
        "data.packing: auto is shared_prompt, 256 tokens per step and rank, padding included; packed 384 "
        "tokens, none 800 tokens"
    )
    # Seconds that make packed rows dear.
    dear = [RowOption(each, row_cost=lambda b: float(b.tokens) ** 2) for each in layouts[:2]]
    flat = RowOption("none", row_cost=lambda b: 1e-3)
    assert chosen([*dear, flat], data)[0] == "none"


def test_what_memory_does_not_hold_is_taken_only_where_nothing_fits() -> None:
    data = FakeLengths(np.full(4, 31), np.array([[20, 10]] * 4))

    def full(_: object) -> str:
        return "takes 99.00 GiB of 16 GiB (trn1)"

    large = RowOption("shared_prompt", memory_fault=full)
    layout, told = chosen([large, RowOption("packed")], data)
    assert layout == "packed" and "shared_prompt does not fit memory" in told
    assert chosen([large, RowOption("packed", memory_fault=full)], data)[0] == "shared_prompt"


def test_buckets_that_hold_one_layout_alone_decide() -> None:
    data = FakeLengths(np.full(4, 31), np.array([[20, 10]] * 4))
    options = LayoutOptions([RowOption("shared_prompt"), RowOption("packed")])
    _, choice = options.choose(lambda o: plans(data, o.layout, buckets=[64]))
    assert choice is not None and choice.layout == "shared_prompt"
    assert "takes 90 tokens in layout packed, but is 64" in choice.refused["packed"]
    with pytest.raises(UserError, match="takes 60 tokens in layout shared_prompt, but is 32"):
        options.choose(lambda o: plans(data, o.layout, buckets=[32]))


# Which are possible


def config(*overrides: str) -> Config:
    return load_config(NAME, [AUTO, *overrides])


def test_auto_takes_only_what_is_possible() -> None:
    assert not layout_faults(config(), LLAMA3_8B)
    causal = config("data.attention=causal", "distributed_strategy.engine=native")
    assert set(layout_faults(causal, LLAMA3_8B)) == {"shared_prompt", "packed"}
    assert with_possible_layout(causal, LLAMA3_8B).data.packing == "none"
    capped = replace(TINY, attention_softcap=50.0)
    with pytest.raises(UserError, match=r"auto finds no layout .* not none: data.attention: causal"):
        layout_faults(causal, capped)
    uneven = config("data.global_batch_size=6", "data.micro_batch_size=4")
    assert "global_batch_size (6) is no multiple" in layout_faults(uneven, LLAMA3_8B)["none"]
    supervised = load_config("sft", [AUTO])
    assert "one response" in layout_faults(supervised, TINY)["shared_prompt"]


def test_rows_that_are_priced_are_no_longer_than_a_sequence_or_the_longest_example() -> None:
    """By positions rows grow to a step's size; on Trainium a row of layout none, or of the longest example,
    is the longest."""
    data = FakeLengths(np.full(64, 100), np.full((64, 2), 51))
    cheap = plans(data, "packed", examples_per_step=64, seq_length=256, row_cost=lambda b: float(b.tokens))
    assert 300 <= max(b.tokens for b in cheap.buckets) < 300 + ROUNDING
    longer = plans(data, "packed", examples_per_step=64, seq_length=1024, row_cost=lambda b: b.tokens - 1.0)
    assert max(b.tokens for b in longer.buckets) <= 1024
    free = plans(data, "packed", examples_per_step=64, seq_length=256)
    assert max(b.tokens for b in free.buckets) > 1024


def test_a_rows_price_is_of_the_attention_in_use() -> None:
    """On trn2 by engine native: flash for layout none; for the others scores, or by nki-library's kernels,
    which compute all of a row's and write none."""
    kinds = {}
    for attention in ("auto", "nki"):
        needs = row_needs(
            config(*TRN2, f"data.attention={attention}"),
            *("native", LLAMA3_8B, "neuron"),
            needs_reference=True,
        )
        for option in needs["layouts"].options:
            assert isinstance(option.row_cost, RowSeconds) and option.row_cost.device == "trn2"
            kinds[attention, option.layout] = option
    assert {key: option.row_multiple for key, option in kinds.items()} == {
        ("auto", "shared_prompt"): 1,
        ("auto", "packed"): 1,
        ("auto", "none"): 512,
        ("nki", "shared_prompt"): 512,
        ("nki", "packed"): 512,
        ("nki", "none"): 512,
    }
    row = Bucket(4096, 2048, 8)
    costs = {key: cost(row) for key, option in kinds.items() if (cost := option.row_cost) is not None}
    assert costs["auto", "none"] < costs["nki", "packed"] < costs["auto", "packed"]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "share"),
    [
        *((32, 8, 1.0), (64, 8, 1.0)),  # of 8 ranks each has one, which two cores get copies of
        *((56, 8, 0.5), (40, 8, 0.5), (72, 24, 0.75)),  # 7 and 5 query heads on it, and 9 on 3
    ],
)
def test_a_core_that_waits_in_the_backward_pass_is_priced(heads: int, kv_heads: int, share: float) -> None:
    """Of ``nki``, by hand: five products of all pairs of tokens, at the rate of the cores at work."""
    model = replace(LLAMA3_8B, num_attention_heads=heads, num_key_value_heads=kv_heads)
    given = config(*TRN2, "data.packing=packed", "data.attention=nki")
    work = workload(given, model, "packed", 2, Bucket(4096, 2048, 8), needs_reference=False)
    two = device_of("trn2", 2)
    waits = (
        micro_batch_cost(work, two).seconds - micro_batch_cost(work, replace(two, physical_cores=1)).seconds
    )
    products = 5 * 2 * work.rows * 4096**2 * (heads // 8) * 128 * model.num_hidden_layers
    assert waits == pytest.approx(products / two.flops * (1 / share - 1), rel=1e-6)


def test_a_price_is_of_the_mask_where_the_flash_kernel_takes_no_heads_of_a_models_size() -> None:
    wide = replace(LLAMA3_8B, head_dim=256)
    given = config(*TRN2, "data.packing=none")
    kinds = [
        workload(given, model, "none", 2, Bucket(512, 256, 2), needs_reference=False).attention
        for model in (LLAMA3_8B, wide)
    ]
    assert kinds == ["flash", "scores"]


LONG = "2048,2048,2048"


def test_the_choice_names_what_nkis_kernels_would_win(capsys: pytest.CaptureFixture[str]) -> None:
    """On long pairs, where a mask's scores take what a shared prompt saves."""
    assert main(on_paper(*TRN2, lengths=LONG)) == 0
    said = capsys.readouterr().out
    found = re.search(r"with data.attention=nki shared_prompt ([\d.]+) s, ([\d.]+) times as fast", said)
    taken = re.search(r"^  none +([\d.]+) s, 1.00 times", said, re.MULTILINE)
    assert found is not None and taken is not None
    assert float(found[2]) == pytest.approx(float(taken[1]) / float(found[1]), rel=0.01)
    assert main(on_paper(*TRN2, "data.attention=nki", lengths=LONG)) == 0
    priced = re.search(r"^  shared_prompt +([\d.]+) s, 1.00", capsys.readouterr().out, re.MULTILINE)
    assert priced is not None and priced[1] == found[1]


@pytest.mark.parametrize(
    "override",
    [
        "data.attention=dense",
        "data.attention=nki",
        "precision.type=fp32",  # which the kernels do not compute
        "data.buckets=[6000,8200]",  # nor such rows
        "trainer.accelerator=cpu",
    ],
)
def test_no_kernel_is_named_that_the_run_could_not_have(
    override: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(on_paper(*TRN2, override, lengths=LONG)) == 0
    assert "with data.attention" not in capsys.readouterr().out


def test_a_setting_is_named_where_it_costs_less() -> None:
    data = FakeLengths(np.full(4, 31), np.array([[20, 10]] * 4))

    def summary(price: float, fault: str | None = None) -> str:
        given = RowOption("none"), RowOption("packed")
        other = RowOption("packed", 1, lambda bucket: bucket.tokens * price, lambda bucket: fault)
        options = LayoutOptions(given, unchosen=[other], setting="data.attention=nki")
        choice = options.choose(lambda o: plans(data, o.layout, row_cost=o.row_cost))[1]
        assert choice is not None and choice.layout == "packed"
        return choice.summary

    assert "; with data.attention=nki packed " in summary(0.5)
    assert "with" not in summary(1.0) and "with" not in summary(0.5, "too large")


# What the verbs say


def test_a_plan_refuses_what_the_kernels_do_not_compute(capsys: pytest.CaptureFixture[str]) -> None:
    given = on_paper(*TRN2, "data.attention=nki", "precision.type=fp32", lengths="136,44,55")
    assert main(given) == 1
    assert "data.attention: nki computes in bf16, but precision.type is fp32" in capsys.readouterr().err


def test_plan_shows_what_each_layout_takes_on_trainium(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(on_paper(*TRN2, lengths="136,44,55")) == 0
    said = capsys.readouterr().out
    assert "data.packing: auto is shared_prompt, the cheapest per step and rank on paper (trn2)" in said
    prices = dict(re.findall(r"^  (shared_prompt|packed|none) +([\d.e+-]+) s", said, re.MULTILINE))
    assert float(prices["shared_prompt"]) < float(prices["packed"]) < float(prices["none"])
    assert "layout shared_prompt, measured" in said

    assert main(on_paper("trainer.accelerator=cpu", lengths="136,44,55")) == 0
    assert re.search(r"  none +\d[\d,]* tokens, \d+\.\d\d times", capsys.readouterr().out)


def test_a_plan_rounds_rows_as_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Of nki-library's kernels, whose key blocks are of 512."""
    given = on_paper(*TRN2, "data.attention=nki", "data.packing=packed", lengths="700,300,300")
    assert main([each for each in given if each != AUTO]) == 0
    sizes = [int(n) for n in re.findall(r"^    (\d+) tokens x", capsys.readouterr().out, re.MULTILINE)]
    assert sizes and not any(size % 512 for size in sizes)


def test_rows_cost_more_on_a_device_of_one_core() -> None:
    """Twice as much: half the rate, half the memory's bandwidth."""
    alone = ("distributed_strategy.tensor_model_parallel_size=1", "trainer.lnc=1")
    one, two = (RowSeconds(load_config(NAME, [*TRN2, *alone[:n]]), LLAMA3_8B) for n in (2, 1))
    assert (one.device, two.device) == ("trn2, lnc 1", "trn2")
    bucket = Bucket(2048, 512, 4)
    assert one(bucket) == pytest.approx(2 * two(bucket))


def test_training_dry_run_and_plan_choose_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that resumes keeps what it had; its config.yaml names it."""
    project = Project.create(tmp_path)
    where = ("--config-path", str(project.root / "conf"), "--config-name", "run")
    assert main(["plan", *where, AUTO]) == 0
    (planned,) = re.findall(r"auto is (\w+), the cheapest", capsys.readouterr().out)

    def choice_of(*overrides: str) -> str:
        assert project.train(AUTO, *overrides) == 0
        captured = capsys.readouterr()
        (told,) = set(re.findall(r"data.packing: auto is ([^\n]+)", captured.out + captured.err))
        return str(told)

    first = choice_of("trainer.max_steps=1")
    assert first.startswith(f"{planned}, ")
    (folder,) = project.runs()
    assert f"packing: {planned}" in (folder / "config.yaml").read_text()
    assert choice_of("trainer.max_steps=2") == first
    assert project.runs() == [folder]
    monkeypatch.setenv("COMPILE", "1")
    assert choice_of("trainer.max_steps=2") == first
