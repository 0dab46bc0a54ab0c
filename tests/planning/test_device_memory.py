"""The memory part of ``nxdt-align plan``: sizes from the YAML, the verdict, advice that keeps its word."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nxdt_align.config.load import load_config
from nxdt_align.config.schema import Config
from nxdt_align.data.packing import Bucket, Layout
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.presets import LLAMA3_8B, DecoderConfig
from nxdt_align.planning import workload as planned
from nxdt_align.planning.changes import _PIPELINE, _pipeline
from nxdt_align.planning.device_memory import GIB, USABLE, estimate, memory_report
from nxdt_align.planning.workload import Formats, Workload, workload
from nxdt_align.run.assemble import loss

DPO, ORPO = "hf_llama3_8B_DPO_config", "hf_llama3_8B_ORPO_config"
BUCKET = Bucket(tokens=4096, responses=2048, slots=8)
ON_8_CORES = ("trainer.devices=8", "distributed_strategy.tensor_model_parallel_size=8")
EVERYTHING_KEPT = "model.activations_checkpoint_granularity=null"


def sizes(*overrides: str, name: str = DPO, layout: Layout = "shared_prompt") -> Workload:
    config = load_config(name, overrides)
    return workload(config, LLAMA3_8B, layout, 2, BUCKET, needs_reference=needs_reference(config))


def needs_reference(config: Config) -> bool:
    return GlobalMeanObjective(loss(config, "nxd")).needs_reference


def report(*overrides: str, layout: Layout = "shared_prompt", model: DecoderConfig = LLAMA3_8B) -> str:
    config = load_config(DPO, overrides)
    return memory_report(config, model, layout, 2, BUCKET, needs_reference=needs_reference(config))


def test_shipped_yaml_fits_a_neuron_core() -> None:
    """test_estimate.py counts the weights by hand: 276,369,408 of them, at 2 + 4 + 4 + 8 bytes."""
    said = report()
    assert "memory of a NeuronCore, rows of 4096 tokens x 1, tensor parallel 32, data parallel 1" in said
    figures = {name.strip(): float(size) for name, size in re.findall(r"    ([a-z ]+?) +([\d.]+) GiB", said)}
    weights = 276_369_408
    assert figures["weights"] == pytest.approx(2 * weights / GIB, abs=0.005)
    assert figures["gradients"] == figures["master weights"] == pytest.approx(4 * weights / GIB, abs=0.005)
    assert figures["optimizer state"] == pytest.approx(8 * weights / GIB, abs=0.005)
    assert figures["total"] == pytest.approx(sum(v for k, v in figures.items() if k != "total"), abs=0.03)
    assert 4.8 < figures["total"] < 6
    assert said.endswith("16 GiB (trn1, 10% reserved for graphs and runtime): fits")


@pytest.mark.parametrize(
    ("overrides", "formats"),
    [
        (["precision.type=mixed_precision"], Formats(2, 4, 4, 8, 2)),
        (["precision.type=mixed_precision_SR"], Formats(2, 4, 4, 8, 2)),
        (["precision.type=fp32"], Formats(4, 4, 0, 8, 4)),
        (["precision.type=autocast"], Formats(4, 4, 0, 8, 2, autocast=True)),
        (["precision.type=fp16", "trainer.accelerator=cuda"], Formats(2, 4, 4, 8, 2)),
        (["precision.type=bf16SR"], Formats(2, 2, 0, 8, 2)),
        (["precision.type=bf16SR", "model.optim.name=adamw"], Formats(2, 2, 0, 4, 2)),
        (["precision.type=bf16SR", "trainer.accelerator=cpu"], Formats(2, 4, 4, 8, 2)),
        (["precision.type=manual"], Formats(4, 4, 0, 8, 4)),
        (
            ["precision.type=manual", "precision.xla_downcast_bf16='1'", "precision.master_weights=True"],
            Formats(2, 2, 4, 8, 2, float32_copy=4),
        ),
        (["model.optim.name=sgd"], Formats(2, 4, 4, 0, 2)),
        (["model.optim.name=sgd", "+model.optim.momentum=0.9"], Formats(2, 4, 4, 4, 2)),
        (["+model.optim.amsgrad=True"], Formats(2, 4, 4, 12, 2)),
    ],
)
def test_precision_and_optimizer_in_bytes(overrides: list[str], formats: Formats) -> None:
    assert sizes(*overrides, "distributed_strategy.zero1=False").formats == formats


MANUAL = ("precision.type=manual", "precision.xla_downcast_bf16='1'", "precision.master_weights=True")


@pytest.mark.parametrize(
    ("overrides", "formats"),
    [
        ((), Formats(2, 4, 4, 8, 2, shard_gradient=4)),
        (("precision.type=fp32",), Formats(4, 4, 4, 8, 4, shard_gradient=4)),
        (("precision.type=bf16SR",), Formats(2, 2, 2, 8, 2, shard_gradient=2)),
        (MANUAL, Formats(2, 2, 4, 8, 2, shard_gradient=4)),
        ((*MANUAL, "precision.fp32_grads_cc=True"), Formats(2, 2, 4, 8, 2, float32_copy=4, shard_gradient=4)),
        ((*MANUAL, "precision.fp32_grad_acc=True"), Formats(2, 4, 4, 8, 2, shard_gradient=4)),
    ],
)
def test_nxds_zero1_in_bytes(overrides: tuple[str, ...], formats: Formats) -> None:
    """NeuronZero1Optimizer keeps this rank's rows of each weight once more, with gradients of their own, and
    makes float32 copies of whole gradients only to reduce them so."""
    assert sizes(*overrides).formats == formats


def test_reductions_in_float32_take_memory_when_activations_are_gone() -> None:
    """276,369,408 weights per rank (see above), 4 bytes each, twice: more than activations and scratch."""
    reduced, plain = (estimate(sizes(*MANUAL, f"precision.fp32_grads_cc={on}")) for on in (True, False))
    assert reduced.activations + reduced.scratch == 8 * 276_369_408
    assert reduced.total - plain.total == 4 * 276_369_408


def test_layouts_and_attention() -> None:
    """Rows: a response each without packing. trn1's flash kernel is causal, so packed rows have scores."""
    padded = sizes("data.micro_batch_size=2", "data.global_batch_size=4", layout="none")
    assert (padded.rows, padded.attention) == (4, "flash")
    assert sizes("model.fusions.flash_attention=False", layout="none").attention == "scores"
    packed = sizes("data.micro_batch_size=2")
    assert (packed.rows, packed.attention) == (2, "scores")
    # By a bias of (S, S), as an option.
    assert sizes("model.fusions.flash_attention_packed=True").attention == "masked"
    assert sizes("trainer.accelerator=cpu").attention == "flash"
    assert sizes("trainer.accelerator=cpu", "data.attention=dense").attention == "masked"


def test_parallel_sizes() -> None:
    work = sizes("trainer.num_nodes=2")
    assert (work.tensor_parallel, work.data_parallel, work.kv_heads) == (32, 2, 1)
    assert work.sequence_parallel and work.zero1
    native = sizes("distributed_strategy.engine=native")
    assert native.kv_heads == 8, "whole where there are fewer heads than ranks"
    three = ("trainer.num_nodes=3", "distributed_strategy.pipeline_model_parallel_size=3")
    assert sizes(*three).stages == (10, 11, 11)
    cuts = "model.pipeline_cuts=[model.layers.4,model.layers.9]"
    assert sizes(*three, cuts).stages == (5, 5, 22)


def test_recomputation_and_reference() -> None:
    assert sizes().recompute == ("full",)
    named = "model.activations_checkpoint_recompute=[CoreAttention,LlamaMLP]"
    assert sizes(EVERYTHING_KEPT, named).recompute == ()
    selective = "model.activations_checkpoint_granularity=selective"
    assert sizes(selective, named).recompute == ("CoreAttention", "LlamaMLP")
    during = "model_alignment_strategy.dpo.precompute_ref_log_probs=False"
    assert [sizes().reference, sizes(during).reference] == [0, 2]
    of_its_own = "model_alignment_strategy.reference_dtype=fp32"
    assert [sizes(of_its_own).reference, sizes(during, of_its_own).reference] == [0, 4]
    low = (during, "precision.type=fp32", "model_alignment_strategy.reference_dtype=bf16")
    assert sizes(*low).reference == 2
    assert sizes(name=ORPO).reference == 0


def test_native_zero1_keeps_float32_shards() -> None:
    overrides = ("trainer.accelerator=cuda", "trainer.num_nodes=2", "precision.type=fp32")
    assert sizes(*overrides).formats.master == 4
    assert sizes(*overrides, "distributed_strategy.zero1=False").formats.master == 0


NATIVE = ("distributed_strategy.engine=native", "distributed_strategy.tensor_model_parallel_size=4")


@pytest.mark.parametrize(
    "overrides",
    [
        ("precision.type=bf16SR",),
        ("precision.type=fp32", "data.attention=dense"),
        (*MANUAL, "distributed_strategy.zero1=False"),
        ("distributed_strategy.zero1=False", "distributed_strategy.fsdp=full"),
    ],
)
def test_native_has_one_price_on_every_device(overrides: tuple[str, ...]) -> None:
    """The shipped kv_replicator of 4, which native does not read, is not counted either."""
    on_neuron, on_cuda, without = (
        sizes(f"trainer.accelerator={device}", f"distributed_strategy.kv_replicator={n}", *NATIVE, *overrides)
        for device, n in (("neuron", 4), ("cuda", 4), ("neuron", 1))
    )
    assert on_neuron == without and (on_neuron.kv_heads, on_neuron.keeps_gathered) == (2, True)
    found, wanted = estimate(on_neuron), estimate(on_cuda)
    assert on_neuron.formats == on_cuda.formats and on_neuron.formats.master * 2 == on_neuron.formats.state
    for part in ("weights", "gradients", "masters", "states"):
        assert getattr(found, part) == getattr(wanted, part) > 0


def test_advice_for_native_names_no_copies_of_heads() -> None:
    said = report(*NATIVE, "trainer.accelerator=neuron", "trainer.devices=4")
    assert "fits with distributed_strategy.tensor_model_parallel_size=" in said
    assert "kv_replicator" not in said and "qkv_linear" not in said


def test_other_devices_have_no_limit() -> None:
    said = report(*ON_8_CORES, EVERYTHING_KEPT, "data.micro_batch_size=4", "trainer.accelerator=cuda")
    assert "memory of a device (cuda), rows of 4096 tokens x 4" in said
    assert "fit" not in said


def apply_line(line: str, overrides: tuple[str, ...]) -> float:
    """GiB that the configuration takes with the advice's own overrides."""
    keys = line.partition(": ")[0].split()
    config = load_config(DPO, [*overrides, *keys])
    tokens = BUCKET.tokens * config.data.seq_length // 4096
    responses = BUCKET.responses * config.data.seq_length // 4096
    work = workload(config, LLAMA3_8B, "shared_prompt", 2, Bucket(tokens, responses, 8), needs_reference=True)
    return estimate(work).total / GIB


@pytest.mark.parametrize(
    "overrides",
    [
        (*ON_8_CORES, "distributed_strategy.kv_replicator=1"),
        (EVERYTHING_KEPT, "data.micro_batch_size=4"),
        (EVERYTHING_KEPT, "data.micro_batch_size=4", "distributed_strategy.sequence_parallel=False"),
        (*ON_8_CORES, "distributed_strategy.kv_replicator=1", EVERYTHING_KEPT, "data.micro_batch_size=4"),
        ("trainer.devices=1", "distributed_strategy.tensor_model_parallel_size=1"),
        ("trainer.devices=1", "distributed_strategy.tensor_model_parallel_size=1", "data.micro_batch_size=4"),
    ],
    ids=lambda overrides: "+".join(each.rpartition(".")[2] for each in overrides),
)
def test_advice_keeps_its_word(overrides: tuple[str, ...]) -> None:
    """Each line's own overrides, read as a configuration, come to the figure that it gives, which fits."""
    said = report(*overrides)
    assert "does not fit" in said
    lines = re.findall(r"^  fits with (.*)$", said, re.MULTILINE)
    assert lines
    for line in lines:
        figure = float(re.search(r": ([\d.]+) GiB", line)[1])  # type: ignore[index]
        assert figure <= 16 * USABLE
        assert apply_line(line, overrides) == pytest.approx(figure, abs=0.006), line


def test_several_are_named_only_where_one_is_not_enough() -> None:
    full = "model.activations_checkpoint_granularity=full"
    said = report(EVERYTHING_KEPT, "data.micro_batch_size=4")
    assert f"  fits with {full}: " in said
    assert "  fits with data.micro_batch_size=2: " in said, "the mildest of its kind"
    assert "micro_batch_size=1" not in said
    copies = "distributed_strategy.kv_replicator=1"
    said = report(*ON_8_CORES, copies, EVERYTHING_KEPT, "data.micro_batch_size=4")
    (line,) = re.findall(r"^  fits with (.*)$", said, re.MULTILINE)
    assert line.startswith(f"{full} distributed_strategy.tensor_model_parallel_size=16 ")
    assert "micro_batch_size" not in line, "the others make up for it"


def test_where_nothing_helps() -> None:
    huge = replace(LLAMA3_8B, num_hidden_layers=400, intermediate_size=2**24)
    assert report(model=huge).endswith("no change of these keys makes it fit: choose a smaller model")


def test_advice_names_sizes_that_the_model_can_be_split_by() -> None:
    """None of 2 to 32 divides 35 heads; layers are cut anywhere."""
    odd = replace(LLAMA3_8B, num_attention_heads=35, num_key_value_heads=7, vocab_size=32000)
    one_core = ("trainer.devices=1", "distributed_strategy.tensor_model_parallel_size=1")
    said = report(*one_core, model=odd)
    assert "tensor_model_parallel_size=" not in said
    assert "fits with distributed_strategy.pipeline_model_parallel_size=32 trainer.devices=32" in said


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        ([], "neuron"),
        (["distributed_strategy.engine=nxd"], "neuron"),
        (["trainer.accelerator=neuron"], "neuron"),
        (["trainer.accelerator=cpu"], "cpu"),
        (["trainer.accelerator=cuda"], "cuda"),
        (["trainer.accelerator=xla"], "cpu"),
    ],
)
def test_what_the_plan_is_for(overrides: list[str], kind: str) -> None:
    assert planned.device_kind(load_config(DPO, overrides)) == kind


def test_norms_biases_and_caps_of_other_families_are_counted() -> None:
    """By hand, of 32 layers on 32 ranks: four norms more than Llama's; q, k and v biases of this rank's 4
    query heads' share and one kv head each; and the norms of q and k, one head's size each."""
    base = replace(LLAMA3_8B, num_hidden_layers=32)
    plain = estimate(replace(sizes(), model=base))
    both = estimate(replace(sizes(), model=replace(base, norms="both")))
    assert both.weights - plain.weights == 2 * 32 * 2 * 4096
    heads = estimate(replace(sizes(), model=replace(base, qk_norm="head")))
    assert heads.weights - plain.weights == 2 * 32 * 2 * 128
    kept = [
        estimate(replace(sizes(EVERYTHING_KEPT), model=model)).activations
        for model in (base, replace(base, norms="both"), replace(base, norms="both", qk_norm="head"))
    ]
    assert kept[0] < kept[1] < kept[2]
    biased = estimate(replace(sizes(), model=replace(base, qkv_bias=True)))
    # 4,096 rows of q over 32 ranks, one kv head of 128 rows each for k and v.
    assert biased.weights - plain.weights == 2 * 32 * (128 + 2 * 128)
    capped = load_config(DPO)
    needs = needs_reference(capped)
    work = workload(capped, replace(base, attention_softcap=50.0), "none", 2, BUCKET, needs_reference=needs)
    assert work.attention == "scores"


@pytest.mark.parametrize(
    ("overrides", "stages", "cores", "nodes"),
    [
        ((), 2, 32, 2),
        (("trainer.lnc=1",), 4, 128, 1),
        (("distributed_strategy.engine=native", "trainer.accelerator=neuron"), 2, 64, 1),
    ],
)
def test_advice_fills_the_machines_nodes(
    overrides: tuple[str, ...], stages: int, cores: int, nodes: int
) -> None:
    """Stages of 32 ranks. A trn1.32xlarge has 32 cores, a trn2.48xlarge 128, by default in pairs."""
    options = _pipeline(load_config(DPO, overrides), LLAMA3_8B)
    (values,) = (each.values for each in options if each.values[_PIPELINE] == stages)
    assert (values["trainer.devices"], values.get("trainer.num_nodes", 1)) == (cores, nodes)
