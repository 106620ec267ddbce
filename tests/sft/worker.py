"""Fine-tuning cases, one after another, on this rank: ``python -m tests.sft.worker JSON``.

A case has ``flags``, the seed of its ``documents``, and how they are run: ``packed``, as the
program does; ``alone``, the oracle: each document by itself through the plain model, unpacked, its
labels and targets read off the document here; or one of ``WRONG``, the program with one thing
undone.
"""

import contextlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from tests.support.cases import run_each

VOCAB_SIZE = 128
LENGTHS = ([21, 9, 14], [5, 33, 8], [40], [2, 3, 17, 11], [30, 19], [12, 12, 12], [50], [7, 28])
"""Tokens of the documents of each pack; none fills its 64 rows, with padding to 4 rows too."""


def packs(seed: int):
    """In-memory packs: random tokens, about half of them targets, weights that differ."""
    random = np.random.default_rng(seed)

    def one(lengths):
        total = sum(lengths)
        mask = (random.random(total) < 0.5).astype(np.uint8)
        mask[np.cumsum(lengths) - 1] = 1  # each document has a target
        return SimpleNamespace(
            tokens=random.integers(0, VOCAB_SIZE, total).astype(np.int32),
            loss_mask=mask,
            lengths=np.array(lengths),
            weights=random.choice([4.0, 8.0, 16.0], len(lengths)).astype(np.float32),
        )

    return [one(lengths) for lengths in LENGTHS]


def documents(pack):
    """(tokens, targets, weight) of each document."""
    ends = np.cumsum(pack.lengths)
    for end, length, weight in zip(ends, pack.lengths, pack.weights, strict=True):
        yield pack.tokens[end - length : end], pack.loss_mask[end - length : end], float(weight)


def _for_multi_token_prediction(targets, weight):
    """A document's loss mask, less what Megatron makes of it: it scales by targets over successors.

    Its own scale is undone, so that each token counts as one of the batch's targets.
    """
    import torch

    mask = torch.from_numpy(targets[1:].astype(np.float32))[None] * weight
    return mask * mask[:, 1:].sum() / mask.sum()


def _alone(all_packs, loss):
    """A forward step that runs the documents of a pack one by one: the oracle."""
    import torch

    class Indices(torch.utils.data.Dataset):
        def __len__(self):
            return len(all_packs)

        def __getitem__(self, index):
            return torch.tensor(index)

    def datasets_provider(_num_samples, _vp_stage=None):
        return Indices(), None, None

    datasets_provider.is_distributed = True

    def forward_step(iterator, model, *_rest):
        pack = all_packs[int(next(iterator)[0])]
        total, count = 0.0, 0
        for tokens, targets, weight in documents(pack):
            ids = torch.from_numpy(tokens.astype(np.int64))[None]
            positions = torch.arange(ids.shape[1] - 1)[None]
            mask = _for_multi_token_prediction(targets, weight)
            labels = ids[:, 1:]
            losses = model(ids[:, :-1], positions, None, labels=labels, loss_mask=mask)[0]
            chosen = [i for i in range(len(tokens) - 1) if targets[i + 1]]
            each = sum(losses[i] for i in chosen) * weight
            total = total + (each / len(chosen) if loss == "sample" else each)
            count += 1 if loss == "sample" else len(chosen)
        number = torch.tensor(count, dtype=torch.int)

        def loss_func(_output):
            return total, number, {"lm loss": torch.stack([total.detach(), number.float()])}

        return total, loss_func

    return datasets_provider, forward_step


def _labels_of_the_whole_row(stack):
    """The last row of a document asks for the first token of the next one."""
    from megatron_k2.sft import dataset

    original = dataset.rows_of

    def rows_of(pack, shape):
        rows = original(pack, shape)
        ends = rows["cu_seqlens"][:-1].long() + rows["lengths"] - 1
        ends = ends[rows["lengths"] > 0][:-1]
        rows["labels"][ends] = rows["tokens"][ends + 1]
        rows["loss_mask"][ends] = 1.0
        return rows

    _put(stack, dataset, "rows_of", rows_of)


def _mask_one_off(stack):
    from megatron_k2.sft import dataset

    original = dataset.rows_of

    def rows_of(pack, shape):
        rows = original(pack, shape)
        return rows | {"loss_mask": rows["loss_mask"].roll(1)}

    _put(stack, dataset, "rows_of", rows_of)


def _attention_over_the_pack(stack):
    """No bounds at all: one document of the whole row."""
    from megatron_k2.model.packed import PackLayout
    from megatron_k2.sft import batch

    original = batch.describe

    def describe(layout, *rest):
        found = original(layout, *rest)
        found.layout = PackLayout((layout.num_rows,), (0, layout.num_rows))
        return found

    _put(stack, batch, "describe", describe)


def _padding_counts(stack):
    """Padding is embedded, routed and attended like tokens."""
    from megatron_k2.model import build
    from megatron_k2.model.packed import PackLayout
    from megatron_k2.sft import batch

    original = batch.describe

    def describe(layout, *rest):
        found = original(layout, *rest)
        lengths = np.diff(layout.bounds).tolist()
        found.layout, found.is_padding = PackLayout(tuple(lengths), layout.bounds), None
        return found

    _put(stack, batch, "describe", describe)
    _put(stack, build, "keep_padding_out", lambda model: None)


def _no_bounds_on_middle_stages(stack):
    """What Megatron-Bridge #2952 reports: only the first and the last stage know the documents."""
    from megatron.core import mpu

    from megatron_k2.sft import providers

    original = providers.next_batch

    def next_batch(*args):
        batch = original(*args)
        is_end = mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()
        return batch if is_end else replace(batch, packed=None)

    _put(stack, providers, "next_batch", next_batch)


WRONG = {
    "middle stages without bounds": _no_bounds_on_middle_stages,
    "labels across documents": _labels_of_the_whole_row,
    "mask one off": _mask_one_off,
    "attention over the pack": _attention_over_the_pack,
    "padding counts": _padding_counts,
}


def _compute_in_fp64(stack):
    """Weights, activations and gradients in fp64, whose rounding is far below what is looked for.

    Megatron has no such flag; its optimizer over ZeRO takes them where their type has fp32's name.
    """
    import torch

    from megatron_k2.model import build

    original, type_of = build.model_config_from_args, torch.Tensor.type

    def model_config_from_args(args, *rest):
        args.params_dtype = torch.float64
        config = original(args, *rest)
        config.transformer.params_dtype = config.transformer.pipeline_dtype = torch.float64
        return config

    def named_as_fp32(*args, **kwargs):
        found = type_of(*args, **kwargs)
        return found.replace("Double", "Float") if isinstance(found, str) else found

    _put(stack, build, "model_config_from_args", model_config_from_args)

    def grouped_mm(a, b, *, offs):
        """``F.grouped_mm``, which has no fp64: rows by group, or sums over groups of rows."""
        ranges = list(itertools.pairwise([0, *offs.tolist()]))
        if b.dim() == 3:
            return torch.cat([a[i:j] @ w for (i, j), w in zip(ranges, b, strict=True)])
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in ranges])

    to_fp32 = torch.Tensor.float
    _put(stack, torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_fp32(x))
    _put(stack, torch.Tensor, "type", named_as_fp32)
    _put(stack, torch.nn.functional, "grouped_mm", grouped_mm)


def _put(stack, owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    stack.callback(setattr, owner, name, before)


def run_case(case: dict) -> None:
    from megatron_k2.flags.words import last_value
    from megatron_k2.host.repairs import roll_packed_documents
    from megatron_k2.model.packed import next_in_document
    from megatron_k2.sft import providers
    from megatron_k2.training.pretrain import PRETRAIN, run

    flags, kind = case["flags"], case["kind"]
    all_packs = packs(case["documents"])
    with contextlib.ExitStack() as stack:
        _put(stack, providers, "open_packs", lambda *_, **__: all_packs)
        found = (providers.datasets_provider, providers.forward_step)
        if kind == "alone":
            found = _alone(all_packs, last_value(flags, "--sft-loss") or "token")
        elif kind in WRONG:
            WRONG[kind](stack)
        else:
            roll_packed_documents(next_in_document)
        _compute_in_fp64(stack)
        program = replace(PRETRAIN, name="sft", providers=lambda: found)
        run([*flags, "--console", "megatron"], program)


def main() -> None:
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
