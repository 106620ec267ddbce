"""Episodes whose policy or environment raises, hangs, answers late or nonsense: a record each."""

import asyncio
import gc
import time

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.control import Control
from megatron_k2.gym.episode import Action, Again, Bounds, play
from megatron_k2.gym.protocol import SingleTurn, Step, Task, right, wrong
from megatron_k2.records.messages import Message
from megatron_k2.records.read import read_json_line
from megatron_k2.records.rollouts import End, Rollout, Sampled, rollout_from

TASK = Task("count", "Count to three.", {"to": 3})
QUICK = Bounds(call_seconds=0.15, seconds=2, wait_seconds=0.01)


class Counting:
    """Right where the policy has said 1, 2 and 3; every call may be replaced."""

    def __init__(self, **calls):
        self.said: list[str] = []
        self.counts = {"reset": 0, "step": 0, "verify": 0}
        self._calls = calls

    async def _maybe(self, name):
        self.counts[name] += 1
        if name in self._calls:
            return await self._calls[name](self)
        return None

    async def reset(self, task):
        self.said = []
        found = await self._maybe("reset")
        return found or Step((Message("user", task.prompt),))

    async def step(self, action):
        if found := await self._maybe("step"):
            return found
        self.said.append(action.content)
        return Step((Message("user", "go on"),), is_over=len(self.said) == 3)

    async def verify(self):
        found = await self._maybe("verify")
        return found or (right("all") if self.said == ["1", "2", "3"] else wrong(str(self.said)))


async def counts(view):
    number = sum(message.role == "assistant" for message in view.messages) + 1
    sampled = Sampled((number, 99), (7,), (-0.5, -0.25), ("v1", "v2"))
    return Action(Message("assistant", str(number)), sampled)


def played(environment=None, policy=counts, task=TASK, bounds=QUICK, **more) -> Rollout:
    found = asyncio.run(play(policy, environment or Counting(), task, bounds, **more))
    assert rollout_from(read_json_line(found.to_line())) == found
    return found


def test_an_episode_is_recorded_whole():
    found = played()
    assert (found.end, found.reward, found.outcome, found.reason) == (End.OVER, 1.0, "right", "")
    said = [(message.role, message.content) for message in found.messages]
    assert said[:3] == [("user", TASK.prompt), ("assistant", "1"), ("user", "go on")]
    assert [found.messages[place].content for place in found.actions] == ["1", "2", "3"]
    assert found.num_tokens == 6
    assert found.sampled[1] == Sampled((2, 99), (7,), (-0.5, -0.25), ("v1", "v2"))
    assert set(found.seconds) == {"policy", "environment", "verify", "total"}
    assert TASK.id == found.task_id


async def raises(_):
    raise KeyError("broken")


async def exits(_):
    raise SystemExit(3)


async def cancels(_):
    raise asyncio.CancelledError


async def hangs(_):
    await asyncio.sleep(60)


async def stubborn(_):
    """Answers late, and will not be told."""
    for _ in range(8):
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            continue
    return Step(is_over=True)


async def nonsense(_):
    return "right"


async def no_json(_):
    return right("", found={1, 2})


async def asks_again(environment):
    if environment.counts["step"] % 2:
        raise Again("the line was busy")


BROKEN = {
    "reset raises": ({"reset": raises}, "reset raised KeyError: 'broken', at try 3"),
    "reset hangs": ({"reset": hangs}, "reset took more than 0.15 seconds, at try 3"),
    "reset lies": ({"reset": nonsense}, "reset gave 'right', which is no Step"),
    "step raises": ({"step": raises}, "step raised KeyError: 'broken'"),
    "step exits": ({"step": exits}, "step raised RuntimeError: SystemExit: 3"),
    "step cancels": ({"step": cancels}, "step raised RuntimeError: environment cancelled itself"),
    "step hangs": ({"step": hangs}, "step took more than 0.15 seconds"),
    "step is late": ({"step": stubborn}, "step took more than 0.15 seconds"),
    "verify raises": ({"verify": raises}, "verify raised KeyError: 'broken', at try 3"),
    "verify lies": ({"verify": nonsense}, "verify gave 'right', which is no Verdict"),
    "verify has no JSON": ({"verify": no_json}, "verify gave Verdict("),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_an_environment_does_is_a_reason_and_masked(name):
    calls, why = BROKEN[name]
    environment = Counting(**calls)
    found = played(environment)
    assert found.end is End.ENVIRONMENT
    assert found.reason.startswith(why)
    assert (found.outcome, found.reward) == ("unknown", None)
    if "step" in calls:  # an action that may be half done is not done twice
        assert environment.counts["step"] == 1


def test_a_late_answer_reaches_no_other_call():
    """The stubborn call answers "over" after its deadline, beside an episode that goes on."""

    async def both():
        good = play(counts, Counting(), TASK, QUICK)
        bad = play(counts, Counting(step=stubborn), TASK, QUICK)
        found = await asyncio.gather(bad, good)
        await asyncio.sleep(0.5)
        return found

    bad, good = asyncio.run(both())
    assert (bad.end, len(bad.messages)) == (End.ENVIRONMENT, 2)
    assert good.reward == 1


def test_what_fails_once_is_tried_again():
    async def fails_once(environment):
        if environment.counts["reset"] == 1:
            raise OSError("no route")

    async def verify_once(environment):
        if environment.counts["verify"] == 1:
            await asyncio.sleep(60)

    found = played(Counting(reset=fails_once, step=asks_again, verify=verify_once))
    assert found.reward == 1
    assert len(found.retries) == 5
    assert found.retries[0] == "reset raised OSError: no route"


async def fails_to_act(view):
    raise ConnectionError("the engine is gone")


async def acts_as_user(view):
    return Action(Message("user", "1"))


def is_no_coroutine(view):
    return 3


@pytest.mark.parametrize(
    ("policy", "why"),
    [
        (fails_to_act, "the policy raised ConnectionError: the engine is gone"),
        (acts_as_user, "the policy gave Action("),
        (nonsense, "the policy gave 'right'; expected an Action"),
        (is_no_coroutine, "the policy raised TypeError"),
    ],
)
def test_what_a_policy_does_is_a_reason_and_masked(policy, why):
    found = played(policy=policy)
    assert (found.end, found.reward) == (End.POLICY, None)
    assert found.reason.startswith(why)


def test_turns_and_tokens_that_are_used_up_are_judged_and_time_is_not():
    turns = played(bounds=Bounds(num_turns=2))
    assert (turns.end, turns.reward) == (End.TURNS, 0.0)
    tokens = played(task=Task("count", "Count.", {}, budget_tokens=3))
    assert (tokens.end, tokens.reward, tokens.num_tokens) == (End.TOKENS, 0.0, 4)
    late = played(policy=hangs, bounds=Bounds(seconds=0.1))
    assert (late.end, late.reward) == (End.DEADLINE, None)
    late = played(Counting(step=hangs), bounds=Bounds(seconds=0.1))
    assert (late.end, late.reward) == (End.DEADLINE, None)
    assert "more than 0.1 seconds, at step" in late.reason


def test_a_pause_holds_calls_back_and_is_on_no_deadline():
    async def paused():
        control, began = Control(), time.monotonic()
        control.pause()
        bounds = Bounds(seconds=0.2)
        episode = asyncio.ensure_future(play(counts, Counting(), TASK, bounds, control))
        await asyncio.sleep(0.5)
        assert not episode.done()
        control.resume()
        return await episode, time.monotonic() - began

    found, seconds = asyncio.run(paused())
    assert found.reward == 1
    assert seconds > 0.5 > 0.2 > found.seconds["total"]


@pytest.mark.parametrize("where", ["policy", "step", "pause"])
def test_cancelled_episodes_leave_a_record_at_once(where):
    async def cancelled():
        control = Control()
        policy = hangs if where == "policy" else counts
        environment = Counting(**({"step": hangs} if where == "step" else {}))
        if where == "pause":
            control.pause()
        episode = asyncio.ensure_future(play(policy, environment, TASK, None, control))
        await asyncio.sleep(0.05)
        control.cancel("the run ends")
        return await asyncio.wait_for(episode, 1)

    found = asyncio.run(cancelled())
    assert (found.end, found.reason, found.reward) == (End.CANCELLED, "the run ends", None)


def test_cancellation_of_the_caller_goes_through_and_ends_the_call_in_flight():
    ended = []

    async def notes(_):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def cancelled():
        episode = asyncio.ensure_future(play(notes, Counting(), TASK))
        await asyncio.sleep(0.05)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode
        await asyncio.sleep(0)

    asyncio.run(cancelled())
    assert ended == [True]


def test_a_question_and_its_answer_are_an_episode():
    class Sums:
        name = "sums"

        async def judge(self, task, answer):
            return right("equal") if answer == "1" else wrong("other")

    assert played(SingleTurn(Sums())).reward == 1


def test_the_wrong_variant_a_deadline_that_waits_for_the_call_is_held_up():
    async def naive():
        began = time.monotonic()
        await asyncio.wait_for(stubborn(None), 0.05)
        return time.monotonic() - began

    async def ours():
        began = time.monotonic()
        await play(counts, Counting(step=stubborn), TASK, Bounds(call_seconds=0.05))
        return time.monotonic() - began

    assert asyncio.run(naive()) > 0.2 > asyncio.run(ours())


def test_a_record_that_is_not_one_is_refused():
    with pytest.raises(ValueError, match="1 logprobs for 2 tokens"):
        Sampled((1, 2), logprobs=(0.5,))
    with pytest.raises(ValueError, match="not finite"):
        Sampled((1,), logprobs=(float("nan"),))
    row = played().to_object()
    for changes, why in (
        ({"schema_version": 2}, "schema_version 2; expected 1"),
        ({"end": "whim"}, "'whim' is not a valid End"),
        ({"surprise": 1}, "not a rollout"),
        ({"sampled": []}, "0 entries of sampled, 3 actions"),
    ):
        with pytest.raises(ValueError, match=why):
            rollout_from({**row, **changes})
    with pytest.raises(ValueError, match="a rollout without 'end'"):
        rollout_from({name: value for name, value in row.items() if name != "end"})
    with pytest.raises(UserError, match="num_tries=0"):
        Bounds(num_tries=0)


@pytest.mark.parametrize("num_turns", [1, 2, 3])
def test_what_a_call_raised_is_not_left_over_where_its_caller_is_cancelled(num_turns):
    async def cancelled():
        said = []
        asyncio.get_running_loop().set_exception_handler(lambda _, found: said.append(found))
        call = Control().within(raises(None), float("inf"), what="a call")
        waiting = asyncio.ensure_future(call)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        del waiting
        gc.collect()
        await asyncio.sleep(0)
        return said

    assert asyncio.run(cancelled()) == []
