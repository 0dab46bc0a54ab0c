"""Completions by vLLM, where it is installed: https://docs.vllm.ai, offline inference."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from nxdt_align.data.tokenize import Tokens
from nxdt_align.errors import UserError
from nxdt_align.evaluation.generate import Completion, FinishReason, Limits, NotFiniteError, Sampling


def is_installed() -> bool:
    return importlib.util.find_spec("vllm") is not None


def require_installed() -> None:
    if not is_installed():
        raise UserError(
            "backend: is vllm, which is not installed; pip install vllm in an environment of its own (it "
            "pins torch), or --backend transformers"
        )


class VLLMModel:
    """The model in a Hugging Face folder, on every device that vLLM runs on.

    Args:
        tensor_parallel: devices that share the model.
        dtype: vLLM's name of one; None lets it choose by the weights.

    vLLM has to be there. Raises UserError where it does not load the folder.
    """

    def __init__(self, folder: Path, *, tensor_parallel: int = 1, dtype: str | None = None) -> None:
        import vllm

        try:
            self._llm: Any = vllm.LLM(
                model=str(folder),
                tensor_parallel_size=tensor_parallel,
                dtype=dtype or "auto",
                trust_remote_code=False,
                skip_tokenizer_init=True,  # it gets and gives token ids alone
            )
        except (OSError, ValueError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"vLLM does not load {folder}: {reason}; --backend transformers may") from error
        self._parameters: Any = vllm.SamplingParams
        self.limits = Limits.of(folder)

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, ends: Collection[int]
    ) -> list[Completion]:
        parameters = [
            self._parameters(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                # One seed per prompt: the same draws, however vLLM batches them.
                seed=sampling.seed + index,
                stop_token_ids=sorted(ends),
                logprobs=0,  # of the chosen token alone
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return [_completion(each.outputs[0]) for each in self._llm.generate(asked, parameters)]


def _completion(output: Any) -> Completion:
    reason: FinishReason = "length" if output.finish_reason == "length" else "stop"
    if not math.isfinite(output.cumulative_logprob):
        raise NotFiniteError
    return Completion(tuple(output.token_ids), reason, float(output.cumulative_logprob))
