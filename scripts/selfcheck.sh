#!/usr/bin/env bash
# Prove a machine: bash selfcheck.sh [--quick] [--device cpu|cuda] [--tests] ...
# Needs Linux on x86-64, Python 3.12 and torch >= 2.9; no internet, no package index, no root.
# Writes selfcheck.json where it is started; everything else lies in one temporary folder.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"

if ! said="$("$python" - <<'PY' 2>&1
import sys
if sys.version_info[:2] != (3, 12):
    sys.exit(f"Python 3.12 is needed, this is {sys.version.split()[0]}; name one: PYTHON=/path/to/python3.12 bash selfcheck.sh")
try:
    import torch
except ImportError as error:
    sys.exit(f"torch cannot be imported ({error}); install torch>=2.9 or name another Python: PYTHON=...")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 9):
    sys.exit(f"torch 2.9 or newer is needed, this is {torch.__version__}")
PY
)"; then
  printf 'selfcheck: %s\n' "${said##*$'\n'}" >&2
  exit 2
fi

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$python" "$here/unpack.py" "$here/wheels" "$work/site"
cp -r "$here/src" "$work/src"
export PYTHONPATH="$work/src:$work/site${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPYCACHEPREFIX="$work/pycache" XDG_CACHE_HOME="$work/cache" TMPDIR="$work"
export TRITON_CACHE_DIR="$work/triton" TORCHINDUCTOR_CACHE_DIR="$work/inductor"
export HF_HOME="$work/hf" HF_HUB_OFFLINE=1
run=("$python" -W ignore -m megatron_k2 selfcheck "$@")

# Ranks meet on 127.0.0.1. Without a network there may be no loopback: then one of our own.
meets='import socket; s = socket.create_server(("127.0.0.1", 0)); socket.create_connection(s.getsockname(), 5)'
if ! "$python" -c "$meets" 2>/dev/null; then
  own=(unshare --user --map-root-user --net "$python" "$here/with_loopback.py")
  if ! "${own[@]}" true 2>/dev/null; then
    echo "selfcheck: the loopback interface is down and no network namespace may be made;" \
         "turn it on first: ip link set lo up" >&2
    exit 2
  fi
  run=("${own[@]}" "${run[@]}")
fi
"${run[@]}"
