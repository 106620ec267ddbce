"""``megatron-k2 doctor`` on machines described by hand, and on this one."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from megatron_k2 import doctor
from megatron_k2.cli import doctor as verb
from megatron_k2.host.repairs import CHECKED_MEGATRON_VERSIONS

CPU_TORCH = doctor.TorchFacts("2.14.1", None, (), has_nccl=False, has_gloo=True)
CUDA_TORCH = doctor.TorchFacts("2.14.1", "13.0", ("H800",) * 8, has_nccl=True, has_gloo=True)
BARE = dict.fromkeys(doctor.DISTRIBUTIONS)
REQUIRED = BARE | {
    "megatron-core": CHECKED_MEGATRON_VERSIONS[-1],
    "emerging-optimizers": "0.3.0",
}
LAPTOP = doctor.Machine(
    python=(3, 12, 3),
    system="Linux x86_64",
    num_cores=2,
    memory_bytes=8 << 30,
    free_disk_bytes=50 << 30,
    c_compiler=None,
    torch=CPU_TORCH,
    versions=REQUIRED,
)
NODE = replace(
    LAPTOP,
    torch=CUDA_TORCH,
    c_compiler="/usr/bin/cc",
    versions=REQUIRED | {"Transformer Engine": "2.14.0", "triton": "3.8.0"},
)


def _on(machine):
    return {feature.name for feature in doctor.features(machine) if feature.is_on}


def test_a_laptop_trains_on_cpu_and_not_on_gpus():
    assert doctor.problems(LAPTOP) == []
    assert _on(LAPTOP) == {"training on CPU", "FP8 storage of activations"}


def test_a_gpu_node_trains_on_gpus_with_fused_adam():
    assert {"training on GPUs", "fused AdamW"} <= _on(NODE)
    assert "training on CPU" not in _on(NODE)


def test_the_triton_kernel_of_newton_schulz_is_off_and_its_flag_is_named():
    without = replace(NODE, versions=NODE.versions | {"triton": None})
    notes = {}
    for name, machine in {"node": NODE, "without": without, "laptop": LAPTOP}.items():
        (feature,) = [f for f in doctor.features(machine) if "symmetric" in f.name]
        assert not feature.is_on
        notes[name] = feature.note
    assert "off by default, not measured on a GPU" in notes["node"]
    assert notes["node"].startswith("needs --muonclip-triton-symmetric")
    assert notes["without"].startswith("needs pip install triton and --muonclip-triton-symmetric")
    assert notes["laptop"] == doctor.NEEDS_GPU


@pytest.mark.parametrize(("version", "is_on"), [("2.20.2", True), ("2.8.0", False), (None, False)])
def test_transformer_engine_counts_from_the_version_that_returns_maximum_logits(version, is_on):
    machine = replace(NODE, versions=NODE.versions | {"Transformer Engine": version})
    assert ("Transformer Engine modules and FP8 compute" in _on(machine)) == is_on


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("tokenizers", "Hugging Face tokenizers and --train-bpe"),
        ("tiktoken", "K2's own tokenizer"),
        ("pyarrow", "dialogues from Parquet tables"),
        ("transformers", "loading exports in transformers"),
        ("NeMo-Run", "launching through NeMo-Run"),
        ("Megatron-Bridge", "Megatron-Bridge configs"),
    ],
)
def test_one_package_turns_on_one_feature(name, feature):
    machine = replace(LAPTOP, versions=REQUIRED | {name: "1.0"})
    assert _on(machine) - _on(LAPTOP) == {feature}


@pytest.mark.parametrize(("version", "is_on"), [("0.27.3", True), ("0.47.1", False)])
def test_nemo_run_counts_unless_a_newer_leptonai_breaks_its_import(version, is_on):
    machine = replace(LAPTOP, versions=REQUIRED | {"NeMo-Run": "0.11.1", "leptonai": version})
    assert ("launching through NeMo-Run" in _on(machine)) == is_on


def test_triton_without_a_gpu_turns_nothing_on():
    assert _on(replace(LAPTOP, versions=REQUIRED | {"triton": "3.8.0"})) == _on(LAPTOP)


@pytest.mark.parametrize("machine", [LAPTOP, NODE], ids=["laptop", "node"])
def test_whatever_is_off_says_how_to_get_it(machine):
    off = [feature for feature in doctor.features(machine) if not feature.is_on]
    assert off
    for feature in off:
        assert any(word in feature.note for word in ("needs", "install", "used only")), feature


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"python": (3, 11, 9)}, "Python 3.11.9"),
        ({"torch": None}, "torch is not installed"),
        ({"torch": replace(CPU_TORCH, version="2.8.1+cpu")}, "torch 2.8.1+cpu is too old"),
        ({"torch": replace(CPU_TORCH, has_gloo=False)}, "neither gloo nor NCCL"),
        ({"versions": REQUIRED | {"megatron-core": None}}, "megatron-core is not installed"),
        ({"versions": REQUIRED | {"megatron-core": "0.20.0"}}, "0.20.0 was not checked"),
        ({"versions": REQUIRED | {"emerging-optimizers": None}}, "emerging-optimizers"),
        (
            {"versions": REQUIRED | {"nvidia-resiliency-ext": "0.4.1"}},
            "nvidia-resiliency-ext 0.4.1 makes the import of megatron-core fail",
        ),
    ],
)
def test_each_missing_requirement_is_one_problem_and_exit_code_one(
    change, named, monkeypatch, capsys
):
    machine = replace(LAPTOP, **change)
    (problem,) = doctor.problems(machine)
    assert named in problem
    assert "training on CPU" not in _on(machine)
    monkeypatch.setattr(doctor, "look", lambda: machine)
    assert verb.main([]) == 1
    assert problem in capsys.readouterr().out


def test_only_the_listed_distributions_are_asked_for(monkeypatch):
    """A strict fake: a distribution that is not in the table raises."""
    answers = dict.fromkeys(doctor.DISTRIBUTIONS.values(), "7.0")
    monkeypatch.setattr(doctor, "installed_version", lambda name: answers.pop(name))
    machine = doctor.look()
    assert answers == {}
    assert set(machine.versions.values()) == {"7.0"}


def test_apex_built_from_source_without_metadata_counts(monkeypatch):
    specs = {"apex": object(), "torch": None}
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: specs[name])
    machine = doctor.look()
    assert machine.has("apex")
    assert not machine.has("triton")
    assert machine.torch is None


def test_this_machine_is_described_and_has_what_is_required(capsys):
    assert verb.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["machine"]["torch"]["has_gloo"] is True
    assert found["machine"]["num_cores"] >= 1


def test_torch_is_the_only_heavy_import():
    program = (
        "import sys; from megatron_k2.cli.main import main; main(['doctor']); "
        "heavy = {'megatron', 'transformers', 'tokenizers', 'triton'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
