"""The GPU column's tensors: a test's own are moved, the package's are where it puts them.

On the meta device in place of a GPU.
"""

import torch

from tests.support.devices import TensorsOfTests


def test_what_a_test_makes_is_moved_and_what_it_places_is_not():
    generator = torch.Generator().manual_seed(0)
    with TensorsOfTests("meta"):
        made = [torch.ones(2), torch.randn(2, generator=generator, requires_grad=True)]
        placed = torch.zeros(2, device="cpu")
    assert [t.device.type for t in made] == ["meta", "meta"]
    assert made[1].requires_grad
    assert made[1].is_leaf
    assert placed.device.type == "cpu"


def test_a_tensor_made_by_other_files_stays_so_that_a_device_they_forgot_is_seen():
    package = {"torch": torch}
    exec(compile("def make(): return torch.ones(2)", "<elsewhere>", "exec"), package)
    with TensorsOfTests("meta"):
        assert package["make"]().device.type == "cpu"
