"""Imports run downward: the contract of pyproject.toml, that it can fail, and recipes' place.

import-linter reads the package's folder; ``recipes/`` becomes part of the package only when it is
built, so its imports, and who imports it, are read here.
"""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPOSITORY

RECIPES_USE = {"errors", "launch", "planning", "presets", "recipes"}
RECIPES_ARE_USED_BY = {"cli", "nemo"}


def imported_rooms(module: Path) -> set[str]:
    """Top-level packages of ours that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            prefix = node.module
            names = [prefix] if "." in prefix else [f"{prefix}.{a.name}" for a in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("megatron_k2.")}
    return found


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contract on the package in ``folder``."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )


def test_recipes_import_what_lies_below_them():
    for module in (REPOSITORY / "recipes").glob("*.py"):
        assert imported_rooms(module) <= RECIPES_USE, module.name


def test_only_what_lies_above_recipes_imports_them():
    package = REPOSITORY / "megatron_k2"
    users = {
        module.relative_to(package).parts[0]
        for module in package.rglob("*.py")
        if "recipes" in imported_rooms(module)
    }
    assert users == RECIPES_ARE_USED_BY


@pytest.mark.parametrize(
    ("module", "statement", "contract"),
    [
        ("run/record.py", "from megatron_k2.training import hooks", "Imports run downward"),
        (
            "checkpoint/names/rules.py",
            "from megatron_k2.checkpoint.hf import reader",
            "No circle among siblings, at any depth",
        ),
        (
            "planning/cost/flops.py",
            "import torch",
            "Planning needs neither torch nor Megatron, but for planning.muonclip",
        ),
    ],
    ids=["upward", "a circle", "torch in planning"],
)
def test_a_wrong_import_fails_the_contract(tmp_path, module, statement, contract):
    pytest.importorskip("importlinter")
    skipped = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "megatron_k2", tmp_path / "megatron_k2", ignore=skipped)
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    wrong = tmp_path / "megatron_k2" / module
    wrong.write_text(re.sub(r"(?m)^(?=from|import)", f"{statement}\n", wrong.read_text(), count=1))
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
