"""The keywords of ``TrainConfig``, written by ``python -m vembed_ds.config.keyword_text``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict

StrPath = str | PathLike[str]


class Settings(TypedDict, total=False):
    """Every key of a configuration, flat; or whole sections.

    What the keys mean, and their defaults: the README's tables. vembed-factory's other keys are
    accepted too, as its files are, and are left out here.
    """

    model: Mapping[str, Any]
    model_name: StrPath | Mapping[str, Any] | None
    encoder_mode: Literal[
        "auto",
        "composed",
        "clip",
        "siglip",
        "vit",
        "dino",
        "dinov2",
        "dinov3",
        "mae",
        "bert",
        "bge",
        "e5",
        "qwen",
        "qwen3_embedding",
        "qwen-vl",
        "llava",
        "phi-3-vision",
        "qwen3_vl",
        "vlm_generic",
    ]
    text_model_name: StrPath | Mapping[str, Any] | None
    image_model_name: StrPath | Mapping[str, Any] | None
    pooling_method: Literal["cls", "mean", "last_token", "pooler", "none"] | None
    projection_dim: int | None
    projection_layers: Literal[1, 2] | None
    topk_tokens: int
    freeze_text_encoder: bool
    freeze_image_encoder: bool
    cache_frozen_encoder: bool
    frozen_features_dir: StrPath | None
    use_lora: bool
    lora_r: int
    lora_alpha: float
    lora_dropout: float
    lora_target_modules: Literal["all-linear"] | Sequence[str] | None
    lora_modules_to_save: Sequence[str] | None
    use_dora: bool
    use_rslora: bool
    load_in_4bit: bool
    freeze_batch_norm: bool
    max_seq_length: int | None
    attn_implementation: Literal["eager", "sdpa"] | None
    gradient_checkpointing: bool
    activation_checkpointing: Literal["huggingface", "deepspeed"]
    gradient_checkpointing_slice_size: int | None
    trust_remote_code: bool
    precision: Literal["fp32", "bf16", "fp16"]
    model_name_or_path: StrPath | Mapping[str, Any] | None
    torch_dtype: str | None

    data: Mapping[str, Any]
    data_path: StrPath | Sequence[StrPath] | None
    val_data_path: StrPath | Sequence[StrPath] | None
    datasets: Sequence[Mapping[str, Any]]
    batching: Literal["mixed", "homogeneous"]
    streaming: bool
    shuffle_buffer: int
    no_duplicates: bool
    on_bad_record: Literal["fail", "skip"]
    max_bad_records: int
    image_root: StrPath
    allow_images_outside_root: bool
    allow_image_urls: bool
    column_mapping: Mapping[str, Any]
    retrieval_mode: str
    query_instruction: str
    document_instruction: str
    prompt: str | None
    max_negatives: int | None
    num_workers: int
    prefetch_factor: int
    loader_timeout_seconds: float | None
    pin_memory: bool
    persistent_workers: bool
    image_augmentation: Sequence[Mapping[str, Any]]

    loss: Mapping[str, Any]
    loss_type: Literal[
        "infonce", "sigmoid", "triplet", "cosent", "colbert", "in_batch_hard", "hard_negative"
    ]
    temperature: float
    learnable_temperature: bool
    loss_bidirectional: bool
    loss_directions: Sequence[
        Literal["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
    ]
    loss_partition: Literal["joint", "per_direction"]
    negatives_scope: Literal["shared", "own"]
    label_mode: Literal["multi_positive", "mask", "ignore"] | None
    mask_duplicates: bool
    guide_model_name: StrPath | None
    guide_query_instruction: str | None
    guide_document_instruction: str | None
    guide_margin: float
    guide_margin_type: Literal["absolute", "relative"]
    init_logit_scale: float
    init_logit_bias: float
    triplet_margin: float
    cosent_scale: float
    maxsim_reduction: Literal["mean", "sum"]
    hard_mining_topk: int
    use_all_negatives: bool
    use_mrl: bool
    mrl_dims: Sequence[int]
    mrl_weights: Sequence[float] | None
    mrl_layers: Sequence[int] | None
    mrl_layer_weights: Sequence[float] | None
    hard_topk: int

    distillation: Mapping[str, Any]
    teacher_model_name: StrPath | Mapping[str, Any] | None
    teacher_ema_decay: float | None
    teacher_scores: bool
    teachers: Sequence[Mapping[str, Any]]
    teacher_mode: Literal["live", "cached", "first_epoch"]
    teacher_cache: StrPath | None
    teacher_ds_config: StrPath | None
    teacher_precision: Literal["fp32", "bf16", "fp16"]
    teacher_trust_remote_code: bool
    teacher_query_instruction: str | None
    teacher_document_instruction: str | None
    teacher_temperature: float | None
    distillation_loss_type: Literal["kl", "mse", "margin_mse", "rank", "regression"]
    distillation_alpha: float
    distillation_alpha_end: float | None
    distillation_alpha_schedule: Literal["constant", "linear", "cosine"]
    distillation_temperature: float
    distillation_scale: float

    optimizer: Mapping[str, Any]
    lr: float
    text_encoder_lr: float | None
    image_encoder_lr: float | None
    projection_lr: float | None
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    scheduler_type: Literal[
        "cosine",
        "linear",
        "constant",
        "constant_with_warmup",
        "cosine_with_restarts",
        "polynomial",
        "inverse_sqrt",
    ]
    warmup_ratio: float
    warmup_steps: int
    learning_rate: float

    training: Mapping[str, Any]
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    use_gradient_cache: bool
    gradient_cache_chunk_size: Literal["auto"] | int
    gradient_cache_chunk_tokens: Literal["auto"] | int | None
    gradient_cache_sort: bool
    encode_duplicates_once: bool
    gradient_cache_kept_graphs: Literal["auto"] | int
    gradient_reduction: Literal["once", "per_chunk", "auto"]
    zero3_gather: Literal["auto", "once", "cache_pass", "per_module"]
    loss_tile_size: Literal["auto"] | int | None
    use_torch_compile: bool
    gradient_self_test: bool
    on_nonfinite: Literal["abort", "skip"]
    max_nonfinite_steps: int
    spike_factor: float | None
    replica_check_steps: int

    run: Mapping[str, Any]
    output_dir: StrPath
    logging_steps: int
    save_steps: int
    save_epochs: int
    save_total_limit: int | None
    best_metric: str | None
    save_async: bool
    node_local_output: bool
    on_save_error: Literal["fail", "warn"]
    save_every_minutes: float | None
    eval_steps: int
    eval_on_start: bool
    eval_batch_size: int | None
    eval_recall_k: Sequence[int]
    report_to: str
    run_name: str | None
    timeout_minutes: float
