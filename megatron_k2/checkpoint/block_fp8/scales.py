"""How a release's scales were made, which decides what can be rebuilt of its weights without them.

- scale = bf16 amax / 448: the block's largest value comes back exactly, so scale and codes do;
- scale = fp32 amax / 448: the largest value was rounded to bf16, so the scale comes back off by up
  to 2^-9 relative, the codes exactly (half a code's spacing is 2^-5 relative or more);
- any other scale (powers of two, a block whose largest code is below 448): neither.
"""

import enum
from collections import Counter

import numpy as np

from megatron_k2.checkpoint.stream.rows import Dtype, Rows

E4M3_MAX = 448.0

_CODE_OF_MAX = 0x7E
"""Of 448; one more is NaN."""


class ScaleClass(enum.StrEnum):
    """How a block's scale was made."""

    ZERO = "zero block"
    """All codes are 0, so any scale says the same; quantising gives 1."""
    BF16_AMAX = "bf16 amax / 448"
    FP32_AMAX = "fp32 amax / 448"
    OTHER = "other"


def classify_scales(largest: np.ndarray, scales: np.ndarray) -> Counter[ScaleClass]:
    """Blocks by class; what an import reports and an export can expect.

    A block is amax-derived if its largest code is 448; then the bf16 class is the one whose scale
    is that of its own amax rounded to bf16.

    Args:
        largest: each block's largest code without its sign, uint8.
        scales: of the blocks, fp32.
    """
    with np.errstate(over="ignore"):
        amax = Rows(scales * np.float32(E4M3_MAX), Dtype.FP32)
    rounded = amax.to(Dtype.BF16).to(Dtype.FP32).bits / np.float32(E4M3_MAX)
    is_zero, is_top = largest == 0, largest == _CODE_OF_MAX
    is_bf16 = is_top & (rounded == scales)
    counts = Counter(
        {
            ScaleClass.ZERO: int(is_zero.sum()),
            ScaleClass.BF16_AMAX: int(is_bf16.sum()),
            ScaleClass.FP32_AMAX: int((is_top & ~is_bf16).sum()),
            ScaleClass.OTHER: int((~is_zero & ~is_top).sum()),
        }
    )
    return +counts
