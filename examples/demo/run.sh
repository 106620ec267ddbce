#!/usr/bin/env bash
# The whole path on this machine: real text -> tokens -> a tiny Kimi K2 on Megatron's own loop with
# MuonClip -> validation against a bigram model -> a Hugging Face checkpoint that transformers runs.
# Run it again after an interruption: every step resumes or is skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
k2() { .venv/bin/megatron-k2 "$@"; }
out="${1:-runs/demo}"
ranks="${RANKS:-2}"
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/6  The Python standard library's source -> BPE tokenizer -> Megatron indexed dataset"
k2 data prepare --python-stdlib --train-bpe 4096 --output "$out/data" --workers 2
k2 data baseline "$out/data"

step "2/6  Pretrain k2-tiny: MLA, 32 experts, MuonClip, $ranks ranks over gloo"
k2 pretrain --preset k2-tiny --data "$out/data" --save "$out/run" --nproc "$ranks"

step "3/6  Validation loss over every held-out token"
k2 evaluate --load "$out/run" --data "$out/data" --nproc "$ranks" --json "$out/evaluation.json"

step "4/6  Export to Hugging Face (fp32 safetensors)"
rm -rf "$out/hf"
k2 convert export "$out/run" "$out/hf" --dtype fp32 --model-type deepseek_v3 \
    --tokenizer "$out/data/tokenizer"

step "5/6  Same logits in transformers?"
k2 evaluate --load "$out/run" --data "$out/data" --dump-logits "$out/logits.pt" --dump-sequences 2
k2 convert verify-logits "$out/hf" --reference "$out/logits.pt" --tolerance 1e-4

step "6/6  A sample, and the bars this demo must meet"
k2 generate --load "$out/run" --data "$out/data" --prompt "def read_" --max-new-tokens 48 --seed 1
.venv/bin/python examples/demo/check.py "$out"
