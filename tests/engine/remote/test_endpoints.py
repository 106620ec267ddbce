"""Shares, rests and waits, by a clock of the test's own."""

import random
from collections import Counter

import pytest

from megatron_k2.engine.remote.client import retry_after_of
from megatron_k2.engine.remote.endpoints import Endpoint, Endpoints, Policy
from megatron_k2.errors import UserError

A, B = Endpoint("http://a:1"), Endpoint("http://b:1", weight=3)


def test_requests_are_shared_by_weight():
    endpoints = Endpoints([A, B], Policy())
    for _ in range(40):
        endpoints.choose(0.0).num_running += 1
    assert [state.num_running for state in endpoints.states] == [10, 30]


def test_idle_endpoints_take_turns():
    endpoints = Endpoints([A, Endpoint("http://c:1")], Policy())
    chosen = Counter()
    for _ in range(10):
        state = endpoints.choose(0.0)
        chosen[state.endpoint.url] += 1
        endpoints.succeeded(state)
    assert set(chosen.values()) == {5}


def test_what_failed_is_tried_elsewhere_and_rests_when_it_goes_on():
    policy = Policy(failures_to_rest=3, failing_seconds=1, rest_seconds=5)
    endpoints = Endpoints([A, B], policy)
    a, b = endpoints.states
    for now in (0.0, 0.1, 0.2, 0.3):
        endpoints.failed(b, "refused", now)  # a burst
    assert endpoints.choose(0.3) is b
    assert endpoints.choose(0.3, tried=b) is a
    endpoints.failed(b, "refused", 1.0)
    a.num_running = 100
    assert endpoints.choose(5.9) is a
    assert endpoints.choose(6.0) is b  # asked again
    endpoints.failed(b, "refused", 6.0)
    assert endpoints.choose(6.1) is a  # one failure is enough now
    endpoints.succeeded(b)
    endpoints.failed(b, "refused", 20.0)
    assert endpoints.choose(20.0) is b


def test_being_busy_is_no_fault():
    endpoints = Endpoints([A], Policy(failures_to_rest=1, failing_seconds=0.001))
    for now in range(9):
        endpoints.failed(endpoints.states[0], "429", now, is_busy=True)
    assert endpoints.is_awake(9)
    endpoints.failed(endpoints.states[0], "refused", 9)
    endpoints.failed(endpoints.states[0], "refused", 10)
    assert not endpoints.is_awake(10)
    assert endpoints.choose(10) is endpoints.states[0]  # the first back, for who waits


def test_waits_double_up_to_a_bound_and_keep_what_was_asked():
    policy, draws = Policy(backoff_seconds=1, most_backoff_seconds=4), random.Random(0)
    for attempt, middle in ((1, 1), (2, 2), (3, 4), (9, 4)):
        waits = [policy.wait(attempt, None, draws) for _ in range(200)]
        assert middle / 2 <= min(waits) < max(waits) <= middle * 1.5
        assert 7 <= policy.wait(attempt, 7.0, draws) < 8


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3),
        ("0.5", 0.5),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60),
        (None, None),
        ("soon", None),
        ("-1", None),
        ("1e9", None),
        ("nan", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, seconds):
    assert retry_after_of(value, now=40.0) == seconds


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Endpoint("ftp://a"), "expected http://host:port"),
        (lambda: Endpoint("http://me:sesame@a"), "keys belong into an environment variable"),
        (lambda: Endpoint("http://a?key=sesame"), "keys belong into an environment variable"),
        (lambda: Endpoint("http://a", weight=0), "weight 0, expected more than 0"),
        (lambda: Policy(attempts=0), "attempts 0: expected more than 0"),
        (lambda: Endpoints([], Policy()), "no endpoint"),
        (lambda: Endpoints([A, Endpoint("http://a:1/v1/")], Policy()), "named twice"),
    ],
)
def test_what_is_wrong_is_said_without_the_key(make, said):
    with pytest.raises(UserError, match=said) as refused:
        make()
    assert "sesame" not in str(refused.value)
