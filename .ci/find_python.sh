#!/usr/bin/env bash
# Prints the path of a Python 3.12 or newer that can make virtual environments: PATH first, then pyenv.
set -u
works() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }

candidates=("${PYTHON:-}")
for version in 3.12 3.13 3.14; do candidates+=("$(command -v "python$version" 2>/dev/null)"); done
candidates+=("$(command -v python3 2>/dev/null)" "$(command -v python 2>/dev/null)")
for pyenv_python in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do candidates+=("$pyenv_python"); done

for python in "${candidates[@]}"; do
    if [ -n "$python" ] && [ -x "$python" ] && works "$python"; then
        "$python" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
cat >&2 <<'TXT'
megatron_k2 needs Python 3.12 or newer (Megatron-Core 0.19 does), and none was found on PATH or under pyenv.
Install one, for example:   apt-get install python3.12 python3.12-venv    or    pyenv install 3.12
or name one:                make PYTHON=/path/to/python3.12 venv
TXT
exit 1
