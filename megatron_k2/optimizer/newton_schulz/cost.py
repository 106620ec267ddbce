"""What Newton-Schulz executes in FLOPs, and which of its two forms is the cheaper one.

Without torch, so that the planner counts with the same function as the optimizer. A dtype is given
as torch's own or by its name, ``bfloat16``.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Form = Literal["auto", "plain", "gram"]
SymmetricMethod = Literal["none", "blocks", "triton"]

NUM_ROW_BLOCKS = 4
MIN_BLOCKED_FLOPS = {
    "bfloat16": 1 << 29,
    "float16": 1 << 29,
    "float32": 1 << 25,
    "float64": 1 << 25,
}
"""A product of fewer FLOPs is formed whole: the copies cost more than is saved (one thread of an
AMD EPYC: bf16 0.92x at 512³, 1.15x at 512² x 1792; fp32 0.98x at 128² x 448, 1.19x at 256³)."""
TRITON_TILE = {"bfloat16": 128, "float16": 128, "float32": 64}
"""Rows and columns of one tile of the Triton kernel."""


def dtype_name(dtype: "torch.dtype | str") -> str:
    """``bfloat16`` for ``torch.bfloat16`` and for itself."""
    return str(dtype).removeprefix("torch.")


def triton_tile(dtype: "torch.dtype | str") -> int:
    """Rows and columns of one tile of the Triton kernel; fp32's for fp64, which it refuses."""
    return TRITON_TILE.get(dtype_name(dtype), TRITON_TILE["float32"])


def choose_form(
    rows: int,
    cols: int,
    segments: tuple[int, ...],
    form: Form,
    symmetric: SymmetricMethod = "none",
    dtype: "torch.dtype | str" = "bfloat16",
) -> Literal["plain", "gram"]:
    """``form`` itself, or for ``auto`` the one that executes fewer FLOPs; plain on a tie."""
    if form not in ("auto", "plain", "gram"):
        raise ValueError(f"form={form!r}: expected auto, plain or gram")
    if form != "auto":
        return form
    plain = newton_schulz_flops(rows, cols, segments, "plain", symmetric, dtype)
    gram = newton_schulz_flops(rows, cols, segments, "gram", symmetric, dtype)
    return "gram" if gram < plain else "plain"


def newton_schulz_flops(
    rows: int,
    cols: int,
    segments: tuple[int, ...],
    form: Form = "auto",
    symmetric: SymmetricMethod = "none",
    dtype: "torch.dtype | str" = "bfloat16",
) -> int:
    """FLOPs ``orthogonalize`` executes on one matrix in matrix products (a multiply-add is two).

    In units of n³ with r = m/n and five steps of ``jordan``: plain 20r + 10; Gram 8r + 28 with one
    restart (bf16), 4r + 34 without (fp32). Were symmetric products free of waste: 15r + 5,
    6r + 14, 3r + 17. What ``symmetric`` really computes is counted here, diagonal blocks in full.

    Args:
        rows: of the matrix.
        cols: of the matrix.
        segments: steps between restarts (``restart_segments``); their sum are the steps.
        form: see ``orthogonalize``.
        symmetric: see ``orthogonalize``.
        dtype: of the iteration; it matters to ``symmetric="blocks"``.
    """
    if form == "auto":
        form = choose_form(rows, cols, segments, form, symmetric, dtype)
    n, m = min(rows, cols), max(rows, cols)
    gram_matrix = 2 * num_computed_elements(n, m, symmetric, dtype) * m
    square = 2 * num_computed_elements(n, n, symmetric, dtype) * n
    apply = 2 * n * n * m
    if form == "plain":
        return sum(segments) * (gram_matrix + square + apply)
    # per step: R², Q, and two for R; a segment's first Q and last R are not needed
    return sum(gram_matrix + apply + (4 * length - 3) * square for length in segments)


def is_worth_blocks(rows: int, inner: int, dtype: "torch.dtype | str") -> bool:
    """Whether a symmetric [rows, rows] product of that inner size is faster by row blocks."""
    return 2 * rows * rows * inner >= MIN_BLOCKED_FLOPS[dtype_name(dtype)]


def row_blocks(rows: int, block: int) -> list[tuple[int, int]]:
    """[start, end) of consecutive blocks of ``block`` rows, the last one short."""
    return [(start, min(start + block, rows)) for start in range(0, rows, block)]


def num_computed_elements(
    rows: int, inner: int, symmetric: SymmetricMethod, dtype: "torch.dtype | str"
) -> int:
    """Elements of a symmetric [rows, rows] result of that inner size computed and not copied."""
    if symmetric == "none" or (symmetric == "blocks" and not is_worth_blocks(rows, inner, dtype)):
        return rows * rows
    block = triton_tile(dtype) if symmetric == "triton" else -(-rows // NUM_ROW_BLOCKS)
    return sum((end - start) * (rows - start) for start, end in row_blocks(rows, block))
