"""A released package with patches applied, beside the installed one."""

import importlib.metadata
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.support.paths import REPOSITORY

PATCHES = REPOSITORY / "patches"


def patches_of(release: str) -> list[Path]:
    """The diffs for ``release``, for example ``megatron-core-0.19.2``, in order."""
    return sorted((PATCHES / release).glob("*.patch"))


def touched(patch: Path) -> list[str]:
    """Files a diff changes, as the wheel lays them out."""
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.MULTILINE)


def installed_root(distribution: str) -> Path:
    """The directory into which a distribution's files were installed."""
    return Path(str(importlib.metadata.distribution(distribution).locate_file("")))


def apply(patches: list[Path], tree: Path) -> None:
    """Apply diffs to ``tree``; a hunk that does not fit is an error."""
    # git looks for no repository above the tree: inside one it would silently skip its files.
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    for patch in patches:
        subprocess.run(["git", "apply", str(patch)], cwd=tree, env=environment, check=True)


def overlay(distribution: str, package: str, patches: list[Path], tree: Path) -> Path:
    """``package`` of an installed ``distribution`` in ``tree``, patched; for PYTHONPATH.

    Files no patch touches are links to the installed ones.
    """
    root = installed_root(distribution)
    copied = {name for patch in patches for name in touched(patch)}
    for source in (root / package).rglob("*"):
        if source.is_dir() or source.suffix == ".pyc":
            continue
        name = source.relative_to(root)
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if str(name) in copied:
            shutil.copy(source, tree / name)
        else:
            (tree / name).symlink_to(source)
    apply(patches, tree)
    return tree
