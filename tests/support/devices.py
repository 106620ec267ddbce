"""The same test body on a CPU and, with ``pytest -m gpu``, on a GPU.

A test makes tensors without naming a device: on a GPU they are made on the CPU, so that both
columns test the same numbers, and moved. Only those that a file under ``tests`` makes: the package
must name its devices itself, and one that it forgot is seen.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.support.paths import REPOSITORY

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""Parameters of a fixture that enters ``on_device``."""

FACTORIES = frozenset(
    {
        *(torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.tensor),
        *(torch.rand, torch.randint, torch.randn, torch.randperm, torch.zeros, torch.empty),
    }
)
TESTS, TORCH = str(REPOSITORY / "tests"), str(Path(torch.__file__).parent)


class TensorsOfTests(TorchFunctionMode):
    """What tests make, on ``device``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        made = func(*args, **named)
        if func not in FACTORIES or named.get("device") is not None or not _is_called_by_test():
            return made
        return made.detach().to(self._device).requires_grad_(made.requires_grad)


def _is_called_by_test() -> bool:
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(TESTS)


def require(device: str | None) -> None:
    """Skip where this process cannot be of ``device``; ``None`` is whatever it is."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        pytest.skip("a GPU is needed, none here")
    if device == "cpu" and has_cuda:
        pytest.skip("a CPU host is needed, this process sees a GPU: CUDA_VISIBLE_DEVICES= hides it")


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Tests' tensors on ``device``, ``cpu`` or ``cuda``; skips where there is none.

    On a GPU nothing is compiled, as nothing is on the CPU host: a compiler would trace the mode.
    """
    require(device)
    if device == "cpu":
        yield
        return
    with torch.compiler.set_stance("force_eager"), TensorsOfTests(device):
        yield


def here() -> torch.device:
    """The device of the models that a test makes in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are the same operations' result.

    To the bit on a CPU; a GPU adds some sums atomically, in no order: 1e-5 of the largest number.
    """
    if not found.is_cuda:
        return torch.equal(found, expected)
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())
