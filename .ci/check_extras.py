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
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
ROOT = CHECKOUT / ".venv-extras"
BRIDGE, OLD_MEGATRON = "megatron-bridge==0.6.2", "megatron-core==0.16.1"


@dataclass(frozen=True)
class Smoke:
    """A command of the new environment, and what it must do."""

    command: str
    """As typed into a shell with the environment activated, in an empty directory."""
    words: str = ""
    """What it must print."""
    code: int = 0
    pip: str = ""
    """Arguments of a ``pip install`` before it."""


@dataclass(frozen=True)
class Extra:
    """One extra, or several that are installed together."""

    smokes: tuple[Smoke, ...]
    before: str = ""
    """Arguments of a ``pip install`` before the package's own."""
    needs: str = ""
    """A program that must be on PATH, else the extra is passed over."""


TRAIN = (
    "megatron-k2 launch kimi_k2_pretrain_cpu --executor local --save run "
    "--set phase.tokens=8192 --set phase.decay_tokens=4096"
)
"""Four steps."""
TRAINED = "test $(cat run/latest_checkpointed_iteration.txt) = 4"

COMPANIONS = "python -m pytest -q tests/patches/test_companions.py"

NEMO_RECIPE = """
import inspect
from nemo.collections.llm.recipes.deepseek_v3 import pretrain_recipe as theirs
from megatron_k2.nemo.factories import pretrain_recipe as ours
words = [list(inspect.signature(f).parameters)[:4] for f in (theirs, ours)]
assert words[0] == words[1], words
made = [f(dir="runs", name="x", num_nodes=32) for f in (theirs, ours)]
assert type(made[0]) is type(made[1]), made
print("same kind of recipe")
"""

EXTRAS = {
    "base": Extra(
        (
            Smoke("megatron-k2 doctor", "training on CPU"),
            Smoke("megatron-k2 launch kimi_k2_pretrain_256gpu_h800 --dry-run", "#SBATCH"),
            Smoke(f"{TRAIN} && {TRAINED}", "step"),
            Smoke("megatron-k2 selfcheck", "clone the repository", code=2),
            Smoke(f"{TRAIN} --nemo-run", "NeMo-Run cannot be imported", code=2),
        )
    ),
    "data": Extra(
        (
            Smoke(
                "for i in $(seq 400); do echo line $i of some text; done | tee a.txt > b.txt; "
                "megatron-k2 data prepare --input a.txt --valid-input b.txt --output data "
                "--train-bpe 300 && megatron-k2 data inspect data",
                "tokens",
            ),
            Smoke("python -c 'import tiktoken, transformers as t; print(t.__version__)'", "5."),
        )
    ),
    "parquet": Extra(
        (
            Smoke(
                "python -c 'import pyarrow as a; from pyarrow.parquet import write_table as w; "
                'm = [[{"role": "assistant", "content": "x"}]]; '
                'w(a.table({"messages": m}), "t.parquet")\' '
                "&& python -c 'from megatron_k2.data.hf_tokenizer import train_byte_bpe as t; "
                'from pathlib import Path; t(["some text"], 300, Path("bpe"))\' '
                "&& megatron-k2 data chat --input t.parquet --output set --tokenizer bpe "
                "--sequence-length 64 --validation-fraction 0",
                "sequences",
                pip="tokenizers",
            ),
        )
    ),
    "dev": Extra(
        (
            Smoke(f"cd {CHECKOUT} && python -m pytest -q tests/launch/test_slurm.py", "passed"),
            Smoke(f"cd {CHECKOUT} && python -m ruff check --no-cache recipes", "passed"),
            Smoke("python -m mypy --version", "mypy"),
        )
    ),
    "launch": Extra(
        (
            Smoke("nemo k2 --help", "train"),
            Smoke(f"{TRAIN} --nemo-run && {TRAINED}", "1 ranks agree"),
            Smoke(
                "echo 'account: k2' > site.yaml; megatron-k2 launch kimi_k2_pretrain_256gpu_h800 "
                "--profile site.yaml --dry-run",
                "--account=k2",
            ),
            Smoke(f"cd {CHECKOUT} && {COMPANIONS}", "2 passed", pip="pytest"),
            Smoke(
                f"{TRAIN} --nemo-run",
                "NeMo-Run cannot be imported",
                code=2,
                pip="--no-deps leptonai==0.47.1",
            ),
        )
    ),
    "bridge": Extra(
        (
            # The tests import the checkout, whose recipes are a package of it when installed so.
            Smoke(
                f"cd {CHECKOUT} && {COMPANIONS} tests/launch/test_bridge_config.py",
                "passed",
                pip=f"pytest --editable {CHECKOUT}",
            ),
        ),
        before=f"--no-deps {BRIDGE}",
    ),
    "nemo": Extra(
        (
            Smoke("nemo k2 --help", "train"),
            Smoke(f"{TRAIN} --nemo-run && {TRAINED}", "1 ranks agree"),
            Smoke("python -c 'import nemo.lightning'"),
            Smoke("python -c 'import nemo.collections.llm'", "inference_wrapper_config", code=1),
            Smoke(f"python -c '{NEMO_RECIPE}'", "same kind", pip=f"--no-deps {OLD_MEGATRON}"),
            Smoke(TRAIN, "megatron-core 0.16.1 is installed, but its internals", code=2),
            Smoke(
                TRAIN,
                "nvidia-resiliency-ext 0.4.1 makes the import of megatron-core fail",
                code=2,
                pip="--no-deps megatron-core==0.19.2 nvidia-resiliency-ext==0.4.1",
            ),
        )
    ),
    "te": Extra(
        (Smoke("python -c 'import transformer_engine.pytorch'"), Smoke("megatron-k2 doctor")),
        needs="nvcc",
    ),
}


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
