"""What requests took and cost, from the stores themselves: exact whatever was killed when."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_k2.errors import UserError
from megatron_k2.synthesis.store import Used

MILLION = 1_000_000


@dataclass(frozen=True)
class Prices:
    """Of a model's tokens, in any currency, for a million.

    Raises:
        UserError: a price is negative.
    """

    prompt: float = 0.0
    completion: float = 0.0

    def __post_init__(self) -> None:
        if min(self.prompt, self.completion) < 0:
            raise UserError(f"prices {self.prompt:g}, {self.completion:g}: expected 0 or more")

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Of so many tokens."""
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / MILLION


def summed(shards: Iterable[Mapping[str, Used]]) -> dict[str, Used]:
    """Tokens by model over all shards.

    A request that was answered and killed before it was committed was paid for and is not here; nor
    is an attempt that failed.
    """
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for shard in shards:
        for model, used in shard.items():
            found[model] = [a + b for a, b in zip(found[model], used, strict=True)]
    return {model: Used(*numbers) for model, numbers in sorted(found.items())}
