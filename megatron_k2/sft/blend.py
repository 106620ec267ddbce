"""Several sets as one: which sequence of which set comes when.

Sequences are drawn by weight, evenly: after any number of them each set has had its share to within
one. A set that is used up begins again in another order. What comes at a place depends on weights,
seed and place alone, not on how many are asked for, so a longer run begins as a shorter one did and
a resumed one needs only its place.
"""

import math
from collections.abc import Sequence

import numpy as np

from megatron_k2.data.manifest import TokenizerRecord
from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_json
from megatron_k2.sft.packed_set import PackedSequence, Sequences


def draw_order(weights: Sequence[float], num_sequences: int) -> tuple[np.ndarray, np.ndarray]:
    """Which set each draw is from, and the how-manieth of that set it is.

    The k-th draw of a set of weight w stands at time (k + 1/2) / w; draws are taken as they come.

    Returns:
        Set of each draw, [num_sequences] int16; its count within the set, [num_sequences] int64.
    """
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = [min(num_sequences, int(share * num_sequences) + 2) for share in shares]
    sets = np.repeat(np.arange(len(shares), dtype=np.int16), counts)
    draws = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    order = np.argsort((draws + 0.5) / shares[sets], kind="stable")[:num_sequences]
    return sets[order], draws[order]


class Blend:
    """Sequences of several sets, shuffled, for as long as asked.

    Args:
        parts: Weight and set of each; weights are relative numbers of sequences.
        num_sequences: How many; more than the sets hold repeats them.
        seed: Of the shuffling.

    Raises:
        UserError: nothing to draw from, a weight that is no positive number, or sets made with
            different tokenizers.
    """

    def __init__(
        self, parts: Sequence[tuple[float, Sequences]], num_sequences: int, seed: int
    ) -> None:
        if not parts:
            raise UserError("no set of dialogues to train on; name one")
        for weight, part in parts:
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(f"weight {weight} of a set: expected a positive number")
            if not len(part):
                raise UserError("a set without a sequence has no place in a blend; leave it out")
        identities = sorted({part.tokenizer.identity[:12] for _, part in parts})
        if len(identities) > 1:
            raise UserError(
                f"the sets were prepared with {len(identities)} tokenizers "
                f"({', '.join(identities)}); prepare all with one"
            )
        self._weights = [weight for weight, _ in parts]
        self._sets = [part for _, part in parts]
        self._seed = seed
        self._set_of, self._draw_of = draw_order(self._weights, num_sequences)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    @property
    def tokenizer(self) -> TokenizerRecord:
        """That of every set."""
        return self._sets[0].tokenizer

    @property
    def content_hash(self) -> str:
        """See ``packed_set.Sequences``."""
        return sha256_of_json(
            [self._weights, self._seed, [part.content_hash for part in self._sets]]
        )

    def _order(self, number: int, epoch: int) -> np.ndarray:
        """The order of a set's sequences in an epoch; the last one asked for is kept."""
        if self._orders.get(number, (-1,))[0] != epoch:
            rng = np.random.default_rng([self._seed, number, epoch])
            self._orders[number] = epoch, rng.permutation(len(self._sets[number]))
        return self._orders[number][1]

    def locate(self, index: int) -> tuple[int, int]:
        """Set, and sequence within it, of a place."""
        number, draw = int(self._set_of[index]), int(self._draw_of[index])
        epoch, place = divmod(draw, len(self._sets[number]))
        return number, int(self._order(number, epoch)[place])

    def __len__(self) -> int:
        return len(self._set_of)

    def __getitem__(self, index: int) -> PackedSequence:
        number, sequence = self.locate(index)
        return self._sets[number][sequence]
