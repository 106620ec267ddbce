"""Account for every tensor of a Hugging Face release on its way to Megatron.

``audit`` looks from Megatron outwards; this is the same question asked of what lies on disk, FP8
scales and leftover buffers included: every weight consumed once, every scale beside the weight it
belongs to, shapes and dtypes as the model's. Names and shapes only, so the real index of K2 is
audited in seconds.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_k2.checkpoint.block_fp8.layout import SCALE_SUFFIX, is_quantized, scale_shape
from megatron_k2.checkpoint.hf.reader import HfTensor
from megatron_k2.checkpoint.names.audit import Finding, released_shapes
from megatron_k2.checkpoint.names.mapping import Pair, expand
from megatron_k2.checkpoint.names.rules import IGNORED_HF_SUFFIXES, RULES, Rule
from megatron_k2.checkpoint.names.selection import Selection
from megatron_k2.checkpoint.stream.rows import WEIGHTS, Dtype
from megatron_k2.errors import UserError
from megatron_k2.presets import ModelPreset

LEFTOVER_ROTARY = "model.layers.{layer}.self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class SourceAudit:
    """What became of every tensor of a source."""

    findings: tuple[Finding, ...]
    num_weights: int
    """Consumed by a rule."""
    num_scales: int
    """Consumed with the FP8 weight they belong to."""
    ignored: tuple[str, ...]
    """Leftover buffers, passed over on purpose."""
    num_targets: int
    """Megatron tensors produced."""

    @property
    def num_tensors(self) -> int:
        """All that was looked at and is accounted for."""
        return self.num_weights + self.num_scales + len(self.ignored)


def released_tensors(preset: ModelPreset) -> dict[str, HfTensor]:
    """Every tensor of the release as it lies on disk: block FP8, its scales, leftover buffers.

    The buffer has 56 numbers in K2 = hidden_size / heads / 2, of a head that MLA does not have.
    """
    tensors: dict[str, HfTensor] = {}
    for name, shape in released_shapes(preset).items():
        dtype = Dtype.FP32 if name.endswith("e_score_correction_bias") else Dtype.BF16
        if is_quantized(name):
            dtype = Dtype.E4M3
            scales = HfTensor("", 0, scale_shape(shape), Dtype.FP32)
            tensors[name + SCALE_SUFFIX] = scales
        tensors[name] = HfTensor("", 0, shape, dtype)
    width = preset.hidden_size // preset.num_attention_heads // 2
    for layer in range(preset.num_layers):
        name = LEFTOVER_ROTARY.format(layer=layer)
        tensors[name] = HfTensor("", 0, (width,), Dtype.BF16)
    return tensors


def audit_source(
    source: Mapping[str, HfTensor],
    preset: ModelPreset,
    selection: Selection | None = None,
    rules: Sequence[Rule] = RULES,
) -> SourceAudit:
    """What of ``source`` becomes what, and everything that does not add up.

    Args:
        source: as ``HfSource.stored``.
        preset: the shape of the model.
        selection: tensors outside it are not reported.
        rules: the table to replay.
    """
    pairs = list((selection or Selection()).take(expand(preset, rules)))
    consumed = Counter(name for pair in pairs for name in pair.hf)
    produced = Counter(pair.megatron for pair in pairs if not pair.rule.is_copy)
    ignored = tuple(name for name in source if name.endswith(IGNORED_HF_SUFFIXES))
    scales = {name for name in source if name.endswith(SCALE_SUFFIX)}
    findings = [Finding(k, f"consumed by {n} rules") for k, n in consumed.items() if n > 1]
    findings += [Finding(k, f"produced {n} times") for k, n in produced.items() if n > 1]
    if selection is None or selection.is_all:
        known = consumed.keys() | scales | set(ignored)
        findings += [
            Finding(k, "in the source, no rule consumes it") for k in source.keys() - known
        ]
    belonging: set[str] = set()
    for pair in pairs:
        for name, shape, _ in pair.parts():
            findings += _weight_findings(source, pair, name, shape)
            tensor = source.get(name)
            if tensor is not None and tensor.dtype is Dtype.E4M3 and name + SCALE_SUFFIX in source:
                belonging.add(name + SCALE_SUFFIX)
    if selection is None or selection.is_all:
        orphans = scales - belonging
        findings += [Finding(k, "is a scale without an FP8 weight") for k in sorted(orphans)]
    num_weights = sum(name in source for name in consumed)
    return SourceAudit(
        tuple(sorted(findings, key=lambda finding: finding.key)),
        num_weights=num_weights,
        num_scales=len(belonging),
        ignored=ignored,
        num_targets=len(produced),
    )


def _weight_findings(
    source: Mapping[str, HfTensor], pair: Pair, name: str, shape: tuple[int, ...]
) -> list[Finding]:
    tensor = source.get(name)
    if tensor is None:
        return [Finding(name, "belongs to the model, but is not in the source")]
    if tensor.shape != shape:
        return [Finding(name, f"has shape {list(tensor.shape)}, config.json says {list(shape)}")]
    if tensor.dtype is not Dtype.E4M3:
        is_known = tensor.dtype in WEIGHTS
        return [] if is_known else [Finding(name, f"has dtype {tensor.dtype}, expected a float")]
    if pair.rule.is_fp32 or len(shape) != 2:
        return [Finding(name, "is FP8, but a block scale fits matrices only")]
    scales = source.get(name + SCALE_SUFFIX)
    if scales is None:
        return [Finding(name, f"is FP8, but its scales '{name}{SCALE_SUFFIX}' are missing")]
    if scales.shape != scale_shape(shape):
        expected = list(scale_shape(shape))
        text = f"has shape {list(scales.shape)}, blocks of 128 need {expected}"
        return [Finding(name + SCALE_SUFFIX, text)]
    if scales.dtype != Dtype.FP32:
        return [Finding(name + SCALE_SUFFIX, f"has dtype {scales.dtype}, expected float32")]
    return []


def require_clean_source(found: SourceAudit, where: object) -> None:
    """Raise unless everything adds up.

    Raises:
        UserError: naming the first keys and how many more there are.
    """
    if found.findings:
        shown = "; ".join(str(finding) for finding in found.findings[:5])
        more = f"; and {len(found.findings) - 5} more" if len(found.findings) > 5 else ""
        raise UserError(f"{where} does not fit, nothing was written: {shown}{more}")
