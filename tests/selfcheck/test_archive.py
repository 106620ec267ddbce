"""The archive's parts by themselves; the whole runs without a network in ``make test-bundle``."""

import importlib.util
import subprocess
import zipfile

import pytest

from tests.support.paths import REPOSITORY


def _script(name):
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_wheel_is_unpacked_with_what_belongs_into_site_packages_and_without_its_scripts(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "a-1-py3-none-any.whl", "w") as wheel:
        for name in ("a/b.txt", "a-1.data/purelib/c.txt", "a-1.data/platlib/d/e.txt"):
            wheel.writestr(name, name)
        wheel.writestr("a-1.data/scripts/run", "no")
    _script("unpack").main(wheels, tmp_path / "site")
    found = {p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*.*")}
    assert found == {"a/b.txt", "c.txt", "d/e.txt"}


def test_what_is_packed_is_what_the_package_needs_but_for_torch_and_pictures():
    found = _script("make_bundle").pinned()
    assert {"megatron-core", "emerging-optimizers", "numpy", "tokenizers"} <= found.keys()
    assert not found.keys() & {"torch", "triton", "matplotlib", "tensorboard", "hf-xet"}
    assert not any(name.startswith("nvidia-") for name in found)


@pytest.mark.parametrize(
    ("fake", "said"),
    [
        ("print('3.11'); import sys; sys.exit('Python 3.12 is needed')", "Python 3.12 is needed"),
        ("import sys; sys.exit('torch cannot be imported')", "torch cannot be imported"),
    ],
)
def test_a_machine_that_cannot_run_it_is_told_why_in_a_line(fake, said, tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env python3\n{fake}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", REPOSITORY / "scripts" / "selfcheck.sh"],
        env={"PYTHON": str(python), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == f"selfcheck: {said}\n"
