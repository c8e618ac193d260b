#!/usr/bin/env bash
# From nothing to a search over pictures that training never saw: environment, training with
# gradient cache under ZeRO-2 (every GPU, or 2 CPU ranks), conversion, evaluation, a page of results.
# Further arguments override the configuration:   bash launch/quickstart.sh max_steps=100
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" quickstart

out=output/emoji
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
ranks=$((gpus > 0 ? gpus : 2))
if [ "$gpus" -eq 0 ]; then export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR=cpu; fi
batch=$(((128 + ranks - 1) / ranks)) # about 128 pairs in the loss, whatever the number of ranks

echo "== Training on $ranks $([ "$gpus" -gt 0 ] && echo GPUs || echo CPU ranks)"
started=$SECONDS
deepspeed --log_level error --num_gpus "$ranks" --module vembed_ds.train \
  --ds_config ds_configs/zero2.json --config examples/emoji/t2i.yaml \
  --config_override output_dir="$out" batch_size="$batch" "$@"
echo "== Trained in $((SECONDS - started)) s. Converting to a plain Hugging Face model"
rm -rf "$out/model"
vembed-ds convert "$out" "$out/model"

echo "== Searching twemoji, whose pictures were never seen, with the converted model"
head -n 1 "$out/metrics.jsonl" > "$out/before.json" # the evaluation before the first step
vembed-ds evaluate --model "$out/model" --data examples/emoji/twemoji.parquet \
  --config_override num_workers=0 --before "$out/before.json" \
  --output "$out/report.json" --picture "$out/search.png" --html "$out/report.html"
echo "Report: $out/report.html   Picture: $out/search.png   Model: $out/model   Curves: tensorboard --logdir $out/tensorboard"
