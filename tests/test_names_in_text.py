"""Every path, module and test named in docs, comments, strings and entry points is there.

Not exercised: names of functions in prose without their module, and anything in the changelog,
which tells of what was.
"""

import ast
import functools
import re
import subprocess
from pathlib import Path

import megatron.core
import pytest

from tests.support.paths import REPOSITORY

PACKAGE = REPOSITORY / "megatron_k2"
MEGATRON = Path(megatron.core.__file__).parent
LEFT_OUT = ("CHANGELOG.md", "LICENSE", "patches/", ".gitignore")
BINARY = (".png", ".xz")
MODULE = re.compile(r"(?<![\w/.-])(?:megatron_k2|tests(?=\.\w+\.\w))(?:\.[A-Za-z]\w*)+")
PATH = re.compile(
    r"(?<![\w/.<{}*$-])(?:\.?[\w-]+/)+[\w-]+\.(?:py|md|sh|c|h|toml|png|yaml|sbatch)\b"
)
FILE = re.compile(r"`([\w-]+\.(?:py|c|h))`")
TEST = re.compile(r"`(test_\w+)`")
ELSEWHERE = {
    *("asyncio", "peft", "runs", "sglang", "vllm", "RUN_DIR", "megatron_k2-selfcheck"),
    *("configuration_deepseek.py", "gpt_builders.py", "pretrain_gpt.py", "tokenization_kimi.py"),
    *("orthogonalized_optimizer.py", "modeling_deepseek.py"),
}
"""First parts of paths, and files, of other projects or of what a command writes."""


def texts() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    names = listed.stdout.splitlines()
    return [
        n for n in names if not n.startswith(LEFT_OUT) and Path(n).suffix not in (".png", ".xz")
    ]


@functools.cache
def defined(module: Path) -> set[str]:
    """Names a module binds anywhere: top level, classes, imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name.split(".")[0])
    return found


def is_module_name(name: str) -> bool:
    """Whether a dotted name is a module or package of ours, or something one of them defines."""
    place = REPOSITORY
    parts = name.split(".")
    if parts[:2] == ["megatron_k2", "recipes"]:
        parts = parts[1:]
    for number, part in enumerate(parts):
        if (place / part).is_dir():
            place /= part
            continue
        module = place / f"{part}.py"
        if module.is_file():
            rest = parts[number + 1 :]
            return not rest or rest[0] in defined(module)
        package = place / "__init__.py"
        return package.is_file() and part in defined(package)
    return True


def is_path(name: str, source: Path) -> bool:
    """Whether a path leads somewhere, from the checkout, a room, its own folder, or Megatron."""
    rooms = [room for room in PACKAGE.iterdir() if room.is_dir()]
    megatrons = [MEGATRON, *MEGATRON.parents[:2]]
    parents = [p for p in source.parents if p.is_relative_to(REPOSITORY)]
    roots = [REPOSITORY, REPOSITORY / "tests", PACKAGE, *rooms, *megatrons, *parents]
    return any((root / name).exists() for root in roots)


@functools.cache
def files_anywhere() -> set[str]:
    """Names of the checkout's files and of Megatron's."""
    return {Path(name).name for name in texts()} | {path.name for path in MEGATRON.rglob("*.py")}


@functools.cache
def names_of_tests() -> set[str]:
    """Names of test functions and of their files."""
    paths = list((REPOSITORY / "tests").rglob("test_*.py"))
    return set().union(*(defined(path) for path in paths)) | {path.stem for path in paths}


def unknown_names(text: str, source: Path) -> list[str]:
    """What ``text`` names and is not there."""
    modules = [name for name in MODULE.findall(text) if not is_module_name(name)]
    paths = [
        name
        for name in PATH.findall(text)
        if name.split("/")[0] not in ELSEWHERE and not is_path(name, source)
    ]
    files = [name for name in FILE.findall(text) if name not in files_anywhere() | ELSEWHERE]
    return (
        modules
        + paths
        + files
        + [name for name in TEST.findall(text) if name not in names_of_tests()]
    )


@pytest.mark.parametrize("name", texts())
def test_what_a_file_names_is_there(name):
    source = REPOSITORY / name
    assert unknown_names(source.read_text(), source) == []


def test_a_test_that_is_not_there_would_be_seen():
    absent = "test_of_nothing" + "_at_all"
    assert unknown_names(f"`{absent}`", REPOSITORY / "README.md") == [absent]
