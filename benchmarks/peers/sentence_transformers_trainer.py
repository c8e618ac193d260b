"""sentence-transformers' Trainer on several ranks: DDP, or DeepSpeed at a ZeRO stage."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from transformers import TrainerCallback

from benchmarks.meter import Meter
from benchmarks.peers.job import Job
from benchmarks.peers.sentence_transformers_loss import build_loss, build_model

# As in the DeepSpeed files of transformers' documentation.
FILLED_BY_HF = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    "auto",
)
NEVER_CLIPPED = 1e9  # 0 would keep the Trainer from telling the norm


def train(job: Job, meter: Meter) -> None:
    """Options: ``cached``; ``stage`` of DeepSpeed, otherwise DDP."""
    model = build_model(job.model)
    meter.watch(model)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=_arguments(job, steps=meter.steps),
        train_dataset=Dataset.from_json(str(job.folder / "pairs.jsonl")),
        loss=build_loss(job, model, gather_across_devices=True),
        callbacks=[_Metered(meter)],
    )
    trainer.train()


class _Metered(TrainerCallback):
    """Measures from the moment when a batch is there until gradients are dropped."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def on_step_begin(self, *arguments: Any, **kwargs: Any) -> None:
        self._meter.begin()

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self._meter.end()

    def on_log(self, *arguments: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "grad_norm" in logs:  # the last line sums up
            self._meter.tell(logs["loss"], logs["grad_norm"])


def _arguments(job: Job, *, steps: int) -> SentenceTransformerTrainingArguments:
    deepspeed = None
    if "stage" in job.options:
        deepspeed = {
            "train_micro_batch_size_per_gpu": job.task.pairs_per_rank,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": NEVER_CLIPPED,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": job.options["stage"], **FILLED_BY_HF},
        }
    return SentenceTransformerTrainingArguments(
        output_dir=str(job.scratch),
        use_cpu=True,
        deepspeed=deepspeed,
        max_steps=steps,
        per_device_train_batch_size=job.task.pairs_per_rank,
        learning_rate=job.task.lr,
        weight_decay=0.0,
        max_grad_norm=NEVER_CLIPPED,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
