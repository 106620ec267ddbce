"""Packs as rows: labels, positions, weights and bounds against a walk over the documents."""

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_k2.sft.dataset import PackedDataset, PackShape, rows_of
from tests.sft.worker import documents, packs

NUM_ROWS = 64


def expected_rows(pack, shape):
    """Row by row: (token, label, weight, position), then padding up to ``shape.multiple``."""
    rows, bounds = [], [0]
    for tokens, targets, weight in documents(pack):
        num_targets = sum(targets[1:])
        for i in range(len(tokens) - 1):
            each = weight * targets[i + 1]
            if shape.loss == "sample" and num_targets:
                each /= num_targets
            rows.append((tokens[i], tokens[i + 1], each, i))
        while len(rows) % shape.multiple:
            rows.append((0, 0, 0, -1))
        bounds.append(len(rows))
    rows += [(0, 0, 0, -1)] * (NUM_ROWS - len(rows))
    return rows, bounds if bounds[-1] == NUM_ROWS else [*bounds, NUM_ROWS]


def found_rows(pack, shape):
    rows = rows_of(pack, shape)
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return list(zip(*(rows[name].tolist() for name in names), strict=True)), rows


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("loss", ["token", "sample"])
@pytest.mark.parametrize("number", range(8))
def test_rows_are_those_of_a_walk_over_the_documents(multiple, loss, number):
    pack, shape = packs(7)[number], PackShape(NUM_ROWS, multiple, loss)
    expected, bounds = expected_rows(pack, shape)
    found, rows = found_rows(pack, shape)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert rows["cu_seqlens"].tolist() == bounds
    assert int(rows["max_seqlen"]) == max(np.diff(bounds))
    assert int(rows["num_samples"]) == len(pack.lengths)


def test_wrong_rows_are_told_apart():
    """Labels and positions that go on over documents, a mask one off: each differs somewhere."""
    pack, shape = packs(7)[0], PackShape(NUM_ROWS)
    expected, _ = expected_rows(pack, shape)
    tokens, labels, weights, positions = (list(column) for column in zip(*expected, strict=True))
    across = [*tokens[1:], 0]
    assert across != labels
    assert np.roll(weights, 1).tolist() != weights
    assert list(range(len(positions))) != positions


def test_a_sample_without_targets_weighs_nothing_and_is_not_counted():
    pack = packs(7)[0]
    pack.loss_mask[: pack.lengths[0]] = 0
    rows = rows_of(pack, PackShape(NUM_ROWS, loss="sample"))
    assert int(rows["num_samples"]) == len(pack.lengths) - 1
    assert not rows["loss_mask"][: pack.lengths[0] - 1].any()


def test_documents_that_do_not_fit_are_refused():
    pack = SimpleNamespace(lengths=np.array([40, 27]), weights=np.ones(2))
    with pytest.raises(ValueError, match=r"65 rows .* has 64"):
        rows_of(pack, PackShape(NUM_ROWS))


def test_a_full_pack_has_no_padding():
    lengths = np.array([33, 33])
    tokens = np.arange(66, dtype=np.int32)
    pack = SimpleNamespace(
        tokens=tokens, loss_mask=np.ones(66, np.uint8), lengths=lengths, weights=np.ones(2)
    )
    dataset = PackedDataset([pack], PackShape(NUM_ROWS))
    rows = dataset[0]
    assert rows["lengths"].tolist() == [32, 32]
    assert (rows["loss_mask"] == 1).all()
    assert len(dataset) == 1
