"""Turning a finished object of Megatron's into our subclass of its class.

Megatron's optimizer factory takes no argument for the class of what it builds, and what it builds
cannot be made again: a ``DistributedOptimizer`` has cut the gradient buffers, replaced parameters
by fp32 shards and filled tables that refer to one another, and a ``ChainedOptimizer`` is already
held by whoever asked for it. So the object stays, with its identity, and is given our class.
"""

from typing import Any


def adopt[T](instance: Any, cls: type[T]) -> T:
    """Make ``instance`` an object of ``cls``, in place.

    Three things must hold, and are checked. ``cls`` is a subclass, so that what Megatron built is a
    valid part of it. It adds no ``__slots__``, so that both have one memory layout. It has no
    ``__init__`` of its own, which would never run; attributes that it adds are set by the caller,
    right after.

    Args:
        instance: as Megatron's factory built it.
        cls: our subclass of its class.

    Returns:
        The same object.

    Raises:
        TypeError: where one of the three does not hold.
    """
    original = type(instance)
    if not issubclass(cls, original):
        raise TypeError(f"{cls.__name__} is no subclass of {original.__name__}, which was built")
    for base in cls.__mro__[: cls.__mro__.index(original)]:
        for name in ("__slots__", "__init__"):
            if name in vars(base):
                raise TypeError(f"{base.__name__} defines {name}, so no object can be turned to it")
    instance.__class__ = cls
    adopted: T = instance
    return adopted
