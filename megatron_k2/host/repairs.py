"""Which Megatron-Core and companions are installed, and the named repairs of released wheels.

Importing this module patches nothing. A repair is one function, called by name, that checks the
version it repairs; ``tests/host/test_repairs.py`` fails when upstream has fixed the defect, so that
the repair can be dropped.
"""

import ctypes
import functools
import importlib.metadata
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker, util
from multiprocessing.managers import SyncManager
from typing import Any

from megatron_k2.errors import UserError

logger = logging.getLogger(__name__)

CHECKED_MEGATRON_VERSIONS = ("0.19.2",)
"""Megatron-Core versions whose private seams this package was tested against."""

MINIMUM_TE_VERSION = (2, 14)
"""``return_max_logit`` needs 2.9, grouped FP8 with padded permutation 2.12; 2.14 is what the ``te``
extra asks for. Tested over stand-ins for its kernels: 2.17.1 and 2.20.2."""
MINIMUM_TE_TEXT = ".".join(map(str, MINIMUM_TE_VERSION))

MINIMUM_NVRX_VERSION = (0, 6)
"""Megatron looks for it while it is imported, and an older one ends that with an error."""


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, or ``None``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def require_checked_megatron() -> str:
    """The installed Megatron-Core version.

    Raises:
        UserError: if it is absent, was not checked, or cannot be imported beside what is installed.
    """
    version = installed_version("megatron-core")
    if version is None:
        raise UserError("megatron-core is not installed; pip install 'megatron-core>=0.19.2,<0.20'")
    if version not in CHECKED_MEGATRON_VERSIONS:
        raise UserError(
            f"megatron-core {version} is installed, but its internals were checked only for "
            f"{', '.join(CHECKED_MEGATRON_VERSIONS)}; "
            f"pip install megatron-core=={CHECKED_MEGATRON_VERSIONS[-1]}"
        )
    if fault := resiliency_extension_fault(installed_version("nvidia-resiliency-ext")):
        raise UserError(fault)
    return version


def resiliency_extension_fault(version: str | None) -> str:
    """Why Megatron-Core cannot be imported beside this nvidia-resiliency-ext; "" where it can."""
    if version is None or release(version) >= MINIMUM_NVRX_VERSION:
        return ""
    minimum = ".".join(map(str, MINIMUM_NVRX_VERSION))
    return (
        f"nvidia-resiliency-ext {version} makes the import of megatron-core fail, which wants "
        f"{minimum} or none (nemo-toolkit[llm] brings it); pip uninstall nvidia-resiliency-ext"
    )


def has_sound_transformer_engine(version: str | None) -> bool:
    """Whether ``version`` of Transformer Engine is one that the model's modules can use."""
    return version is not None and release(version) >= MINIMUM_TE_VERSION


def release(version: str) -> tuple[int, ...]:
    """(major, minor) of a version string."""
    return tuple(int(part) for part in version.split(".")[:2])


def require_transformer_engine() -> str:
    """The installed Transformer Engine's version.

    Raises:
        UserError: if it is absent or too old.
    """
    version = installed_version("transformer-engine")
    if version is None:
        raise UserError(
            "--transformer-impl transformer_engine: Transformer Engine is not installed; "
            "pip install -e '.[te]' (needs a CUDA toolchain), or use --transformer-impl local"
        )
    if not has_sound_transformer_engine(version):
        raise UserError(
            f"--transformer-impl transformer_engine: Transformer Engine {version} is installed, "
            f"{MINIMUM_TE_TEXT} or newer is needed; "
            f"pip install 'transformer-engine[pytorch]>={MINIMUM_TE_TEXT},<3'"
        )
    return version


def skip_helpers_compilation() -> None:
    """Let ``initialize_megatron`` run from the wheel, on CPU and GPU alike.

    ``megatron/training/initialize.py:_compile_dependencies`` calls ``compile_helpers()``, which
    runs ``make`` in ``megatron/core/datasets``. The wheel ships the compiled helpers but not the
    Makefile, so it ends with "No targets specified and no makefile found" and ``sys.exit(1)``.
    """
    require_checked_megatron()
    import megatron.core.datasets.utils as dataset_utils

    dataset_utils.compile_helpers = lambda: None


def l2_norm(_chunk: int, _overflow: Any, lists: list[list[Any]], *_flags: Any) -> tuple[Any, None]:
    """Norm over all tensors, [1] on their device; none of them is read by the host."""
    import torch

    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).view(1), None


def norms_without_te() -> None:
    """Let the gradient norm wait for the device once where Transformer Engine and apex are absent.

    Upstream's fallback for their kernel (``megatron/core/utils.py:local_multi_tensor_l2_norm``)
    makes a list of each tensor's norm and a tensor of that list, which reads them one by one: 994
    waits in a step of ``k2-mini`` on an H200. The CPU host has this norm already.
    """
    require_checked_megatron()
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def recompute_without_te() -> None:
    """Let ``--recompute-modules layernorm`` run without Transformer Engine.

    ``CheckpointWithoutOutput(fp8=False)`` takes any ``fp8`` but ``None`` for FP8
    (``core/tensor_parallel/random.py:738``) and then asks Transformer Engine, which is not imported
    where it is absent: ``NameError: FP8GlobalStateManager``.
    """
    require_checked_megatron()
    import megatron.core.tensor_parallel.random as random

    checkpoint: Any = random.CheckpointWithoutOutput
    if hasattr(random, "FP8GlobalStateManager") or hasattr(checkpoint, "_k2_without_te"):
        return
    original = checkpoint.__init__

    @functools.wraps(original)
    def initialize(self: Any, fp8: Any = None) -> None:
        original(self, fp8=fp8 or None)

    checkpoint.__init__ = initialize
    checkpoint._k2_without_te = True


def roll_packed_documents(successors: Callable[[Any, Any, Any], Any]) -> None:
    """Let multi-token prediction learn from packed documents as from each alone.

    ``core/transformer/multi_token_prediction.py``: ``_roll_tensor_packed_seq`` (:238) takes the
    padding behind a document for its next token, and ``process_mtp_loss`` (:883) scales a
    micro-batch's loss, on each context-parallel rank by itself, by its targets before the roll over
    those after it: what a document teaches then depends on which others share its pack. DeepSeek-V3
    (arXiv:2412.19437, section 2.2) divides by all tokens, as it is divided here.

    Args:
        successors: (values, pack, context-parallel group) -> each row's next within its document;
            ``model.packed.next_in_document``.
    """
    require_checked_megatron()
    import megatron.core.transformer.multi_token_prediction as mtp

    original = mtp.roll_tensor
    if hasattr(original, "_k2_knows_documents"):
        return

    @functools.wraps(original)
    def roll_tensor(
        tensor: Any,
        shifts: int = -1,
        dims: int = -1,
        cp_group: Any = None,
        packed_seq_params: Any = None,
    ) -> Any:
        if tensor is None or getattr(packed_seq_params, "layout", None) is None:
            return original(tensor, shifts, dims, cp_group, packed_seq_params)
        return successors(tensor, packed_seq_params, cp_group), packed_seq_params.loss_weight

    roll_tensor._k2_knows_documents = True  # type: ignore[attr-defined]
    mtp.roll_tensor = roll_tensor


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def keep_checkpoint_queue_through_sigterm() -> None:
    """Let a rank save after a SIGTERM that its whole process group got, as Slurm preempts.

    Checkpoint writers report through a queue in a process of its own
    (``core/dist_checkpointing/strategies/filesystem_async.py:65``), which dies of the signal that
    ``--exit-signal-handler`` answers with a save: ``BrokenPipeError``, and nothing is saved. A
    process started while the signal is blocked never gets it; it ends with its rank instead.
    """
    require_checked_megatron()
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    original = filesystem_async.get_write_results_queue
    if hasattr(original, "_k2_survives_sigterm"):
        return

    @functools.wraps(original)
    def get_write_results_queue(mp_mode: str = "spawn") -> Any:
        if filesystem_async._results_queue is not None:
            return filesystem_async._results_queue
        manager = SyncManager(ctx=multiprocessing.get_context(mp_mode))
        resource_tracker.ensure_running()  # its start unblocks the signal again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            manager.start(_end_with_parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        filesystem_async._results_queue = manager.Queue()
        return filesystem_async._results_queue

    get_write_results_queue._k2_survives_sigterm = True  # type: ignore[attr-defined]
    filesystem_async.get_write_results_queue = get_write_results_queue


def guard_checkpoint_worker() -> None:
    """Let a persistent checkpoint worker outlive a SIGTERM, and a rank not outwait a dead worker.

    Under ``--use-persistent-ckpt-worker`` a process of its own writes. A preemption's SIGTERM,
    which ``--exit-signal-handler`` answers with a save, reaches it too and ended it: it starts with
    the signal blocked, and is killed where its rank ends without closing it. The rank joins a queue
    that only the worker empties, and polls another (``core/dist_checkpointing/strategies/
    async_utils.py:421`` and ``:461``); neither looks at the process, and of one that the kernel
    ended for its memory the whole job waited until its time limit. The rank ends with an error
    instead, which whoever starts ranks sees: the last whole checkpoint is there to go on from.
    """
    require_checked_megatron()
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    caller: Any = PersistentAsyncCaller
    original = caller._get_process
    if hasattr(original, "_k2_is_guarded"):
        return

    def get_process(*args: Any, **kwargs: Any) -> Any:
        if caller._persistent_process is not None:
            return original(*args, **kwargs)
        resource_tracker.ensure_running()  # its start unblocks the signal again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            process = original(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Before multiprocessing asks it to end by the blocked signal, and waits for it.
        util.Finalize(None, _kill_at_exit, args=(caller, process), exitpriority=100)
        threading.Thread(target=_end_with, args=(caller, process), daemon=True).start()
        return process

    get_process._k2_is_guarded = True  # type: ignore[attr-defined]
    caller._get_process = staticmethod(get_process)


def _kill_at_exit(caller: Any, worker: Any) -> None:
    caller.close = lambda *_args, **_kwargs: None  # it would wait for the dead
    caller._persistent_process = None
    worker.kill()


def _end_with(caller: Any, worker: Any) -> None:
    multiprocessing.connection.wait([worker.sentinel])
    time.sleep(1.0)  # until a ``close`` that ended it has forgotten it
    is_closed = caller._persistent_process is not worker or worker.exitcode == 0
    if is_closed or not threading.main_thread().is_alive():
        return
    print(
        f"the checkpoint worker, pid {worker.pid}, has died (exit code {worker.exitcode}; "
        f"{-signal.SIGKILL} is the kernel's, for memory): this rank ends, the last whole "
        "checkpoint is there to go on from",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def restore_distributed_optimizer_without_te() -> None:
    """Exact resume of ``DistributedOptimizer`` over ``torch.optim.AdamW`` (no Transformer Engine).

    Without TE's FusedAdam, upstream's resume is wrong in three places of
    ``core/optimizer/distrib_optimizer.py``:

    - ``sharded_state_dict(is_loading=True)`` asserts on a fresh optimizer's empty state (:839);
    - ``_set_main_param_and_optimizer_states`` overwrites or misses ``step`` (:1223);
    - ``load_state_dict`` stores one shared ``step`` tensor in every parameter's state (:1027), so
      AdamW increments it once per parameter and the bias correction is silently wrong.
    """
    require_checked_megatron()
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if getattr(DistributedOptimizer, "_k2_restores_without_te", False):
        return

    def wraps(name: str) -> Callable[[Callable[..., Any]], None]:
        original = getattr(DistributedOptimizer, name)

        def install(replacement: Callable[..., Any]) -> None:
            @functools.wraps(original)
            def method(self: Any, *args: Any, **kwargs: Any) -> Any:
                return replacement(self, original, *args, **kwargs)

            setattr(DistributedOptimizer, name, method)

        return install

    @wraps("sharded_state_dict")
    def _sharded_state_dict(
        self: Any, original: Any, state: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return original(self, state, is_loading, *args, **kwargs)

    @wraps("_set_main_param_and_optimizer_states")
    def _set_states(self: Any, original: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        state = self.optimizer.state.get(main_param, {})
        if "step" in state:
            tensors = {**tensors, "step": state["step"]}
        return original(self, model_param, tensors)

    @wraps("load_state_dict")
    def _load_state_dict(self: Any, original: Any, state_dict: Any) -> None:
        with torch.no_grad():  # fp32 main parameters are views of leaves
            original(self, state_dict)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    DistributedOptimizer._k2_restores_without_te = True
