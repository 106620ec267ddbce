"""Answers of the embedded engine to plain code: no thread, no event loop."""

from collections.abc import Iterator, Sequence

from megatron_k2.engine.local.core import Core
from megatron_k2.engine.protocol import Request, SamplingParams, check_request


def continued(core: Core, prompt: Sequence[int], params: SamplingParams) -> Iterator[int]:
    """New tokens one by one; whoever stops early ends the request.

    Raises:
        UserError: the prompt and its answer do not fit.
    """
    _add(core, "only", prompt, params)
    try:
        while core.has_work:
            for _, output in core.step():
                yield from (token.id for token in output.tokens)
    finally:
        core.abort(["only"])


def answers(
    core: Core, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[list[int]]:
    """New tokens of each prompt, as many at once as there are slots.

    Raises:
        UserError: a prompt and its answer do not fit.
    """
    found: list[list[int]] = [[] for _ in prompts]
    for number, prompt in enumerate(prompts):
        _add(core, str(number), prompt, params)
    while core.has_work:
        for name, output in core.step():
            found[int(name)] += [token.id for token in output.tokens]
    return found


def _add(core: Core, name: str, prompt: Sequence[int], params: SamplingParams) -> None:
    request = Request(name, tuple(prompt), params)
    check_request(request, core.limits)
    core.add(request)
