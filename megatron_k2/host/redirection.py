"""An attribute of another package that is answered by ours for a while."""

import contextlib
import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Redirection:
    """One attribute of a module that is replaced while the context is entered."""

    target: str
    """Dotted path of the attribute."""
    replacement: Any
    needed_by: str
    """Upstream line that calls it, ``file:line`` under ``megatron/``."""


def replace(stack: contextlib.ExitStack, target: str, replacement: Any) -> None:
    """Put ``replacement`` in place of the attribute ``target`` until ``stack`` closes."""
    owner_path, name = target.rsplit(".", 1)
    try:
        owner = importlib.import_module(owner_path)
    except ModuleNotFoundError:  # an attribute of a class or object, such as torch.cuda.nvtx
        parent, attribute = owner_path.rsplit(".", 1)
        owner = getattr(importlib.import_module(parent), attribute)
    previous = getattr(owner, name)
    setattr(owner, name, replacement)
    stack.callback(setattr, owner, name, previous)
