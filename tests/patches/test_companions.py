"""The diffs for NeMo-Run and Megatron-Bridge: each applies to the release and repairs it.

Each needs its release in the environment: NeMo-Run's is ``make launch-venv``, Megatron-Bridge's is
described in ``docs/compatibility.md``.
"""

import importlib.metadata
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.patches.overlay import overlay, patches_of
from tests.support.paths import REPOSITORY

WITHOUT_LEPTON = """
import importlib.abc, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith("leptonai.api.v1"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())  # as with leptonai 0.47
import nemo_run
nemo_run.LocalExecutor(); nemo_run.LeptonExecutor
"""
WITHOUT_TE = """
import sys
sys.modules["transformer_engine"] = sys.modules["transformer_engine.pytorch"] = None
import megatron.bridge.peft.lora_layers
"""
FP8 = """
import types, torch
from megatron.bridge.models.kimi.kimi_bridge import KimiK2Bridge
weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
scale = torch.tensor([[0.5], [0.25]])
codes = (weight / scale.repeat_interleave(128, 0)).to(torch.float8_e4m3fn)
state = {"w": codes, "w_scale_inv": scale}
found = KimiK2Bridge.maybe_modify_loaded_hf_weight(KimiK2Bridge(), "w", state)
expected = codes.float() * scale.repeat_interleave(128, 0)
error = (found.float() - expected).abs().max() / expected.abs().max()
assert error < 0.01, f"relative error {error}: scales dropped"
"""


@dataclass(frozen=True)
class Repair:
    """A patch, the program that needs it, what that says without it, what else it needs."""

    distribution: str
    release: str
    package: str
    patch: str
    program: str
    words: str
    others: tuple[str, ...] = ()


REPAIRS = [
    Repair(
        *("nemo-run", "0.11.1", "nemo_run", "0001-import-without-lepton-api-v1"),
        *(WITHOUT_LEPTON, "leptonai.api.v1"),
    ),
    Repair(
        *("megatron-bridge", "0.6.2", "megatron/bridge", "0001-import-without-transformer-engine"),
        *(WITHOUT_TE, "transformer_engine"),
    ),
    Repair(
        *("megatron-bridge", "0.6.2", "megatron/bridge", "0002-kimi-k2-fp8-import"),
        *(FP8, "scales dropped", ("0001-import-without-transformer-engine",)),
    ),
]


def test_every_patch_has_its_reproduction():
    for distribution, release in {(r.distribution, r.release) for r in REPAIRS}:
        patches = [patch.stem for patch in patches_of(f"{distribution}-{release}")]
        assert patches == [r.patch for r in REPAIRS if r.distribution == distribution]


@pytest.mark.slow
@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: f"{repair.patch}")
def test_the_defect_is_in_the_release_and_not_in_the_patched_one(repair, tmp_path):
    try:
        installed = importlib.metadata.version(repair.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{repair.distribution} is not in this environment")
    assert installed == repair.release
    by_name = {patch.stem: patch for patch in patches_of(f"{repair.distribution}-{installed}")}

    def run(*patches):
        first = overlay(
            repair.distribution,
            repair.package,
            [by_name[name] for name in patches],
            tmp_path / str(len(patches)),
        )
        environment = os.environ | {"PYTHONPATH": f"{first}{os.pathsep}{REPOSITORY}"}
        program = [sys.executable, "-W", "ignore", "-c", repair.program]
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)

    released = run(*repair.others)
    assert released.returncode != 0
    assert repair.words in released.stderr
    patched = run(*repair.others, repair.patch)
    assert patched.returncode == 0, patched.stderr[-2000:]
