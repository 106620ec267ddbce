#!/usr/bin/env bash
# The archive for machines without internet, tried as one: an empty folder, a Python that has torch
# and nothing else of ours, no network. Further words go to selfcheck.sh (default: --quick).
set -euo pipefail
cd "$(dirname "$0")/.."
archive="$PWD/dist/megatron_k2-selfcheck.tar.gz"
site="$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"$(readlink -f .venv/bin/python)" -m venv --without-pip "$work/venv"
into="$work/venv/lib/python3.12/site-packages"
for name in torch torchgen functorch triton nvidia cuda typing_extensions sympy mpmath networkx jinja2 _distutils_hack \
            markupsafe filelock fsspec setuptools; do
  for found in "$site/$name" "$site/$name.py" "$site/$name"-*.dist-info; do
    if [ -e "$found" ]; then ln -s "$found" "$into/"; fi
  done
done
without_network=()
if unshare -n true 2>/dev/null; then without_network=(unshare -n); else
  echo "check_bundle: this user may not unshare the network; run with it"
fi
cd "$work" && tar xzf "$archive"
before="$(ls "$work/megatron_k2-selfcheck")"
PYTHON="$work/venv/bin/python" env -u PYTHONPATH "${without_network[@]}" \
  bash megatron_k2-selfcheck/selfcheck.sh "${@:---quick}"
test "$before" = "$(ls "$work/megatron_k2-selfcheck")"
"$work/venv/bin/python" -c "import json; json.load(open('selfcheck.json'))['steps'][0]"
