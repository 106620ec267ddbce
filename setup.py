"""Packaging of megatron_k2: metadata, the supported Megatron-Core range, and the extras."""

from pathlib import Path

from setuptools import find_packages, setup

NEMO_RUN = ["nemo-run>=0.11,<0.12", "leptonai<0.47", "pyyaml>=6"]

EXTRAS = {
    # Transformer Engine modules, FP8 (needs a CUDA toolchain; the CPU path does without).
    # nvidia-ml-py: Megatron's activation offload needs it and does not declare it.
    "te": ["transformer-engine[pytorch]>=2.14,<3", "nvidia-ml-py"],
    # Launching on Slurm or locally through NeMo-Run, which imports a module leptonai 0.47 dropped.
    "launch": NEMO_RUN,
    # What Megatron-Bridge's configs import. Itself it installs with --no-deps only, first:
    # one of its dependencies wants torch, and a CUDA toolchain, while it is built.
    "bridge": [
        "transformers>=5.8,<=5.12.1",
        "nvidia-modelopt",
        "datasets>=2.20",
        "accelerate",
        "peft>=0.18.1",
        "einops",
        "diffusers>=0.36",
        "megatron-energon",
        "wandb==0.29.0",
        "omegaconf>=2.3",
    ],
    # nemo-toolkit's recipes, in an environment of its own (transformers 4.57). Not its extra llm,
    # which brings an nvidia-resiliency-ext that makes Megatron's import fail; the rest of that.
    "nemo": [
        "nemo-toolkit[lightning]>=2.7,<2.8",
        "nvidia-modelopt==0.37.0",
        "multi-storage-client>=0.21",
        "boto3",
        "datasets",
        "einops",
        "nvtx",
        "sentencepiece<1",
        "tensorstore<0.1.72",
        "zarr>=2.18.2,<3",
        "pandas",
        "tiktoken==0.7.0",
        *NEMO_RUN,
    ],
    # Tokenizers, and transformers as reader of what we export.
    "data": ["tokenizers>=0.21", "tiktoken>=0.9", "transformers>=5,<6"],
    # Dialogues from Parquet tables (Apache-2.0).
    "parquet": ["pyarrow>=16"],
    # The server: FastAPI (MIT) reads and describes routes, uvicorn (BSD) speaks HTTP,
    # prometheus-client (Apache-2.0) counts.
    "serve": ["fastapi>=0.115,<1", "uvicorn>=0.30,<1", "prometheus-client>=0.20,<1"],
    # The client of engines elsewhere: aiohttp (Apache-2.0).
    "remote": ["aiohttp>=3.10,<4"],
    # Data made by models elsewhere: their client, and answers held to a schema (MIT).
    "synthesis": ["aiohttp>=3.10,<4", "jsonschema>=4.20,<5"],
    # Shards as tasks of a Ray cluster (Apache-2.0; 331 MB).
    "ray": ["ray>=2.50,<3"],
    # Answers held to a grammar: llguidance (MIT, no dependencies of its own).
    "grammar": ["llguidance>=1.3,<2"],
    # math-verify compares what is not a number, reasoning-gym makes puzzles (both Apache-2.0);
    # jsonschema (MIT) checks arguments of tools.
    "gym": [
        "math-verify[antlr4_13_2]>=0.9,<0.10",
        "reasoning-gym>=0.1.23,<0.2",
        "jsonschema>=4.20,<5",
    ],
    # Confines programs without namespaces (Apache-2.0); bubblewrap is the distribution's.
    "sandbox": ["sandlock>=0.9,<0.10"],
    # Tasksets of verifiers, scored without its runner (MIT).
    "verifiers": ["verifiers>=0.4,<0.5"],
    # Programs in pods of a cluster: the client of agent-sandbox's claims (Apache-2.0).
    "kubernetes": ["k8s-agent-sandbox[async]>=1.0.8,<2"],
    "dev": [
        "peft>=0.21,<0.22",  # Apache-2.0: the other side's reading of an exported adapter
        "scipy>=1.11,<2",  # BSD: an independent fit of what we fit ourselves
        "openai>=2",  # Apache-2.0: the server's tests call it as users do
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6",
        "ruff>=0.9",
        "mypy>=1.15",
        "import-linter>=2.17,<3",
    ],
}

setup(
    name="megatron-k2",
    version="0.1.0",
    description="Kimi-K2-class training on Megatron-Core: MLA, fine-grained MoE, MuonClip",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12",
    packages=[
        *find_packages(include=["megatron_k2", "megatron_k2.*"]),
        "megatron_k2.recipes",
    ],
    package_dir={"megatron_k2.recipes": "recipes"},
    package_data={
        "megatron_k2.fp8": ["*.c", "*.h"],
        "megatron_k2.engine.server": ["*.html"],
        "megatron_k2.run.report": ["*.html", "*.js"],
        "megatron_k2.sandbox.escapes": ["*.txt"],
        "megatron_k2.synthesis.rephrase": ["styles/*.json"],
    },
    install_requires=[
        "torch>=2.9,<3",
        "megatron-core>=0.19.2,<0.20",
        "emerging-optimizers>=0.3,<0.4",  # Megatron's optimizer registry opens only with it
        "numpy>=1.26",
        "psutil>=5.9",  # Megatron's checkpoint writer needs it and does not declare it
        "safetensors>=0.4",
        "rich>=13",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-k2 = megatron_k2.cli.main:main"],
        "nemo_run.cli": ["k2 = megatron_k2.nemo.factories"],
        "vllm.general_plugins": ["megatron_k2 = megatron_k2.engine.transfer.vllm_files:register"],
    },
)
