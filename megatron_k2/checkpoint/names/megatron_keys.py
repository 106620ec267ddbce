"""Keys of a Megatron ``torch_dist`` checkpoint <-> names of the rules, and where a tensor lies.

Storage differs from ``GPTModel.state_dict()`` with the local spec in these ways (0.19.2):

- experts of a layer are one tensor ``...mlp.experts.experts.linear_fc1.weight`` [e, 2F, H], whether
  they run apart or as one grouped product;
- with an integer ``moe_layer_freq`` the layers are stacked too, ``decoder.layers.<rest>`` [L, ...];
  with a list, as every preset here has, each layer has its own key;
- a prediction layer's ``mtp_model_layer`` keeps its former name ``transformer_layer``;
- Transformer Engine's modules fuse a norm into the linear layer behind it and store it there
  (``Rule.megatron_te``).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.checkpoint.names.rules import RULES
from megatron_k2.checkpoint.stream.rows import Dtype

TransformerImpl = Literal["local", "te"]
"""Whose modules a model is built of (Megatron's ``--transformer-impl``): Megatron's own, or
Transformer Engine's."""

STACKED_EXPERTS = "mlp.experts.experts."

_APART = re.compile(r"mlp\.experts\.local_experts\.\d+\.")
_LAYER_KEY = re.compile(
    r"^(?P<block>decoder|mtp)\.layers\.(?:(?P<layer>\d+)\.)?"
    r"(?:(?P<inner>transformer_layer|mtp_model_layer)\.)?(?P<rest>.+)$"
)
_LOCAL_NAMES = {
    rule.megatron_te: rule.megatron.rpartition("{layer}.")[2] for rule in RULES if rule.megatron_te
}
"""Within a layer: Transformer Engine's name -> the rules'."""


@dataclass(frozen=True)
class Location:
    """Where one tensor lies: a key, and indices into its stacked leading dimensions."""

    key: str
    leading: tuple[int, ...]
    """Layer and/or expert index, where the stored tensor stacks them."""
    shape: tuple[int, ...]
    """Of the tensor itself, vocabulary padding included."""
    dtype: Dtype


def stored_key(pair: Pair, modules: TransformerImpl) -> str:
    """The key a model of these modules stores a tensor of the rules under."""
    key = _APART.sub(STACKED_EXPERTS, pair.megatron)
    if modules == "te" and pair.rule.megatron_te is not None:
        within = pair.rule.megatron.rpartition("{layer}.")[2]
        key = key.removesuffix(within) + pair.rule.megatron_te
    return key.replace(".mtp_model_layer.", ".transformer_layer.")


def locate(key: str, size: tuple[int, ...], dtype: Dtype) -> Iterator[tuple[str, Location]]:
    """The tensors one stored key holds, by unstacking layers and experts."""
    match = _LAYER_KEY.match(key)
    if match is None:
        yield key, Location(key, (), size, dtype)
        return
    layer = match["layer"]
    rest = _LOCAL_NAMES.get(match["rest"], match["rest"])
    layers = [(int(layer), ())] if layer is not None else [(i, (i,)) for i in range(size[0])]
    shape = size if layer is not None else size[1:]
    within = "mtp_model_layer." if match["inner"] else ""
    for index, at_layer in layers:
        prefix = f"{match['block']}.layers.{index}.{within}"
        if not rest.startswith(STACKED_EXPERTS):
            yield f"{prefix}{rest}", Location(key, at_layer, shape, dtype)
            continue
        matrix = rest.removeprefix(STACKED_EXPERTS)
        for expert in range(shape[0]):
            name = f"{prefix}mlp.experts.local_experts.{expert}.{matrix}"
            yield name, Location(key, (*at_layer, expert), shape[1:], dtype)
