"""Products, norms, softmax, padding and packs in plain torch, accumulating in fp32.

TE hands operands to cuBLAS, which is column-major: with row-major tensors a call computes
``op(B) @ op(A)``. Layout TN is ``x Wᵀ`` with A = W and B = x, NN the data gradient, NT the weight
gradient.
"""

import itertools
from typing import Any

import torch
from torch import Tensor

_TORCH_DTYPE = {
    0: torch.uint8,
    2: torch.int32,
    4: torch.float32,
    5: torch.float16,
    6: torch.bfloat16,
}


def high_precision(operand: Any) -> Tensor:
    """A plain tensor as it is; any quantised storage of TE's dequantised."""
    is_plain = isinstance(operand, torch.Tensor) and not hasattr(operand, "_quantizer")
    return operand if is_plain else operand.dequantize()


def _rows(operand: Any) -> Tensor:
    x = high_precision(operand)
    return x.reshape(-1, x.shape[-1])


def _product(A: Any, transa: bool, B: Any, transb: bool) -> Tensor:
    a, b = _rows(A).float(), high_precision(B).float()
    a = a.t() if transa else a
    if transb:
        return b.reshape(-1, b.shape[-1]).t() @ a
    return (b.reshape(-1, b.shape[-1]) @ a).reshape(*b.shape[:-1], a.shape[-1])


def _deliver(result: Tensor, out: Tensor, accumulate: bool) -> Tensor:
    result = result.reshape(out.shape).to(out.dtype)
    return out.add_(result) if accumulate else out.copy_(result)


def generic_gemm(
    A: Any,
    transa: bool,
    B: Any,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Any, Tensor | None, None, Any]:
    """``alpha op(B) op(A)`` with bias or its gradient; no GELU, no overlapped communication."""
    if comm_overlap is not None or gelu:
        raise NotImplementedError("GEMM with overlapped communication or GELU")
    result, bias_grad = _product(A, transa, B, transb) * alpha, None
    if bias is not None and grad:
        bias_grad = _rows(B).float().sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is not None:
        result = _deliver(result, out, accumulate)
    else:
        dtype = high_precision(A).dtype if out_dtype is None else _TORCH_DTYPE[int(out_dtype)]
        result = result.to(dtype)
    return (
        result if quantizer is None else quantizer(result),
        bias_grad,
        None,
        extra_output,
    )


def te_general_grouped_gemm(
    A: list[Any],
    transa: bool,
    B: list[Any],
    transb: bool,
    D: list[Tensor],
    D_type: Any,
    m_splits: list[int],
    bias: list[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Any,
    grad: bool,
    workspace: Any,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """One product an expert; an expert without tokens gets a zero weight gradient."""
    outputs = list(torch.split(D[0], list(m_splits))) if single_output else D
    for a, b, out, group_bias in zip(A, B, outputs, bias, strict=True):
        if out.numel() == 0:
            continue
        if high_precision(b).numel() == 0:
            if not accumulate:
                out.zero_()
            continue
        result = _product(a, transa, b, transb)
        if group_bias.numel() and grad:
            group_bias.copy_(_rows(b).float().sum(0))
        elif group_bias.numel():
            result = result + group_bias.float()
        _deliver(result, out, accumulate)
    return bias


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    """y = x / rms(x) * w, and 1 / rms(x) for the backward pass."""
    inverse_rms = torch.rsqrt(x.float().pow(2).mean(-1) + eps)
    gain = weight.float() + (1.0 if zero_centered_gamma else 0.0)
    y: Any = (x.float() * inverse_rms[..., None] * gain).to(_TORCH_DTYPE[int(otype)])
    if quantizer is not None:
        y = quantizer(y)
    elif ln_out is not None:
        y = ln_out.copy_(y)
    return y, None, inverse_rms


def rmsnorm_bwd(
    dz: Tensor,
    x: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Tensor]:
    """Gradients of x and of the gain."""
    gain = gamma.float() + (1.0 if zero_centered_gamma else 0.0)
    inverse_rms = rsigma[..., None]
    normalised, scaled = x.float() * inverse_rms, dz.float() * gain
    dx = (scaled - normalised * (scaled * normalised).mean(-1, keepdim=True)) * inverse_rms
    dgamma = (dz.float() * normalised).reshape(-1, x.shape[-1]).sum(0)
    return [dx.to(x.dtype), dgamma.to(gamma.dtype)]


def _causal_softmax(inputs: Tensor, scale: float) -> Tensor:
    """Softmax of the scaled scores [..., sq, sk] with the future masked; fp32 inside."""
    queries, keys = inputs.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool).triu_(1 + keys - queries)
    scores = (inputs.float() * scale).masked_fill(future, float("-inf"))
    return scores.softmax(-1).to(inputs.dtype)


def _masked_softmax(inputs: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax of the scaled scores where ``mask`` is False, 0 where it is True; fp32 inside."""
    scores = (inputs.float() * scale).masked_fill(mask, -10000.0)
    return scores.softmax(-1).to(inputs.dtype)


def _softmax_backward(output_grads: Tensor, probabilities: Tensor, scale: float) -> Tensor:
    grad, p = output_grads.float(), probabilities.float()
    return (scale * p * (grad - (grad * p).sum(-1, keepdim=True))).to(output_grads.dtype)


def convert_thd_to_bshd(
    packed: Tensor, cu_seqlens: Tensor, batch_size: int, max_seqlen: int
) -> Tensor:
    """Sequences laid end to end [t, h, d] -> [b, longest, h, d], zeros behind each."""
    bounds = cu_seqlens.tolist()
    found = packed.new_zeros(batch_size, max_seqlen, *packed.shape[1:])
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        found[row, : end - start] = packed[start:end]
    return found


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The way back: [b, longest, h, d] -> [t, h, d]."""
    bounds = cu_seqlens.tolist()
    found = padded.new_zeros(num_tokens, *padded.shape[2:])
    for row, (start, end) in enumerate(itertools.pairwise(bounds)):
        found[start:end] = padded[row, : end - start]
    return found


def fused_multi_row_padding(
    inp: Tensor, out: Tensor, rows: list[int], padded_rows: list[int]
) -> None:
    """Each expert's rows followed by zeros up to its padded number."""
    source = torch.split(inp, list(rows))
    for part, target in zip(source, torch.split(out, list(padded_rows)), strict=True):
        target.zero_()[: len(part)].copy_(part)


def fused_multi_row_unpadding(
    inp: Tensor, out: Tensor, padded_rows: list[int], rows: list[int]
) -> None:
    """The rows without the padding."""
    source = torch.split(inp, list(padded_rows))
    for part, target in zip(source, torch.split(out, list(rows)), strict=True):
        target.copy_(part[: len(target)])


KERNELS = {
    "generic_gemm": generic_gemm,
    "te_general_grouped_gemm": te_general_grouped_gemm,
    "rmsnorm_fwd": rmsnorm_fwd,
    "rmsnorm_bwd": rmsnorm_bwd,
    "scaled_masked_softmax_forward": _masked_softmax,
    "scaled_masked_softmax_backward": _softmax_backward,
    "scaled_upper_triang_masked_softmax_forward": _causal_softmax,
    "scaled_upper_triang_masked_softmax_backward": _softmax_backward,
    "scaled_aligned_causal_masked_softmax_forward": _causal_softmax,
    "scaled_aligned_causal_masked_softmax_backward": _softmax_backward,
    "convert_thd_to_bshd": convert_thd_to_bshd,
    "convert_bshd_to_thd": convert_bshd_to_thd,
    "fused_multi_row_padding": fused_multi_row_padding,
    "fused_multi_row_unpadding": fused_multi_row_unpadding,
}
