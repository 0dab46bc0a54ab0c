"""Runs that train adapters: what they leave, how they resume, and that PEFT computes the same of it."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_fixture import Project, assert_same_run, final_weights, scalars

from nxdt_align.cli import main
from nxdt_align.config.load import read_config
from nxdt_align.errors import UserError
from nxdt_align.run.conversion import convert, export
from nxdt_align.run.mode import RunMode
from nxdt_align.run.reference import open_store

peft = pytest.importorskip("peft")

LORA = (
    "model_alignment_strategy.peft.target_modules=[all-linear]",
    "model_alignment_strategy.peft.rank=4",
    "model_alignment_strategy.peft.alpha=8",
    "exp_manager.export_hf=adapter",
    "model.optim.lr=0.02",
)
NO_DROPOUT = "model_alignment_strategy.peft.dropout=0"
ONLINE = "model_alignment_strategy.dpo.precompute_ref_log_probs=False"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With start weights on disk, so that PEFT finds the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    project = Project.create(tmp_path_factory.mktemp("project"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(project.root)).save_pretrained(project.root / "base")
    return project


def train(project: Project, name: str, *overrides: str) -> Path:
    start = f"exp_manager.resume_from_checkpoint={project.root}/base"
    folder = f"exp_manager.exp_dir={project.root}/{name}"
    assert project.train(folder, start, *overrides) == 0
    return project.only_run(name)


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    return train(project, "whole", *LORA)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None] % 60).logits  # type: ignore[no-any-return]


def adapted_by_peft(project: Project, folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(project.root / "base")
    return peft.PeftModel.from_pretrained(base, folder)


def test_training_starts_at_ln_2_and_checkpoints_hold_adapters_alone(whole: Path) -> None:
    losses = [value for _, value in scalars(whole)["reduced_train_loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.01
    names = final_weights(whole).keys()
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    assert len(names) == 2 * 7 * 2


def test_a_broken_off_run_ends_as_an_uninterrupted_one_to_the_last_bit(project: Project, whole: Path) -> None:
    """With dropout, whose masks follow from the seed and the step."""
    first = train(project, "broken", *LORA, "trainer.max_steps=4")
    second = train(project, "broken", *LORA)
    assert first == second
    assert_same_run(second, whole)


def test_a_reference_at_each_step_is_the_stored_one(project: Project, whole: Path) -> None:
    """The policy with its adapters off, also in a resumed run, whose policy is another by then."""
    train(project, "online", *LORA, ONLINE, "trainer.max_steps=4")
    online = train(project, "online", *LORA, ONLINE)
    got, want = scalars(online), scalars(whole)
    for tag in ("reduced_train_loss", "rewards/margins", "val_loss"):
        assert [v for _, v in got[tag]] == pytest.approx([v for _, v in want[tag]], abs=2e-5), tag


def test_peft_loads_the_exported_adapter_and_gives_the_merged_models_logits(
    project: Project, whole: Path
) -> None:
    from transformers import LlamaForCausalLM

    said = json.loads((whole / "hf_export" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8, f"{project.root}/base")
    model = adapted_by_peft(project, whole / "hf_export")
    got = logits(model)
    assert float((got - logits(LlamaForCausalLM.from_pretrained(project.root / "base"))).abs().max()) > 1e-3
    checkpoint, folder = next((whole / "checkpoints").iterdir()), project.root / "merged"
    assert main(["export", "--merge", "--quiet", str(checkpoint), str(folder)]) == 0
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(folder)), got, atol=1e-5)
    again = project.root / "merged from peft"
    assert main(["export", "--merge", "--quiet", str(whole / "hf_export"), str(again)]) == 0
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(again)), got, atol=1e-5)


def test_a_checkpoints_adapter_is_exported_without_merging_it(project: Project, whole: Path) -> None:
    folder = project.root / "adapter"
    assert main(["export", "--quiet", str(whole), str(folder)]) == 0
    assert torch.equal(
        logits(adapted_by_peft(project, folder)), logits(adapted_by_peft(project, whole / "hf_export"))
    )


def test_options_of_an_adapters_export_count_or_are_refused(
    project: Project, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    for *option, name in (
        ("--tokenizer", str(project.root / "tokenizer"), "--tokenizer"),
        *(("--max-shard-size", "1", "--max-shard-size"), ("--first-replica", "--first-replica")),
        *(("--resume", "--resume"), ("--no-verify", "--no-verify")),
    ):
        assert main(["export", "--quiet", str(whole), str(folder), *option]) == 1
        assert f"{name}: belongs to --merge" in capsys.readouterr().err
        assert not folder.exists()
    assert main(["export", "--quiet", "--dtype", "bf16", str(whole), str(folder)]) == 0
    files = [load_file(place / "adapter_model.safetensors") for place in (folder, whole / "hf_export")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], tensor.bfloat16()) for name, tensor in files[1].items())
    with pytest.raises(UserError, match="dtype: must be one of bf16, fp16, fp32"):
        export(whole, tmp_path / "other", dtype="int8")  # type: ignore[arg-type]


def test_a_runs_adapter_is_converted_to_a_whole_model(project: Project, whole: Path, tmp_path: Path) -> None:
    """As a run's checkpoint of all weights is: to Hugging Face's layout, to shards where sizes are given."""
    convert(whole, tmp_path / "hf", quiet=True)
    assert (tmp_path / "hf" / "config.json").is_file() and not (tmp_path / "hf" / "model").exists()
    convert(whole, tmp_path / "nxdt", tp=2, quiet=True)
    assert len(list((tmp_path / "nxdt" / "model").glob("*tp_rank_*.pt"))) == 2


def test_a_merged_export_computes_what_the_adapter_does(project: Project, whole: Path) -> None:
    from transformers import LlamaForCausalLM

    merged = train(project, "as merged", *LORA, "exp_manager.export_hf=merged")
    got = logits(LlamaForCausalLM.from_pretrained(merged / "hf_export"))
    assert torch.allclose(got, logits(adapted_by_peft(project, whole / "hf_export")), atol=1e-5)


@pytest.mark.parametrize(
    "online", [False, pytest.param(True, marks=pytest.mark.full)], ids=["stored", "at each step"]
)
def test_training_goes_on_from_an_adapter_of_pefts_against_base_and_adapter(
    project: Project, whole: Path, online: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """As TRL has it: the loss starts at ln 2 again, and a resumed run keeps that reference."""
    name = f"second {online}"
    given = f"exp_manager.resume_from_checkpoint={whole}/hf_export"
    overrides = [*LORA, given, NO_DROPOUT, *([ONLINE] if online else [])]
    train(project, name, *overrides, "trainer.max_steps=4")
    run = train(project, name, *overrides)
    assert "the adapter frozen" in capsys.readouterr().err
    curves = scalars(run)
    assert curves["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(curves["rewards/margins"][-1][1]) > 1e-3
    uninterrupted = train(project, f"{name} whole", *overrides)
    assert_same_run(run, uninterrupted)


def test_modules_to_save_are_trained_whole_and_exported(project: Project) -> None:
    from transformers import LlamaForCausalLM

    saved = "model_alignment_strategy.peft.modules_to_save=[lm_head]"
    run = train(project, "saved", *LORA, saved, ONLINE)
    assert "lm_head.trained_weight" in final_weights(run)
    assert scalars(run)["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    folder = project.root / "saved merged"
    assert main(["export", "--merge", "--quiet", str(run), str(folder)]) == 0
    model = LlamaForCausalLM.from_pretrained(folder)
    assert not torch.equal(
        model.lm_head.weight, LlamaForCausalLM.from_pretrained(project.root / "base").lm_head.weight
    )
    assert torch.allclose(logits(model), logits(adapted_by_peft(project, run / "hf_export")), atol=1e-5)


@pytest.mark.full
def test_bf16_and_dora(project: Project) -> None:
    """Masters of the factors alone; the base is rounded, as the policy's weights are."""
    dora = "model_alignment_strategy.peft.dora=True"
    run = train(project, "low", *LORA, dora, "precision.type=mixed_precision")
    weights = final_weights(run)
    assert {name.rpartition(".")[2] for name in weights} == {"lora_A", "lora_B", "magnitude"}
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert scalars(run)["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=2e-3)
    checkpoint = next((run / "checkpoints").iterdir())
    folder = project.root / "dora merged"
    assert main(["export", "--merge", "--quiet", str(checkpoint), str(folder)]) == 0
    from transformers import LlamaForCausalLM

    want = logits(adapted_by_peft(project, run / "hf_export"))
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(folder)), want, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model_alignment_strategy.peft.rank=8"], "peft.lora_rank: must be 4, as in the adapter"),
        (["model_alignment_strategy.peft.target_modules=[q_proj]"], "must name the layers of the adapter"),
    ],
)
def test_an_adapter_to_start_from_settles_its_sizes(
    project: Project, whole: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = f"exp_manager.resume_from_checkpoint={whole}/hf_export"
    assert project.train("model_alignment_strategy.peft={}", *overrides, given) == 1
    assert message in capsys.readouterr().err


def test_bad_adapters_are_refused_with_what_would_do(
    project: Project, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(message: str, *overrides: str) -> None:
        assert project.train(*overrides) == 1
        assert message in capsys.readouterr().err

    base = f"exp_manager.resume_from_checkpoint={project.root}/base"
    key = "model_alignment_strategy.peft"
    says("There are: down_proj, gate_proj, k_proj, o_proj", base, f"{key}.target_modules=[query]")
    says("modules_to_save=[lm_head] trains it whole", base, f"{key}.target_modules=[lm_head]")
    says("must be at most 16", base, *LORA, f"{key}.rank=17")
    other = tmp_path / "other"
    shutil.copytree(whole / "hf_export", other)
    settings = json.loads((other / "adapter_config.json").read_text())
    given = f"exp_manager.resume_from_checkpoint={other}"

    def rewritten(**changes: Any) -> None:
        (other / "adapter_config.json").write_text(json.dumps(settings | changes))

    rewritten(r=8)
    says("must have shape [8, 32], but has [4, 32]", given)
    rewritten(base_model_name_or_path="meta-llama/nowhere")
    says("whose base is no folder on this machine", given)
    rewritten(peft_type="IA3")
    says("peft_type must be LORA", given)
    rewritten(alpha_pattern={"q_proj": 2})
    says("alpha_pattern must be {}", given)
    quantised = tmp_path / "quantised"
    shutil.copytree(project.root / "base", quantised)
    of_base = json.loads((quantised / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(of_base | {"quantization_config": {}}))
    rewritten(base_model_name_or_path=str(quantised))
    says("to the folder of the unquantised model", given)
    assert main(["export", "--merge", str(other), str(tmp_path / "merged")]) == 1
    assert "would have to be rounded anew" in capsys.readouterr().err
    rewritten()
    tensors = load_file(other / "adapter_model.safetensors")
    for name in ("lm_head.base_layer.weight", "lm_head.lora_A.weight", "h.0.attn.c_attn.lora_A.weight"):
        odd = tensors | {f"base_model.model.{name}": torch.ones(4, 32)}
        save_file(odd, other / "adapter_model.safetensors")
        says(
            "no weight named" if name.startswith("h.") else "merge it with PEFT, and give that folder", given
        )
    save_file(tensors, other / "adapter_model.safetensors")
    says("did you mean o_proj?", base, f"{key}.target_modules=[output_proj]")
    says("target_modules names the layers: q_proj", base, f"{key}.apply_lora_to_mlp=True")
    says("did you mean model_alignment_strategy.peft.lora_bias?", base, f"{key}.bias=none")
    with_optimizer = (f"exp_manager.resume_from_checkpoint={whole}", "model.weight_init_only=False")
    says("must be True with model_alignment_strategy.peft", *LORA, *with_optimizer)
    of_config = ["--config-path", str(project.root / "conf"), "--config-name", "run"]
    assert main(["reference", "precompute", *of_config, *LORA, *with_optimizer]) == 1
    assert "must be True with model_alignment_strategy.peft" in capsys.readouterr().err


def test_training_goes_on_from_a_runs_adapters(project: Project, whole: Path) -> None:
    """Of its newest checkpoint, and once those are added in, with every weight."""
    given = f"exp_manager.resume_from_checkpoint={whole}"
    first = scalars(train(project, "from run", *LORA, given, NO_DROPOUT, "trainer.max_steps=2"))
    every = scalars(train(project, "from run, all", given, "trainer.max_steps=2"))
    assert first["logps/chosen"][0][1] == pytest.approx(every["logps/chosen"][0][1], abs=1e-3)
    assert first["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)


def test_generate_takes_a_run_of_adapters_and_its_export(
    project: Project, whole: Path, tmp_path: Path
) -> None:
    """Both with the base that they belong to: as the whole model, merged, answers."""
    import nxdt_align as na

    merged = tmp_path / "merged"
    assert main(["export", str(whole), str(merged), "--merge", "--quiet"]) == 0
    answers = [
        [
            (row["completion"], row["logprob"])
            for row in na.generate(
                *(place, project.root / "val.jsonl"),
                max_tokens=5,
                tokenizer=project.root / "tokenizer",
                backend="transformers",
                device="cpu",
            )
        ]
        for place in (merged, whole, whole / "hf_export")
    ]
    assert answers[0] == answers[1] == answers[2]


NF4 = "model_alignment_strategy.peft.quantize_base=nf4"
PRESENT = [NF4, "exp_manager.export_hf=True"]
"""What overrides LORA's export, and is the adapter's all the same."""


def test_qlora_trains_resumes_and_exports_the_adapter(
    project: Project, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base in 4 bits is the reference, so that training starts at ln 2, from other values than the whole
    base's; the adapter fits the unquantised base, into which it can be merged."""
    pytest.importorskip("bitsandbytes")
    run = train(project, "qlora", *LORA, *PRESENT)
    assert "the base stays as it is, in 4 bits (nf4)" in capsys.readouterr().err
    curves, unquantised = scalars(run), scalars(whole)
    assert curves["reduced_train_loss"][0][1] == pytest.approx(math.log(2), abs=1e-5)
    assert curves["reduced_train_loss"][-1][1] < math.log(2) - 0.01
    for tag in ("reduced_train_loss", "val_loss"):
        assert curves[tag][-1][1] == pytest.approx(unquantised[tag][-1][1], rel=0.02), tag
    assert abs(curves["logps/chosen"][0][1] - unquantised["logps/chosen"][0][1]) > 1e-3
    assert {name.rpartition(".")[2] for name in final_weights(run)} == {"lora_A", "lora_B"}
    train(project, "qlora broken", *LORA, *PRESENT, "trainer.max_steps=4")
    assert_same_run(train(project, "qlora broken", *LORA, *PRESENT), run)
    model, folder = adapted_by_peft(project, run / "hf_export"), project.root / "qlora merged"
    assert main(["export", "--merge", "--quiet", str(run), str(folder)]) == 0
    from transformers import LlamaForCausalLM

    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(folder)), logits(model), atol=1e-5)


def test_stored_values_are_of_one_set_of_quantised_layers(project: Project) -> None:
    """A layer that is trained whole is not quantised, nor is an adapter beside its base: the reference is
    another. Stores of other runs keep their fingerprint."""

    def store_of(*overrides: str, has_adapter: bool = False) -> dict[str, str]:
        config = read_config("run", [*LORA, *overrides], project.root / "conf")[0]
        names = dict.fromkeys(("weights", "model", "tokenization", "precision"), "x")
        return open_store(config, RunMode(), project.root, **names, has_adapter=has_adapter).description

    assert "quantized" not in store_of()
    assert store_of() == store_of(has_adapter=True)
    assert store_of(NF4)["quantized"] == "nf4"
    assert store_of(NF4, has_adapter=True)["quantized"] == "nf4 beside an adapter"
    saved = "model_alignment_strategy.peft.modules_to_save"
    assert store_of(NF4, f"{saved}=[o_proj,lm_head]")["quantized"] == "nf4 but lm_head, o_proj"
    assert "quantized" not in store_of(f"{saved}=[o_proj]")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["exp_manager.export_hf=merged"],
            "must be adapter with model_alignment_strategy.peft.quantize_base",
        ),
        (["exp_manager.export_hf=merged"], "nxdt-align export --merge RUN FOLDER adds a run's adapter"),
        (["model_alignment_strategy.peft.merge_lora=True"], "peft.merge_lora: must be False with"),
        (
            ["distributed_strategy.tensor_model_parallel_size=2", "trainer.devices=2"],
            "must be 1 with model_alignment_strategy.peft.quantize_base: nf4, whose weights are not split "
            "over tensor-parallel ranks",
        ),
        (
            ["distributed_strategy.pipeline_model_parallel_size=2", "trainer.devices=2"],
            "distributed_strategy.fsdp=full spreads the base over all ranks",
        ),
        (["model_alignment_strategy.peft.quantize_base=int8"], "quantize_base"),
    ],
)
def test_what_a_base_in_4_bits_cannot_do(
    project: Project, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert project.train(*LORA, "exp_manager.export_hf=True", NF4, *overrides) == 1
    assert message in capsys.readouterr().err


def test_a_base_in_4_bits_without_its_library(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name)
    )
    base = f"exp_manager.resume_from_checkpoint={project.root}/base"
    assert project.train(base, *LORA, *PRESENT) == 1
    assert "pip install 'nxdt-align[qlora]'" in capsys.readouterr().err
