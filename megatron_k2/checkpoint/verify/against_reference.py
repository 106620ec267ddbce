"""Compare an exported model's logits with reference logits, through transformers.

The reference file is a ``torch.save`` of ``{"tokens": int64 [b, s], "logits": fp32 [b, s, V]}``,
dumped by whoever trained the model. Both sides run in fp32, so the export under test should be
``--dtype fp32`` or the reference made from bf16-rounded weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_k2.checkpoint.hf.reader import HfSource
from megatron_k2.checkpoint.verify.reference_model import reference_model
from megatron_k2.errors import UserError


@dataclass(frozen=True)
class LogitComparison:
    """How far the export is from the reference."""

    max_abs_difference: float
    mean_abs_difference: float
    max_abs_reference: float
    argmax_agreement: float
    """Fraction of positions whose most likely token is the same."""
    largest_lost_margin: float
    """Where it is not: by how much the reference prefers its own token to the other's, the largest
    of all positions; within the rounding of the arithmetic it is a tie, not a difference."""
    missing_keys: tuple[str, ...]
    """Of the model, not in the files; transformers would invent them."""
    unexpected_keys: tuple[str, ...]


def read_reference(path: Path) -> tuple[Tensor, Tensor]:
    """Tokens [b, s] int64 and logits [b, s, V] fp32 of a reference file.

    Raises:
        UserError: if it is missing or does not hold the two.
    """
    if not path.is_file():
        raise UserError(f"--reference {path}: no such file")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises whatever its bytes lead it to
        raise UserError(f"--reference {path}: cannot be read ({error})") from error
    if not isinstance(stored, dict) or not {"tokens", "logits"} <= set(stored):
        raise UserError(f"--reference {path}: expected a dict with 'tokens' and 'logits'")
    tokens, logits = stored["tokens"], stored["logits"]
    if logits.shape[:-1] != tokens.shape:
        raise UserError(
            f"--reference {path}: tokens {list(tokens.shape)} and logits {list(logits.shape)} "
            "differ in batch or sequence"
        )
    return tokens.long(), logits.float()


def verify_logits(hf_dir: Path, reference: Path) -> LogitComparison:
    """Load ``hf_dir`` in fp32 with transformers, run the reference's tokens, compare.

    The directory's ``model_type`` may be ``kimi_k2``: it is read as ``deepseek_v3``.
    The reference may have more columns than the vocabulary (padding); they are not compared.
    """
    tokens, expected = read_reference(reference)
    model, info = reference_model(HfSource(hf_dir))
    with torch.inference_mode():
        logits = model(tokens).logits.float()
    if expected.shape[-1] < logits.shape[-1]:
        raise UserError(
            f"--reference {reference} has {expected.shape[-1]} columns, the model's vocabulary "
            f"is {logits.shape[-1]}: not logits of this model"
        )
    return compare_outputs(logits, expected[..., : logits.shape[-1]], info)


def compare_outputs(
    logits: Tensor, expected: Tensor, loading: Mapping[str, Iterable[str]] | None = None
) -> LogitComparison:
    """Two models' logits on the same tokens.

    Args:
        logits: under test, [b, s, V] fp32.
        expected: reference, the same shape.
        loading: transformers' loading info, if it loaded the one under test.
    """
    info = loading or {}
    difference = (logits - expected).abs()
    chosen = logits.argmax(-1, keepdim=True)
    lost_margin = expected.amax(-1, keepdim=True) - expected.gather(-1, chosen)
    agreement = (chosen == expected.argmax(-1, keepdim=True)).float().mean()
    return LogitComparison(
        max_abs_difference=difference.max().item(),
        mean_abs_difference=difference.mean().item(),
        max_abs_reference=expected.abs().max().item(),
        argmax_agreement=agreement.item(),
        largest_lost_margin=lost_margin.max().item(),
        missing_keys=tuple(sorted(info.get("missing_keys", ()))),
        unexpected_keys=tuple(sorted(info.get("unexpected_keys", ()))),
    )
