"""What a card computes, in one command: ``make test-cuda``. On machines without one the same bodies run on
the CPU, with what a CPU has (dense masks, graphs of AOTAutograd), so that they are known to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_fixture import AdapterCase, Dequantized, exact_gradients, lora, peft_oracle, qlora
from adapter_fixture import run_case as run_adapters
from bounds import Item, key_bounds
from parallel_fixture import (
    LOSSES,
    SHAPE,
    Case,
    Outcome,
    oracle,
    run_case,
    worst,
)
from torch import Tensor

from nxdt_align.batch import IGNORE_LABEL
from nxdt_align.engines.native.graphs import GraphRecorder
from nxdt_align.engines.native.settings import Precision
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.ops import logprobs
from nxdt_align.ops.attention import DenseAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.training.optim import build_optimizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CARD = replace(SHAPE, num_hidden_layers=2, hidden_size=64, intermediate_size=128, head_dim=16)
"""Heads of 16 entries at least, as FlexAttention's kernel takes; rows of whole blocks of 4 bits."""
FULL, SELECTIVE = ("full", ()), ("selective", ("CoreAttention", "LlamaMLP", "LlamaRMSNorm"))
BF16, FP16 = Precision(torch.bfloat16), Precision(torch.float16)

TOLERANCES = {"fp32": (2e-6, 2e-5), "bf16": (5e-3, 0.06), "fp16": (1e-3, 0.01), "autocast": (5e-3, 0.06)}
"""Of the loss and of gradients: in fp32 each relative to its weight's largest, as for families; else relative
L2 errors, as in test_native_parallel.py and test_native_loss_scale.py."""


def on(device: str, **settings: Any) -> dict[str, Any]:
    """A case's settings for ``device``: its attention, and its backend where the case is compiled."""
    is_card, is_compiled = device == "cuda", settings.pop("compiled", False)
    flex = "flex, in the layer's graph" if is_compiled else "flex"
    attention = flex if is_card else "dense"
    backend = None if not is_compiled else "inductor" if is_card else "aot_eager"
    given = {"shape": CARD, "steps": 2, "pairs": 4, "buckets": (128,)} | settings
    return {"device": device, "attention": attention, "compiled": backend, **given}


@cache
def plain(loss: str) -> Outcome:
    return oracle(Case(**on("cpu", loss=loss)))


def assert_near(got: Outcome, want: Outcome, kind: str, exact: dict[str, Tensor] | None = None) -> None:
    of_loss, of_gradients = TOLERANCES[kind]
    assert abs(got.loss - want.loss) <= of_loss
    assert abs(got.final - want.final) <= (1e-5 if kind == "fp32" else of_loss)
    wanted = exact or want.gradients
    if kind == "fp32":
        assert worst(got.gradients, wanted, relative=True)[0] <= of_gradients
        return
    for name, gradient in wanted.items():
        error = float((got.gradients[name] - gradient).norm() / gradient.norm())
        assert error <= of_gradients, f"{name}: {error:.4f}"


STEPS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, compiled": {"compiled": True, "loss": "orpo"},
    "bf16": {"precision": BF16},
    "bf16, compiled": {"precision": BF16, "compiled": True},
    "bf16, compiled, full checkpointing": {"precision": BF16, "compiled": True, "checkpointing": FULL},
    "bf16, compiled, selective": {"precision": BF16, "compiled": True, "checkpointing": SELECTIVE},
    "bf16, compiled, none": {"precision": BF16, "compiled": True, "layout": "none"},
    "bf16, compiled, packed": {"precision": BF16, "compiled": True, "layout": "packed"},
    "fp16": {"precision": FP16},
    "fp16, compiled": {"precision": FP16, "compiled": True},
    "autocast, compiled": {"precision": Precision(autocast=True), "compiled": True},
}


def cells(names: dict[str, Any], usual: tuple[str, ...]) -> list[Any]:
    """(device, name): every one on a card, the usual ones in ``make test`` on the CPU."""
    on_card = [pytest.param("cuda", name, marks=pytest.mark.cuda) for name in names]
    return on_card + [
        pytest.param("cpu", name, marks=() if name in usual else pytest.mark.full) for name in names
    ]


@pytest.mark.parametrize(("device", "name"), cells(STEPS, ("fp16",)))
def test_a_step_as_the_plain_models_in_float32(device: str, name: str) -> None:
    """Loss, gradients, and the loss after two AdamW steps."""
    case = Case(**on(device, **STEPS[name]))
    assert_near(run_case(0, case), plain(case.loss), name.split(",")[0])


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {"spec": lora(CARD)},
    "LoRA, compiled": {"spec": lora(CARD), "compiled": True},
    "DoRA": {"spec": lora(CARD, dora=True)},
    "LoRA bf16, compiled": {"spec": lora(CARD), "compiled": True, "precision": BF16},
    "QLoRA": {"spec": qlora(CARD)},
    "QLoRA, compiled": {"spec": qlora(CARD), "compiled": True},
}


@pytest.mark.parametrize(("device", "name"), cells(ADAPTERS, ()))
def test_adapters_as_peft_on_the_plain_model(device: str, name: str) -> None:
    """Of a base in 4 bits: on the plain model of the values that these stand for."""
    pytest.importorskip("peft")
    if "QLoRA" in name:
        pytest.importorskip("bitsandbytes")
    case = AdapterCase(**on(device, **ADAPTERS[name]))
    truth = Dequantized if "QLoRA" in name else AdapterCase
    want = truth(spec=case.spec, shape=CARD, pairs=case.pairs, steps=case.steps, device=device)
    kind = "bf16" if "bf16" in name else "fp32"
    assert_near(run_adapters(0, case), peft_oracle(want), kind, exact_gradients(want))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.full), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_no_graph_after_the_first_step(device: str) -> None:
    """Over training, validation and the reference, of any number of layers; the attention's mask is made anew
    for each batch, and is no constant of the graph. On the CPU the same is in test_native_compiled.py."""
    counts, objective = [], GlobalMeanObjective(LOSSES["dpo"])
    for layers in (1, 3):
        recorder, found = GraphRecorder(), []
        case = Case(**on(device, precision=BF16, compiled=True))
        backend = recorder.noting("a part", str(case.compiled))
        case = replace(case, shape=replace(CARD, num_hidden_layers=layers), compiled=backend)
        engine = case.engine(0)
        for seed in range(3):
            drawn = replace(case, seed=seed)
            batches = drawn.micro_batches(0, drawn.examples())
            engine.step(batches, objective)
            engine.evaluate(batches, objective)
            found.append(recorder.count())
        assert found[0] == found[1] == found[2] > 0
        counts.append(found[0])
    assert counts[0] == counts[1]


# Single operations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_tiled_log_probabilities_as_whole_logits(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tiles, some kept for the backward pass. Operands of 16 bits are multiplied with float32
    results, so that values are those of float32 on the same operands; a gradient is rounded to its dtype, and
    on a card so is what enters its product."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 64 * 512 * 4)
    monkeypatch.setattr(logprobs, "KEPT_BYTES", 64 * 512 * 4)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=generator) * 0.3 for n in (200, 512))
    labels = torch.randint(0, 512, (1, 200), generator=generator)
    labels[0, ::7] = IGNORE_LABEL
    weights = torch.randn(1, 200, generator=generator)
    given = [x.to(device, dtype).requires_grad_() for x in (hidden[None], head)]
    logps, _ = logprobs.token_logps(*given, labels.to(device))
    grads = torch.autograd.grad((logps * weights.to(device)).sum(), given)

    exact = [x.detach().cpu().double().requires_grad_() for x in given]
    picked = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    wanted = torch.where(labels == IGNORE_LABEL, 0.0, picked)
    torch.testing.assert_close(logps.cpu().double(), wanted, atol=1e-5, rtol=1e-5)
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for got, want in zip(grads, torch.autograd.grad((wanted * weights).sum(), exact), strict=True):
        assert float((got.cpu().double() - want).norm() / want.norm()) <= bound


@pytest.mark.cuda
def test_a_long_rows_logits_are_never_whole() -> None:
    """8,192 positions and Llama 3's vocabulary: 4.2 GB of logits; forward and backward take a quarter."""
    hidden = torch.randn(1, 8192, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = torch.randn(128256, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 128256, (1, 8192), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs.token_logps(hidden, head, labels)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 8192 * 128256 * 4 / 4


@pytest.mark.parametrize("device", DEVICES)
def test_adamw_is_fused_and_steps_as_the_loop_over_tensors(device: str) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.01, "betas": [0.9, 0.95], "eps": 1e-8}
    weights = []
    for choice in ({}, {"foreach": False, "fused": False}):
        generator = torch.Generator().manual_seed(0)
        named = [
            (f"{i}.weight", torch.nn.Parameter(torch.randn(9, 5, generator=generator).to(device)))
            for i in range(3)
        ]
        optimizer = (
            build_optimizer(named, "adamw", settings)
            if not choice
            else torch.optim.AdamW([p for _, p in named], **settings, **choice)
        )
        assert bool(optimizer.defaults["fused"]) is not bool(choice)
        for _ in range(3):
            for _, parameter in named:
                parameter.grad = torch.randn(9, 5, generator=generator).to(device)
            optimizer.step()
        weights.append(torch.stack([parameter.detach().cpu() for _, parameter in named]))
    torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-6)


ROWS: list[list[Item]] = [[(20, 60, 9), (51,), (-10,)], [(140,), (-10,)]]
"""Of 150 tokens: whole, partial and empty blocks."""


@pytest.mark.cuda
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 17])
def test_flex_kernel_as_the_dense_mask(window: int | None, softcap: float | None) -> None:
    """Values and gradients, grouped heads. Elsewhere torch runs it forward alone (test_attention_flex.py)."""
    bounds = [bound.cuda() for bound in key_bounds(ROWS, window)]
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(2, 150, heads, 16, generator=generator, device="cuda", requires_grad=True)

    given, found = [random(4), random(2), random(2)], []
    for attention in (DenseAttention(), FlexAttention()):
        out = attention(*given, attention.prepare(*bounds), softcap)
        found.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)  # products may be TF32


# A whole run


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.full), pytest.param("cuda", marks=pytest.mark.cuda)]
)
def test_a_run_to_its_end_with_an_export(device: str, tmp_path: Path, repo: Path) -> None:
    """examples/one_card.sh with its small model: from random weights, and every key else at its default."""
    settings = {"MODEL": "tiny", "STEPS": "3", "ACCELERATOR": device, "NXDT_ALIGN_PYTHON": sys.executable}
    done = subprocess.run(
        [str(repo / "examples" / "one_card.sh")],
        cwd=tmp_path,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = tmp_path / "one_card_run" / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["reduced_train_loss"] for line in lines if "reduced_train_loss" in line]
    assert len(losses) == 3 and losses[0] == pytest.approx(0.693, abs=2e-3)
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoModelForCausalLM.from_pretrained(folder / "hf_export").num_parameters() > 0


def test_one_card_knows_two_models(tmp_path: Path, repo: Path) -> None:
    command = [str(repo / "examples" / "one_card.sh")]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MODEL": "7b"}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (1, "MODEL must be 1b or tiny, but is '7b'\n")
