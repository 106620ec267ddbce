"""FP8 compute as a named opt-in: recipes as Megatron's flags, and what must stay out of FP8.

Kimi K2 was trained with bf16 compute; FP8 only stores activations (report, section on activation
memory; ``fp8/storage.py``). Computing in FP8 is therefore never a default. ``--fp8-compute NAME``
expands to Megatron's own flags:

- ``blockwise``: E4M3 throughout, activations and gradients in 1x128 tiles, weights in 128x128
  blocks, fp32 scales (DeepSeek-V3, arXiv:2412.19437, section 3.3). TE rounds scales to powers of
  two unless ``NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1`` is set before it is imported: the recipe's
  ``use_f32_scales`` argument alone changes nothing (TE 2.17.1 and 2.20.2).
- ``mxfp8``: 1x32 with power-of-two scales, Blackwell.
- ``delayed``: one scale a tensor from the history of its maxima, E4M3 forward, E5M2 backward.

What stays in high precision whatever the recipe: the router (fp32 scores decide on routes), the
attention product that S_max is read from, the embedding and the output head. No torch here.
"""

import os
import sys
from collections.abc import Container, MutableMapping

from megatron_k2.errors import UserError

RECIPES = {
    "blockwise": "--fp8-format e4m3 --fp8-recipe blockwise",
    "mxfp8": "--fp8-format e4m3 --fp8-recipe mxfp8",
    "delayed": "--fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 "
    "--fp8-amax-compute-algo max",
}
"""``--fp8-compute`` -> Megatron's flags."""

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"

OFFLOAD_V1 = "NVTE_CPU_OFFLOAD_V1"
"""Transformer Engine's older CPU offload, which Megatron's fine-grained one insists on."""

FORBIDDEN = {
    "--fp8-dot-product-attention": "S_max would be that of quantised logits, and Transformer "
    "Engine has no attention backend that returns it in FP8",
    "--fp8-multi-head-attention": "S_max would be that of quantised logits, and Transformer "
    "Engine has no attention backend that returns it in FP8",
    "--fp8-output-proj": "the output head stays in bf16",
}
"""Flags of Megatron's that would put FP8 where it must not be -> why."""

HIGH_PRECISION_ROUTERS = ("fp32", "fp64")


def recipe_flags(name: str) -> list[str]:
    """Megatron's flags for ``--fp8-compute name``.

    Raises:
        UserError: if there is no such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"--fp8-compute {name}: expected one of {', '.join(RECIPES)}")
    return RECIPES[name].split()


def check_fp8(
    flags: Container[str],
    *,
    fp8_format: str | None,
    transformer_impl: str,
    router_dtype: str | None,
    te_version: str | None,
) -> None:
    """Refuse FP8 compute that cannot run here, or where it must not be.

    Args:
        flags: every flag of the run.
        fp8_format: value of ``--fp8-format``.
        transformer_impl: value of ``--transformer-impl``.
        router_dtype: value of ``--moe-router-dtype``.
        te_version: of the installed Transformer Engine.

    Raises:
        UserError: naming the flag and the way out.
    """
    for flag, reason in FORBIDDEN.items():
        if flag in flags:
            raise UserError(f"{flag}: {reason}; drop it")
    if "--fp8-param-gather" in flags and "--use-cpu-initialization" in flags:
        raise UserError(
            "--fp8-param-gather with --use-cpu-initialization: Megatron-Core 0.19.2 then makes the "
            "fp32 masters of uninitialised memory (Transformer Engine keeps the weight's first "
            "value before Megatron sets it); drop --use-cpu-initialization"
        )
    if fp8_format is None:
        return
    if te_version is None:
        raise UserError(
            f"--fp8-format {fp8_format} (--fp8-compute) needs Transformer Engine, which is not "
            "installed; pip install -e '.[te]', or drop it and train in bf16"
        )
    if transformer_impl != "transformer_engine":
        raise UserError(
            f"--fp8-format {fp8_format} (--fp8-compute) acts on Transformer Engine's modules "
            f"alone, and --transformer-impl is {transformer_impl}; "
            "use --transformer-impl transformer_engine"
        )
    if router_dtype not in HIGH_PRECISION_ROUTERS:
        raise UserError(
            f"--moe-router-dtype {router_dtype} with FP8 compute: routes are decided in "
            f"{' or '.join(HIGH_PRECISION_ROUTERS)}; use --moe-router-dtype fp32"
        )


def choose_scale_format(
    fp8_recipe: str | None, environment: MutableMapping[str, str] = os.environ
) -> None:
    """fp32 scales for ``blockwise``, unless the user has set the environment switch.

    Raises:
        UserError: if TE is already imported, which reads the switch once, at import.
    """
    if fp8_recipe != "blockwise" or FP32_SCALES in environment:
        return
    if "transformer_engine" in sys.modules:
        raise UserError(
            f"blockwise FP8 with fp32 scales: set {FP32_SCALES}=1 before Transformer Engine is "
            "imported (0 keeps its power-of-two scales)"
        )
    environment[FP32_SCALES] = "1"


def choose_offload_version(
    flags: Container[str], environment: MutableMapping[str, str] = os.environ
) -> None:
    """What Megatron's ``--fine-grained-activation-offloading`` asks of TE's environment."""
    if "--fine-grained-activation-offloading" in flags:
        environment.setdefault(OFFLOAD_V1, "1")
