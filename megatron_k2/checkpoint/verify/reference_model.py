"""A Hugging Face directory as transformers reads it: the reference that nothing of ours shapes.

``config.json`` goes to transformers as it lies there; only ``model_type`` becomes ``deepseek_v3``,
for transformers has no ``kimi_k2`` without the release's code, and ``quantization_config`` is left
out. bf16 and fp32 files are read by transformers too. It cannot dequantise every block FP8 release
(``docs/checkpoints.md``), needs a package for int4 and takes no language model out of a larger one,
so of those the weights are read by ``verify.compare`` and named as the model in memory names them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.reader import INDEX, HfSource
from megatron_k2.checkpoint.names.rules import GATE_OVER_UP
from megatron_k2.checkpoint.verify.compare import HfWeights
from megatron_k2.errors import UserError

if TYPE_CHECKING:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM


def reference_model(source: HfSource) -> "tuple[DeepseekV3ForCausalLM, dict[str, Any]]":
    """The model of a directory in fp32, ready to run, and transformers' loading info.

    Raises:
        UserError: where transformers takes the configuration for none, or a weight is absent.
    """
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    config = _untouched_config(source)
    if (
        source.is_fp8
        or source.packed
        or source.is_part
        or not _is_laid_out_for_transformers(source.directory)
    ):
        model = DeepseekV3ForCausalLM(config)
        model.load_state_dict(dict(_fused_state(HfWeights(source), list(model.state_dict()))))
        return model.eval(), {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it lists prediction layers, which it has no use for
    logging.disable_progress_bar()
    try:
        model, info = DeepseekV3ForCausalLM.from_pretrained(
            source.directory, config=config, dtype=torch.float32, output_loading_info=True
        )
    finally:
        logging.enable_progress_bar()
        logging.set_verbosity(verbosity)
    return model.eval(), info


def _is_laid_out_for_transformers(directory: Path) -> bool:
    return any((directory / file).is_file() for file in ("model.safetensors", INDEX))


def _untouched_config(source: HfSource) -> "DeepseekV3Config":
    from transformers import DeepseekV3Config

    settings = source.config | {"model_type": "deepseek_v3"}
    settings.pop("quantization_config", None)
    try:
        config = DeepseekV3Config.from_dict(settings)
    except Exception as error:  # its validation raises whatever a value leads it to
        said = " ".join(str(error).split())
        raise UserError(f"{source.directory / 'config.json'}: transformers says: {said}") from None
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # its grouped product wants rows of whole 16 bytes
    return config


def _fused_state(weights: HfWeights, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """State of transformers 5's model, which has a layer's experts in two tensors."""

    def whole(name: str) -> Tensor:
        if name not in weights.shapes:
            raise UserError(f"'{name}' belongs to the model, but is not in the checkpoint")
        return weights.values(name, slice(0, weights.shapes[name][0])).float()

    for name in names:
        prefix, is_fused, matrix = name.rpartition("mlp.experts.")
        if not is_fused or matrix not in ("gate_up_proj", "down_proj"):
            yield name, whole(name)
            continue
        num_experts = sum(n.startswith(f"{prefix}mlp.experts.") for n in weights.shapes) // 3
        experts = [f"{prefix}mlp.experts.{i}." for i in range(num_experts)]
        if matrix == "down_proj":
            parts = [whole(f"{at}down_proj.weight") for at in experts]
        else:
            parts = [
                GATE_OVER_UP.join([whole(f"{at}{half}_proj.weight") for half in ("gate", "up")])
                for at in experts
            ]
        yield name, torch.stack(parts)
