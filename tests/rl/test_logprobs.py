"""Token log-probabilities against ``log_softmax`` in fp64, on one rank and on two.

The wrong variant scales by no temperature.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_k2.errors import UserError
from megatron_k2.rl.logprobs import token_logprobs
from tests.rl.worker import TOKENS, answers, drawn
from tests.support.devices import DEVICES, require
from tests.support.distributed import BACKENDS, run_ranks


def _by_definition():
    logits, targets, temperature, weights = (each.double() for each in drawn())
    logits.requires_grad_()
    everything = (logits / temperature[:, None]).log_softmax(-1)
    logprobs = everything.gather(1, targets.long()[:, None])[:, 0]
    kept = everything.detach()
    entropy = -torch.where(kept > -torch.inf, kept.exp() * kept, 0.0).sum(-1)
    (slope,) = torch.autograd.grad((weights * logprobs).sum(), logits)
    return {"logprobs": logprobs.detach(), "entropy": entropy, "slope": slope}


def _close(found, expected):
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_one_rank_is_log_softmax_at_the_temperature(device):
    require(device)
    found, expected = answers(device, None), _by_definition()
    for name in expected:
        _close(found[name], expected[name])
    logits, targets, _, _ = drawn()
    unscaled, _ = token_logprobs(logits, targets)
    assert (unscaled - expected["logprobs"]).abs().max() > 0.1


@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_are_one(backend, tmp_path):
    run_ranks("tests.rl.worker", 2, {"out": str(tmp_path)}, tmp_path / "logs", backend)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    expected = _by_definition()
    for found in ranks:
        _close(found["logprobs"], expected["logprobs"])
        _close(found["entropy"], expected["entropy"])
    _close(torch.cat([found["slope"] for found in ranks], 1), expected["slope"])


class _Largest(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.elements = max(self.elements, each.numel())
        return found


def test_fp32_of_all_tokens_and_ids_never_exists():
    """Of bf16 logits; a chunk of as many tokens as there are is seen, so the count can."""
    logits, targets, temperature, _ = drawn(torch.bfloat16)
    logits.requires_grad_()
    largest = {}
    for chunk in (8, TOKENS):
        with _Largest() as seen:
            token_logprobs(logits, targets, temperature, None, chunk)[0].sum().backward()
        largest[chunk] = seen.elements
    assert largest == {8: 8 * 24, TOKENS: TOKENS * 24}
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_a_target_has_the_same_bits_whatever_the_chunk():
    logits, targets, temperature, _ = drawn()
    found = [token_logprobs(logits, targets, temperature, None, n)[0] for n in (1, 8, 64)]
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_wrong_input_is_named():
    logits, targets, _, _ = drawn()
    with pytest.raises(UserError, match="temperature 0"):
        token_logprobs(logits, targets, 0.0)
    with pytest.raises(UserError, match=r"\[tokens, vocabulary\]"):
        token_logprobs(logits, targets[1:])
