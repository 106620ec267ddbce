"""What a run writes about itself: a record beside its output, with versions and commit."""

import json
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.host.repairs import installed_version
from megatron_k2.run.commit import git_commit

RUN_RECORD = "run.json"
"""What was trained with which flags; written by the run itself."""

RUN = "a run"
"""What a run's lock says that is done in its ``--save`` directory."""

_FIELDS = {"shape": dict, "preset": str | None, "data": dict}
"""What a start reads of it, and as what; ``data`` is not in older ones."""

PACKAGES = (
    *("megatron-k2", "megatron-core", "torch"),
    *("emerging-optimizers", "transformer-engine", "numpy"),
)
"""Distributions whose versions a run depends on."""


def package_versions() -> dict[str, str | None]:
    """Distribution -> installed version, ``None`` if it is absent."""
    return {name: installed_version(name) for name in PACKAGES}


def write_record(path: Path, content: dict[str, Any]) -> None:
    """``content`` with the versions and the commit it was made by, as JSON; whole or not at all."""
    record = {
        "schema_version": 1,
        **content,
        "versions": package_versions(),
        "git_commit": git_commit(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def read_run_record(save: Path) -> dict[str, Any]:
    """``run.json`` of the run in ``save``; empty if it has none.

    Raises:
        UserError: if it is not a JSON object.
    """
    path = save / RUN_RECORD
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not JSON ({error}); remove it or restore it") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} holds {type(record).__name__}, expected an object; remove it")
    for name, kind in _FIELDS.items():
        if name in record and not isinstance(record[name], kind):
            raise UserError(
                f"{path} is not what a run wrote: {name} is {record[name]!r}; remove or restore it"
            )
    return record
