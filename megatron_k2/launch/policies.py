"""Parts of a recipe that are neither model, layout, schedule nor data, each with its flags."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_k2.errors import UserError
from megatron_k2.planning.request import RunRequest
from megatron_k2.run.rollback import MARGIN
from megatron_k2.run.spikes import LEAST_NATS


def check_choice(key: str, value: str, kind: object) -> None:
    """Refuse a ``value`` that the literal type ``kind`` does not name."""
    if value not in (choices := get_args(kind)):
        raise UserError(f"{key}={value}: expected one of {', '.join(choices)}")


@dataclass(frozen=True)
class CheckpointPolicy:
    """When to save, and what to keep."""

    interval: int
    """Steps from one save to the next."""
    retain_interval: int
    """Steps between checkpoints that stay; the last one always does. A multiple of the interval."""
    asynchronous: bool

    def flags(self) -> list[str]:
        """Megatron's flags for when to save, and what is kept."""
        if self.interval < 1 or self.retain_interval % self.interval:
            raise UserError(
                f"checkpoint: retain_interval={self.retain_interval} is not a multiple of "
                f"interval={self.interval}, which Megatron asks for"
            )
        flags = ["--save-interval", str(self.interval)]
        flags += ["--save-retain-interval", str(self.retain_interval)]
        if self.asynchronous:
            flags += "--async-save --use-persistent-ckpt-worker --async-strategy mcore".split()
        return flags


type SpikeAction = Literal["off", "warn", "stop", "rollback"]


@dataclass(frozen=True)
class LossPolicy:
    """How the run answers a loss that is not finite, or a spike."""

    stop_on_nonfinite: bool
    """Stop with the rank and step named (Megatron's check); otherwise go on."""
    iterations_to_skip: tuple[int, ...] = ()
    """Steps whose batch is left out: how a spike is passed after going back to a checkpoint."""
    on_spike: SpikeAction = "warn"
    """``stop`` and ``rollback`` act before the next save (``run/spikes.py``)."""
    spike_nats: float = LEAST_NATS
    """Nats over the running median under which nothing is a spike."""
    spike_margin: int = MARGIN
    """Steps on either side of a spike that a rollback leaves out too."""

    def __post_init__(self) -> None:
        check_choice("loss.on_spike", self.on_spike, SpikeAction.__value__)
        if not (self.spike_nats > 0 and self.spike_margin >= 0):
            raise UserError(
                f"loss.spike_nats={self.spike_nats:g}, loss.spike_margin={self.spike_margin}: "
                "nats above 0 and steps from 0 are expected"
            )

    def flags(self) -> list[str]:
        """Megatron's, and ours for spikes."""
        flags = [] if self.stop_on_nonfinite else ["--no-check-for-nan-in-loss-and-grad"]
        if self.iterations_to_skip:
            flags += ["--iterations-to-skip", *map(str, self.iterations_to_skip)]
        flags += ["--on-spike", self.on_spike, "--spike-nats", f"{self.spike_nats:g}"]
        return [*flags, "--spike-margin", str(self.spike_margin)]

    def described(self) -> str:
        """The policy in one line of the launch table."""
        nonfinite = "the run stops" if self.stop_on_nonfinite else "not checked"
        spike = {
            "off": "not looked for",
            "warn": "said",
            "stop": "the run stops",
            "rollback": f"back to before it, without {2 * self.spike_margin + 1} steps",
        }[self.on_spike]
        high = f"{self.spike_nats:g} nats over the median or more"
        return f"not finite: {nonfinite}; {high}: {spike}"


type Dispatcher = Literal["alltoall", "flex"]
type FlexBackend = Literal["deepep", "hybridep", "ncclep"]


@dataclass(frozen=True)
class ExpertDispatch:
    """How tokens reach the ranks of their experts."""

    dispatcher: Dispatcher = "alltoall"
    """``alltoall`` is NCCL's or gloo's; ``flex`` one fused kernel over all TP x EP ranks, CUDA
    only."""
    backend: FlexBackend = "deepep"
    """The kernels of ``flex``; each is a package of its own."""
    num_sms: int = 0
    """Multiprocessors that ``flex`` communicates with; 0 leaves it to the backend (DeepEP: 20)."""

    def check(self, layout: RunRequest, *, is_cpu: bool) -> None:
        """Refuse what Megatron would refuse once the model is being built.

        Raises:
            UserError: naming the key.
        """
        check_choice("dispatch.dispatcher", self.dispatcher, Dispatcher.__value__)
        check_choice("dispatch.backend", self.backend, FlexBackend.__value__)
        if self.num_sms < 0 or (self.backend == "deepep" and self.num_sms % 2):
            raise UserError(
                f"dispatch.num_sms={self.num_sms}: a number above 0 is expected, for DeepEP an "
                "even one, or 0 for the backend's own"
            )
        if self.dispatcher == "alltoall":
            if self.num_sms:
                raise UserError(
                    f"dispatch.num_sms={self.num_sms} without dispatch.dispatcher=flex, which it "
                    "is for; set both, or neither"
                )
            return
        if is_cpu:
            raise UserError(
                "dispatch.dispatcher=flex: its kernels are CUDA's; a CPU twin takes alltoall"
            )
        if layout.tp * layout.ep == 1:
            raise UserError(
                "dispatch.dispatcher=flex: TP x EP is 1 and no token leaves its rank; set "
                "layout.ep, or dispatch.dispatcher=alltoall"
            )

    def flags(self) -> list[str]:
        """Megatron's; ``alltoall`` is among the model's already."""
        if self.dispatcher == "alltoall":
            return []
        flags = ["--moe-token-dispatcher-type", "flex"]
        flags += ["--moe-flex-dispatcher-backend", self.backend]
        return flags + (
            ["--moe-flex-dispatcher-num-sms", str(self.num_sms)] if self.num_sms else []
        )

    def described(self) -> str:
        """The dispatcher in one line of the launch table."""
        if self.dispatcher == "alltoall":
            return "all-to-all"
        return f"flex, {self.backend}" + (f", {self.num_sms} SMs" if self.num_sms else "")


type ProfilerTool = Literal["off", "pytorch", "nsys"]


@dataclass(frozen=True)
class Profiler:
    """Steps and ranks that are traced."""

    tool: ProfilerTool = "off"
    """``pytorch``: a Chrome trace a rank in ``<save>/torch_profile``; ``nsys``: a CUDA profiler
    range, for ranks that were started under ``nsys profile --capture-range=cudaProfilerApi``."""
    first_step: int = 11
    """``pytorch`` counts from the start of the process, ``nsys`` from the run's."""
    last_step: int = 12
    """The last step traced, itself included."""
    ranks: tuple[int, ...] = (0,)
    """Global; none given is all of them, for Megatron too."""
    shapes: bool = False
    """Record the shapes of the operators' inputs; the traces grow."""

    def check(self, world_size: int, steps: int) -> None:
        """Refuse an empty range, one that the run does not reach, or ranks that do not exist.

        Raises:
            UserError: naming the key.
        """
        check_choice("profiler.tool", self.tool, ProfilerTool.__value__)
        if not 0 < self.first_step <= self.last_step:
            raise UserError(
                f"profiler.first_step={self.first_step}, profiler.last_step={self.last_step}: "
                "steps from 1, at least one, are expected"
            )
        if self.tool != "off" and self.last_step >= steps:
            raise UserError(
                f"profiler.last_step={self.last_step}: the run has {steps} steps, and a trace is "
                "written at the step after the last that is traced"
            )
        if beyond := [rank for rank in self.ranks if not 0 <= rank < world_size]:
            raise UserError(
                f"profiler.ranks: {beyond[0]} is not a rank of {world_size}; the last is "
                f"{world_size - 1}"
            )

    def flags(self) -> list[str]:
        """Megatron's: PyTorch traces from its start to its end - 1, nsys from start + 1 to end."""
        if self.tool == "off":
            return []
        shift = 0 if self.tool == "pytorch" else 1
        flags = ["--profile", "--profile-step-start", str(self.first_step - shift)]
        flags += ["--profile-step-end", str(self.last_step + 1 - shift)]
        if self.ranks:
            flags += ["--profile-ranks", *map(str, self.ranks)]
        if self.tool == "pytorch":
            shapes = ["--pytorch-profiler-collect-shapes"] if self.shapes else []
            return [*flags, "--use-pytorch-profiler", *shapes]
        return [*flags, "--nvtx-ranges", *(["--record-shapes"] if self.shapes else [])]

    def described(self) -> str:
        """The profiler in one line of the launch table."""
        if self.tool == "off":
            return "off"
        ranks = f"ranks {', '.join(map(str, self.ranks))}" if self.ranks else "all ranks"
        return f"{self.tool}, steps {self.first_step} to {self.last_step}, {ranks}"
