"""Layers over pipeline stages by Megatron's own flags, other than a layout string.

``--decoder-first-pipeline-num-layers`` and ``-last-`` give the outer stages their number and the
rest an equal one; ``--account-for-embedding-in-pipeline-split`` and ``-loss-`` count those as a
layer of their stage. Megatron ends what does not add up by a bare assertion, on every rank.
"""

from dataclasses import dataclass

from megatron_k2.errors import UserError

_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_EMBEDDING = "--account-for-embedding-in-pipeline-split"
_LOSS = "--account-for-loss-in-pipeline-split"
_PER_CHUNK, _CHUNKS = (
    "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank",
)


@dataclass(frozen=True)
class PipelineSplit:
    """Megatron's flags that split the layers unevenly over pipeline ranks, as given."""

    first: int | None = None
    """Layers of the first stage."""
    last: int | None = None
    counts_embedding: bool = False
    counts_loss: bool = False
    layers_per_chunk: int | None = None
    """Layers of a virtual stage; gives their number."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of those that are given."""
        given = {
            _FIRST: self.first is not None,
            _LAST: self.last is not None,
            _EMBEDDING: self.counts_embedding,
            _LOSS: self.counts_loss,
            _PER_CHUNK: self.layers_per_chunk is not None,
        }
        return tuple(flag for flag, is_given in given.items() if is_given)

    def stages(self, num_layers: int, pp: int) -> list[int]:
        """Layers of each pipeline rank, a counted embedding or loss among them.

        Args:
            num_layers: of the decoder.
            pp: pipeline ranks.

        Raises:
            UserError: where they do not add up.
        """
        outer = [(_FIRST, self.first), (_LAST, self.last)]
        given = {flag: n for flag, n in outer if n is not None}
        counted = [
            flag
            for flag, is_given in ((_EMBEDDING, self.counts_embedding), (_LOSS, self.counts_loss))
            if is_given
        ]
        if given and counted:
            raise UserError(
                f"{next(iter(given))} gives the layers of a stage and {counted[0]} changes them; "
                "drop one of the two"
            )
        for flag, n in given.items():
            if n < 1:
                raise UserError(f"{flag} {n}: expected at least 1")
        total, middle = num_layers + len(counted), pp - len(given)
        left = total - sum(given.values())
        said = ", ".join([f"num_layers={num_layers}", *(f"{f} {n}" for f, n in given.items())])
        said += "".join(f" and one for {flag}" for flag in counted)
        if middle < 0:
            raise UserError(f"{said}: there is one pipeline stage; give one of the two")
        if middle == 0 and left:
            raise UserError(f"{said}: {sum(given.values())} layers in {pp} stages, {total} are due")
        if middle and (left < middle or left % middle):
            stages_left = f"the other {middle} of {pp} pipeline stages" if given else f"PP = {pp}"
            way_out = f"give {_FIRST} or -last-"
            if given:
                way_out = "change a number"
            elif len(counted) == 2:
                way_out = f"drop {_EMBEDDING} or {_LOSS}"
            raise UserError(
                f"{said}: {left} layers do not divide by {stages_left}; {way_out}, or give "
                "--pipeline-model-parallel-layout"
            )
        stages = [left // middle if middle else 0] * pp
        if self.first is not None:
            stages[0] = self.first
        if self.last is not None:
            stages[-1] = self.last
        return stages

    def num_chunks(self, num_layers: int, pp: int, chunks: int) -> int:
        """Virtual stages of each pipeline rank.

        Args:
            num_layers: of the decoder.
            pp: pipeline ranks.
            chunks: ``--num-virtual-stages-per-pipeline-rank``, 1 where it is not given.

        Raises:
            UserError: where a stage's layers do not divide.
        """
        stages = self.stages(num_layers, pp)
        if self.layers_per_chunk is not None:
            chunks = self._from_layers(stages, chunks)
        for n in stages:
            if n % chunks:
                raise UserError(
                    f"{' '.join(self.flags)}: a pipeline stage of {n} layers does not divide by "
                    f"{chunks} virtual stages"
                )
        return chunks

    def _from_layers(self, stages: list[int], chunks: int) -> int:
        if self.first is not None or self.last is not None or chunks > 1:
            other = _CHUNKS if chunks > 1 else (_FIRST if self.first is not None else _LAST)
            raise UserError(
                f"{_PER_CHUNK} does not go with {other}; give {_CHUNKS} alone for the virtual "
                "stages"
            )
        per_chunk = self.layers_per_chunk or 0
        if per_chunk < 1 or stages[0] % per_chunk:
            raise UserError(
                f"{_PER_CHUNK} {per_chunk}: a pipeline stage has {stages[0]} layers; expected a "
                "divisor of that"
            )
        return stages[0] // per_chunk
