"""Transformer Engine's real Python over torch stand-ins for its compiled kernels. Tests only.

The wheel ``transformer-engine`` holds TE's Python and nothing compiled. Here its pybind extension
``transformer_engine_torch`` is replaced by a module of the same names: a few of them compute with
torch (``kernels``, ``quantization``), the others raise. So module construction, names, saved
tensors, recipes, padding and the wiring of every GEMM are TE's own; kernels, their rounding order,
speed, backend choice and memory are not, and nothing may be concluded about them.

``install`` must run before anything imports ``transformer_engine`` or ``megatron.core``.
"""

import importlib.metadata
import os
import sys

KNOWN_VERSIONS = ("2.17.1", "2.20.2")
"""Releases whose extension these stand-ins were written against."""


def require_known_version(version: str) -> None:
    """Refuse a release whose extension may have other signatures.

    Raises:
        RuntimeError: naming the version and those that are known.
    """
    if version not in KNOWN_VERSIONS:
        raise RuntimeError(
            f"transformer-engine {version}: the CPU stand-ins were written against "
            f"{', '.join(KNOWN_VERSIONS)}; compare the extension's signatures, then add it"
        )


def has_compiled_part() -> bool:
    """Whether Transformer Engine is here with its extension: on a machine with GPUs."""
    try:
        importlib.metadata.version("transformer-engine-torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def prepare() -> None:
    """Of a worker: ``install``, unless Transformer Engine itself is to run, on NCCL."""
    if not has_compiled_part():
        install()


def install() -> None:
    """Put the stand-in in place and import TE over it; once a process."""
    if "transformer_engine_torch" in sys.modules:
        return
    if "transformer_engine" in sys.modules or "megatron.core" in sys.modules:
        raise RuntimeError("install() must run before transformer_engine or megatron is imported")
    require_known_version(importlib.metadata.version("transformer-engine"))

    from tests.te.standin.devices import believe_in_cuda, patch_devices
    from tests.te.standin.extension import make_extension

    # TE's own switch for a build machine: transformer_engine.common then loads no library.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        sys.modules["transformer_engine_torch"] = make_extension()
        import transformer_engine.common

        transformer_engine.common.load_framework_extension = lambda _framework: None
        patch_devices()
        import transformer_engine.pytorch
        from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    finally:
        del os.environ["NVTE_PROJECT_BUILDING"]
    TransformerEngineBaseModule.__init__ = believe_in_cuda(TransformerEngineBaseModule.__init__)
