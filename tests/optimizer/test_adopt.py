"""A finished object turned into a subclass of its class, and what cannot be turned so."""

import pytest

from megatron_k2.optimizer.adopt import adopt
from megatron_k2.optimizer.offload.optimizer import OffloadedMuonClip
from megatron_k2.optimizer.plain_chain import PlainMuonClipChain
from megatron_k2.optimizer.sharded.chain import MuonClipChain


class _Built:
    def __init__(self, value):
        self.value = value

    def told(self):
        return self.value


class _Ours(_Built):
    extra: int

    def told(self):
        return super().told() + self.extra


class _WithInit(_Ours):
    def __init__(self):
        self.extra = 0


class _WithSlots(_Built):
    __slots__ = ("extra",)


class _BelowInit(_WithInit):
    pass


def test_the_object_stays_the_same_and_answers_as_ours():
    built = _Built(40)
    held = {"by its owner": built}
    ours = adopt(built, _Ours)
    ours.extra = 2
    assert ours is built
    assert held["by its owner"].told() == 42
    assert adopt(ours, _Ours) is ours


@pytest.mark.parametrize("cls", [int, _WithInit, _BelowInit, _WithSlots])
def test_what_would_be_half_an_object_is_refused(cls):
    built = _Built(40)
    with pytest.raises(TypeError):
        adopt(built, cls)
    assert type(built) is _Built


@pytest.mark.parametrize("cls", [OffloadedMuonClip, MuonClipChain, PlainMuonClipChain])
def test_all_of_ours_can_be_adopted(cls):
    built = object.__new__(next(c for c in cls.__mro__ if c.__module__.startswith("megatron.")))
    assert type(adopt(built, cls)) is cls
