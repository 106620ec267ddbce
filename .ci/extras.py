"""Extras of setup.py, and commands that show that what each is for starts to work.

`check_extras.py` runs them. Standard library only.
"""

from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
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

PYTEST = f"cd {CHECKOUT} && python -m pytest -q"
"""The tests import the checkout, with the packages that the extra has brought."""
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
    "serve": Extra(
        (
            Smoke("megatron-k2 doctor", "the server"),
            Smoke(
                f"{PYTEST} tests/engine/server/test_server.py",
                "passed",
                pip="pytest openai tokenizers",
            ),
        )
    ),
    "remote": Extra(
        (
            Smoke(
                f"{PYTEST} tests/engine/remote/test_client.py",
                "passed",
                pip="pytest",
            ),
        )
    ),
    "synthesis": Extra(
        (
            Smoke(
                "echo 'The Orlen rises at 1240 metres. It froze in 1931.' > a.txt; "
                "megatron-k2 rephrase plan --input a.txt",
                "requests",
            ),
            Smoke(f"{PYTEST} tests/synthesis/test_commands.py -k killed", "1 passed", pip="pytest"),
        )
    ),
    "ray": Extra(
        (
            Smoke(
                f"RAY_USAGE_STATS_ENABLED=0 {PYTEST} tests/synthesis/test_ray.py",
                "passed",
                pip="pytest 'aiohttp>=3.10' 'jsonschema>=4.20'",
            ),
        )
    ),
    "grammar": Extra(
        (Smoke(f"{PYTEST} tests/engine/test_grammar.py", "passed", pip="pytest tokenizers"),)
    ),
    "gym": Extra(
        (
            Smoke(
                r"""echo '{"reference": "\\sqrt{8}", "answer": "$2\\sqrt{2}$"}' > a.jsonl; """
                "megatron-k2 gym verify --domain mathematics --jsonl a.jsonl",
                "right",
            ),
            Smoke("megatron-k2 gym sample reasoning_gym/simple_equations --number 2", "="),
        )
    ),
    "sandbox": Extra((Smoke("megatron-k2 sandbox check --backend sandlock", "sandlock"),)),
    "verifiers": Extra(
        (
            Smoke(
                f"{PYTEST} tests/gym/test_adapters.py -k taskset_of_verifiers",
                "1 passed",
                pip="pytest",
            ),
        )
    ),
    "kubernetes": Extra(
        (
            Smoke(
                f"{PYTEST} tests/sandbox/test_kubernetes.py",
                "passed",
                pip="pytest",
            ),
        )
    ),
    "te": Extra(
        (Smoke("python -c 'import transformer_engine.pytorch'"), Smoke("megatron-k2 doctor")),
        needs="nvcc",
    ),
}
