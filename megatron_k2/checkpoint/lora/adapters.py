"""The adapters in a Megatron checkpoint, by the linear they stand beside.

A checkpoint of adapters holds two tensors a linear, ``<linear>.adapter.lora_a`` and ``lora_b``,
under the linear's own name (``names/rules.py``), and in its saved arguments rank, alpha and the
base they were trained over. Gate and up are one linear of Megatron's: dense layers and shared
experts keep an A for each, one above the other, a routed expert one for both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.stream.rows import Dtype
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.errors import UserError
from megatron_k2.run.iterations import find_iteration

if TYPE_CHECKING:
    from torch import Tensor

LORA_A, LORA_B = "adapter.lora_a", "adapter.lora_b"


def linear_of(pair: Pair) -> str:
    """What an adapter's tensors of this weight are named by: its module, with a dot."""
    return pair.megatron.removesuffix("weight")


@dataclass(frozen=True)
class Factors:
    """One Hugging Face weight's part of an adapter."""

    a: "Tensor"
    """[rank, in] fp32."""
    b: "Tensor"
    """[out, rank] fp32."""

    def product(self, scale: float) -> "Tensor":
        """``scale (B A)``, [out, in] fp32: what a dense merge adds."""
        return scale * (self.b @ self.a)


def factors_of(pair: Pair, a: "Tensor", b: "Tensor") -> list[Factors]:
    """Of each Hugging Face tensor of ``pair``, in its order.

    Args:
        pair: the weight.
        a: its adapter's ``LORA_A``, fp32: [rank, in], or gate's above up's.
        b: its adapter's ``LORA_B``, [out, rank] fp32.
    """
    num = len(pair.hf)
    inner = list(a.chunk(num)) if len(a) // b.shape[1] == num else [a] * num
    return [Factors(x, y) for x, y in zip(inner, b.chunk(num), strict=True)]


def whole_product(factors: list[Factors], scale: float) -> "Tensor":
    """What a dense merge adds to the Megatron weight of ``factors_of``, fp32."""
    import torch

    return torch.cat([part.product(scale) for part in factors])


def is_adapters(source: MegatronSource) -> bool:
    """Whether a checkpoint holds adapters over another one's weights."""
    return getattr(source.args, "lora_rank", None) is not None


class AdapterSource:
    """An opened checkpoint of adapters."""

    def __init__(self, source: MegatronSource, base: Path | None = None) -> None:
        """Look at the arguments; factors are read when they are asked for.

        Args:
            source: of the adapters.
            base: where the base lies now; None: where it was trained over.

        Raises:
            UserError: if the checkpoint holds a whole model, or its base is not there.
        """
        self.source = source
        args: Any = source.args
        rank = getattr(args, "lora_rank", None)
        if rank is None:
            raise UserError(f"{source.directory} holds a whole model, not adapters")
        alpha = args.lora_alpha
        self.rank: int = rank
        self.alpha: float = 2.0 * rank if alpha is None else alpha
        given = args.lora_base if base is None else base
        if given is None:
            raise UserError(
                f"{source.directory} does not say over which base it was trained; give --base RUN"
            )
        self.base_directory = _base_directory(Path(given), source.directory)

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    def shape_args(self, base: Any) -> Any:
        """Megatron's arguments that say the model's shape: those of the run that trained them.

        It may have read longer sequences than its base. Where it names no preset, the base's.

        Args:
            base: the base's own.
        """
        own = self.source.args
        return base if getattr(own, "preset", None) is None else own

    def has(self, pair: Pair) -> bool:
        """Whether an adapter stands beside this weight."""
        return f"{linear_of(pair)}{LORA_A}" in self.source.locations

    def factors(self, pair: Pair) -> list[Factors]:
        """See ``factors_of``."""
        a, b = (self.tensor(f"{linear_of(pair)}{name}") for name in (LORA_A, LORA_B))
        return factors_of(pair, a, b)

    def require_matched(self, pairs: list[Pair]) -> None:
        """Refuse adapters of linears that are not among ``pairs``.

        Raises:
            UserError: naming one.
        """
        known = {linear_of(pair) for pair in pairs}
        names = (name.removesuffix(LORA_A) for name in self.source.locations if LORA_A in name)
        if unmatched := sorted(name for name in names if name not in known):
            raise UserError(f"{self.source.directory}: no linear of the model is {unmatched[0]}")

    def tensor(self, name: str) -> "Tensor":
        """One factor, fp32.

        Raises:
            UserError: if it is missing.
        """
        if name not in self.source.locations:
            raise UserError(f"{self.source.directory} lacks '{name}'; the checkpoint is damaged")
        return self.source.read(name, is_computed=True).to(Dtype.FP32).tensor()


def _base_directory(given: Path, adapters: Path) -> Path:
    """The base's ``iter_*``, which may have moved since."""
    if not given.exists():
        raise UserError(
            f"{adapters}: its base {given} is not there; give --base RUN, where it lies now"
        )
    return find_iteration(given)
