"""Whole answers against transformers: ragged admission, shared prefixes, routes, new weights.

The oracle computes the whole sequence anew for each token. Random weights make near-ties rare;
where the two differ, the margin of the two best logits must be below 1e-4.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.local.scheduler import num_common
from megatron_k2.engine.protocol import Limits, Request, SamplingParams, check_request
from megatron_k2.errors import UserError
from tests.engine.local.models import TINY, reference, tokens, weights_of
from tests.support.devices import DEVICES, on_device

GREEDY = SamplingParams(temperature=0, max_tokens=12)
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


def core_of(model, num_slots=4, **options):
    return Core(weights_of(model, TINY), num_slots=num_slots, max_length=96, **options)


def run(core, requests):
    """Answers by id, every request added before the first step."""
    for request in requests:
        core.add(request)
    return drain(core)


def drain(core):
    found, ends, prompts = {}, {}, {}
    while core.has_work:
        for name, output in core.step():
            found.setdefault(name, []).extend(output.tokens)
            prompts.setdefault(name, []).extend(output.prompt_tokens)
            if output.finish_reason:
                ends[name] = output.finish_reason
    return found, ends, prompts


def same_or_near_tie(model, prompt, answer):
    """The answer is greedy: each token is the best after those before it, but for near-ties."""
    ids = torch.tensor([[*prompt, *(t.id for t in answer)]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    for line, token in zip(logits, answer, strict=True):
        assert line.max() - line[token.id] < NEAR_TIE
        assert line.log_softmax(-1)[token.id].item() == pytest.approx(token.logprob, abs=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_200_greedy_answers_are_transformers(model, device):
    prompts = {str(i): tokens(1 + 7 * i % 50, i) for i in range(200)}
    requests = [Request(name, tuple(prompt), GREEDY) for name, prompt in prompts.items()]
    with on_device(device):
        weights = weights_of(model, TINY, device=device)
        core = Core(weights, num_slots=16, max_length=96, step_tokens=64)
        found, ends, _ = run(core, requests)
    assert set(ends) == set(prompts)
    for name, prompt in prompts.items():
        same_or_near_tie(model, prompt, found[name])


class GivenUp:
    """Grammars of which each constraint is given up at its third token."""

    def compiled(self, grammar):
        constraint = GivenUp()
        constraint.fault, constraint.left = "", 2
        return constraint

    def allowed(self):
        self.fault = "" if self.left else "too complex"
        return torch.arange(96) == (5 if self.left else 1)

    def accept(self, token):
        self.left -= 1


def test_a_grammar_given_up_is_said_with_the_token_that_ends_the_answer(model):
    core = core_of(model, grammars=GivenUp())
    core.add(Request("a", (3, 4), replace(GREEDY, stop_token_ids=(1,)), "start: /x/"))
    outputs = [output for _ in range(3) for _, output in core.step()]
    assert [[t.id for t in output.tokens] for output in outputs] == [[5], [5], [1]]
    assert [output.fault for output in outputs] == ["", "", "too complex"]
    assert outputs[-1].finish_reason == "stop"
    with pytest.raises(UserError, match="without a tokenizer"):
        core_of(model).add(Request("a", (3,), GREEDY, "start: /x/"))


def test_an_answer_ends_at_a_stop_token_which_is_its_last(model):
    prompt = tuple(tokens(9))
    free, _, _ = run(core_of(model), [Request("a", prompt, GREEDY)])
    stop = free["a"][4].id
    first = [t.id for t in free["a"]].index(stop)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,))
    found, ends, _ = run(core_of(model), [Request("a", prompt, params)])
    assert [t.id for t in found["a"]] == [t.id for t in free["a"][: first + 1]]
    assert ends == {"a": "stop"}


def counting(core):
    """Rows of each forward pass from here on."""
    computed, forward = [], core._model.forward
    core._model.forward = lambda ids, *a, **k: computed.append(len(ids)) or forward(ids, *a, **k)
    return computed


def routed(found, given, name):
    """Ids and routes of a prompt and its answer."""
    return [(t.id, t.routed_experts) for t in (*given[name], *found[name])]


@pytest.mark.parametrize("is_routed", [False, True])
def test_samples_of_one_prompt_share_its_rows(model, is_routed):
    prompt = tuple(tokens(60))
    params = SamplingParams(max_tokens=6, temperature=1.5, returns_routed_experts=is_routed)
    requests = [Request(str(i), prompt, replace(params, seed=i)) for i in range(4)]
    core = core_of(model)
    computed = counting(core)
    together, _, given = run(core, requests)
    assert sum(computed) == 60 + 3 + 4 * 5  # the prompt once, its last token for the other three
    for request in requests:
        alone, _, read = run(core_of(model, shares_prefixes=False), [request])
        assert routed(alone, read, request.id) == routed(together, given, request.id)


def test_rows_without_routes_are_no_use_to_who_asks_for_them(model):
    """A prompt that b has read, c reads again, and d takes from c."""
    prompt = tuple(tokens(60))
    asked = SamplingParams(temperature=0, max_tokens=6, returns_routed_experts=True)
    core = core_of(model, step_tokens=16)
    run(core, [Request("a", prompt, GREEDY)])
    computed = counting(core)
    found, _, given = run(
        core, [Request("b", prompt, replace(asked, returns_routed_experts=False)),
               Request("c", prompt, asked), Request("d", prompt, asked)]
    )  # fmt: skip
    assert sum(computed) == 1 + 60 + 1 + 3 * 5  # a's rows serve b, and c's serve d
    alone, _, read = run(core_of(model), [Request("c", prompt, asked)])
    assert routed(found, given, "c") == routed(found, given, "d") == routed(alone, read, "c")


def test_routes_of_old_weights_are_forgotten_with_their_rows(model):
    prompt = tuple(tokens(40))
    asked = SamplingParams(temperature=0, max_tokens=6, returns_routed_experts=True)
    core = core_of(model)
    run(core, [Request("a", prompt, asked)])
    core.add(Request("b", prompt, asked))
    core.step()
    from megatron_k2.checkpoint.names.mapping import classic_from_transformers

    moved = reference(TINY, seed=1)
    core.update(classic_from_transformers(moved.state_dict()).items(), "2")
    drain(core)
    found, _, given = run(core, [Request("c", prompt, asked)])
    alone, _, read = run(core_of(moved), [Request("c", prompt, asked)])
    assert routed(found, given, "c") == routed(alone, read, "c")


def test_drawn_answers_are_the_same_alone_and_in_a_crowd(model):
    """In the default mode: equal tokens, log-probabilities to 1e-5, but after a near-tie."""
    requests = [
        Request(
            str(i), tuple(tokens(3 + 5 * i, i)), SamplingParams(max_tokens=20, seed=i, top_p=0.9)
        )
        for i in range(12)
    ]
    crowd, _, _ = run(core_of(model, step_tokens=16), requests)
    parted = 0
    for request in requests:
        alone = run(core_of(model), [request])[0][request.id]
        for ours, theirs in zip(crowd[request.id], alone, strict=True):
            if ours.id != theirs.id:
                parted += 1
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    assert parted <= 1, "a draw between two tokens, nearer than rounding, is rare"
    swapped = replace(requests[0], params=replace(requests[0].params, seed=99))
    other = run(core_of(model), [swapped])[0]["0"]
    assert [t.id for t in other] != [t.id for t in crowd["0"]]


def test_a_dialogues_next_turn_computes_only_what_is_new(model):
    core, prompt = core_of(model), tokens(40)
    first, _, _ = run(core, [Request("a", tuple(prompt), GREEDY)])
    longer = [*prompt, *(t.id for t in first["a"]), *tokens(5, 3)]
    computed = counting(core)
    second, _, _ = run(core, [Request("b", tuple(longer), GREEDY)])
    assert computed[0] == 6  # the answer's last token was never an input
    same_or_near_tie(model, longer, second["b"])


def test_a_prompts_logprobs_and_candidates(model):
    prompt = tokens(30)
    params = SamplingParams(max_tokens=0, prompt_logprobs=2)
    core = core_of(model, step_tokens=8)
    _, ends, given = run(core, [Request("a", tuple(prompt), params)])
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert ends == {"a": "length"}
    assert [t.id for t in given["a"]] == prompt
    assert given["a"][0].logprob is None
    for place, token in enumerate(given["a"][1:]):
        assert token.logprob == pytest.approx(expected[place, token.id].item(), abs=1e-5)
        assert token.top[0].logprob == pytest.approx(expected[place].max().item(), abs=1e-5)


def test_routes_are_the_routers_own(model):
    prompt = tokens(20)
    params = SamplingParams(temperature=0, max_tokens=5, returns_routed_experts=True)
    core = core_of(model, step_tokens=8)
    found, _, given = run(core, [Request("a", tuple(prompt), params)])
    whole = [*given["a"], *found["a"]]
    assert [t.id for t in given["a"]] == prompt
    assert len(found["a"]) == 5
    assert found["a"][-1].routed_experts is None
    seen = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out: seen.append(out))
        for layer in model.model.layers[1:]
    ]
    chosen = []
    experts = [layer.mlp for layer in model.model.layers[1:]]
    with torch.inference_mode():
        model(torch.tensor([[t.id for t in whole[:-1]]]))
    for hook in hooks:
        hook.remove()
    for block, logits in zip(experts, seen, strict=True):
        logits = logits[0] if isinstance(logits, tuple) else logits
        scores = (
            logits.view(-1, TINY.num_moe_experts).sigmoid() + block.gate.e_score_correction_bias
        )
        chosen.append(scores.topk(TINY.moe_router_topk, -1).indices)
    for place, token in enumerate(whole[:-1]):
        for layer, ids in enumerate(chosen):
            assert sorted(token.routed_experts.array[0, layer]) == sorted(ids[place].tolist())


def test_new_weights_are_used_from_the_next_token_on(model):
    from megatron_k2.checkpoint.names.mapping import classic_from_transformers

    other = reference(TINY, seed=1)
    core, prompt = core_of(model), tokens(40)
    core.add(Request("a", tuple(prompt), GREEDY))
    before = [t for _ in range(5) for _, out in core.step() for t in out.tokens]
    core.update(classic_from_transformers(other.state_dict()).items(), "1")
    after = drain(core)[0]["a"]
    assert {t.weight_version for t in before} == {"0"}
    assert {t.weight_version for t in after} == {"1"}
    same_or_near_tie(other, [*prompt, *(t.id for t in before)], after)
    again, _, _ = run(core, [Request("b", tuple(prompt), GREEDY)])
    same_or_near_tie(other, prompt, again["b"])  # no row of the old weights is left


def test_what_cannot_fit_is_refused_with_its_numbers(model):
    limits = Limits(TINY.vocab_size, 96, 4)
    for request, said in [
        (Request("a", ()), "an empty prompt"),
        (Request("a", (3, 96)), "token 96: this model has 0 to 95"),
        (Request("a", (3,) * 90), "90 tokens of prompt and up to 16 new ones are more than the 96"),
        (Request("a", (3,), SamplingParams(stop_token_ids=(-1,))), "token -1"),
        (Request("a", (3,), SamplingParams(logprobs=97)), "logprobs 97"),
    ]:
        with pytest.raises(UserError, match=said):
            check_request(request, limits)
    with pytest.raises(UserError, match=r"4 slots x 96 tokens x 384 bytes"):
        core_of(model, memory_bytes=1000)


def test_beginnings_are_counted():
    assert num_common([1, 2, 3], [1, 2, 4, 5]) == 2
    assert num_common([1, 2], [1, 2, 4]) == 2
    assert num_common([], [1]) == 0
    assert num_common([2], [1]) == 0
