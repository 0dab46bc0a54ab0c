"""YAML texts in the forms that NxDT's documentation and tutorial show."""

from __future__ import annotations

TUTORIAL_DPO = """
exp_manager:
    resume_from_checkpoint: /pretrained_ckpt

data:
    train_dir: /example_datasets/llama3_8b/data_dpo.jsonl
    val_dir: null
    dev_choose_samples: null
    seq_length: 4096
    tokenizer:
        type: /llama3_tokenizer

model:
    weight_init_only: True

model_alignment_strategy:
    dpo:
        kl_beta: 0.01
        loss_type: sigmoid
        max_prompt_length: 2048
        precompute_ref_log_probs: True
        truncation_mode: keep_start
"""

TUTORIAL_ORPO = """
exp_manager:
    checkpoint_callback_params:
        every_n_train_steps: 10
    resume_from_checkpoint: /pretrained_ckpt

data:
    train_dir: /example_datasets/llama3_8b/data_orpo.jsonl
    val_dir: null
    dev_choose_samples: null
    seq_length: 4096
    tokenizer:
        type: /llama3_tokenizer

model:
    encoder_seq_len: 4096
    weight_init_only: True
    optim:
        lr: 1.5e-4
        sched:
            name: CosineAnnealing

model_alignment_strategy:
    orpo:
        beta: 0.1
        max_prompt_length: 2048
        truncation_mode: keep_start
"""

SFT_WITH_LORA = """
model_source: hf
data:
    train_dir: $HOME/training.jsonl
    seq_length: ${model.encoder_seq_length}
    tokenizer: {type: ~/tokenizer}
model:
    model_config: ~/config.json
    encoder_seq_length: 4096
    max_position_embeddings: ${.encoder_seq_length}
    activations_checkpoint_granularity: selective
    activations_checkpoint_recompute: [CoreAttention]
model_alignment_strategy:
    sft:
        packing: True
    peft:
        lora_rank: 16
        lora_alpha: 32
        lora_dropout: 0.05
        lora_bias: "none"
        lora_verbose: True
        target_modules: ["qkv_proj"]
        load_lora_from_ckpt: False
        save_lora_base: True
        merge_lora: False
        save_lora_config_adapter: True
        merge_sharded_lora: False
precision: {type: autocast}
"""

PRETRAINING = """
trainer:
    {devices: 64, num_nodes: 4, max_steps: 30000, lnc: 2, sequential_move_factor: 32, limit_val_batches: 1}
exp_manager:
    checkpoint_callback_params:
        model_parallel_size: ${multiply:${distributed_strategy.tensor_model_parallel_size},
            ${distributed_strategy.pipeline_model_parallel_size}}
distributed_strategy:
    tensor_model_parallel_size: 32
    pipeline_model_parallel_size: 4
    virtual_pipeline_model_parallel_size: null
    context_parallel_size: 2
    zero1: True
    kv_replicator: 4
data: {micro_batch_size: 1, global_batch_size: 1024, train_dir: /home/ubuntu/wikicorpus_tokenized}
model:
    model_config: /home/ubuntu/config.json
    encoder_seq_length: 8192
    transpose_nki_inputs: False
    pipeline_cuts: [model.layers.18, model.layers.39, model.layers.60]
    fusions: {softmax: True, flash_attention: True, ring_attention: True}
    optim:
        name: adamw_fp32OptState
        lr: 3e-4
        betas: [0.9, 0.95]
        sched: {name: CosineAnnealing, warmup_steps: 2000, constant_steps: 0, min_lr: 1.0e-6}
precision:
    type: manual
    master_weights: True
    fp32_grad_acc: True
    xla_downcast_bf16: '1'
    parallel_layers_reduce_dtype: bf16
"""

MEGATRON_SFT = """
model_source: megatron
data:
    data_impl: mmap
    packing: True
    use_sft_style_data_module: True
    train_dir: /home/ubuntu/training.jsonl
    tokenizer: {library: huggingface, type: /home/ubuntu/llama_tokenizer, use_fast: False}
model:
    ffn_hidden_size: 11008
    num_attention_heads: 32
    layernorm_epsilon: 1e-5
    moe: {num_experts: 8, top_k: 2}
"""

ALL = {
    "tutorial_dpo": TUTORIAL_DPO,
    "tutorial_orpo": TUTORIAL_ORPO,
    "sft_with_lora": SFT_WITH_LORA,
    "pretraining": PRETRAINING,
    "megatron_sft": MEGATRON_SFT,
}
