# make demo | test | check | bench | clean      (the environment is .venv/, built once)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
export OMP_NUM_THREADS ?= 1

.PHONY: venv demo test check bench clean

venv: $(STAMP)

$(STAMP): setup.py
	@python="$$(PYTHON="$(PYTHON)" bash scripts/find_python.sh)" && "$$python" -m venv $(VENV)
	$(PY) -m pip install --quiet --editable ".[data,dev]"
	@touch $@

demo: venv
	bash examples/demo/run.sh

check: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q -m "not slow and not gpu"

test: venv
	$(PY) -m pytest -q -m "not gpu"

bench: venv
	@for script in benchmarks/*.py; do $(PY) $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
