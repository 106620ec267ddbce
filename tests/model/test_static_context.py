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


class Numbers:
    """A tokenizer whose text is the ids."""

    vocab_size, eod, bos = SMALL.vocab_size, -1, None

    def tokenize(self, text):
        return [int(word) for word in text.split()]

    def detokenize(self, ids, **_):
        return " ".join(map(str, ids))


def test_megatrons_static_engine_answers_greedily():
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines.static_engine import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.sampling_params import SamplingParams
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )

    model = build(SMALL).eval()
    randomise(model)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(SMALL.vocab_size, (BATCH, PROMPT), generator=generator).tolist()
    expected = []
    with torch.no_grad():
        for ids in map(list, prompts):
            for _ in range(NEW):
                positions = torch.arange(len(ids), device=here())[None]
                logits = model(torch.tensor([ids], device=here()), positions, None)
                ids.append(int(logits[0, -1].argmax()))
            expected.append(ids[PROMPT:])
    wrapped = GPTInferenceWrapper(model, StaticInferenceContext(BATCH, PROMPT + NEW))
    controller = TextGenerationController(wrapped, Numbers())
    engine = StaticInferenceEngine(controller, legacy=True)
    params = SamplingParams(top_k=1, num_tokens_to_generate=NEW, termination_id=-1)
    answers = engine.generate([" ".join(map(str, ids)) for ids in prompts], sampling_params=params)
    assert [answer.generated_tokens.tolist() for answer in answers] == expected
