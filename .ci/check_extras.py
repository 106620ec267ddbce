"""Each extra of setup.py in a fresh environment: it installs, and what it is for starts to work.

    make test-extras                              # all of them, one after another
    python .ci/check_extras.py nemo launch       # some; "base" is the package without any

Standard library only. The wheel is built once from this checkout; an environment (3 to 7 GB) lies
under ``.venv-extras/`` and is deleted before the next one is made. Prints one line an extra, for
``docs/compatibility.md``.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from extras import CHECKOUT, EXTRAS, Smoke

ROOT = CHECKOUT / ".venv-extras"


def shell(command: str, place: Path, venv: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``command``, with ``venv`` activated and nothing of this checkout on Python's path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if venv:
        environment |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", command],
        cwd=place,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def install(arguments: str, venv: Path) -> str:
    """Pip's complaint, "" where it installs."""
    done = shell(f"python -m pip install --quiet {arguments}", ROOT, venv)
    return "\n".join(done.stdout.strip().splitlines()[-3:]) if done.returncode else ""


def smoke_fault(smoke: Smoke, venv: Path) -> str:
    """What is wrong with one command, "" where nothing is."""
    if smoke.pip and (fault := install(smoke.pip, venv)):
        return f"pip install {smoke.pip}: {fault}"
    place = ROOT / "work"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    done = shell(smoke.command, place, venv)
    if done.returncode == smoke.code and smoke.words in done.stdout:
        return ""
    end = "\n".join(done.stdout.strip().splitlines()[-15:])
    wanted = f"exit {smoke.code} and '{smoke.words}'"
    return f"{smoke.command}\nexit {done.returncode}, wanted {wanted}:\n{end}"


def check(name: str, wheel: Path) -> str:
    """Make the environment of one extra and use it; returns what is wrong, "" where nothing is."""
    extra, venv = EXTRAS[name], ROOT / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    start = time.monotonic()
    wanted = [extra.before, f"'{wheel}{'' if name == 'base' else f'[{name}]'}'"]
    for arguments in filter(None, wanted):
        if fault := install(arguments, venv):
            return f"pip install {arguments}: {fault}"
    seconds = time.monotonic() - start
    conflicts = shell("python -m pip check", ROOT, venv).stdout.strip().splitlines()
    kilobytes = int(shell(f"du -sk {venv}", ROOT).stdout.split()[0])
    faults = [fault for smoke in extra.smokes if (fault := smoke_fault(smoke, venv))]
    print(
        f"{name}: installed in {seconds:.0f} s, {kilobytes / 1e6:.1f} GB, "
        f"{len(extra.smokes) - len(faults)} of {len(extra.smokes)} commands as they should be; "
        f"pip check: {'; '.join(conflicts)}",
        flush=True,
    )
    return "\n\n".join(faults)


def main() -> int:
    """Check the extras asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=", ".join(EXTRAS))
    names = parser.parse_args().extras or list(EXTRAS)
    if unknown := [name for name in names if name not in EXTRAS]:
        parser.error(f"{unknown[0]}: expected {', '.join(EXTRAS)}")
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir()
    failed = []
    try:
        build = f"{sys.executable} -m pip wheel --quiet --no-deps --wheel-dir {ROOT} {CHECKOUT}"
        if (built := shell(build, ROOT)).returncode:
            sys.exit(built.stdout)
        shutil.rmtree(CHECKOUT / "build", ignore_errors=True)  # pip's, where it built the wheel
        (wheel,) = ROOT.glob("*.whl")
        for name in names:
            if EXTRAS[name].needs and shutil.which(EXTRAS[name].needs) is None:
                print(f"{name}: passed over, {EXTRAS[name].needs} is not on PATH", flush=True)
            elif fault := check(name, wheel):
                failed.append(name)
                print(f"{name}: FAILED\n{fault}\n", flush=True)
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)
    print(f"{len(names) - len(failed)} of {len(names)} extras as they should be", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
