"""Each diff for Megatron-Core applies to the released wheel and repairs what it says."""

import importlib.metadata
import json
import subprocess

import pytest

from tests.patches.overlay import apply, installed_root, overlay, patches_of, touched
from tests.patches.reproductions import REPRODUCTIONS
from tests.support.distributed import run_ranks

RELEASE = "0.19.2"
PATCHES = patches_of(f"megatron-core-{RELEASE}")
DEFECTS = {
    "mla_rotary_key_gradient": "relative errors of the gradient",
    "qk_clip_factors": "AssertionError",  # NaN ends the job
    "qk_clip_sharded_main_params": "RuntimeError",  # a flat shard has no heads
    "interleaved_p2p_two_stages": "previous gave 0.0, next gave 1.0",
    "optimizer_resume_shared_step": "after two steps",
    "fully_reshardable_padding": "saved main parameters are off by",
    "yarn_flags_for_mla": "beta fast and slow are",
    "activation_offload_chunk_end": "left before its second group",
    "activation_offload_inline_reload": "only reload",
}
"""What each reproduction says over the released wheel."""


def test_the_installed_release_is_the_one_the_patches_are_for():
    assert importlib.metadata.version("megatron-core") == RELEASE


def test_every_patch_has_its_reproduction():
    names = [reproduction.__name__ for reproduction in REPRODUCTIONS]
    assert [patch.stem[5:].replace("-", "_") for patch in PATCHES] == names == list(DEFECTS)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_a_patch_applies_alone_and_not_twice(patch, tmp_path):
    for name in touched(patch):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((installed_root("megatron-core") / name).read_bytes())
    apply([patch], tmp_path)
    with pytest.raises(subprocess.CalledProcessError):
        apply([patch], tmp_path)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each reproduction says, over the released wheel and over the patched one."""
    root = tmp_path_factory.mktemp("patches")
    patched = overlay("megatron-core", "megatron", PATCHES, root / "patched")
    results = []
    for name, first in (("released", None), ("repaired", patched)):
        out = root / f"{name}.json"
        run_ranks("tests.patches.reproductions", 2, str(out), root / name, first_on_path=first)
        results.append(json.loads(out.read_text()))
    return results


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("defect", DEFECTS)
def test_the_defect_is_in_the_release_and_not_in_the_patched_one(found, defect):
    released, repaired = found
    assert DEFECTS[defect] in released[defect], (
        "upstream is repaired: drop the patch, its table row and this case"
    )
    assert repaired[defect] == ""
