"""The CPU host redirects while entered, and at no other time.

That it lets Megatron train is what every other test of the model and of the layouts shows.
"""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import megatron.core
import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.host import repairs
from megatron_k2.host.cpu import cpu_host, megatron_host
from megatron_k2.host.cpu_megatron import megatron_redirections
from megatron_k2.host.cpu_torch import tensor_redirections, torch_cuda_redirections, uncompiled
from tests.support.paths import REPOSITORY

MEGATRON = Path(megatron.core.__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cpu_host refuses CUDA")

IMPORT_EVERYTHING = """
import importlib, json, pkgutil, sys
import torch.cuda
import megatron.training.training, megatron.training.arguments, megatron.training.initialize
import megatron.core.datasets.utils, megatron.core.optimizer.distrib_optimizer
import megatron.core.transformer.moe.token_dispatcher

def attributes():
    modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "megatron"}
    modules |= {n: m for n, m in sys.modules.items() if n.startswith("torch.cuda")}
    modules["torch.Tensor"] = torch.Tensor
    classes = {
        f"{n}.{k}": v for n, m in modules.items() if n.startswith("megatron")
        for k, v in vars(m).items() if isinstance(v, type) and v.__module__ == n
    }
    return {f"{n}:{k}": v for n, m in (modules | classes).items() for k, v in vars(m).items()
            if not k.startswith("__") and k != "_abc_impl"}

before = attributes()
import megatron_k2
imported, failed = [], []
for module in pkgutil.walk_packages(megatron_k2.__path__, "megatron_k2."):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ImportError as error:
        failed.append((module.name, str(error)))
if "--patch" in sys.argv:
    from megatron_k2.host.repairs import skip_helpers_compilation
    skip_helpers_compilation()
after = attributes()
changed = [k for k, v in before.items() if k not in after or after[k] is not v]
print(json.dumps({"imported": imported, "failed": failed, "changed": changed}))
"""


def _import_everything(*argv):
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IMPORT_EVERYTHING, *argv],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_importing_the_package_patches_nothing():
    found = _import_everything()
    assert found["changed"] == []
    assert "megatron_k2.host.cpu" in found["imported"]
    assert "megatron_k2.optimizer.muonclip" in found["imported"]
    others = {
        "megatron_k2.optimizer.newton_schulz.triton_symmetric",
        "megatron_k2.nemo.factories",
        "megatron_k2.engine.transfer.vllm_files",
    }
    assert {name for name, _ in found["failed"]} <= others  # need Triton, NeMo-Run, vLLM


@pytest.mark.slow
def test_a_patch_would_be_noticed():
    assert _import_everything("--patch")["changed"] == [
        "megatron.core.datasets.utils:compile_helpers"
    ]


def _owner(target):
    path, name = target.rsplit(".", 1)
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        parent, attribute = path.rsplit(".", 1)
        return getattr(importlib.import_module(parent), attribute), name


REDIRECTIONS = [*torch_cuda_redirections(), *tensor_redirections(), *megatron_redirections()]
TARGETS = [row.target for row in REDIRECTIONS]


def _current():
    return [getattr(*_owner(target)) for target in TARGETS]


def _state():
    environment = [
        os.environ.get(n) for n in ("TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS")
    ]
    subnormal = torch.full((64,), 1e-310, dtype=torch.float64)
    return environment, (subnormal * 1).tolist()


@pytest.mark.parametrize("ends_by", ["return", "error"])
def test_after_the_context_every_attribute_is_the_original_object(ends_by, monkeypatch):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    before, state = _current(), _state()
    try:
        with cpu_host():
            inside = _current()
            assert torch.empty(1, device="cuda").device.type == "cpu"
            assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
            if ends_by == "error":
                raise KeyError
    except KeyError:
        pass
    assert all(new is not old for new, old in zip(inside, before, strict=True))
    assert all(new is old for new, old in zip(_current(), before, strict=True))
    assert _state() == state


def test_an_unchecked_megatron_version_is_refused_before_anything_is_redirected(monkeypatch):
    def version(distribution):
        assert distribution == "megatron-core"
        return "0.20.0"

    monkeypatch.setattr(repairs.importlib.metadata, "version", version)
    before = _current()
    with (
        pytest.raises(UserError, match=r"0\.20\.0 is installed.*megatron-core==0\.19\.2"),
        cpu_host(),
    ):
        pass
    assert all(new is old for new, old in zip(_current(), before, strict=True))


def test_a_machine_with_cuda_is_refused_and_used_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = _current()
    with pytest.raises(RuntimeError, match="has CUDA"), cpu_host():
        pass
    with megatron_host() as backend:
        assert backend == "nccl"
        assert all(new is old for new, old in zip(_current(), before, strict=True))


@pytest.mark.parametrize("row", REDIRECTIONS, ids=lambda row: row.target)
def test_the_upstream_line_that_needs_a_redirection_calls_it_or_hands_it_on(row):
    path, line = re.fullmatch(r"([\w/]+\.py):(\d+)", row.needed_by).groups()
    text = (MEGATRON / path).read_text().splitlines()[int(line) - 1]
    name = row.target.rsplit(".", 1)[1]
    assert re.search(rf"\b{name}[(,]", text), f"{row.needed_by}: {text.strip()}"


def test_a_cuda_device_means_the_cpu_however_it_is_given():
    with cpu_host():
        one = torch.ones(1, device=torch.device("cuda", 0))
        pinned = torch.tensor([1, 2], device="cpu", pin_memory=True)
        moved = [one.to("cuda"), one.to(device="cuda:0"), one.to(0), one.cuda(0), pinned.cuda()]
        assert {tensor.device.type for tensor in [one, *moved]} == {"cpu"}
        assert one.to(torch.float64).dtype == torch.float64
        assert one.type() == "torch.cuda.FloatTensor"
        assert torch.nn.Linear(2, 2).cuda().weight.is_cpu


@pytest.mark.slow
def test_a_device_context_works_inside_and_afterwards():
    """torch notes its factories when a device context is first used: they must be the originals."""
    code = (
        "import torch\n"
        "from megatron_k2.host.cpu import cpu_host\n"
        "def where():\n"
        "    with torch.device('meta'):\n"
        "        made = torch.empty(1), torch.ones(1), torch.tensor([1])\n"
        "    return {tensor.device.type for tensor in made}\n"
        "with cpu_host():\n"
        "    assert where() == {'meta'}, where()\n"
        "assert where() == {'meta'}, where()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]


def test_random_state_of_the_cpu_serves_as_that_of_cuda():
    with cpu_host():
        torch.cuda.manual_seed(3)
        state = torch.cuda.get_rng_state()
        first = torch.randn(4, device="cuda")
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.randn(4, device="cuda"), first)


def test_split_sizes_leave_the_tensor_world_only_when_asked():
    from megatron.core.transformer.moe import token_dispatcher

    sizes = torch.tensor([1, 2])
    with cpu_host():
        assert token_dispatcher.maybe_move_tensor_to_cpu(sizes) is sizes
        assert token_dispatcher.maybe_move_tensor_to_cpu(sizes, as_numpy=True).tolist() == [1, 2]
        assert token_dispatcher.maybe_move_tensor_to_cpu(None, as_numpy=True) is None


def _doubled(x):
    return x + x


@pytest.mark.parametrize("decorate", [lambda: torch.compile, lambda: torch.compile(dynamic=True)])
def test_what_is_decorated_on_the_cpu_host_is_not_compiled(decorate):
    with cpu_host():
        assert decorate()(_doubled) is _doubled
    assert torch.compile is not uncompiled


def test_what_was_decorated_before_runs_eagerly_meanwhile(monkeypatch):
    """Loaded before the context, the compiler does not look at the variable again."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    function = torch.compile(_doubled, backend=backend)
    with cpu_host():
        assert function(torch.ones(2)).tolist() == [2, 2]
    assert graphs == []
    assert function(torch.ones(2)).tolist() == [2, 2]
    assert len(graphs) == 1  # the wrong variant: without the context it is compiled


def test_megatron_is_imported_without_the_compiler():
    text = (
        "import sys, torch\n"
        "from megatron_k2.host.cpu import cpu_host\n"
        "with cpu_host():\n"
        "    import megatron.training.training\n"
        "print('torch._inductor' in sys.modules, 'torch._dynamo' in sys.modules)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["False", "False"]
