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

# Fast tests share the cores by file; what starts ranks or takes long runs alone.
FAST := -m "not slow and not dist and not gpu" --numprocesses 2 --dist loadfile
ALONE := -m "(slow or dist) and not gpu"

check: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q --no-showlocals $(FAST)

test: venv
	$(PY) -m pytest -q $(FAST)
	$(PY) -m pytest -q $(ALONE)

bench: venv
	@for script in benchmarks/*.py; do $(PY) $$script || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
