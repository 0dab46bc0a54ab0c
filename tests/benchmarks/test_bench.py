"""The benchmark's own sums, on a small model and a few pairs; its figures are no test."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import TINY, random_examples

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_flops_of_one_pair_counted_by_hand() -> None:
    """Prompt 3, responses 2 and 1: 2 + 2 + 1 = 5 tokens. A layer of width 32 with 4 and 2 heads of 8 and an
    MLP of 48 has 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 = 7,680 weights; there are 2 layers, and 61 x 32 in
    the head for 3 response tokens. Prompt tokens see 1 + 2, the responses 3 + 4 and 3: 13 sights, each
    4 * 32 operations a layer."""
    from bench import forward_flops
    from workload import Workload

    examples = random_examples(1, 0, prompt=(3, 3), response=(1, 1))
    examples.response_lengths = np.array([[2, 1]])
    workload = Workload("a test", [], examples, None, 1)  # type: ignore[arg-type]
    wanted = 2 * (2 * 7680 * 5 + 13 * 4 * 32) + 2 * 61 * 32 * 3
    assert forward_flops(workload, TINY, [0]) == wanted


def test_layouts_and_the_padded_baseline_do_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    import contenders
    from workload import Workload

    monkeypatch.setattr(contenders, "SEQ_LENGTH", 64)
    examples = random_examples(4, 1)
    workload = Workload("a test", [], examples, None, 4)  # type: ignore[arg-type]
    shape = replace(TINY, max_position_embeddings=64, model_type="qwen3", qk_norm="head")
    losses, logps = [], []
    names = ("ours shared_prompt", "ours packed", "ours none", contenders.BY_TRANSFORMERS, "padded")
    for name in names:
        contender = contenders.build(name, workload, shape, torch.device("cpu"))
        logps.append(contender.precompute([2, 0, 3]))
        losses.append(float(contender.train([2, 0, 3])))
        assert float(contender.train([2, 0, 3])) != losses[-1], "the optimizer changed nothing"
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-5)
    for other in logps[1:]:
        torch.testing.assert_close(other, logps[0], rtol=1e-4, atol=1e-4)


def test_adapters_do_the_same_sum_as_trls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loss and reference of a fresh adapter are the base's, whose weights a step leaves alone."""
    pytest.importorskip("peft")
    import contenders
    from small_tokenizers import make_tokenizer
    from workload import Workload

    monkeypatch.setattr(contenders, "SEQ_LENGTH", 64)
    tokenizer = make_tokenizer()
    workload = Workload("a test", [], random_examples(4, 1), tokenizer, 4)  # type: ignore[arg-type]
    shape = replace(TINY, max_position_embeddings=64, vocab_size=max(TINY.vocab_size, len(tokenizer)))
    losses, logps = [], []
    for name in contenders.WITH_LORA:
        contender = contenders.build(name, workload, shape, torch.device("cpu"))
        logps.append(contender.precompute([2, 0, 3]))
        losses.append(float(contender.train([2, 0, 3])))
        assert float(contender.train([2, 0, 3])) != losses[-1], "the optimizer changed nothing"
        if "lora" in name:
            assert contender.precompute([2, 0, 3]).equal(logps[-1]), "the base was trained"
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    for other in logps[1:]:
        torch.testing.assert_close(other, logps[0], rtol=1e-4, atol=1e-4)


def test_a_run_writes_its_table_and_missing_data_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench
    import workload

    monkeypatch.setattr(workload, "VOCABULARY", 300)
    monkeypatch.setitem(bench.MODELS, "24m", replace(TINY, vocab_size=300))
    pairs = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = ["bench.py", "--steps", "1", "--no-memory", "--cache", str(tmp_path), "--only"]
    arguments = [*common, "ours shared_prompt,ours none", "--out", str(tmp_path / "out.json"), "--data"]
    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "pairs.jsonl")])
    assert bench.main() == 0
    lines = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [line["contender"] for line in lines] == ["ours shared_prompt", "ours none"]
    assert lines[0]["trained_gain"] == 1.0 and lines[0]["batch"] == 8
    assert "| ours none |" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / "nowhere.jsonl")])
    assert bench.main() == 1
    assert "is not here" in capsys.readouterr().out


def test_a_model_that_no_card_holds_is_refused_with_what_would_fit() -> None:
    from bench import memory_fault

    gib = 2**30
    both = ["ours shared_prompt", "trl"]
    assert memory_fault("1b", both, 139 * gib) is None
    assert "1b take 41 GiB for weights and states alone, but the card has 24; --only 'ours sh" in str(
        memory_fault("1b", both, 24 * gib)
    )
    assert "8b take 269 GiB" in str(memory_fault("8b", both, 139 * gib))
    assert str(memory_fault("8b", both, 80 * gib)).endswith("PEFT=lora (--peft lora) trains adapters")
    assert memory_fault("8b", ["ours lora", "trl lora"], 80 * gib) is None


def test_trl_in_bf16_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its training step asks for no autocast: accelerate's preparing of the model does."""
    import contenders
    from small_tokenizers import make_tokenizer
    from workload import Workload

    monkeypatch.setattr(contenders, "SEQ_LENGTH", 64)
    tokenizer = make_tokenizer()
    workload = Workload("a test", [], random_examples(2, 1), tokenizer, 2)  # type: ignore[arg-type]
    shape = replace(TINY, max_position_embeddings=64, vocab_size=max(TINY.vocab_size, len(tokenizer)))

    import trl

    given = trl.DPOConfig
    monkeypatch.setattr(trl, "DPOConfig", lambda **settings: given(**{**settings, "bf16": True}))
    trainer, seen = contenders.TRL(workload, shape, torch.device("cpu")), set()
    layer = next(m for m in trainer._model.modules() if type(m).__name__ == "LlamaMLP")
    layer.down_proj.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    trainer.train([0, 1])
    assert seen == {torch.bfloat16}
    trainer.precompute([0, 1])
    assert seen == {torch.bfloat16}


def test_the_rate_of_a_card_is_found_by_its_name() -> None:
    from nxdt_align.planning.devices import card_flops

    rates = {
        "NVIDIA A100-SXM4-80GB": 312,
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H200": 989,
        "NVIDIA L40S": 362,
    }
    assert {name: card_flops(name) for name in rates} == {name: r * 1e12 for name, r in rates.items()}
    assert card_flops("NVIDIA H200 MIG 1g.18gb") is card_flops("Tesla T4") is None
