"""How a release lays block FP8 out: which tensors, in what blocks, under which names.

Codes are e4m3; one fp32 ``weight_scale_inv`` a 128x128 block, rows and columns ceil-divided. The
arithmetic is in ``reference``, which needs torch; names and shapes do not.
"""

BLOCK = 128

QUANTIZED_SUFFIXES = (
    *(f"{name}_proj.weight" for name in ("gate", "up", "down", "q_a", "q_b", "q", "kv_b", "o")),
    "kv_a_proj_with_mqa.weight",
)
"""What a release quantises: every linear of attention and FFN; not router, norms, vocabulary."""

SCALE_SUFFIX = "_scale_inv"

QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
"""``quantization_config`` of the released ``config.json``."""


def is_quantized(hf_name: str) -> bool:
    """Whether a release holds this Hugging Face tensor as FP8."""
    return hf_name.endswith(QUANTIZED_SUFFIXES)


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Blocks of a weight [m, n], ceil-divided: kv_a_proj_with_mqa's 576 rows have 5."""
    m, n = shape
    return -(-m // BLOCK), -(-n // BLOCK)


def block_rows(top: int, end: int) -> slice:
    """Rows of scales of a weight's rows [top, end); ``top`` begins a block."""
    return slice(top // BLOCK, -(-end // BLOCK))
