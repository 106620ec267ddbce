"""What the tests of FP8 storage share: inputs, what was saved, and the gradients it must give."""

import torch

from megatron_k2.fp8.tiles import dequantize_tiles, quantize_tiles

SIZES = [5, 0, 3, 1, 0, 7, 2, 6]
"""Tokens of each expert; two have none."""


def inputs(hidden_size, dtype=torch.float32, seed=3):
    """hidden [tokens, h], probs [tokens], direction of the output's gradient [tokens, h]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(SIZES)
    hidden, direction = torch.randn(2, tokens, hidden_size, generator=generator).to(dtype)
    return hidden, torch.rand(tokens, generator=generator), direction


def run(experts, hidden, probs, direction):
    """Output, gradient of the input and of the probabilities, of one forward and backward pass."""
    hidden, probs = hidden.clone().requires_grad_(), probs.clone().requires_grad_()
    for param in experts.parameters():
        param.grad = None
    out, _ = experts(hidden * 1, torch.tensor(SIZES), probs)
    out.backward(direction)
    return out.detach(), hidden.grad, probs.grad


def through_fp8(x):
    return dequantize_tiles(*quantize_tiles(x.contiguous()), x.dtype)


def expected(weights, hidden, probs, direction, is_stored=True):
    """The same by the chain rule written out, expert by expert, in fp64.

    Args:
        weights: (fc1 [2f, h], fc2 [h, f]) of each expert.
        hidden: [tokens, h].
        probs: [tokens].
        direction: [tokens, h].
        is_stored: whether backward sees the two activations through FP8.

    Returns:
        Output, gradients of hidden and probs, and [(dfc1, dfc2)] of each expert.
    """
    stored = through_fp8 if is_stored else lambda x: x
    outputs, of_hidden, of_probs, of_weights, start = [], [], [], [], 0
    for (fc1, fc2), size in zip(weights, SIZES, strict=True):
        rows = slice(start, start + size)
        start += size
        x, p, g = hidden[rows], probs[rows, None].double(), direction[rows].double()
        w1, w2 = fc1.double(), fc2.double()
        gate_up = x.double() @ w1.T
        gate, up = gate_up.chunk(2, -1)
        activated = torch.nn.functional.silu(gate) * up * p
        outputs.append(activated @ w2.T)
        kept = stored(gate_up.to(hidden.dtype)) if size else gate_up
        gate, up = kept.double().chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        of_activated = g @ w2
        of_probs.append((of_activated * gate * sigmoid * up).sum(-1))
        of_up = of_activated * p * gate * sigmoid
        of_gate = of_activated * p * up * sigmoid * (1 + gate * (1 - sigmoid))
        of_gate_up = torch.cat((of_gate, of_up), -1)
        of_hidden.append(of_gate_up @ w1)
        seen = (stored(x) if size else x).double()
        of_weights.append((of_gate_up.T @ seen, g.T @ activated))
    return torch.cat(outputs), torch.cat(of_hidden), torch.cat(of_probs), of_weights


def relative(found, wanted):
    return ((found.double() - wanted).abs().max() / wanted.abs().max()).item()


def worst(found, grads, wanted):
    """Largest relative difference of (output, dhidden, dprobs), and of the weights' gradients."""
    *of_tensors, of_weights = wanted
    of_all = [relative(a, b) for a, b in zip(found, of_tensors, strict=True)]
    for pair, wanted_pair in zip(grads, of_weights, strict=True):
        for grad, gradient in zip(pair, wanted_pair, strict=True):
            if not gradient.any():
                assert not grad.any(), "an expert without tokens has no gradient"
                continue
            of_all.append(relative(grad, gradient))
    return max(of_all)
