"""Megatron's static inference context over our attention: prefill and decode are the whole forward.

fp32, 1e-5 of the largest logit. Wrong variant: rows placed at the beginning of the keys, as they
would be without knowing of the cache.
"""

import pytest
import torch

from megatron_k2.model import attention
from megatron_k2.model.segments import Segment
from tests.support.devices import DEVICES, here
from tests.support.single_rank import SMALL, build, one_rank, randomise

BATCH, PROMPT, NEW = 3, 20, 12


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


@pytest.fixture(autouse=True)
def _as_before():
    """The context switches Megatron's inference mode on, for good."""
    from megatron.core.inference.utils import InferenceMode

    was = InferenceMode.is_active()
    yield
    if not was:
        InferenceMode.unset_active()


def decoded_and_whole():
    """Logits through the context, and of one forward pass; [b, PROMPT + NEW, V] each."""
    from megatron.core.inference.contexts import StaticInferenceContext

    model = build(SMALL).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, PROMPT + NEW)
    tokens = torch.randint(SMALL.vocab_size, shape, generator=generator).to(here())
    positions = torch.arange(PROMPT + NEW, device=here()).expand(BATCH, -1).contiguous()
    with torch.no_grad():
        whole = model(tokens, positions, None)
        context = StaticInferenceContext(BATCH, PROMPT + NEW)
        context.materialize_only_last_token_logits = False
        found, ends = [], [PROMPT, *range(PROMPT + 1, PROMPT + NEW + 1)]
        for begin, end in zip([0, *ends], ends, strict=False):
            rows = slice(begin, end)
            part = model(
                tokens[:, rows],
                positions[:, rows],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            found.append(part)
            context.sequence_len_offset += end - begin
            context.enable_decode_mode()
    return torch.cat(found, 1), whole


def difference():
    found, whole = decoded_and_whole()
    return ((found - whole).abs().max() / whole.abs().max()).item()


def test_decoding_is_the_whole_forward():
    assert difference() < 1e-5


def test_rows_at_the_beginning_of_the_keys_are_found(monkeypatch):
    monkeypatch.setattr(
        attention, "Segment", lambda first, count, _position: Segment(first, count, 0)
    )
    assert difference() > 1e-3
