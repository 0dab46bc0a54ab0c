"""PEFT's folders: what is written loads in PEFT, and what PEFT computes otherwise is refused."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TINY
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nxdt_align.errors import UserError
from nxdt_align.models.adapter_targets import adapter_spec
from nxdt_align.models.adapters import AdapterSpec, adapter_shapes
from nxdt_align.named_tensors import content_fingerprint
from nxdt_align.run import export_check  # noqa: F401 (what it imports takes seconds, once)
from nxdt_align.run.conversion import export
from nxdt_align.weights.detect import open_adapter
from nxdt_align.weights.extents import WeightsError
from nxdt_align.weights.hf import HFFolder
from nxdt_align.weights.names import to_hf
from nxdt_align.weights.peft import VARIANTS, MergedWeights, PeftFolder, read_settings, write_peft_folder

peft = pytest.importorskip("peft")

CONFIG = replace(TINY, vocab_size=64)


def spec(**changes: Any) -> AdapterSpec:
    return adapter_spec(CONFIG, **{"target_modules": ["q_proj"], "rank": 4, "alpha": 8} | changes)


def tensors(chosen: AdapterSpec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = adapter_shapes(CONFIG, chosen).items()
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes}


@pytest.mark.parametrize(
    ("saved", "written"),
    [
        (["norm"], ["model.norm"]),
        (["norm", "lm_head"], ["lm_head", "model.norm"]),
        (["norm", ".*_layernorm"], ["input_layernorm", "norm", "post_attention_layernorm"]),
        (
            ["layers.1.input_layernorm", "embed_tokens"],
            ["embed_tokens", "model.layers.1.input_layernorm"],
        ),
    ],
)
def test_peft_trains_the_modules_to_save_and_no_others(
    tmp_path: Path, saved: list[str], written: list[str]
) -> None:
    """PEFT takes a name for the end of any path: ``norm`` for every ``input_layernorm``, too."""
    chosen = spec(modules_to_save=saved)
    values = tensors(chosen)
    write_peft_folder(tmp_path / "adapter", CONFIG, chosen, values.items(), base=None)
    assert read_settings(tmp_path / "adapter")["modules_to_save"] == written
    base = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict()))
    model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    wrapper = peft.utils.ModulesToSaveWrapper
    found = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, wrapper)
    }
    assert found.keys() == set(chosen.saved)
    for path, module in found.items():
        assert torch.equal(module.modules_to_save["default"].weight, values[f"{path}.trained_weight"])


def test_an_embedding_that_is_saved_of_a_tied_model_is_refused(tmp_path: Path) -> None:
    """PEFT trains the embedding and leaves the head as it was; a merged folder has one weight for both."""
    base = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict() | {"tie_word_embeddings": True}))
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    peft.get_peft_model(base, settings).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"has model\.embed_tokens trained whole, but this model's head"):
        PeftFolder(tmp_path, replace(CONFIG, tie_word_embeddings=True))


@pytest.fixture
def on_bf16(tmp_path: Path) -> tuple[MergedWeights, dict[str, Tensor]]:
    """An adapter of q and the head on a base in bf16, and the sums in float32."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict())).bfloat16()
    base.save_pretrained(tmp_path / "base")
    chosen = spec(modules_to_save=["lm_head"])
    values = tensors(chosen)
    folder = tmp_path / "adapter"
    write_peft_folder(folder, CONFIG, chosen, values.items(), base=str(tmp_path / "base"))
    sums = {"lm_head.weight": values["lm_head.trained_weight"]}
    for path in chosen.targets:
        own = base.get_submodule(to_hf(f"{path}.weight").removesuffix(".weight")).weight.detach()
        a, b = values[f"{path}.lora_A"], values[f"{path}.lora_B"]
        sums[f"{path}.weight"] = own.float() + 2 * (b @ a)
    return open_adapter(folder)[0], sums


@pytest.mark.parametrize(("dtype", "kept"), [("fp32", torch.float32), ("fp16", torch.float16), (None, None)])
def test_merged_weights_are_rounded_once(
    on_bf16: tuple[MergedWeights, dict[str, Tensor]], tmp_path: Path, dtype: Any, kept: torch.dtype | None
) -> None:
    """From float32 to what is asked for, and to the base's dtype where nothing is."""
    _, sums = on_bf16
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, dtype=dtype, quiet=True)
    written = HFFolder(tmp_path / "merged")
    for name, whole in sums.items():
        assert torch.equal(written.read(name), whole.to(kept or torch.bfloat16)), name


def test_a_merged_folder_that_computes_something_else_is_removed(
    on_bf16: tuple[MergedWeights, dict[str, Tensor]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is compared with base and adapter apart; one layer's adapter is left out on its way."""
    caplog.set_level("INFO")
    export(tmp_path / "adapter", tmp_path / "merged", merge=True, quiet=True)
    assert "log-probabilities of the merged folder are those of base and adapter" in caplog.text
    read, path = MergedWeights.read, "model.layers.1.self_attn.qkv_proj.q_proj.weight"

    def spoiled(self: MergedWeights, name: str) -> Tensor:
        return self.base.read(name) if name == path else read(self, name)

    monkeypatch.setattr(MergedWeights, "read", spoiled)
    with pytest.raises(UserError, match=r"differs from base and adapter apart by .* and was removed"):
        export(tmp_path / "adapter", tmp_path / "spoiled", merge=True, dtype="fp32", quiet=True)
    assert not (tmp_path / "spoiled").exists()
    export(tmp_path / "adapter", tmp_path / "spoiled", merge=True, verify=False, quiet=True)
    assert (tmp_path / "spoiled").is_dir()


@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_folder_is_compared_with_every_kind_of_adapter(
    tmp_path: Path, dora: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    LlamaForCausalLM(LlamaConfig(**CONFIG.to_hf_dict())).save_pretrained(tmp_path / "base")
    chosen = spec(target_modules=["all-linear"], modules_to_save=["norm"], dora=dora)
    folder = tmp_path / "adapter"
    write_peft_folder(folder, CONFIG, chosen, tensors(chosen).items(), base=str(tmp_path / "base"))
    export(folder, tmp_path / "merged", merge=True, quiet=True)
    assert "log-probabilities of the merged folder are those of base and adapter" in caplog.text


def test_what_merged_weights_are_stored_under_stays(
    on_bf16: tuple[MergedWeights, dict[str, Tensor]],
) -> None:
    """The fingerprint is that of the sums in the base's dtype."""
    source, sums = on_bf16
    assert {source.dtype(name) for name in source.names()} == {torch.bfloat16}
    assert all(torch.equal(source.read(name), whole) for name, whole in sums.items())
    pairs = ((name, source.read(name).bfloat16()) for name in sorted(source.names()))
    assert source.fingerprint() == content_fingerprint(pairs)


PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def says(folder: Path, **settings: Any) -> dict[str, Any]:
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | settings))
    return read_settings(folder)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_an_adapter_whose_initialiser_changes_the_base_is_refused(tmp_path: Path, start: str) -> None:
    with pytest.raises(WeightsError, match=rf"init_lora_weights is '{start}'.*path_initial_model_for_weight"):
        says(tmp_path, init_lora_weights=start)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_whose_initialiser_leaves_the_base_is_read(tmp_path: Path, start: Any) -> None:
    assert says(tmp_path, init_lora_weights=start)["init_lora_weights"] == start


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_bdlora", {"nblocks": 2}),
        ("velora_config", {"num_groups": 4}),
    ],
)
def test_a_variant_that_is_computed_otherwise_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(WeightsError, match=rf"{key} must not be set.*give the merged folder"):
        says(tmp_path, **{key: value})
    assert says(tmp_path, **{key: None})[key] is None


def test_every_setting_of_pefts_is_known(tmp_path: Path) -> None:
    """Its defaults are read, and each variant that it declares is one that is refused, or DoRA."""
    default = peft.LoraConfig(r=4, target_modules=["q_proj"])
    default.save_pretrained(tmp_path)
    assert read_settings(tmp_path)["init_lora_weights"] is True
    fields = dataclasses.fields(peft.LoraConfig)
    variants = {field.name for field in fields if field.metadata.get("is_lora_variant")}
    assert variants - {"use_dora"} <= set(VARIANTS)
