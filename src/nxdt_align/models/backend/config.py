"""What a model of transformers is, by its ``config.json``.

transformers is imported when something is asked that the file does not say by itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from nxdt_align.models.config import LinearLayers, config_error
from nxdt_align.models.fields import TokenIds

if TYPE_CHECKING:
    from nxdt_align.models.backend.probe import Findings

IMPLEMENTATION = "nxdt_align_implementation"
"""Key of a run's record of its model, whose value ``transformers`` says that it is one of these."""
REMOTE_FOLDER = "nxdt_align_remote_code"
"""Key of the same: the folder with the model's own code, where that may be run."""
_VOLATILE = ("transformers_version", "_name_or_path", "_attn_implementation", "torch_dtype", "dtype")
"""Keys of ``config.json`` that say nothing about what is computed."""
BY_LONGEST_POSITION = ("dynamic", "longrope", "su")
"""Rotary scalings that choose their frequencies by the longest position of a batch."""
_QUANTISED_BY = {
    "awq": "AutoAWQ",
    "bitsandbytes": "bitsandbytes",
    "bitnet": "transformers (BitNet)",
    "compressed-tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fbgemm_fp8": "FBGEMM",
    "fp8": "transformers (fine-grained fp8)",
    "gptq": "GPTQModel",
    "hqq": "HQQ",
    "mxfp4": "transformers (MXFP4)",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
}
"""``quant_method`` -> the library."""


@dataclass(frozen=True)
class TransformersConfig:
    """The shape of a model that transformers' own class computes.

    Its text is part of a reference store's fingerprint.

    Args:
        text: its ``config.json``, as canonical JSON without what varies with the version that wrote it.
        remote_folder: the folder whose own code may be run; None runs none.
    """

    text: str
    remote_folder: str | None = None

    @classmethod
    def of(
        cls, values: Mapping[str, Any], *, where: str = "config.json", remote_folder: str | None = None
    ) -> TransformersConfig:
        """Raises ModelConfigError for what no causal model that can be trained says of itself."""
        folder = remote_folder or values.get(REMOTE_FOLDER)
        kept = {k: v for k, v in values.items() if k not in (*_VOLATILE, IMPLEMENTATION, REMOTE_FOLDER)}
        faults = _faults(kept, runs_own_code=folder is not None)
        if faults:
            raise config_error(where, faults)
        return cls(json.dumps(kept, sort_keys=True), folder)

    @cached_property
    def values(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.text)
        return loaded

    @cached_property
    def hf(self) -> Any:
        """transformers' configuration; not to be changed."""
        from nxdt_align.models.backend.model import read_config

        return read_config(self)

    @cached_property
    def findings(self) -> Findings:
        """What the check at the start found. Raises UserError where transformers cannot run the model."""
        from nxdt_align.models.backend.probe import probe

        return probe(self)

    @property
    def model_type(self) -> str:
        return str(self.values.get("model_type"))

    @property
    def vocab_size(self) -> int:
        return int(self.hf.vocab_size)

    @property
    def hidden_size(self) -> int:
        return int(self.hf.hidden_size)

    @property
    def num_hidden_layers(self) -> int:
        return int(self.hf.num_hidden_layers)

    @property
    def max_position_embeddings(self) -> int:
        """Without bound, where the configuration names none."""
        return int(getattr(self.hf, "max_position_embeddings", None) or sys.maxsize)

    @property
    def tie_word_embeddings(self) -> bool:
        return bool(self.hf.tie_word_embeddings)

    @property
    def bos_token_id(self) -> TokenIds:
        return _token_ids(self.hf.bos_token_id)

    @property
    def eos_token_id(self) -> TokenIds:
        return _token_ids(self.hf.eos_token_id)

    @property
    def pad_token_id(self) -> TokenIds:
        return _token_ids(self.hf.pad_token_id)

    @property
    def sliding_window(self) -> int | None:
        """The smallest window of a layer; None where none has one, or where layout none alone is possible."""
        return min((w for w in self.findings.windows if w is not None), default=None)

    @property
    def layer_types(self) -> tuple[str, ...] | None:
        """As of a DecoderConfig: None where all layers have the same window, or none."""
        windows = self.findings.windows
        if len(set(windows)) <= 1:
            return None
        return tuple("full_attention" if w is None else "sliding_attention" for w in windows)

    @property
    def attention_softcap(self) -> float | None:
        """Of scores, where the layers ask for one."""
        return self.findings.attention_softcap

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        from nxdt_align.models.backend.model import weight_shapes

        return weight_shapes(self)

    def linear_layers(self) -> LinearLayers:
        """Raises UserError where transformers cannot run the model."""
        from nxdt_align.models.backend.model import linear_layers

        return linear_layers(self)

    @property
    def float32_weights(self) -> frozenset[str]:
        """Names of weights that are float32 whatever the model computes in, as a router's balancing bias."""
        from nxdt_align.models.backend.model import fixed_weights

        return fixed_weights(self)

    def to_hf_dict(self) -> dict[str, Any]:
        """Its ``config.json``."""
        found = dict(self.values)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found.setdefault(key, getattr(self.hf, key))
        found.setdefault("architectures", [type_name(self)])
        return found

    def to_record(self) -> dict[str, Any]:
        """``to_hf_dict`` with what a run's record must say of it besides."""
        remote = {} if self.remote_folder is None else {REMOTE_FOLDER: self.remote_folder}
        return {**self.to_hf_dict(), IMPLEMENTATION: "transformers", **remote}


def is_recorded(values: Mapping[str, Any]) -> bool:
    """Whether a run's record of its model is of one that transformers computes."""
    return values.get(IMPLEMENTATION) == "transformers"


def type_name(config: TransformersConfig) -> str:
    """transformers' class of it."""
    from nxdt_align.models.backend.model import model_class

    return str(model_class(config).__name__)


def _token_ids(value: Any) -> TokenIds:
    return tuple(value) if isinstance(value, list | tuple) else value


def _faults(values: Mapping[str, Any], *, runs_own_code: bool) -> list[str]:
    """What forbids training, as far as the file itself says it."""
    kind = values.get("model_type")
    if not isinstance(kind, str):
        return [f"`model_type` must name a model of transformers, but is {json.dumps(kind, default=str)}"]
    if values.get("is_encoder_decoder") is True:
        return [
            f"`model_type` {kind} is a model with an encoder and a decoder; only models that continue a text "
            "are trained here: give a causal model"
        ]
    if "vision_config" in values or "audio_config" in values:
        text = values.get("text_config")
        inner = text.get("model_type") if isinstance(text, Mapping) else None
        advice = f": save its text model ({inner}) by itself, with transformers" if inner else ""
        return [
            f"`model_type` {kind} is a model of images or sounds; of those nothing is trained here{advice}"
        ]
    faults = []
    quantised = values.get("quantization_config")
    if quantised is not None:
        faults.append(quantised_fault(quantised))
    if "auto_map" in values and not runs_own_code and not _is_known(kind):
        faults.append(
            f"`model_type` {kind} is none of transformers', and its folder brings code of its own "
            "(`auto_map`), which is not run: read it, and set model.trust_remote_code: True"
        )
    elif not runs_own_code and not _is_known(kind):
        faults.append(
            f"`model_type` {kind} is no causal model that the installed transformers {_version()} knows: "
            "update transformers, or give another model"
        )
    for key in ("rope_scaling", "rope_parameters"):
        rotary = values.get(key)
        if not isinstance(rotary, Mapping):
            continue
        chosen = rotary.get("rope_type", rotary.get("type"))
        if chosen in BY_LONGEST_POSITION:
            faults.append(
                f"`{key}.rope_type` {chosen} chooses frequencies by the longest position of a batch, so that "
                "what a text is in a batch with changes its results: set another, or null and train within "
                "original_max_position_embeddings"
            )
    return faults


def quantised_fault(quantised: Any) -> str:
    """Why a quantised checkpoint is not trained, and what is."""
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else None
    by = f" by {_QUANTISED_BY.get(method, method)}" if isinstance(method, str) else ""
    return (
        f"`quantization_config` says that the weights are quantised{by}: whole weights cannot be trained so. "
        "Give the unquantised checkpoint; adapters train on a quantised base"
    )


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _version() -> str:
    import transformers

    return str(transformers.__version__)
