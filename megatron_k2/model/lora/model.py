"""A GPT model of which only the adapters train, are saved and are loaded; the base is read once."""

import re
from typing import Any, override

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_k2.errors import UserError
from megatron_k2.fp8.frozen import hold_in_fp8
from megatron_k2.model.experts import GroupedExperts
from megatron_k2.model.linear import ReplicatedLinear
from megatron_k2.model.lora.adapter import ADAPTER, LowRankAdapter
from megatron_k2.model.lora.settings import LoraSettings

_LINEARS = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)
_MARK = f".{ADAPTER}."
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")
_DECODER_LAYER = re.compile(r"^decoder\.layers\.\d+\.")


def is_adapters(name: str) -> bool:
    """Whether a parameter or a checkpoint's key belongs to an adapter."""
    return _MARK in name


class AdapterGPTModel(GPTModel):
    """Megatron's model over a frozen base.

    To a checkpoint it is its adapters alone: what it saves, and what it asks a checkpoint for. The
    base comes by ``load_base``, once, when the model is built.

    Args:
        lora: of its adapters.
        args: Megatron's.
        kwargs: Megatron's.
    """

    def __init__(self, lora: LoraSettings, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora, self.is_base_in_fp8 = lora, False
        for name, param in self.named_parameters():
            param.requires_grad_(is_adapters(name))
        for name, adapter in self.adapters():
            adapter.initialise(name)
        if self.pre_process:
            # A recomputed layer gives no gradient to what it holds unless its input wants one.
            self.embedding.register_forward_hook(_want_gradient)

    def adapters(self) -> list[tuple[str, LowRankAdapter]]:
        """Each adapter of this rank with its name as at TP1, EP1 and PP1."""
        numbers: dict[str, int] = {}
        offsets: dict[str, int] = {}
        found = []
        for name, module in self.named_modules():
            if isinstance(module, TransformerLayer):
                numbers[name] = module.layer_number - 1
            elif isinstance(module, SequentialMLP):
                offsets[name] = module.ep_group.rank() * module.num_local_experts
            elif isinstance(module, LowRankAdapter):
                found.append((_whole_name(name, numbers, offsets), module))
        return found

    @override
    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The adapters' parameters."""
        whole = super().sharded_state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if is_adapters(name)}

    def whole_sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The base's parameters, as a plain model describes its own, and the adapters'.

        Raises:
            UserError: the base is held in block FP8: its codes are no weights of that description.
        """
        self.require_plain_base()
        return super().sharded_state_dict(*args, **kwargs)

    def require_plain_base(self) -> None:
        """Refuse a base whose weights are codes.

        Raises:
            UserError: it is held in block FP8.
        """
        if self.is_base_in_fp8:
            raise UserError(
                "the frozen base is held in block FP8, and its weights cannot be given out whole; "
                "leave out --lora-base-fp8, or save the adapters and take "
                "'megatron-k2 convert export --merge-lora'"
            )

    @override
    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Fill the adapters; with ``strict`` every one of them, and nothing else."""
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if is_adapters(name)]
        if strict and (missing or found.unexpected_keys):
            first = (missing or found.unexpected_keys)[0]
            what = "lacks" if missing else "has besides"
            raise RuntimeError(f"a checkpoint of adapters {what} {first}")
        return found

    def load_base(self, directory: str) -> None:
        """Fill the frozen weights from an ``iter_*`` directory, saved at any layout.

        Collective over all ranks.

        Raises:
            UserError: where the checkpoint does not hold this model's weights.
        """
        metadata = {
            "singleton_local_shards": False,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        whole = self.whole_sharded_state_dict(metadata=metadata)
        wanted = {
            name: value
            for name, value in whole.items()
            if not is_adapters(name) and not name.endswith("_extra_state")
        }
        try:
            # A stage asks for its own layers alone, which the check of whole coverage would refuse.
            loaded = dist_checkpointing.load(wanted, directory, validate_access_integrity=False)
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            raise UserError(
                f"--lora-base {directory} does not hold this model's weights ({error}); give the "
                "run whose preset and sizes these are"
            ) from error
        super().load_state_dict({name: loaded[name] for name in wanted}, strict=False)

    def hold_base_in_fp8(self) -> None:
        """Hold the frozen linears of the layers in block FP8; embedding and head stay as they are.

        The router too: its scores choose, and it is small.
        """
        experts = [module for module in self.modules() if isinstance(module, GroupedExperts)]
        owners: list[tuple[torch.nn.Module, list[torch.nn.Module]]] = []
        of_experts: set[int] = set()
        for owner in experts:
            holders: list[torch.nn.Module] = [
                linear
                for expert in owner.local_experts
                for linear in (expert.linear_fc1, expert.linear_fc2)
            ]
            of_experts.update(map(id, holders))
            owners.append((owner, holders))
        for name, module in self.named_modules():
            if isinstance(module, _LINEARS) and id(module) not in of_experts:
                if name != "output_layer":
                    owners.append((module, [module]))
        hold_in_fp8(owners)
        self.is_base_in_fp8 = True


def _whole_name(name: str, numbers: dict[str, int], offsets: dict[str, int]) -> str:
    """``name`` with the model's own numbers of layer and expert in place of this rank's."""
    layer = next((at for at in numbers if name.startswith(f"{at}.")), None)
    experts = next((at for at in offsets if name.startswith(f"{at}.")), None)
    if experts is not None:
        offset = offsets[experts]
        name = _LOCAL_EXPERT.sub(lambda m: f".local_experts.{int(m[1]) + offset}.", name)
    if layer is not None and _DECODER_LAYER.match(name):
        name = _DECODER_LAYER.sub(f"decoder.layers.{numbers[layer]}.", name)
    return name


def _want_gradient(_module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
