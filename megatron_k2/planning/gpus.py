"""What a GPU and its node can do, from published data sheets; every figure can be overridden.

Rates are dense (no structured sparsity) and one direction, decimal units throughout: 1 GB = 1e9
bytes, 1 TFLOP/s = 1e12. A node has eight GPUs on one NVLink switch and a 400 Gb/s card for each,
which is the report's cluster (section 2.4.1) and NVIDIA's HGX reference design.
"""

import difflib
from dataclasses import dataclass

from megatron_k2.errors import UserError

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Gpu:
    """One accelerator and its links; rates are dense and of one direction."""

    name: str
    source: str
    memory_gb: float
    bf16_tflops: float
    fp8_tflops: float
    hbm_gb_per_s: float
    nvlink_gb_per_s: float
    """Rate to the other GPUs of its node, one direction."""
    network_gb_per_s: float
    """Rate to other nodes, one direction: of its own network card."""
    pcie_gb_per_s: float
    """Rate to host memory, one direction."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100",
            "NVIDIA H100 data sheet, SXM5: 989 TFLOP/s, 80 GB, 3.35 TB/s, NVLink 900 GB/s both "
            "ways, PCIe Gen5 x16",
            memory_gb=80,
            bf16_tflops=989,
            fp8_tflops=1979,
            hbm_gb_per_s=3350,
            nvlink_gb_per_s=450,
            network_gb_per_s=50,
            pcie_gb_per_s=64,
        ),
        Gpu(
            "h200",
            "NVIDIA H200 data sheet, SXM: the H100's rates, 141 GB, 4.8 TB/s",
            memory_gb=141,
            bf16_tflops=989,
            fp8_tflops=1979,
            hbm_gb_per_s=4800,
            nvlink_gb_per_s=450,
            network_gb_per_s=50,
            pcie_gb_per_s=64,
        ),
        Gpu(
            "h800",
            "NVIDIA H800 SXM: the H100 with NVLink at 400 GB/s both ways; report 2.4.1: eight a "
            "node, 8 x 400 Gb/s",
            memory_gb=80,
            bf16_tflops=989,
            fp8_tflops=1979,
            hbm_gb_per_s=3350,
            nvlink_gb_per_s=200,
            network_gb_per_s=50,
            pcie_gb_per_s=64,
        ),
        Gpu(
            "b200",
            "NVIDIA HGX B200 data sheet, a GPU of eight: 2.25 PFLOP/s dense, 180 GB, 8 TB/s, "
            "NVLink 1.8 TB/s both ways, PCIe Gen5 x16",
            memory_gb=180,
            bf16_tflops=2250,
            fp8_tflops=4500,
            hbm_gb_per_s=8000,
            nvlink_gb_per_s=900,
            network_gb_per_s=50,
            pcie_gb_per_s=64,
        ),
    )
}


def get_gpu(name: str) -> Gpu:
    """The GPU called ``name``.

    Raises:
        UserError: naming the nearest there is.
    """
    if name in GPUS:
        return GPUS[name]
    near = difflib.get_close_matches(name, GPUS, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(GPUS)}"
    raise UserError(f"--gpu '{name}' is not known; {hint}")
