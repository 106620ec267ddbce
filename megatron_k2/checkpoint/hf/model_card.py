"""The model card of an export: what it is, where it came from, how to load it."""

from megatron_k2.planning.cost.params import count_parameters
from megatron_k2.presets import ModelPreset

_LOAD = {
    "deepseek_v3": "`AutoModelForCausalLM.from_pretrained(directory)`; transformers' DeepseekV3.",
    "kimi_k2": (
        "vLLM and SGLang know `model_type` kimi_k2. For transformers either pass "
        "`trust_remote_code=True`, which needs the Kimi-K2 release's `configuration_deepseek.py` "
        "and `modeling_deepseek.py` beside this file, or set `model_type` to `deepseek_v3` and "
        "drop `auto_map` in `config.json`."
    ),
}


def model_card(
    preset: ModelPreset,
    *,
    checkpoint: str,
    iteration: int | None,
    num_tokens: int | None,
    dtype: str,
    model_type: str,
    versions: dict[str, str],
) -> str:
    """``README.md`` with the provenance that can be known; unknown numbers are left out.

    Args:
        preset: the exported shape.
        checkpoint: name of the ``iter_*`` directory; no path, which would tell the machine.
        iteration: optimizer steps.
        num_tokens: consumed in training.
        dtype: of the weights, ``bf16`` or ``fp32``.
        model_type: of ``config.json``; decides the loading advice.
        versions: package -> version.
    """
    count = count_parameters(preset)
    yarn = preset.yarn
    positions = "plain rotary" if yarn is None else f"YaRN x {yarn.rotary_scaling_factor:g}"
    rows = {
        "preset": preset.name,
        "parameters": f"{count.total:,}, of which {count.activated:,} active per token",
        "layers": f"{preset.num_layers} ({preset.num_dense_layers} dense)",
        "experts": f"{preset.num_moe_experts}, {preset.moe_router_topk} per token",
        "position encoding": f"{positions}, up to {preset.max_position_embeddings:,} positions",
        "weights": f"{dtype}; router selection bias fp32",
        "checkpoint": checkpoint,
    }
    if iteration is not None:
        rows["iteration"] = f"{iteration:,}"
    if num_tokens is not None:
        rows["training tokens"] = f"{num_tokens:,}"
    rows |= versions
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n"
        f"# {preset.name}\n\nExported from a Megatron-Core checkpoint by `megatron-k2 convert "
        f"export`.\n\n| | |\n|---|---|\n{table}\n\n## Load\n\n{_LOAD[model_type]}\n"
    )
