"""What is compared: each contender trains one batch of pairs, or computes its reference log-probs."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from workload import SEQ_LENGTH, Workload

from nxdt_align.batch import Topology
from nxdt_align.config.alignment import DPOConfig
from nxdt_align.data.packing import Layout, RowPlanner
from nxdt_align.data.steps import StepDataset
from nxdt_align.engines.native.compiled import Compiling
from nxdt_align.engines.native.engine import NativeEngine
from nxdt_align.engines.native.graphs import GraphRecorder
from nxdt_align.engines.native.settings import Precision
from nxdt_align.losses.dpo import DPOLoss
from nxdt_align.losses.objective import GlobalMeanObjective
from nxdt_align.models.adapter_targets import ALL_LINEAR, adapter_spec
from nxdt_align.models.adapters import AdapterSpec
from nxdt_align.models.backend.config import TransformersConfig
from nxdt_align.models.decoder import Decoder
from nxdt_align.models.presets import DecoderConfig, ModelShape, fresh_weight
from nxdt_align.named_tensors import WeightSource
from nxdt_align.ops.attention_blocks import BlockAttention
from nxdt_align.ops.attention_flex import FlexAttention
from nxdt_align.training import optim
from nxdt_align.weights.hf import FreshWeights
from nxdt_align.weights.hf_writer import write_hf_folder
from nxdt_align.weights.peft import AdaptedWeights
from nxdt_align.weights.transformers_folder import TransformersFolder

BETA, MAX_NORM = 0.1, 1.0
OPTIMIZER = {"lr": 1e-5, "weight_decay": 0.01}
RANK, ALPHA = 16, 32
"""Of adapters on all linear layers of the decoder's layers, without dropout."""
ROWS_AT_ONCE = 4
"""Our micro_batch_size on a CPU, where padding is left out; 1 on a device that computes it."""


class Contender(Protocol):
    def train(self, indices: Sequence[int]) -> Tensor:
        """One optimizer step, with reference log-probs of 0; returns the loss."""
        ...

    def precompute(self, indices: Sequence[int]) -> Tensor:
        """(n, 2): log-probs of chosen and rejected, without gradients."""
        ...

    def graphs(self) -> int:
        """How many graphs have been compiled so far; a step that compiles one is no measure of speed."""
        ...


class Ours:
    _spec: AdapterSpec | None = None
    """Of adapters; None where every weight is trained."""
    _compiling: Compiling | None = None

    def __init__(
        self, workload: Workload, shape: DecoderConfig, layout: Layout, device: torch.device
    ) -> None:
        on_cpu = device.type == "cpu"
        planner = RowPlanner(
            workload.examples,
            layout,
            examples_per_step=workload.batch_size,
            seq_length=SEQ_LENGTH,
            micro_batch_size=(workload.batch_size if layout == "none" else ROWS_AT_ONCE) if on_cpu else 1,
        )
        self._steps = StepDataset(workload.examples, planner, layout, Topology())
        with ExitStack() as self._held:
            model, weights = self._shape_and_weights(shape)
            self._make_engine(model, weights, device)
        self._optimizer = optim.build_optimizer(
            self._engine.named_parameters(), "adamw_fp32OptState", OPTIMIZER
        )
        self._objective = GlobalMeanObjective(DPOLoss(DPOConfig(kl_beta=BETA)), token_statistics=True)

    def _shape_and_weights(self, shape: DecoderConfig) -> tuple[ModelShape, WeightSource]:
        return shape, FreshWeights(shape, 0)

    def _make_engine(self, model: ModelShape, weights: WeightSource, device: torch.device) -> None:
        """As a run on that device has it with every key left to auto."""
        on_cpu = device.type == "cpu"
        if not on_cpu and isinstance(model, DecoderConfig):
            self._compiling = Compiling("inductor", recorder=GraphRecorder())
        self._engine = NativeEngine(
            model,
            BlockAttention() if on_cpu else FlexAttention(compiled=self._compiling is None),
            precision=Precision() if on_cpu else Precision(compute=torch.bfloat16),
            device=device,
            adapters=self._spec,
            compiling=self._compiling,
        )
        self._engine.load_weights(weights)

    def graphs(self) -> int:
        recorder = None if self._compiling is None else self._compiling.recorder
        return 0 if recorder is None else recorder.count()

    def train(self, indices: Sequence[int]) -> Tensor:
        batches = [b.to(self._engine.device) for b in self._steps[list(indices)]]
        batches = [b.with_reference(torch.zeros_like(b.slot_valid, dtype=torch.float32)) for b in batches]
        output = self._engine.step(batches, self._objective)
        self._engine.clip_gradients(MAX_NORM)
        self._optimizer.step()
        return output.loss

    def precompute(self, indices: Sequence[int]) -> Tensor:
        place = {index: at for at, index in enumerate(indices)}
        values = torch.zeros(len(indices), 2)
        for batch in self._steps[list(indices)]:
            on_device = batch.to(self._engine.device)
            logps = self._engine.response_logps(on_device, reference=self._spec is not None).cpu()
            for row, slot in batch.slot_valid.nonzero().tolist():
                at = place[int(batch.record_index[row, slot])]
                values[at, int(batch.slot_role[row, slot])] = logps[row, slot]
        return values


class OursWithAdapters(Ours):
    """LoRA: the reference is the policy with its adapters off."""

    def _make_engine(self, model: ModelShape, weights: WeightSource, device: torch.device) -> None:
        assert isinstance(model, DecoderConfig)
        self._spec = adapter_spec(model, target_modules=[ALL_LINEAR], rank=RANK, alpha=ALPHA)
        super()._make_engine(model, AdaptedWeights(weights, model, self._spec, 0), device)
        self._engine.load_reference(None)


class ByTransformers(Ours):
    """Our layouts, losses and engine on transformers' own class of the model."""

    def _shape_and_weights(self, shape: DecoderConfig) -> tuple[ModelShape, WeightSource]:
        model = TransformersConfig.of(shape.to_hf_dict())
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory()))
        _write_fresh(folder / "model", shape)
        return model, TransformersFolder(folder / "model", model)


def _write_fresh(folder: Path, shape: DecoderConfig, dtype: torch.dtype = torch.float32) -> None:
    source = FreshWeights(shape, 0)
    named = ((name, source.read(name)) for name in source.names())
    write_hf_folder(folder, shape, named, tokenizer_dir=None, dtype=dtype)


def trl_settings(device: torch.device) -> dict[str, Any]:
    """TRL's fastest on ``device`` of what is installed; what it computes is the same. Its padding_free is
    switched off in 1.16, and a fused head is its default."""
    if device.type == "cpu":
        return {"attn_implementation": "sdpa", "use_liger_kernel": False}
    flash = importlib.util.find_spec("flash_attn") is not None
    return {
        "attn_implementation": "flash_attention_2" if flash else "sdpa",
        "use_liger_kernel": importlib.util.find_spec("liger_kernel") is not None,
    }


class TRL:
    """TRL's DPOTrainer in its own padded batches, given the same tokens: its collator, its training
    step, its reference pass. Gradient checkpointing is off, as it is in ours; on a card bf16 by autocast over
    float32 weights, or over a frozen base in bf16."""

    def __init__(
        self, workload: Workload, shape: DecoderConfig, device: torch.device, *, adapters: bool = False
    ) -> None:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM
        from trl import DPOConfig, DPOTrainer

        self._examples = workload.examples
        self._device = device
        on_cpu, chosen = device.type == "cpu", trl_settings(device)
        dtype = torch.float32 if on_cpu or not adapters else torch.bfloat16
        with tempfile.TemporaryDirectory() as folder:
            _write_fresh(Path(folder) / "model", shape, dtype)
            model = AutoModelForCausalLM.from_pretrained(
                Path(folder) / "model", dtype=dtype, attn_implementation=chosen["attn_implementation"]
            )
            settings = DPOConfig(
                output_dir=str(Path(folder) / "out"),
                per_device_train_batch_size=workload.batch_size,
                precompute_ref_log_probs=True,
                max_length=2 * SEQ_LENGTH,
                gradient_checkpointing=False,
                beta=BETA,
                use_cpu=on_cpu,
                bf16=not on_cpu,
                use_liger_kernel=chosen["use_liger_kernel"],
                report_to=[],
                disable_tqdm=True,
                max_steps=1,
            )
            one = Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}])
            lora = LoraConfig(
                r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=ALL_LINEAR, task_type="CAUSAL_LM"
            )
            self._trainer = DPOTrainer(
                model=model,
                args=settings,
                train_dataset=one,
                processing_class=workload.tokenizer,
                peft_config=lora if adapters else None,
            )
        # What train() does before its first step, but for the loop.
        if chosen["use_liger_kernel"]:
            from transformers.integrations.liger import apply_liger_kernel

            apply_liger_kernel(self._trainer.model, self._trainer.args.liger_kernel_config)
        # accelerate wraps forward in autocast; nothing else in a training step asks for bf16.
        self._model = self._trainer.accelerator.prepare_model(self._trainer.model.to(device))
        self._trained = [p for p in self._model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, **OPTIMIZER, fused=True)
        self._trainer.optimizer = self._optimizer
        self._trainer.current_gradient_accumulation_steps = 1

    def _inputs(self, indices: Sequence[int]) -> dict[str, Tensor]:
        examples = [
            {
                "prompt_ids": e.prompt.tolist(),
                "chosen_ids": e.responses[0].tolist(),
                "rejected_ids": e.responses[1].tolist(),
                "ref_chosen_logps": 0.0,
                "ref_rejected_logps": 0.0,
            }
            for e in (self._examples[i] for i in indices)
        ]
        return {name: value.to(self._device) for name, value in self._trainer.data_collator(examples).items()}

    def train(self, indices: Sequence[int]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self._trainer.training_step(self._model, self._inputs(indices))
        nn.utils.clip_grad_norm_(self._trained, MAX_NORM)
        self._optimizer.step()
        return loss.detach()

    def precompute(self, indices: Sequence[int]) -> Tensor:
        self._model.eval()
        inputs = {k: v for k, v in self._inputs(indices).items() if not k.startswith("ref_")}
        return torch.stack(self._trainer.compute_ref_log_probs(self._model, inputs), 1).float().cpu()

    def graphs(self) -> int:
        return 0


class Padded:
    """NxDT's layout: chosen and rejected each a row of SEQ_LENGTH tokens, causal attention, the logits of
    every position. The model, loss and optimizer are ours, so that the layout is all that differs."""

    def __init__(self, workload: Workload, shape: DecoderConfig, device: torch.device) -> None:
        self._examples = workload.examples
        self._device = device
        self._context = Precision(autocast=device.type != "cpu").context
        self._model = Decoder(shape, _causal).to(device)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(fresh_weight(shape, name, 0))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), **OPTIMIZER, fused=True)

    def train(self, indices: Sequence[int]) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for index in indices:
            chosen, rejected = self._logps(index)
            loss = -nn.functional.logsigmoid(BETA * (chosen - rejected)) / len(indices)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        nn.utils.clip_grad_norm_(self._model.parameters(), MAX_NORM)
        self._optimizer.step()
        return total

    @torch.no_grad()
    def precompute(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._logps(index) for index in indices]).float().cpu()

    def graphs(self) -> int:
        return 0

    def _logps(self, index: int) -> Tensor:
        """(2,): both responses of a pair, in one forward pass of two rows."""
        example = self._examples[index]
        ids = torch.zeros(2, SEQ_LENGTH, dtype=torch.long)
        counts = torch.zeros(2, SEQ_LENGTH - 1, dtype=torch.bool)
        for row, response in enumerate(example.responses):
            start, end = len(example.prompt), len(example.prompt) + len(response)
            ids[row, :start] = torch.from_numpy(example.prompt.astype("int64"))
            ids[row, start:end] = torch.from_numpy(response.astype("int64"))
            counts[row, start - 1 : end - 1] = True
        ids, counts = ids.to(self._device), counts.to(self._device)
        positions = torch.arange(SEQ_LENGTH, device=self._device).expand(2, -1)
        with self._context(self._device):
            logits = self._model.logits(self._model(ids, positions, None))[:, :-1]
        logps = torch.log_softmax(logits.float(), -1).gather(2, ids[:, 1:, None]).squeeze(2)
        return (logps * counts).sum(1)


def _causal(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    out = nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
    return out.transpose(1, 2)


def build(name: str, workload: Workload, shape: DecoderConfig, device: torch.device) -> Contender:
    if name in ("trl", TRL_LORA):
        return TRL(workload, shape, device, adapters=name == TRL_LORA)
    if name == OURS_LORA:
        return OursWithAdapters(workload, shape, "shared_prompt", device)
    if name == "padded":
        return Padded(workload, shape, device)
    layout: Layout = name.split()[1]  # type: ignore[assignment]
    kind = ByTransformers if name == BY_TRANSFORMERS else Ours
    return kind(workload, shape, layout, device)


BY_TRANSFORMERS = "transformers shared_prompt"
OURS_LORA, TRL_LORA = "ours lora", "trl lora"
NAMES = ("ours shared_prompt", "ours packed", "ours none", BY_TRANSFORMERS, "trl", "padded")
WITH_LORA = (OURS_LORA, "ours shared_prompt", TRL_LORA)
"""Adapters, every weight, and TRL's with PEFT's."""
ON_A_CARD = {"ours shared_prompt", "trl", OURS_LORA, TRL_LORA}
"""What a card compares if nothing else is asked for: all contenders are in its memory at once."""
