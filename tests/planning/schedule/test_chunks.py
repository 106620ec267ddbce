"""Every layer once, evenly, in Megatron's own reading of the layout."""

import pytest

from megatron_k2.errors import UserError
from megatron_k2.planning.schedule.chunks import megatron_layout, split_into_chunks


@pytest.mark.parametrize(
    ("layers", "pp", "vpp"),
    [(61, 16, 1), (61, 16, 2), (61, 8, 4), (61, 1, 1), (27, 4, 2), (4, 2, 2), (61, 16, 3)],
)
def test_every_layer_is_held_once_and_units_differ_by_at_most_one(layers, pp, vpp):
    chunks = split_into_chunks(layers, pp, vpp)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(layers))
    assert [(c.virtual, c.rank) for c in chunks] == [(v, r) for v in range(vpp) for r in range(pp)]
    units = [chunk.units for chunk in chunks]
    assert sum(units) == layers + 3
    assert max(units) - min(units) <= 1
    assert chunks[0].has_embedding
    assert chunks[-1].has_head


def test_k2_on_16_ranks_has_four_units_each_and_the_ends_fewer_layers():
    by_rank = [0] * 16
    for chunk in split_into_chunks(61, 16, 2):
        by_rank[chunk.rank] += len(chunk.layers)
    assert by_rank == [3, *[4] * 14, 2]
    assert [len(c.layers) for c in split_into_chunks(61, 16, 1)] == [3, *[4] * 14, 2]


def test_short_chunks_are_spread_over_the_ranks():
    units = [0] * 16
    for chunk in split_into_chunks(61, 16, 3):
        units[chunk.rank] += chunk.units
    assert units == [4] * 16


def test_megatron_reads_the_layout_as_it_is_meant():
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    chunks = split_into_chunks(61, 16, 2)
    layout = PipelineParallelLayerLayout(megatron_layout(chunks), pipeline_model_parallel_size=16)
    assert layout.virtual_pipeline_model_parallel_size == 2
    for chunk in chunks:
        found = layout.layout[chunk.rank][chunk.virtual]
        assert found.count(LayerType.decoder) == len(chunk.layers)
        assert (LayerType.embedding in found) == chunk.has_embedding
        assert (LayerType.loss in found) == chunk.has_head


def test_more_chunks_than_layers_are_refused_with_what_fits():
    with pytest.raises(UserError, match=r"61 layers do not fill 16 .* x 4 .*--vpp 3"):
        split_into_chunks(61, 16, 4)
    with pytest.raises(UserError, match=r"take fewer ranks than 8"):
        split_into_chunks(4, 8, 1)
