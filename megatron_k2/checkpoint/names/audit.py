"""Account for every key before any byte is written: names and shapes only, no tensor.

A converter that silently skips a key is how a router bias stays zero. So three lists that were
made independently must agree: what the checkpoint holds, what the rules consume and produce, and
what a Hugging Face model of this preset has (``released_shapes``, written from the modeling code
and not from the rules).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import override

from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.checkpoint.names.rules import RULES, Rule, Shape
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset


@dataclass(frozen=True)
class Finding:
    """One key that does not add up."""

    key: str
    problem: str

    @override
    def __str__(self) -> str:
        return f"{self.key}: {self.problem}"


def released_shapes(preset: ModelPreset) -> dict[str, Shape]:
    """Every tensor of the Hugging Face model, by walking the architecture as its code builds it.

    Names as in Kimi-K2-Instruct's index, bf16 layout (no scales); shapes are [out, in].
    """
    p, h = preset, preset.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (p.vocab_size, h)}
    for layer in range(p.num_layers + p.num_mtp_layers):
        prefix = f"model.layers.{layer}."
        if layer >= p.num_layers:
            shapes |= _prediction_shapes(prefix, p)
        shapes[f"{prefix}input_layernorm.weight"] = (h,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (h,)
        for name, shape in _attention_shapes(p).items():
            shapes[f"{prefix}self_attn.{name}.weight"] = shape
        mlp = f"{prefix}mlp."
        if layer < p.num_dense_layers:
            shapes |= _swiglu_shapes(mlp, p.ffn_hidden_size, h)
            continue
        shapes[f"{mlp}gate.weight"] = (p.num_moe_experts, h)
        shapes[f"{mlp}gate.e_score_correction_bias"] = (p.num_moe_experts,)
        shared_width = p.num_shared_experts * p.moe_ffn_hidden_size
        shapes |= _swiglu_shapes(f"{mlp}shared_experts.", shared_width, h)
        for expert in range(p.num_moe_experts):
            shapes |= _swiglu_shapes(f"{mlp}experts.{expert}.", p.moe_ffn_hidden_size, h)
    shapes["model.norm.weight"] = (h,)
    shapes["lm_head.weight"] = (p.vocab_size, h)
    return shapes


def _prediction_shapes(prefix: str, p: ModelPreset) -> dict[str, Shape]:
    """What a prediction layer of DeepSeek-V3 has besides a layer's own tensors."""
    h = p.hidden_size
    return {
        f"{prefix}embed_tokens.weight": (p.vocab_size, h),
        f"{prefix}enorm.weight": (h,),
        f"{prefix}hnorm.weight": (h,),
        f"{prefix}eh_proj.weight": (h, 2 * h),
        f"{prefix}shared_head.norm.weight": (h,),
        f"{prefix}shared_head.head.weight": (p.vocab_size, h),
    }


def _attention_shapes(p: ModelPreset) -> dict[str, Shape]:
    heads, h = p.num_attention_heads, p.hidden_size
    head_dim = p.qk_head_dim + p.qk_pos_emb_head_dim
    shapes: dict[str, Shape] = {
        "kv_a_proj_with_mqa": (p.kv_lora_rank + p.qk_pos_emb_head_dim, h),
        "kv_a_layernorm": (p.kv_lora_rank,),
        "kv_b_proj": (heads * (p.qk_head_dim + p.v_head_dim), p.kv_lora_rank),
        "o_proj": (h, heads * p.v_head_dim),
    }
    if p.q_lora_rank is None:
        shapes["q_proj"] = (heads * head_dim, h)
    else:
        shapes["q_a_proj"] = (p.q_lora_rank, h)
        shapes["q_a_layernorm"] = (p.q_lora_rank,)
        shapes["q_b_proj"] = (heads * head_dim, p.q_lora_rank)
    return shapes


def _swiglu_shapes(prefix: str, width: int, hidden_size: int) -> dict[str, Shape]:
    return {
        f"{prefix}gate_proj.weight": (width, hidden_size),
        f"{prefix}up_proj.weight": (width, hidden_size),
        f"{prefix}down_proj.weight": (hidden_size, width),
    }


def audit(
    source: Mapping[str, Shape],
    preset: ModelPreset,
    rules: Sequence[Rule] = RULES,
    only: Selection | None = None,
) -> list[Finding]:
    """Everything that does not add up on the way from Megatron to Hugging Face.

    Args:
        source: Megatron name -> shape, as ``MegatronSource.shapes``; the embedding and the head
            may have padding rows.
        preset: the shape the result shall have.
        rules: the table to replay.
        only: part of the model that is taken; the rest may be missing or left over.

    Returns:
        Findings, the source's first; empty if every source key is consumed exactly once, every
        target key produced exactly once, and all shapes agree.
    """
    pairs = list(expand(preset, rules))
    if only is not None and not only.is_all:
        taken = list(only.take(pairs))
        return _pair_findings(source, taken)
    return [*_source_findings(source, pairs), *_target_findings(released_shapes(preset), pairs)]


def require_clean(
    source: Mapping[str, Shape],
    preset: ModelPreset,
    rules: Sequence[Rule] = RULES,
    only: Selection | None = None,
) -> None:
    """``audit``, raising.

    Raises:
        UserError: naming the first keys and how many more there are.
    """
    findings = audit(source, preset, rules, only)
    if findings:
        shown = "; ".join(str(finding) for finding in findings[:5])
        more = f"; and {len(findings) - 5} more" if len(findings) > 5 else ""
        raise UserError(
            f"checkpoint and preset '{preset.name}' do not fit, nothing was written: {shown}{more}"
        )


def _source_findings(source: Mapping[str, Shape], pairs: Sequence[Pair]) -> list[Finding]:
    consumed = Counter(pair.megatron for pair in pairs if not pair.rule.is_copy)
    findings = [
        Finding(key, "in the checkpoint, but no rule consumes it")
        for key in source
        if key not in consumed
    ]
    findings += [Finding(k, f"consumed by {n} rules") for k, n in consumed.items() if n > 1]
    return findings + _pair_findings(source, pairs)


def _pair_findings(source: Mapping[str, Shape], pairs: Sequence[Pair]) -> list[Finding]:
    findings: list[Finding] = []
    for pair in pairs:
        found = source.get(pair.megatron)
        if found is None:
            findings.append(Finding(pair.megatron, "expected, but not in the checkpoint"))
        elif not _fits(found, pair):
            text = f"has shape {list(found)}, expected {list(pair.megatron_shape)}"
            findings.append(Finding(pair.megatron, text))
    return findings


def _fits(found: Shape, pair: Pair) -> bool:
    if pair.rule.is_vocabulary:
        return found[0] >= pair.megatron_shape[0] and found[1:] == pair.megatron_shape[1:]
    return found == pair.megatron_shape


def _target_findings(target: Mapping[str, Shape], pairs: Sequence[Pair]) -> list[Finding]:
    produced = Counter(name for pair in pairs for name in pair.hf)
    findings = [Finding(k, "belongs to the model, but no rule produces it") for k in target]
    findings = [finding for finding in findings if finding.key not in produced]
    findings += [Finding(k, f"produced {n} times") for k, n in produced.items() if n > 1]
    for pair in pairs:
        for name, shape in zip(
            pair.hf, pair.rule.operation.split_shape(pair.megatron_shape), strict=True
        ):
            if name not in target:
                findings.append(Finding(name, "produced, but the model has no such tensor"))
            elif shape != target[name]:
                text = f"produced as {list(shape)}, the model has {list(target[name])}"
                findings.append(Finding(name, text))
    return findings
