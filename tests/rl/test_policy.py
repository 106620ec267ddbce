"""Token ids over turns and cuts: kept as they were drawn, and what an environment reads of them.

Wrong variants: the dialogue rendered anew from its messages, routes that a later one overwrites.
"""

import asyncio
import itertools
from dataclasses import replace

import pytest

from megatron_k2.chat.call_ids import call_id
from megatron_k2.engine.protocol import EngineError, Output, Token
from megatron_k2.errors import UserError
from megatron_k2.gym.episode import View, play
from megatron_k2.records.messages import Message, ToolCall
from megatron_k2.records.rollouts import End
from megatron_k2.records.routes import Routes
from megatron_k2.rl.policy import EnginePolicy, Speaker
from megatron_k2.rl.record import Segment
from megatron_k2.rl.transcript import Transcript, cut_to
from tests.rl.collecting import END, QUICK, RENDERER, DrawingEngine, Letters, Talk, tasks

SPECIAL = Letters.special_ids


class Metered:
    def __init__(self, left):
        self.left = left

    def num_left(self):
        return self.left

    def draw(self, number):
        self.left -= number


class Saying(DrawingEngine):
    """Says rows of ids, a row a turn, whatever it is asked; remembers what it was asked."""

    def __init__(self, *rows, **more):
        super().__init__(**more)
        self.rows, self.num_said = list(rows), 0

    def _answer(self, request):
        self.requests.append(request)
        found = self.rows[0][self.num_said :][: request.params.max_tokens]
        self.num_said += len(found)
        if self.num_said == len(self.rows[0]):
            self.rows, self.num_said = self.rows[1:] or self.rows, 0
        return [Token(number, -0.5, (), self._version) for number in found]


def played(engine, task, transcript=None, meter=None, temperature=1.0, environment=None):
    policy = EnginePolicy(Speaker(engine, RENDERER, 3), "0/0", temperature, transcript, meter)
    rollout = asyncio.run(play(policy, environment or Talk(), task, QUICK))
    return rollout, policy


def three_turns():
    """Drawn as ``a`` and ``b``, which the tokenizer would write as one token."""
    row = [*map(ord, "1ab2"), END]
    return Saying(row), replace(tasks(1, 3)[0], budget_tokens=60)


def test_trl_5224_verl_6719_every_later_prompt_strictly_extends_earlier_ids():
    engine, task = three_turns()
    rollout, policy = played(engine, task)
    prompts = [request.prompt for request in engine.requests]
    assert len(prompts) == 3
    said = (*map(ord, "1ab2"), END)
    for shorter, longer in itertools.pairwise(prompts):
        assert longer[: len(shorter) + len(said)] == shorter + said
        assert len(longer) > len(shorter) + len(said)
    assert rollout.messages[1].content == "1ab2"
    ids = [token for each in policy.transcript.segments() for token in each.token_ids]
    assert ids == policy.transcript.ids == [*prompts[-1], *said]
    again = RENDERER.render(rollout.messages[:-1], add_generation_prompt=True).ids
    assert tuple(again[: len(prompts[1])]) != prompts[1]  # rendered anew: other ids


def test_what_the_policy_wrote_and_what_it_read_are_told_apart():
    engine, task = three_turns()
    policy = played(engine, task)[1]
    segments = policy.transcript.segments()
    assert [each.is_sampled for each in segments] == [False, True] * 3
    assert all(each.token_ids == (*map(ord, "1ab2"), END) for each in segments[1::2])
    assert Transcript.of(segments) == policy.transcript


@pytest.mark.parametrize("first", [1, 3, 5, 6, 9, 10, 11, 14, 15])
def test_an_answer_that_is_cut_off_anywhere_goes_on_as_if_it_had_not_been(first):
    engine, task = three_turns()
    expected = played(engine, task)[1].transcript.segments()
    engine, _ = three_turns()
    _, policy = played(engine, task, meter=Metered(first))
    assert policy.is_cut_off == (first < 15)
    kept = cut_to(policy.transcript.segments(), first)
    assert sum(len(each.token_ids) for each in kept if each.is_sampled) == first
    rollout, again = played(engine, task, Transcript.of(kept))
    assert (rollout.end, rollout.reward) == (End.OVER, 1.0)
    assert again.transcript.segments() == expected


def test_a_cut_hangs_on_its_place_alone_and_not_on_how_far_the_answer_had_gone():
    engine, task = three_turns()
    whole = played(engine, task)[1].transcript.segments()
    for first in range(16):
        engine, _ = three_turns()
        cut = played(engine, task, meter=Metered(first))[1].transcript.segments()
        assert cut_to(whole, first) == cut_to(cut, first)


def turn_ids(*calls):
    """A turn as K2 writes it: calls, or words."""
    if not calls:
        return [*map(ord, "done"), END]
    message = Message("assistant", tool_calls=calls)
    ids = RENDERER.render([Message("user", ""), message]).ids
    return ids[ids.index(SPECIAL["<|tool_calls_section_begin|>"]) :]


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.62, 0.9, 0.99])
def test_calls_that_were_made_before_a_cut_are_made_again_and_lead_to_the_same_state(share):
    from megatron_k2.gym.tool_use.env import ToolUse
    from megatron_k2.gym.tool_use.generators import ToolUseGenerator, as_calls

    task = ToolUseGenerator("book").sample(1, 3)[0]
    calls = as_calls([(name, arguments) for name, arguments in task.reference["solution"]])
    rows = [*(turn_ids(call) for call in calls), turn_ids()]
    domain, number = ToolUse(), sum(map(len, rows))
    engine = Saying(*rows)
    _, policy = played(
        engine, task, meter=Metered(int(share * number)), environment=domain.environment()
    )
    assert policy.is_cut_off
    kept = Transcript.of(cut_to(policy.transcript.segments(), int(share * number)))
    rollout, again = played(engine, task, kept, environment=domain.environment())
    assert (rollout.end, rollout.reward) == (End.OVER, 1.0)
    expected = played(Saying(*rows), task, environment=domain.environment())[1]
    assert again.transcript.segments() == expected.transcript.segments()


def test_an_environment_that_says_something_else_fails_by_name():
    engine, task = three_turns()
    kept = cut_to(played(engine, task)[1].transcript.segments(), 7)

    class Other(Talk):
        async def step(self, action):
            found = await super().step(action)
            return replace(found, messages=(Message("user", "something else"),))

    rollout, _ = played(engine, task, Transcript.of(kept), environment=Other())
    assert (rollout.end, rollout.reward) == (End.POLICY, None)
    assert "Replayed: turn 2 of 2 is another" in rollout.reason


def test_an_answer_out_of_tokens_is_text_and_calls_nothing():
    call = [SPECIAL["<|tool_calls_section_begin|>"], SPECIAL["<|tool_call_begin|>"]]
    engine, task = Saying([ord("7"), *call, ord("x")] * 9), tasks(1, 3)[0]
    rollout, policy = played(engine, replace(task, budget_tokens=6))
    assert policy.is_out_of_tokens
    assert rollout.num_tokens == 6
    assert not rollout.messages[1].tool_calls
    assert policy.num_format_errors == 0


CALLS = {
    "K2's": (call_id("now", 0), "{}", True),
    "a counter": ("call00003", "{}", False),
    "underscores": ("functions_now_0", "{}", False),
    "no JSON": (call_id("now", 0), "{", False),
}


@pytest.mark.parametrize("name", CALLS)
def test_sglang_25358_a_call_counts_as_k2_writes_it_or_not_and_its_id_stays_verbatim(name):
    identity, arguments, is_fine = CALLS[name]
    names = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    row = [
        *(SPECIAL[each] for each in names),
        *map(ord, identity), SPECIAL["<|tool_call_argument_begin|>"], *map(ord, arguments),
        SPECIAL["<|tool_call_end|>"], SPECIAL["<|tool_calls_section_end|>"], END,
    ]  # fmt: skip
    engine = Saying(row)
    rollout, policy = played(engine, tasks(1, 2)[0])
    calls = (ToolCall(identity, "now", arguments),) if is_fine else ()
    assert rollout.messages[1].tool_calls == calls
    assert policy.num_format_errors == (0 if is_fine else 2)
    prompt = Letters().decode(list(engine.requests[1].prompt))
    assert f"<|tool_call_begin|>{identity}<|tool_call_argument_begin|>{arguments}" in prompt


class Routing(Saying):
    """Gives each input's route: (its place, how often it was asked before)."""

    async def generate(self, request):
        number = len(self.requests)
        async for output in super().generate(request):
            given = ()
            if number + 1 == len(self.requests) and output.tokens:
                given = tuple(
                    Token(i, None, routed_experts=Routes.of([[[place, number]]]))
                    for place, i in enumerate(request.prompt)
                )
                number = -1
            yield Output(output.tokens, given, output.finish_reason, output.stop_id)


def test_every_token_but_the_last_has_the_route_of_its_last_reading():
    row = [*map(ord, "12"), END]
    engine, task = Routing(row), tasks(1, 2)[0]
    policy = EnginePolicy(Speaker(engine, RENDERER, 3, returns_routed_experts=True), "0/0", 1.0)
    asyncio.run(play(policy, Talk(), task, QUICK))
    routes = policy.transcript.routes
    found = Routes.joined(routes[:-3]).array[:, 0]
    assert found[:, 0].tolist() == list(range(len(routes) - 3))
    first = len(engine.requests[0].prompt)
    assert set(found[:first, 1].tolist()) == {1}  # 0: the weights before, which are gone
    segments = policy.transcript.segments()
    assert [len(each.token_ids) - len(each.routes) for each in segments[:-1]] == [0, 0, 0]


def test_seeds_hang_on_run_answer_and_place():
    speaker = Speaker(DrawingEngine(), RENDERER, 3)
    other = replace(speaker, seed=4)
    seeds = {
        other.request_seed("0/0", 5),
        *(speaker.request_seed(f"{n}/{k}", 5) for n, k in ((0, 0), (0, 1), (1, 0))),
        speaker.request_seed("0/0", 6),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_greedy_asks_for_temperature_0():
    engine, task = three_turns()
    played(engine, task, temperature=0.0)
    assert {request.params.temperature for request in engine.requests} == {0.0}


def said(engine, task=None):
    async def ask():
        policy = EnginePolicy(Speaker(engine, RENDERER, 3), "0/0", 1.0)
        return await policy(View((Message("user", "?"),), (), None))

    return asyncio.run(ask())


def test_what_rl_cannot_use_is_refused():
    with pytest.raises(UserError, match=r"'x'; expected the number of optimizer steps"):
        said(DrawingEngine(version="x"))
    with pytest.raises(UserError, match=r"prompt of \d+ tokens leaves none.*slots hold 20"):
        said(DrawingEngine(max_length=20))


def test_a_request_that_the_engine_ends_is_its_failure():
    class Aborting(DrawingEngine):
        async def generate(self, request):
            yield Output(finish_reason="abort")

    with pytest.raises(EngineError, match="ended the request 0/0"):
        said(Aborting())


def test_a_segment_is_of_one_version_and_temperature():
    read = Segment((1, 2))
    old, new = Segment((3,), (-1.0,), 4, 0.9), Segment((5, 6), (-1.0, -2.0), 5, 0.8)
    assert Transcript.of((read, old, new)).segments() == (read, old, new)
    assert cut_to((read, old, new), 2) == (read, old, Segment((5,), (-1.0,), 5, 0.8))
    assert cut_to((read, old, new), 0) == ()


def test_an_answer_without_a_prompt_is_a_prompt_of_nothing():
    assert Transcript().segments() == (Segment(()),)
    assert Transcript.of((Segment(()),)).segments() == (Segment(()),)
