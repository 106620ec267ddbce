"""Packaging of megatron_k2: metadata, the supported Megatron-Core range, and the extras."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    # Transformer Engine modules, FP8 (needs a CUDA toolchain; the CPU path does without).
    # nvidia-ml-py: Megatron's activation offload needs it and does not declare it.
    "te": ["transformer-engine[pytorch]>=2.14,<3", "nvidia-ml-py"],
    # Launching on Slurm or locally through NeMo-Run, which imports a module leptonai 0.47 dropped.
    "launch": ["nemo-run>=0.11,<0.12", "leptonai<0.47", "pyyaml>=6"],
    # Megatron-Bridge configs (installs with --no-deps only, see docs).
    "bridge": ["megatron-bridge>=0.6.2,<0.7"],
    # nemo-toolkit's recipe style; an environment of its own.
    "nemo": ["nemo-toolkit[llm]>=2.7,<2.8"],
    # Tokenizers, and transformers as reader of what we export.
    "data": ["tokenizers>=0.21", "tiktoken>=0.9", "transformers>=5,<6"],
    "rl": [],
    "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "ruff>=0.9", "mypy>=1.15"],
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
    package_data={"megatron_k2.fp8": ["*.c", "*.h"]},
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
        "nemo_run.cli": ["k2 = megatron_k2.launch.nemo_factories"],
    },
)
