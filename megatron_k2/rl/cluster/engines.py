"""The engines of a run as a file says them, and which node runs which part of which replica.

A replica is one server with one address; a large one has processes on several nodes, of which the
first, its leader, answers HTTP. Nodes are filled in order: replica 0 has the first ones.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.presets import ModelPreset, get_preset

BACKENDS = ("local", "vllm", "sglang")
KIND = "engine"
"""What leaders publish themselves as; their index is their replica's."""


def attempts_name(replica: int) -> str:
    """The name under which a replica's attempts are counted in the meeting folder."""
    return f"replica.{replica}"


@dataclass(frozen=True)
class Patience:
    """How long a supervisor waits, in seconds, and how often it tries.

    All are choices: K2's engines take minutes to start, and a health check is answered in
    milliseconds unless the machine itself is busy.

    Raises:
        UserError: a value that is not positive.
    """

    start: float = 1800.0
    """From a process's start to its first answer."""
    silent: float = 30.0
    """After which a server that does not answer is killed."""
    look: float = 1.0
    """Between two looks."""
    backoff: float = 1.0
    """Before the first restart; twice as long before each further one."""
    most_backoff: float = 60.0
    restarts: int = 5
    """Of a replica, within ``window``; one more ends its supervisors."""
    window: float = 1800.0
    end: float = 10.0
    """Between SIGTERM and SIGKILL where all is over."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int | float) or not value > 0:
                raise UserError(f"patience: {name} {value!r}: expected a number above 0")


@dataclass(frozen=True)
class Engines:
    """The file ``--engines`` names.

    Raises:
        UserError: a count or a combination that cannot be.
    """

    backend: str
    """``local``: this package's own server; ``vllm``; ``sglang``."""
    replicas: int
    model: Mapping[str, Any]
    """``directory`` with a ``config.json``, or ``preset`` with fields of it that are other;
    ``tokenizer``, a directory, where it does not lie with the model."""
    nodes_per_replica: int = 1
    gpus_per_node: int = 0
    """0: on CPUs."""
    colocated: bool = False
    """The trainer's GPUs, which engines give back while it trains."""
    after: str = ""
    """A process that publishes itself (``trainer``) before the engines are started: colocated ones
    take their memory from what it leaves."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the backend, see ``commands.py``."""
    weights_directory: str = "/dev/shm"
    """Under which there is a directory for new weights, which rank 0 of the trainer writes and
    engines read: shared memory where they are on its node, else a disk that all of them see."""
    weights_are_shared: bool = False
    """Such a disk: one directory for all nodes, so that weights are written once; it is made where
    it is not there. Without it each node has its own."""
    patience: Patience = Patience()

    @property
    def weights_under(self) -> Path:
        """``weights_directory``."""
        return Path(self.weights_directory)

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise UserError(f"backend {self.backend!r}: expected one of {', '.join(BACKENDS)}")
        for name, least in (("replicas", 1), ("nodes_per_replica", 1), ("gpus_per_node", 0)):
            if not isinstance(value := getattr(self, name), int) or value < least:
                raise UserError(f"{name} {value!r}: expected {least} or more")
        if self.backend == "local" and self.nodes_per_replica > 1:
            raise UserError(
                f"backend 'local' with nodes_per_replica {self.nodes_per_replica}: this package's "
                "own engine lies on one node; take 1, or vllm"
            )
        if self.backend == "vllm" and not self.gpus_per_node and self.nodes_per_replica > 1:
            raise UserError("a vllm replica over several nodes without gpus_per_node; give it")
        if ("directory" in self.model) == ("preset" in self.model):
            raise UserError("model: expected either 'directory' or 'preset'")
        if not self.weights_are_shared and not self.weights_under.is_dir():
            raise UserError(f"weights_directory {self.weights_directory}: no such directory")


@dataclass(frozen=True)
class Member:
    """One process of a replica."""

    replica: int
    rank: int
    """Of its node among the replica's; 0 leads."""
    devices: tuple[int, ...]
    """GPUs of the node; empty: none."""

    @property
    def is_leader(self) -> bool:
        """Whether it answers HTTP."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """Of its logs."""
        return f"{KIND}.{self.replica}.{self.rank}"


def read_engines(path: Path) -> Engines:
    """The file.

    Raises:
        UserError: with the path, and what is wrong there.
    """
    try:
        row = json.loads(path.read_text("utf-8"))
    except OSError as problem:
        raise UserError(f"--engines {path}: {problem.strerror}") from None
    except ValueError as problem:
        raise UserError(f"--engines {path} is no JSON: {problem}") from None
    names = [each.name for each in dataclasses.fields(Engines)]
    if not isinstance(row, dict) or set(row) - set(names):
        found = sorted(set(row) - set(names)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"--engines {path}: {found}; expected an object of {', '.join(names)}")
    if missing := [name for name in ("backend", "replicas", "model") if name not in row]:
        raise UserError(f"--engines {path}: {', '.join(missing)} missing")
    for name in ("model", "options", "patience"):
        if not isinstance(row.get(name, {}), dict):
            raise UserError(f"--engines {path}: {name} is {row[name]!r}; expected an object")
    try:
        return Engines(**row | {"patience": Patience(**row.get("patience", {}))})
    except (UserError, TypeError) as problem:
        raise UserError(f"--engines {path}: {problem}") from None


def members_of(engines: Engines, node: int, nodes: int) -> list[Member]:
    """What runs on a node.

    Args:
        engines: of the run.
        node: from 0.
        nodes: that have engines.

    Raises:
        UserError: the replicas do not fill the nodes.
    """
    each, replicas = engines.nodes_per_replica, engines.replicas
    gpus = tuple(range(engines.gpus_per_node))
    if not 0 <= node < nodes:
        raise UserError(f"--node {node} of --nodes {nodes}: expected 0 to {nodes - 1}")
    if replicas * each == nodes:
        return [Member(node // each, node % each, gpus)]
    if each == 1 and replicas % nodes == 0:
        count = replicas // nodes
        if len(gpus) % count == 0:
            width = len(gpus) // count
            return [
                Member(node * count + i, 0, gpus[i * width : (i + 1) * width]) for i in range(count)
            ]
        raise UserError(
            f"{count} replicas on a node of {len(gpus)} GPUs: they do not divide; take fewer"
        )
    raise UserError(
        f"{replicas} replicas of {each} nodes on {nodes} nodes: expected {replicas * each} nodes, "
        "or replicas of one node that share the nodes out evenly"
    )


def model_directory(engines: Engines, under: Path) -> Path:
    """The directory with the model's ``config.json``; a preset's is written into ``under``.

    Raises:
        UserError: no such directory or preset, or a field that it does not have.
    """
    if "directory" in engines.model:
        found = Path(engines.model["directory"])
        if not (found / "config.json").is_file():
            raise UserError(f"model directory {found} has no config.json")
        return found
    preset = _preset(engines.model)
    under.mkdir(mode=0o700, parents=True, exist_ok=True)
    # transformers, and with it vLLM, has classes for deepseek_v3; kimi_k2's are remote code
    config = json.dumps(hf_config(preset, model_type="deepseek_v3"), indent=1)
    write_atomically(under / "config.json", config.encode())
    return under


def _preset(model: Mapping[str, Any]) -> ModelPreset:
    changed = {name: v for name, v in model.items() if name not in ("preset", "tokenizer")}
    known = {each.name for each in dataclasses.fields(ModelPreset) if each.init}
    if unknown := sorted(set(changed) - known):
        raise UserError(f"model: {', '.join(unknown)} is no field of a preset, nor 'tokenizer'")
    return dataclasses.replace(get_preset(model["preset"]), **changed)


def tokenizer_directory(engines: Engines, model: Path) -> Path:
    """Where the tokenizer lies: as said, or with the model."""
    return Path(engines.model.get("tokenizer", model))
