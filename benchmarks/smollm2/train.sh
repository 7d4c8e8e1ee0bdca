#!/usr/bin/env bash
# Train SmolLM2's heads: the prompts, the model's own answers to them, first heads, and these heads on more text. Every step resumes
# where it was stopped.
# usage: benchmarks/smollm2/train.sh FOLDER_OF_TRAIN_DATA OUTPUT_FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$1 output=$2
mkdir -p "$output"
python "$here/prompts.py" "$data" "$output/prompts.jsonl"
medhead generate-data --model smollm2 --prompts "$output/prompts.jsonl" --output "$output/answers.jsonl" \
    --num-answers "${NUM_ANSWERS:-5270}" --temperatures 0 0.7 0 1.0 --max-new-tokens 160 --batch-size 32
python "$here/answers.py" split "$output/answers.jsonl" "$output/train.jsonl" "$output/held-out.jsonl"
python "$here/texts.py" "$data" "$output/texts.jsonl"
train() { medhead finetune --model smollm2 --eval-data "$output/held-out.jsonl" "$@"; }
train --data "$output/train.jsonl" --output "$output/first" --kind recurrent --epochs 3 --draft-vocab 8192
train --data "$output/train.jsonl" "$output/texts.jsonl" --output "$output/heads" --init-from "$output/first" --learn-from answers \
    --anchor-fraction 1 --depth-decay 0.8 --batch-size 4 --epochs 1 --max-steps 260
