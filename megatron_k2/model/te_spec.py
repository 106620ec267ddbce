"""The decoder's modules from Transformer Engine, for ``--transformer-impl transformer_engine``.

Imported only where TE is installed. What is TE's: every linear, the norms (fused into the linear
that follows them where there is one: the latents' up-projections, the dense layers' gate/up), the
experts as one grouped product (``TEGroupedMLP``), and attention. What stays Megatron's: router,
embedding, output head.

Differences from the local modules that a reader of the numbers should know:

- S_max comes from TE's ``return_max_logit``. It has the dtype of the attention's output: in bf16 it
  is rounded to 8 bits, steps of 0.5 between 64 and 128, so a head is known to be over τ = 100 only
  to ±0.25. It is recorded in evaluation as well; ``optimizer/qk_clip/max_logits.py`` keeps
  training's.
- ``return_max_logit`` turns FlashAttention off: TE then chooses cuDNN's fused attention, or its
  unfused one, which holds all logits. It is asked for only where MuonClip reads it.
- Parameters of a fused norm are named ``layer_norm_weight`` in ``state_dict``. In checkpoints they
  have the local modules' names (``sharded_state_dict_keys_map``), so that either implementation
  goes on from what the other saved; TE from a local checkpoint with ``--dist-ckpt-strictness
  log_all``, since it would load extra states (FP8 scaling history) that are not there.
"""

from typing import Any, override

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.identity_op import IdentityOp

from megatron_k2.model.mla import K2SelfAttention, LatentAttention
from megatron_k2.model.spec_local import LocalBackend

CHECKPOINT_NAMES = {
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
DENSE_CHECKPOINT_NAMES = {"mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm."}
"""Names of fused norms -> the local modules' names."""


class TEBackend(TESpecProvider):
    """Megatron's provider of TE modules, and how MLA is put together from them."""

    latent_attention: type = LatentAttention

    def down_projection(self) -> Any:
        """Of the latents: whole on every tensor-parallel rank (TE's "duplicated" mode)."""
        return self.linear()

    def up_projection(self) -> Any:
        """The linear up from a latent, column-parallel, with the latent's norm fused in."""
        return self.column_parallel_layer_norm_linear()

    def latent_norm(self) -> Any:
        """An identity: the norm is fused into the up-projection."""
        return IdentityOp

    def pre_mlp_norm(self, *, is_moe: bool) -> Any:
        """Before the experts; a dense layer's is fused into its gate/up projection."""
        return self.layer_norm(rms_norm=True, has_residual=True) if is_moe else IdentityOp

    def checkpoint_names(self, *, is_moe: bool) -> dict[str, str]:
        """Prefixes of parameters -> their prefixes in a checkpoint."""
        return CHECKPOINT_NAMES if is_moe else CHECKPOINT_NAMES | DENSE_CHECKPOINT_NAMES


class _AdaptedAttention(K2SelfAttention):
    """MLA of Megatron's linears around TE's attention."""

    _run_core_attention = LatentAttention._run_core_attention


class AdaptedTEBackend(LocalBackend):
    """For adapters: attention and norms are TE's, linears and experts Megatron's and ours.

    A frozen linear keeps nothing for backward and makes no gradient of its weight, which is what
    TE's would fuse; its norm stands apart, since the adapter beside it needs its output too. FP8
    products are TE's alone, so that there are none.
    """

    latent_attention: type = _AdaptedAttention

    def __init__(self) -> None:
        self._te = TESpecProvider()

    @override
    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Any:
        return self._te.layer_norm(rms_norm=rms_norm, for_qk=for_qk, has_residual=has_residual)

    @override
    def core_attention(self) -> type:
        return self._te.core_attention()

    @override
    def latent_norm(self) -> Any:
        return self.layer_norm(rms_norm=True, for_qk=True)

    @override
    def pre_mlp_norm(self, *, is_moe: bool) -> Any:
        del is_moe
        return self.layer_norm(rms_norm=True, has_residual=True)
