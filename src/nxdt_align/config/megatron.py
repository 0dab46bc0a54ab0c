"""Keys of NxDT's Megatron YAMLs that have no meaning for a Hugging Face model.

They are known so that such a YAML is not refused key by key; the notice of keys without effect names each one
that is set. ``model.moe`` is refused: experts are what config.json says.
"""

from __future__ import annotations

_DATA = """
data_impl data_prefix dataloader_type drop_last eod_mask_loss fine_tuning index_mapping_dir
no_seqlen_plus_one_input_tokens pad_samples_to_global_batch_size reset_attention_mask reset_position_ids
skip_warmup splits_string use_sft_style_data_module validation_drop_last
"""
_TOKENIZER = "delimiter library merge_file model sentencepiece_legacy use_fast vocab_file"
_MODEL = """
activation activations_checkpoint_layers_per_pipeline activations_checkpoint_method
activations_checkpoint_num_layers apply_query_key_layer_scaling attention_dropout bias_activation_fusion
bias_dropout_add_fusion disable_layer_norm_checkpointing ffn_dropout ffn_hidden_size fp16_lm_cross_entropy
fp32_residual_connection gradient_accumulation_fusion has_bias hidden_dropout init_method_std kv_channels
layernorm_epsilon make_vocab_size_divisible_by masked_softmax_fusion megatron_amp_o2 moe normalization
num_attention_heads num_kv_heads num_micro_batches_with_partial_activation_checkpoints persist_layer_norm
position_abf_factor position_embedding_type position_freq_base position_interpolation_factor precision
rotary_percentage save_logits share_embeddings_and_output_weights sliding_window_size
transformer_block_type use_emha use_scaled_init_method
"""
_STRATEGY = "pipeline_model_parallel_split_rank"


def _under(section: str, names: str) -> list[str]:
    return [f"{section}.{name}" for name in names.split()]


MEGATRON_KEYS = frozenset(
    [
        *_under("data", _DATA),
        *_under("data.tokenizer", _TOKENIZER),
        *_under("model", _MODEL),
        *_under("distributed_strategy", _STRATEGY),
    ]
)
"""Paths of those keys; whatever lies below one (model.moe.top_k) belongs to it."""


def megatron_key(path: str) -> str | None:
    """The Megatron key that ``path`` is or lies below."""
    return next((key for key in MEGATRON_KEYS if path == key or path.startswith(f"{key}.")), None)
