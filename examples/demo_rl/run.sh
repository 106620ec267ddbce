#!/usr/bin/env bash
# Reinforcement learning on this machine, from the checkpoint that `make demo-sft` left: a warm-up on
# noisy demonstrations -> groups of answers, judged by executed calls and by rule -> MuonClip on two
# ranks -> held-out tasks before and after. Run it again after an interruption: every step resumes.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/examples/demo_rl:$PWD/examples/demo_sft${PYTHONPATH:+:$PYTHONPATH}"
k2() { .venv/bin/megatron-k2 "$@"; }
start="${START:-runs/demo-sft/run}"
tokenizer="${TOKENIZER:-runs/demo/data/tokenizer}"
out="${1:-runs/demo-rl}"
seed="${SEED:-1}"
ranks="${RANKS:-2}"
iterations="${ITERATIONS:-27}"
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/4  Tasks: tool calls that are really executed, digits to be put in order; a third of the demonstrations wrong"
.venv/bin/python examples/demo_rl/make_tasks.py "$out/tasks"
k2 data chat --input "$out/tasks/noisy.jsonl" --output "$out/set" --tokenizer "$tokenizer" \
    --sequence-length 1024 --workers 2

step "2/4  Warm-up: fine-tune on them, $ranks ranks over gloo"
k2 sft --preset k2-tiny --load "$start" --data "$out/set" --save "$out/warm" --nproc "$ranks" \
    --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 4 --epochs 2 \
    --lr 1.5e-3 --min-lr 1.5e-4 --on-spike off --seed 1

step "3/4  RL: 32 prompts x 8 answers an iteration, temperature 1.0 to 0.8, MuonClip with QK-Clip"
k2 rl --preset k2-tiny --load "$out/warm" --tasks "$out/tasks/task_sets.json" \
    --chat-tokenizer "$tokenizer" --save "$out/run" --nproc "$ranks" --seq-length 512 \
    --max-position-embeddings 1024 --iterations "$iterations" --prompts-per-iteration 32 \
    --group-size 8 --engine-processes "$ranks" --lr "${LR:-4e-4}" --min-lr "${LR:-4e-4}" \
    --eval-every $((iterations - 1)) --eval-samples 4 --save-interval 10 --seed "$seed" ${FLAGS:-}

step "4/4  Samples before and after, and the bar this demo must meet"
.venv/bin/python examples/demo_rl/check.py "$out/run"
