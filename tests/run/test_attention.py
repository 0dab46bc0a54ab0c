"""``data.attention``: the device's own by default, and a clear error for one that device or layout lack."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nxdt_align.config.alignment import ModelAlignmentStrategyConfig, SFTConfig
from nxdt_align.config.data import Attention, DataConfig, Packing
from nxdt_align.config.model import FusionsConfig, ModelConfig
from nxdt_align.config.schema import Config, PrecisionConfig
from nxdt_align.engines.nxd.compat import Platform
from nxdt_align.engines.nxd.flash import CausalFlashAttention, IntervalFlashAttention
from nxdt_align.errors import UserError
from nxdt_align.messages import NOTICE
from nxdt_align.models.presets import TINY
from nxdt_align.ops.attention import CausalAttention, DenseAttention
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.run import native, nxd
from nxdt_align.run.computing import attention, check_attention
from nxdt_align.run.rows import row_multiple

NEURON: Any = SimpleNamespace(type="neuron")
"""A device that no torch knows without Neuron's own package."""
MISTRAL = replace(TINY, model_type="mistral", sliding_window=1024)


def config(kind: Attention, packing: Packing | None = None, seq_length: int = 4096) -> Config:
    return replace(Config(), data=DataConfig(attention=kind, packing=packing, seq_length=seq_length))


def test_each_device_has_its_own() -> None:
    chosen = {
        name: type(attention(config("auto"), torch.device(name), TINY)) for name in ("cpu", "cuda", "xla")
    }
    assert chosen == {"cpu": BlockAttention, "cuda": FlexAttention, "xla": DenseAttention}
    assert isinstance(attention(config("dense"), torch.device("cuda"), TINY), DenseAttention)


def test_a_neuron_device_takes_its_flash_kernel_where_no_mask_is_needed() -> None:
    """Rows of a multiple of 512 tokens, as the kernel asks for."""
    plain = config("auto", "none", 1000)
    chosen = attention(plain, NEURON, TINY)
    assert isinstance(chosen, CausalAttention) and row_multiple(plain, "native", TINY, "neuron") == 512
    with pytest.raises(UserError, match="multiple of 512 tokens, but a row has 1000"):
        chosen.prepare(*torch.zeros(2, 1, 1000))
    for packed in (config("auto"), config("auto", "packed")):
        assert isinstance(attention(packed, NEURON, TINY), DenseAttention)
        assert row_multiple(packed, "native", TINY, "neuron") == 1
    assert isinstance(attention(config("auto", "none", 4096), NEURON, MISTRAL), DenseAttention)
    assert isinstance(attention(config("auto", "none", 1024), NEURON, MISTRAL), CausalAttention)
    # Elsewhere rows of any length.
    assert row_multiple(config("causal", "none"), "native", TINY, "cpu") == 1


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Any:
    """What a run on a Neuron device says of a configuration while its engine is made."""
    monkeypatch.setattr(native, "NativeEngine", lambda *args, **named: SimpleNamespace())

    def of(given: Config, model: Any = TINY) -> str:
        parts = native.NativeParts.__new__(native.NativeParts)
        parts._config, parts._model, parts.device, parts._compiling = given, model, NEURON, None
        parts.precision = parts.reference_precision = parts.topology = None  # type: ignore[assignment]
        caplog.clear()
        parts.engine()
        return caplog.text

    return of


def test_buckets_that_the_flash_kernel_takes_are_its_own(said: Any) -> None:
    def of(*buckets: int) -> Config:
        plain = config("auto", "none")
        return replace(plain, data=replace(plain.data, buckets=buckets))

    fitting, others = of(512, 1024), of(300, 512, 700)
    assert isinstance(attention(fitting, NEURON, TINY), CausalAttention)
    assert row_multiple(fitting, "native", TINY, "neuron") == 512 and said(fitting) == ""
    assert isinstance(attention(others, NEURON, TINY), DenseAttention)
    assert row_multiple(others, "native", TINY, "neuron") == 1
    assert "auto is dense, with a mask, as the flash kernel takes rows of a multiple of 512" in said(others)
    assert "data.buckets has [300, 700]" in said(others)
    assert said(replace(others, data=replace(others.data, packing="packed"))) == ""  # wants a mask anyway
    refused = replace(others, data=replace(others.data, attention="causal"))
    with pytest.raises(UserError, match=r"attention: causal takes rows .* has \[300, 700\]; set .*dense"):
        attention(refused, NEURON, TINY)


def test_heads_that_no_flash_kernel_takes(said: Any) -> None:
    """As Gemma 3's, in rows within its window."""
    wide, plain = replace(MISTRAL, head_dim=256), config("auto", "none", 1024)
    assert isinstance(attention(plain, NEURON, wide), DenseAttention)
    assert row_multiple(plain, "native", wide, "neuron") == 1
    fault = "takes heads of up to 128 entries, but this model's have 256"
    assert f"data.attention: auto is dense, with a mask, as the flash kernel {fault}" in said(plain, wide)
    assert isinstance(attention(plain, NEURON, replace(wide, head_dim=128)), CausalAttention)
    with pytest.raises(UserError, match=f"data.attention: causal {fault}; set data.attention=dense"):
        check_attention(config("causal", "none", 1024), wide, "neuron")
    check_attention(config("causal", "none", 1024), wide, "cpu")


def test_nkis_kernels_compute_in_bf16_alone() -> None:
    def of(kind: Any, reference: Any = None) -> Config:
        given = replace(config("nki"), precision=PrecisionConfig(type=kind))
        return replace(
            given, model_alignment_strategy=ModelAlignmentStrategyConfig(reference_dtype=reference)
        )

    for kind in ("mixed_precision", "bf16SR", "autocast"):
        check_attention(of(kind), TINY, "neuron")
        check_attention(of(kind, "bf16"), TINY, "neuron")
    with pytest.raises(
        UserError, match=r"nki computes in bf16, but precision.type is fp32; set data.att.*dense"
    ):
        attention(of("fp32"), NEURON, TINY)
    with pytest.raises(UserError, match=r"in bf16, but model_alignment_strategy.reference_dtype is fp32"):
        attention(of("autocast", "fp32"), NEURON, TINY)


class OnNeuron(nxd.NxDParts):
    """Engine nxd's choice of an attention, without its processes."""

    def __init__(self, config: Config, model: Any = TINY) -> None:
        self._config, self._model = config, model
        self.platform = Platform("neuron", torch.device("cpu"))

    def _kernel(self) -> Any:
        return "NxD's"

    def _kernels(self) -> Any:
        return "the compiler's"


def rows_of(parts: OnNeuron) -> int:
    return row_multiple(parts._config, "nxd", parts._model, "neuron")


def fused(kind: Attention, packing: Packing | None, **fusions: bool) -> Config:
    return replace(config(kind, packing), model=ModelConfig(fusions=FusionsConfig(**fusions)))


def test_engine_nxd_has_flash_for_packed_rows_where_it_is_asked_for() -> None:
    """Rows of a multiple of 512 tokens then; causal but around a shared prompt; windows, too."""
    both = {"flash_attention": True, "flash_attention_packed": True}
    for packing, model, causal in (
        ("packed", TINY, True),
        ("shared_prompt", TINY, False),
        ("none", MISTRAL, True),
    ):
        parts = OnNeuron(fused("auto", packing, **both), model)  # type: ignore[arg-type]
        chosen = parts._attention()
        assert isinstance(chosen, IntervalFlashAttention) and chosen._causal is causal
        assert rows_of(parts) == 512
    plain = OnNeuron(fused("auto", "none", **both))
    assert isinstance(plain._attention(), CausalFlashAttention) and rows_of(plain) == 1
    for without in ({"flash_attention": True}, {"flash_attention_packed": True}):
        parts = OnNeuron(fused("auto", "packed", **without))
        assert isinstance(parts._attention(), DenseAttention) and rows_of(parts) == 1


@pytest.mark.parametrize(
    ("kind", "model", "why"),
    [
        ("dense", TINY, "as data.attention is dense"),
        ("auto", replace(TINY, attention_softcap=50.0), "does not cap scores, as this model does (at 50)"),
        ("auto", replace(TINY, head_dim=256), "takes heads of 128 at most, but this model's have 256"),
    ],
)
def test_where_the_kernel_cannot_a_mask_is_used_and_told(
    caplog: pytest.LogCaptureFixture, kind: Attention, model: Any, why: str
) -> None:
    asked = fused(kind, "packed", flash_attention=True, flash_attention_packed=True)
    parts = OnNeuron(asked, model)
    with caplog.at_level(NOTICE):
        assert isinstance(parts._attention(), DenseAttention)
    assert "model.fusions.flash_attention_packed: a mask is used, " in caplog.text and why in caplog.text
    assert rows_of(parts) == 1


def test_the_layout_is_the_objectives_own_where_the_yaml_says_nothing() -> None:
    sft = ModelAlignmentStrategyConfig(sft=SFTConfig(packing=False))
    assert replace(Config(), model_alignment_strategy=sft).layout == "none"
    packed = ModelAlignmentStrategyConfig(sft=SFTConfig(packing=True))
    assert replace(Config(), model_alignment_strategy=packed).layout == "packed"
    assert Config().layout == "shared_prompt"


@pytest.mark.parametrize(
    ("kind", "device", "fault"),
    [
        (
            "flex",
            "cpu",
            "flex needs trainer.accelerator cuda, but this run's device is cpu; auto, dense, blocks",
        ),
        (
            "blocks",
            "xla",
            "blocks needs trainer.accelerator cpu, but this run's device is xla; auto, dense would",
        ),
    ],
)
def test_a_kind_of_another_device_is_refused(kind: Attention, device: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        attention(config(kind), torch.device(device), TINY)


@pytest.mark.parametrize("packing", [None, "packed", "shared_prompt"])
def test_causal_is_refused_for_layouts_that_need_bounds(packing: Packing | None) -> None:
    fault = (
        f"data.attention: causal takes no bounds .* but the layout is {packing or 'shared_prompt'}: set "
        r"data.packing=none, the one layout that it computes, or data.attention=dense"
    )
    with pytest.raises(UserError, match=fault):
        attention(config("causal", packing), torch.device("cpu"), TINY)
    assert isinstance(attention(config("causal", "none"), torch.device("cpu"), TINY), CausalAttention)


def test_causal_is_refused_for_a_window_shorter_than_the_sequence() -> None:
    with pytest.raises(UserError, match=r"sliding_window is 1024, but data.seq_length 4096; set data"):
        attention(config("causal", "none"), torch.device("cpu"), MISTRAL)
