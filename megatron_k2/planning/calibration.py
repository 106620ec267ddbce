"""Measured rates in place of assumed efficiencies, each beside what it replaces.

The planner's rates are a data sheet's times an efficiency, so a measured rate becomes the
efficiency that gives it back: measured over the sheet's. What the self-check does not measure stays
an assumption and is said to be one: grouped products, attention, elementwise work, copies to the
host. Its training step is shown and not used, since its matrices are too small to speak for K2's.
"""

import math
from dataclasses import dataclass, replace

from megatron_k2.errors import UserError
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.planning.cost.flops import newton_schulz_segments
from megatron_k2.planning.cost.matrices import matrix_shapes
from megatron_k2.planning.estimate import FALLBACKS, Assumptions
from megatron_k2.planning.gpus import GPUS, Gpu
from megatron_k2.planning.measured_rates import SelfcheckRecord
from megatron_k2.presets import ModelPreset

CPU = "cpu"
"""``--gpu``'s name for the machine of a record that was measured on a CPU."""
OTHER_CARDS = frozenset({"PCIE", "NVL", "MIG"})
"""Words of a device's name that make it another card than the data sheet's, or a part of one."""
UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}
MOST_OF_SHEET = 1.5
"""A rate above this many times the data sheet's was not measured on that GPU."""


@dataclass(frozen=True)
class Efficiency:
    """A rate of the planner: a field of ``Assumptions``, and what it is a part of."""

    field: str
    what: str
    sheet: float | None
    """The data sheet's, in ``unit``; ``None``: the field is no part of a rate."""
    unit: str
    assumed: float
    measured: float | None
    """As a part of ``sheet``; ``None`` where not measured."""
    note: str = ""


def gpu_called(device_name: str) -> Gpu | None:
    """The GPU of the data sheets that a driver calls ``device_name``, if any."""
    words = set(device_name.upper().replace("-", " ").split())
    if words & OTHER_CARDS:
        return None
    return next((gpu for gpu in GPUS.values() if gpu.name.upper() in words), None)


def planned_gpu(name: str, record: SelfcheckRecord | None) -> Gpu | None:
    """``cpu`` as a GPU whose sheet is the record, or ``None`` for one of the data sheets'.

    Raises:
        UserError: if the record was not measured on what is planned for.
    """
    if record is None:
        if name == CPU:
            raise UserError(
                "--gpu cpu: no data sheet is kept of a CPU; give its measured rates, "
                "--calibrate selfcheck.json"
            )
        return None
    device = record.device
    if device.kind == "cpu":
        if name != CPU:
            raise UserError(
                f"the rates were measured on a CPU ({device.name}) and say nothing about "
                f"--gpu {name}; plan for that machine with --gpu cpu, or measure on the GPU"
            )
        return _cpu(record)
    found = gpu_called(device.name)
    if found is None or found.name != name:
        way_out = (
            f"plan with --gpu {found.name}"
            if found
            else f"data sheets are kept of {', '.join(GPUS)} with eight on one switch"
        )
        raise UserError(
            f"the rates were measured on '{device.name}', and --gpu {name} is planned for; "
            f"{way_out}, or measure on the GPU that is planned for"
        )
    return None


def _cpu(record: SelfcheckRecord) -> Gpu:
    """The machine as a GPU: its products in fp32, and every link as fast as its memory copies."""
    rates = record.rates
    if rates.matmul_fp32_flops is None or rates.copy_bytes_per_s is None:
        raise UserError(
            "--gpu cpu needs rates.matmul_fp32_flops and rates.copy_bytes_per_s, which this record "
            "lacks: its run was cut off before; run selfcheck again"
        )
    copied = rates.copy_bytes_per_s / 1e9
    return Gpu(
        CPU,
        f"measured on {record.device.name}; fp32 products",
        memory_gb=record.device.memory_bytes / 1e9,
        bf16_tflops=rates.matmul_fp32_flops / 1e12,
        fp8_tflops=rates.matmul_fp32_flops / 1e12,
        hbm_gb_per_s=copied,
        nvlink_gb_per_s=copied,
        network_gb_per_s=copied,
        pcie_gb_per_s=copied,
    )


@dataclass(frozen=True)
class NewtonSchulz:
    """Newton-Schulz over all of a model's matrices."""

    flops_per_s: float
    """FLOPs of all of them over their seconds."""
    covered: float
    """Part of those FLOPs whose very shape was measured, tall or wide; the rest goes at the rate of
    the shape nearest in FLOPs."""


def newton_schulz_rate(preset: ModelPreset, measured: dict[str, float]) -> NewtonSchulz | None:
    """The rate at which the optimizer's products run, ``None`` where no shape was measured."""
    segments = newton_schulz_segments(preset)
    sizes = {_wide(*map(int, shape.split("x"))): rate for shape, rate in measured.items()}
    if not sizes:
        return None
    costs = {shape: newton_schulz_flops(*shape, segments) for shape in sizes}
    flops = covered = seconds = 0.0
    for shape, count in matrix_shapes(preset).items():
        wide = _wide(*shape)
        size = newton_schulz_flops(*wide, segments)
        distances = {known: abs(math.log(cost / size)) for known, cost in costs.items()}
        nearest = wide if wide in sizes else min(distances, key=lambda known: distances[known])
        flops += count * size
        covered += count * size * (wide in sizes)
        seconds += count * size / sizes[nearest]
    return NewtonSchulz(flops / seconds, covered / flops)


def _wide(rows: int, cols: int) -> tuple[int, int]:
    """A tall matrix is iterated as its transpose."""
    return min(rows, cols), max(rows, cols)


def efficiencies(
    gpu: Gpu, preset: ModelPreset, assumed: Assumptions, record: SelfcheckRecord
) -> tuple[Efficiency, ...]:
    """Every rate of the planner, what is assumed of it and what was measured.

    Args:
        gpu: whose data sheet the efficiencies are parts of.
        preset: whose matrices Newton-Schulz works on.
        assumed: without the record.
        record: what was measured on that GPU.

    Raises:
        UserError: for a rate that the GPU cannot have.
    """
    rates = record.rates
    products = rates.matmul_fp32_flops if record.device.kind == "cpu" else rates.matmul_bf16_flops
    shapes = newton_schulz_rate(preset, rates.newton_schulz_flops)
    share = f"{shapes.covered:.0%} of FLOPs in shapes measured" if shapes else ""
    orthogonal = shapes.flops_per_s if shapes else None
    # A CPU's sheet is its products in fp32; Newton-Schulz works in bf16, which may be faster there.
    fastest = gpu.bf16_tflops
    if record.device.kind == "cpu":
        fastest = max(fastest, (rates.matmul_bf16_flops or 0.0) / UNITS["TFLOP/s"])
    peak, memory = (gpu.bf16_tflops, "TFLOP/s"), (gpu.hbm_gb_per_s, "GB/s")
    in_node, between = (gpu.nvlink_gb_per_s, "GB/s"), (gpu.network_gb_per_s, "GB/s")
    rows = (
        ("gemm", "matrix products", *peak, products),
        ("grouped", "experts' grouped products", *peak, None),
        ("attention", "attention", *peak, None),
        ("newton_schulz", "Newton-Schulz", *peak, orthogonal),
        ("hbm", "device memory", *memory, rates.copy_bytes_per_s),
        ("nvlink", "links in a node", *in_node, rates.intra_node_bytes_per_s),
        ("network", "between nodes", *between, rates.inter_node_bytes_per_s),
        ("host", "to host memory", gpu.pcie_gb_per_s, "GB/s", None),
        ("elementwise", "elementwise, added to products", None, "", None),
    )
    return tuple(
        Efficiency(
            *(name, what, sheet, unit, assumed.part(name)),
            _part(gpu, what, sheet, unit, rate, fastest if name == "newton_schulz" else None),
            share if name == "newton_schulz" else "",
        )
        for name, what, sheet, unit, rate in rows
    )


def _part(
    gpu: Gpu,
    what: str,
    sheet: float | None,
    unit: str,
    rate: float | None,
    fastest: float | None = None,
) -> float | None:
    """``rate``, a second, as a part of the data sheet's.

    Args:
        gpu: whose sheet.
        what: for the error.
        sheet: its number, in ``unit``.
        unit: of it.
        rate: measured.
        fastest: in ``unit``, what the device can do at that, where it is not the sheet's number.

    Raises:
        UserError: the device cannot be so fast.
    """
    if rate is None or sheet is None:
        return None
    part = rate / UNITS[unit] / sheet
    if rate / UNITS[unit] > MOST_OF_SHEET * (fastest or sheet):
        raise UserError(
            f"{what}: {rate:.3g} a second were measured, {part:.1f} times the data sheet's "
            f"{sheet:g} {unit} of {gpu.name}: the file is damaged, or of another GPU"
        )
    return part


def calibrated(
    assumed: Assumptions, found: tuple[Efficiency, ...], typed: frozenset[str] = frozenset()
) -> Assumptions:
    """``assumed`` with what was measured in its place.

    Args:
        assumed: without the record.
        found: what was measured.
        typed: fields that somebody chose, which stay as they are.
    """
    kept = {name: assumed.part(name) for name in FALLBACKS}
    measured = {
        one.field: one.measured
        for one in found
        if one.measured is not None and one.field not in typed
    }
    return replace(assumed, **(kept | measured))


@dataclass(frozen=True)
class Basis:
    """What a plan's seconds rest on."""

    used: Assumptions
    assumed: Assumptions
    """What would be used without the record."""
    found: tuple[Efficiency, ...] = ()
    """Every rate, where a record was given."""
    typed: frozenset[str] = frozenset()
    """Fields that somebody chose."""
    record: SelfcheckRecord | None = None


def basis(
    gpu: Gpu, preset: ModelPreset, typed: dict[str, float], record: SelfcheckRecord | None
) -> Basis:
    """The efficiencies of a plan: typed before measured, measured before assumed."""
    assumed = replace(Assumptions(), **typed)
    if record is None:
        return Basis(assumed, assumed)
    found, names = efficiencies(gpu, preset, assumed, record), frozenset(typed)
    return Basis(calibrated(assumed, found, names), assumed, found, names, record)
