"""What a site adds to a recipe: one YAML profile a cluster, and the command line over it."""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError


@dataclass(frozen=True)
class Cluster:
    """Account, queue, image and environment of a site; from a profile, from flags, flags last."""

    account: str | None = None
    partition: str | None = None
    time: str = "24:00:00"
    container: str | None = None
    """Image for pyxis; without one, ``python`` is the node's own."""
    mounts: tuple[str, ...] = ()
    """Pairs ``from:to`` that are mounted into the container."""
    python: str = "python"
    seconds_to_save: int = 600
    """Between the signal and the time limit: one step and one checkpoint. Ours."""
    gym_nodes: int = 0
    """Nodes without GPUs for environments and verifiers of reinforcement learning, a component of
    the job of their own; 0: they run on the trainer's nodes."""
    gym_partition: str | None = None
    """Of those nodes; without one, the partition."""
    environment: tuple[tuple[str, str], ...] = ()
    """Pairs (name, value) that come after ``launch/environment.py``'s and win."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", self.time):
            raise UserError(
                f"time {self.time}: expected [days-]hours:minutes:seconds, for example 24:00:00 "
                "(in quotes in a profile: YAML takes it for a number)"
            )
        if self.mounts and not self.container:
            raise UserError(
                f"mounts {','.join(self.mounts)} without a container: there is nothing to mount "
                "into; give --container IMAGE, or drop them"
            )
        if wrong := [mount for mount in self.mounts if ":" not in mount]:
            raise UserError(f"mounts: {wrong[0]}: expected FROM:TO, for example /lustre:/lustre")
        if self.seconds_to_save < 1:
            raise UserError(
                f"seconds_to_save {self.seconds_to_save}: expected the seconds that one step and "
                "one checkpoint take, 600 for example"
            )
        if self.gym_nodes < 0:
            raise UserError(f"gym_nodes {self.gym_nodes}: expected a number of nodes, or 0")


def read_profile(path: Path) -> Cluster:
    """A cluster's YAML profile: keys are ``Cluster``'s, one without a value is left out.

    Raises:
        UserError: without PyYAML or the file, for another shape, an unknown key (naming the
            nearest), or a value of another type.
    """
    values = _read(path)
    known = [f.name for f in fields(Cluster)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(known)}"
            raise UserError(f"--profile {path}: no key is called {key}; {hint}")
    read: dict[str, Callable[[Any], Any]] = {
        "mounts": _mounts,
        "environment": _environment,
        "seconds_to_save": _seconds,
        "gym_nodes": _nodes,
    }
    found: dict[str, Any] = {}
    for key, value in values.items():
        if value is None:
            continue
        try:
            found[key] = read.get(key, _word)(value)
        except ValueError as error:
            raise UserError(f"--profile {path}: {key}: {value!r}: expected {error}") from None
    try:
        return Cluster(**found)
    except UserError as error:
        raise UserError(f"--profile {path}: {error}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        import yaml
    except ImportError:
        raise UserError("--profile needs PyYAML: pip install pyyaml") from None
    if not path.is_file():
        raise UserError(f"--profile {path}: no such file; examples/cluster/site.yaml has every key")
    try:
        read = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"--profile {path}: not YAML: {' '.join(str(error).split())}") from None
    if read is None:
        return {}
    if not isinstance(read, dict):
        raise UserError(f"--profile {path}: expected lines of 'key: value', not {read!r}")
    return read


def _word(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError("one word or text; in quotes where YAML reads something else")
    return str(value)


def _seconds(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number of seconds")
    return value


def _nodes(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number of nodes")
    return value


def _mounts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("a list, for example ['/lustre:/lustre']")
    return tuple(_word(one) for one in value)


def _environment(value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, dict):
        raise ValueError("NAME: value pairs, for example {NCCL_IB_HCA: mlx5}")
    for name, setting in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise ValueError(f"variables' names, which {name!r} is not")
        if isinstance(setting, bool) or not isinstance(setting, (str, int, float)):
            raise ValueError(f"{name}: 'text' or a number; true, false and nothing in quotes")
    return tuple((str(name), str(setting)) for name, setting in value.items())
