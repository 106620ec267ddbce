"""``--only 'layers.0-3,experts.0-7'``: a part of a checkpoint, to debug with."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import override

from megatron_k2.checkpoint.names.mapping import Pair
from megatron_k2.errors import UserError

_INDEX = {kind: re.compile(rf"\.{kind}\.(\d+)\.") for kind in ("layers", "experts")}
_PART = re.compile(r"(layers|experts)\.(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Selection:
    """Layers and routed experts to take; None: all. Ranges are from 0 and include their end."""

    layers: range | None = None
    experts: range | None = None

    @classmethod
    def parse(cls, text: str | None) -> "Selection":
        """The part of a model that ``--only`` names.

        Args:
            text: ``layers.0-3``, ``experts.5``, or both with a comma between; None takes all.
        """
        chosen: dict[str, range] = {}
        for part in text.split(",") if text else ():
            match = _PART.fullmatch(part.strip())
            if match is None:
                raise UserError(
                    f"--only '{text}': '{part}' is neither 'layers.A-B' nor 'experts.A-B'"
                )
            first, last = int(match[2]), int(match[3] or match[2])
            if last < first or match[1] in chosen:
                raise UserError(f"--only '{text}': '{part}' is empty or given twice")
            chosen[match[1]] = range(first, last + 1)
        return cls(**chosen)

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return self.layers is None and self.experts is None

    def has(self, pair: Pair) -> bool:
        """Whether a tensor is taken.

        Embedding, norm and head go with the layer they travel with, a layer's other tensors with
        their layer.
        """
        in_layer = self.layers is None or pair.layer in self.layers
        is_routed = pair.expert is not None
        return in_layer and not (
            is_routed and self.experts is not None and pair.expert not in self.experts
        )

    def has_name(self, hf_name: str) -> bool:
        """``has`` from a Hugging Face name alone; a name without a layer belongs to all."""
        layer, expert = (_INDEX[kind].search(hf_name) for kind in ("layers", "experts"))
        in_layer = self.layers is None or layer is None or int(layer[1]) in self.layers
        return in_layer and (
            self.experts is None or expert is None or int(expert[1]) in self.experts
        )

    def take(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """The selected pairs.

        Raises:
            UserError: if there are none.
        """
        has_any = has_expert = False
        for pair in pairs:
            if self.has(pair):
                has_any, has_expert = True, has_expert or pair.expert is not None
                yield pair
        if not has_any or (self.experts is not None and not has_expert):
            raise UserError(f"--only {self}: the model has no such layer or expert")

    def require_some(self, hf_names: Iterable[str]) -> None:
        """Refuse a selection that matches none of ``names``.

        Raises:
            UserError: then.
        """
        names = [name for name in hf_names if self.has_name(name)]
        for kind, chosen in (("layers", self.layers), ("experts", self.experts)):
            if chosen is not None and not any(_INDEX[kind].search(name) for name in names):
                raise UserError(f"--only {self}: there are no such {kind}")

    @override
    def __str__(self) -> str:
        chosen = {"layers": self.layers, "experts": self.experts}
        return ",".join(f"{k}.{r[0]}-{r[-1]}" for k, r in chosen.items() if r is not None) or "all"
