"""Before the first step: is what the job was given what the recipe needs?

    srun … python -m megatron_k2.launch.node_check --ranks 512 --gpus 8 --checkpoint-gb 10000 FLAGS

Every rank looks at its node (world size, GPUs, free memory, disk, versions) and tells rank 0
through the store at ``MASTER_ADDR``, which needs no working GPU. Where all agree, the training's
own parallel groups are tried (``launch/group_check.py``). What is wrong is said in one sentence
with host and rank, and the exit code is 1; slow groups are only reported.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand
from megatron_k2.launch.group_check import slow_groups, timed_sums, within
from megatron_k2.run.flags import read_flags
from megatron_k2.run.record import package_versions

FREE_MEMORY = 0.9
"""Part of a GPU that must be free; another process holds the rest. Ours."""


@dataclass(frozen=True)
class NodeFacts:
    """What one rank says of its node."""

    rank: int
    host: str
    versions: dict[str, str | None]
    problems: list[str]


def _arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="node_check", allow_abbrev=False, add_help=False)
    parser.add_argument("--ranks", type=int, required=True, help="the recipe's world size")
    parser.add_argument("--gpus", type=int, required=True, help="of a node; 0 for a CPU twin")
    parser.add_argument("--checkpoint-gb", type=float, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="any one step may take")
    return parser.parse_known_args(argv)


def existing_parent(path: Path) -> Path:
    """``path`` itself, or the nearest directory above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def look(rank: int, wanted: argparse.Namespace, save: str | None) -> NodeFacts:
    """This rank's node, without talking to another."""
    problems = []
    started = int(os.environ["WORLD_SIZE"])
    if started != wanted.ranks:
        problems.append(f"{started} ranks were started, the recipe has {wanted.ranks}")
    problems += _gpu_problems(wanted.gpus)
    place = existing_parent(Path(save or "."))
    free_gb = shutil.disk_usage(place).free / 1e9
    if free_gb < wanted.checkpoint_gb:
        problems.append(
            f"{place} has {free_gb:,.1f} GB free, one checkpoint is {wanted.checkpoint_gb:,.1f} GB"
        )
    if not os.access(place, os.W_OK):
        problems.append(f"{place} cannot be written to")
    versions = package_versions()
    versions["python"] = platform.python_version()
    return NodeFacts(rank, socket.gethostname(), versions, problems)


def _gpu_problems(gpus: int) -> list[str]:
    import torch

    if gpus == 0:
        return []
    if (seen := torch.cuda.device_count()) < gpus:
        return [f"{seen} GPUs are visible, the recipe has {gpus} a node"]
    free, total = torch.cuda.mem_get_info(int(os.environ["LOCAL_RANK"]))
    if free >= FREE_MEMORY * total:
        return []
    return [f"{free / 1e9:.1f} of {total / 1e9:.1f} GB of the GPU are free: who holds the rest?"]


def verdict(facts: list[NodeFacts]) -> str:
    """What is wrong, a line each; "" where nothing is."""
    lines = [f"{f.host}, rank {f.rank}: {problem}" for f in facts for problem in f.problems]
    first = facts[0]
    for fact in facts[1:]:
        lines += [
            f"{fact.host}, rank {fact.rank}: {name} {version}, but {first.versions[name]} on "
            f"{first.host}"
            for name, version in fact.versions.items()
            if version != first.versions[name]
        ]
    return "\n".join(lines)


def _agreed(
    store: Any, key: str, rank: int, mine: object, judge: Callable[[list[Any]], str]
) -> str:
    """What ``judge`` makes on rank 0 of every rank's ``mine``; every rank returns it.

    Rank 0 prints it before any other knows: the first rank that ends with a code ends them all.
    """
    world = int(os.environ["WORLD_SIZE"])
    store.set(f"{key}/{rank}", json.dumps(mine))
    if rank == 0:
        said = judge([json.loads(_of_rank(store, key, r)) for r in range(world)])
        if said:
            print(f"node check: {said}", flush=True)
        store.set(key, said)
    answer: str = store.get(key).decode()
    if store.add(f"{key}/read", 1) == world:
        store.set(f"{key}/all", "")
    if rank == 0:  # the store is this process
        store.get(f"{key}/all")
    return answer


def _master() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _meeting_place(rank: int, world: int, seconds: float) -> Any:
    """The store at ``MASTER_ADDR``: rank 0's own, or torchrun's, where each start has its keys."""
    from torch.distributed import PrefixStore, TCPStore

    has_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        rank == 0 and not has_torchruns,
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
    )
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"node_check/{start}", store)


def _of_rank(store: Any, key: str, rank: int) -> bytes:
    import torch

    try:
        found: bytes = store.get(f"{key}/{rank}")
    except torch.distributed.DistStoreError:
        raise UserError(
            f"rank {rank} has not come to {_master()}: its node's log says why"
        ) from None
    return found


def check(argv: list[str]) -> int:
    """The check of this rank; returns its exit code.

    Args:
        argv: the options above, then the training's flags.

    Raises:
        UserError: for what this rank alone found wrong: a rank that did not come, a wrong sum.
    """
    import torch

    wanted, training = _arguments(argv)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    flags = read_flags(expand(training, cuda=torch.cuda.is_available()))
    with within(wanted.seconds + 30, f"meeting the other ranks at {_master()}"):
        store = _meeting_place(rank, world, wanted.seconds)
        mine = asdict(look(rank, wanted, flags.save))
        if _agreed(
            store, "facts", rank, mine, lambda all_: verdict([NodeFacts(**one) for one in all_])
        ):
            return 1
    timed = timed_sums(
        flags.layout(world), torch.distributed.PrefixStore("groups", store), rank, wanted.seconds
    )
    here = (socket.gethostname(), timed)
    _agreed(
        store, "timed", rank, here, lambda all_: f"{world} ranks agree\n{slow_groups(all_)}".strip()
    )
    return 0


def main() -> None:
    """Entry point of each rank."""
    try:
        code = check(sys.argv[1:])
    except UserError as error:
        where = f"{socket.gethostname()}, rank {os.environ['RANK']}"
        print(f"node check: {where}: {error}", file=sys.stderr, flush=True)
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
