import pytest
import torch
from safetensors.torch import load_file

from megatron_k2.checkpoint.hf.writer import TensorSlot, write_safetensors
from megatron_k2.checkpoint.stream.rows import Dtype, rows_of


def test_the_reference_reader_gets_back_every_bit(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "bias": torch.randn(3, generator=generator),
        "matrix": torch.randn(5, 7, generator=generator).bfloat16(),
        "view": torch.randn(4, 6, generator=generator).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    rows = {name: rows_of(tensor) for name, tensor in tensors.items()}
    slots = [TensorSlot(name, row.shape, row.dtype) for name, row in rows.items()]
    num_bytes = write_safetensors(tmp_path / "x.safetensors", slots, iter(rows.values()))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert num_bytes == 3 * 4 + 35 * 2 + 24 * 4 + 4


def test_a_tensor_is_rounded_to_the_announced_dtype(tmp_path):
    exact = torch.tensor([1.0 + 2**-10])
    write_safetensors(tmp_path / "x", [TensorSlot("a", (1,), Dtype.BF16)], [rows_of(exact)])
    assert torch.equal(load_file(tmp_path / "x")["a"], exact.bfloat16())


@pytest.mark.parametrize(
    "tensors", [[], [torch.ones(3)], [torch.ones(2)] * 2], ids=["few", "shape", "many"]
)
def test_tensors_that_were_not_announced_are_refused(tmp_path, tensors):
    slot = TensorSlot("a", (2,), Dtype.FP32)
    with pytest.raises(ValueError, match=r"announced|zip"):
        write_safetensors(tmp_path / "x", [slot], map(rows_of, tensors))
