"""Where the Gram form of Newton-Schulz forms its Gram matrix afresh, for any set of polynomials.

Between restarts the iteration follows ``R = XXᵀ`` only. Rounding puts eigenvalues of ``R`` off by
about one unit in the last place of the entries they come from; an eigenvalue near zero, the square
of a small singular value, then has an error as large as itself, or becomes negative. The step
``x <- x (a + bx + cx²)²`` multiplies it by ``a²``, 11.9 for ``jordan``, at each further step, until
the gain ``a + bx + cx²`` that the direction gets is wrong by a factor, its singular value is
beyond 1.3 and the next steps send it to infinity. So what must be bounded is the product of ``a²``
since the restart, all steps but the last of a segment counted (its last ``R`` is not needed), times
the rounding unit. Two things let a segment be longer:

* The first one starts from ``‖X‖_F <= 1``, thus ``‖R‖_F <= 1``: the entries that rounding is
  relative to are small unless few rows make up all of the matrix. Later ones start from singular
  values near 1. So the longest segment goes first.
* If few nearly parallel rows do make up all of it, errors are as large as the diagonal's own
  rounding. Raising the first ``R``'s diagonal by a unit in the last place makes up for them
  (``iteration.raise_diagonal``); for any other matrix it adds 0.8 % of the mean eigenvalue in bf16.

The limits are measured, in bf16, on the spectra and the nearly parallel rows of
``tests/optimizer/newton_schulz/test_gram_restarts.py``: first segments with a product of 139 (three
of ``jordan``) keep every singular value below 1.25 and one of 260 (three of ``quintic``) does not;
later ones with 11.9 do, and one of 15.3 (``polar_express``, steps 3 and 4) does not. fp16's are
bf16's by its rounding unit. fp32's keep results within 1e-3 of the plain form's and not just
bounded.
"""

from typing import TYPE_CHECKING

from megatron_k2.optimizer.newton_schulz.coefficients import Step
from megatron_k2.optimizer.newton_schulz.cost import dtype_name

if TYPE_CHECKING:
    import torch

EPS = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23, "float64": 2.0**-52}
"""One unit in the last place at 1, as ``torch.finfo`` has it."""

FIRST_LIMIT = 1.5
"""Largest product of ``a²`` in the first segment, in units of 1 / eps: 192 in bf16."""
LATER_LIMIT = 0.1
"""Largest product of ``a²`` in a later segment, in units of 1 / eps: 12.8 in bf16."""
LATER_STEPS = 2
"""Steps in a later segment: ``Q`` is rounded at each, and near convergence, where the last segments
are, that is all of the error there is (``polar_express``, last three of eight: 1.35 times it)."""
WIDE_LIMIT = 2.0**16
"""Largest product of ``a²`` in fp32 and fp64, in all segments and whatever their length: five steps
of ``jordan`` (19,800) need no restart."""


def restart_segments(schedule: tuple[Step, ...], dtype: "torch.dtype | str") -> tuple[int, ...]:
    """Steps between restarts, in order; their sum is ``len(schedule)``.

    Args:
        schedule: the polynomials.
        dtype: that ``R`` is kept in, torch's or its name.
    """
    eps = EPS[dtype_name(dtype)]
    lengths = [1]
    amplification = 1.0
    for a, _, _ in schedule[:-1]:
        amplification *= a * a
        if eps <= EPS["float32"]:
            is_full = amplification > WIDE_LIMIT
        elif len(lengths) == 1:
            is_full = amplification > FIRST_LIMIT / eps
        else:
            is_full = amplification > LATER_LIMIT / eps or lengths[-1] == LATER_STEPS
        if is_full:
            lengths.append(0)
            amplification = 1.0
        lengths[-1] += 1
    return tuple(lengths)
