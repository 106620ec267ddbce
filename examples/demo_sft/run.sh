#!/usr/bin/env bash
# Fine-tuning on this machine, from the checkpoint that `make demo` left: dialogues made of the
# standard library -> packed set -> MuonClip on packed documents, all weights and adapters alone ->
# tool calls for arguments that were held out. Run it again after an interruption: every step
# resumes or is skipped.
set -euo pipefail
cd "$(dirname "$0")/../.."
k2() { .venv/bin/megatron-k2 "$@"; }
demo="${DEMO:-runs/demo}"
out="${1:-runs/demo-sft}"
seed="${SEED:-1}"
ranks="${RANKS:-2}"
step() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

step "1/6  Dialogues: documentation, tools of math and statistics really executed, two questions in one"
.venv/bin/python examples/demo_sft/make_set.py "$out/text"

step "2/6  To tokens with a loss mask, packed to 1,024 positions"
k2 data chat --input "$out/text/tools.jsonl" "$out/text/documented.jsonl" --output "$out/set" \
    --tokenizer "$demo/data/tokenizer" --sequence-length 1024 --workers 2

step "3/6  Fine-tune k2-tiny on packed documents, $ranks ranks over gloo, one epoch"
k2 sft --preset k2-tiny --load "$demo/run" --data "$out/set" --save "$out/run" --nproc "$ranks" \
    --seq-length 1024 --max-position-embeddings 1024 --global-batch-size 4 --epochs 1 \
    --lr 3e-3 --min-lr 3e-4 --on-spike off --seed "$seed"  # four packs a step: losses jump

step "4/6  The same set, a fifth of the steps, adapters of rank 16 over frozen weights"
k2 sft --preset k2-tiny --load "$demo/run" --data "$out/set" --save "$out/adapters" \
    --nproc "$ranks" --lora-rank 16 --seq-length 1024 --max-position-embeddings 1024 \
    --global-batch-size 4 --train-samples 320 --lr 1e-2 --min-lr 1e-3 --on-spike off --seed "$seed"

step "5/6  Calls for held-out arguments, and for a module that was never trained on"
answer() {
    OMP_NUM_THREADS=1 .venv/bin/python -W ignore examples/demo_sft/evaluate.py "$out/$1" \
        "$demo/data/tokenizer" "$out/text" "$out/answers_$1.json" 2> "$out/evaluate_$1.log"
}
answer adapters > "$out/said_by_adapters.txt" & beside=$!  # a core each
answer run
wait "$beside"
cat "$out/said_by_adapters.txt"

step "6/6  One turn by hand, and the bars this demo must meet"
.venv/bin/python -c 'import json, sys; t = json.loads(open(sys.argv[1]).readline()); \
json.dump(t["tools"], open(sys.argv[2], "w")); print(t["messages"][0]["content"])' \
    "$out/text/held_out.jsonl" "$out/tools.json" > "$out/question.txt"
printf '> '; cat "$out/question.txt"
k2 chat --load "$out/run" --tools "$out/tools.json" --prompt "$(cat "$out/question.txt")" \
    --max-new-tokens 48 --temperature 0
.venv/bin/python examples/demo_sft/check.py "$out"
