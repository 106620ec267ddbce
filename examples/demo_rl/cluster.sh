#!/usr/bin/env bash
# Reinforcement learning as a cluster has it, on this machine: two supervisors with an engine server
# each, a gym service, a controller, four ranks over gloo, each a process of its own, met in a folder.
# From random weights, on tasks that ask for one letter; a few minutes. Kill what you like meanwhile
# (the processes are listed): engines, supervisors and the gym come back; where a rank or the
# controller goes, run it again and it goes on. docs/rl.md says what happens when what dies.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}"
out="${1:-runs/demo-rl-cluster}"
ranks="${RANKS:-4}"
starts=("$out"/run/rl/rendezvous/local.*)
[ -e "${starts[0]}" ] && start=${#starts[@]} || start=0
meet="$out/run/rl/rendezvous/local.$start"
(umask 077 && mkdir -p "$meet")
export OMP_NUM_THREADS=1

"$python" - "$out/data" <<'PREPARE'
import sys
from pathlib import Path
from megatron_k2.rl.synthetic import write_letter_tasks, write_tokenizer
folder = Path(sys.argv[1])
write_letter_tasks(folder / "letters.json")
write_tokenizer(folder / "tokenizer", 4096)
PREPARE

cat > "$meet/engines.json" <<ENGINES
{"backend": "local", "replicas": 2,
 "model": {"preset": "k2-tiny", "max_position_embeddings": 128, "yarn": null,
           "tokenizer": "$out/data/tokenizer"},
 "options": {"num_slots": 8, "max_length": 128, "dtype": "float32", "batch_invariant": true}}
ENGINES
host=127.0.0.1
meeting=(--meet "$meet" --engines "$meet/engines.json" --gym 1 --host "$host")
flags=(--preset k2-tiny --tasks "$out/data/letters.json" --chat-tokenizer "$out/data/tokenizer"
  --save "$out/run" --save-interval 1 --iterations "${ITERATIONS:-6}" --batch-invariant
  --seq-length 128 --max-position-embeddings 128 --tensor-model-parallel-size 2 --sequence-parallel
  --prompts-per-iteration 8 --group-size 4 --eval-every 3 --rail truncated=off
  --lr 2e-4 --min-lr 2e-4 --exit-signal-handler --seed 1)

# A program that is started again whenever it ends, until this script tells it to.
pids=()
keep() {
  local name=$1
  shift
  (
    child="" over=0
    trap 'over=1; [ -z "$child" ] || kill "$child"' TERM
    while [ "$over" -eq 0 ]; do
      "$python" -m "megatron_k2.rl.cluster.$@" & child=$!
      wait "$child" || true
      [ "$over" -eq 1 ] || { echo "$name ended: started again"; sleep 1; }
    done
    wait
  ) > "$meet/$name.log" 2>&1 &
  pids+=($!)
}
trap 'kill "${pids[@]}" 2> /dev/null || true; wait' EXIT

for node in 0 1; do
  keep "supervisor.$node" supervisor --meet "$meet" --engines "$meet/engines.json" \
    --node "$node" --nodes 2 --host "$host"
done
keep gym.0 gym_service --meet "$meet" --tasks "$out/data/letters.json" --host "$host" --index 0
"$python" -m megatron_k2.rl.cluster.controller "${meeting[@]}" "${flags[@]}" \
  > "$meet/controller.log" 2>&1 & pids+=($!)
echo "start $start meets in $meet; logs lie there and in $out/run/logs"
"$python" -m megatron_k2 rl --nproc "$ranks" "${meeting[@]}" "${flags[@]}"
