"""The decoder's modules from Megatron itself, with those that K2 needs from us."""

from typing import Any, Protocol, override

from megatron.core.models.backends import LocalSpecProvider

from megatron_k2.model.attention import MLACoreAttention
from megatron_k2.model.experts import GroupedExperts
from megatron_k2.model.mla import K2SelfAttention, LatentAttention
from megatron_k2.model.norm import RMSNorm


class Backend(Protocol):
    """What a family of modules says of itself, beyond Megatron's ``BackendSpecProvider``."""

    latent_attention: type[LatentAttention]

    def down_projection(self) -> Any:
        """The linear down to a latent, whole on every tensor-parallel rank."""

    def up_projection(self) -> Any:
        """The linear up from a latent, column-parallel; may hold the latent's norm."""

    def latent_norm(self) -> Any:
        """Between the two, where it is a module of its own."""

    def pre_mlp_norm(self, *, is_moe: bool) -> Any:
        """Before the experts or the dense SwiGLU."""

    def checkpoint_names(self, *, is_moe: bool) -> dict[str, str]:
        """Prefixes of parameters -> prefixes in a checkpoint, where they differ."""


class LocalBackend(LocalSpecProvider):
    """Megatron's own modules, with those that K2 on this path needs from us."""

    latent_attention: type[LatentAttention] = K2SelfAttention

    @override
    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        del rms_norm, for_qk, has_residual
        return RMSNorm

    @override
    def core_attention(self) -> type:
        return MLACoreAttention

    @override
    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        del moe_use_grouped_gemm
        return GroupedExperts

    def down_projection(self) -> Any:
        """A stand-in of the right signature; ``K2SelfAttention`` builds the replicated one."""
        return self.column_parallel_linear()

    def up_projection(self) -> Any:
        """The linear alone: the latent's norm is a module of its own here."""
        return self.column_parallel_linear()

    def latent_norm(self) -> Any:
        """A module of its own."""
        return RMSNorm

    def pre_mlp_norm(self, *, is_moe: bool) -> Any:
        """A module of its own in either kind of layer."""
        del is_moe
        return RMSNorm

    def checkpoint_names(self, *, is_moe: bool) -> dict[str, str]:
        """No renaming: modules are called as Megatron's local spec calls them."""
        del is_moe
        return {}
