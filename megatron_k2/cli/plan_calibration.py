"""What ``megatron-k2 plan --calibrate`` prints: every efficiency as assumed and as measured."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from megatron_k2.planning.calibration import Basis, Efficiency
    from megatron_k2.planning.estimate import Estimate

GB = 1e9


def _origin(one: "Efficiency", b: "Basis") -> str:
    if one.field in b.typed:
        return "typed"
    return "assumed" if one.measured is None else "measured"


def _row(one: "Efficiency", b: "Basis") -> list[str]:
    sheet = "" if one.sheet is None else f"{one.sheet:,.4g} {one.unit}"
    rate, part = "-", "-"
    if one.measured is not None and one.sheet is not None:
        rate, part = f"{one.measured * one.sheet:,.4g} {one.unit}", f"{one.measured:.1%}"
    origin = _origin(one, b)
    return [one.what, sheet, f"{one.assumed:.0%}", part, rate, origin, one.note]


def calibration_facts(e: "Estimate", assumed: "Estimate", b: "Basis") -> dict[str, Any]:
    """The same for JSON: parts of the data sheet's rates, seconds."""
    assert b.record is not None
    return {
        "device": b.record.device.name,
        "efficiencies": {
            one.field: {
                "assumed": one.assumed,
                "measured": one.measured,
                "used": b.used.part(one.field),
                "origin": _origin(one, b),
            }
            for one in b.found
        },
        "step_seconds": e.step_seconds,
        "assumed_step_seconds": assumed.step_seconds,
    }


def shown(e: "Estimate", assumed: "Estimate", b: "Basis") -> "list[RenderableType]":
    """The table, the step's time on both, and the self-check's own training step.

    Args:
        e: of the run, with what was measured.
        assumed: of the same run, without.
        b: the efficiencies.
    """
    from megatron_k2.terminal import table

    assert b.record is not None
    title = f"efficiencies, measured on {b.record.device.name}"
    headings = "of the sheet's", "data sheet", "assumed", "measured", "rate", "used", ""
    whole = table(*headings, title=title)
    for one in b.found:
        whole.add_row(*_row(one, b))
    return [
        whole,
        f"step {e.step_seconds:.2f} s; with the assumed efficiencies {assumed.step_seconds:.2f} s "
        f"(MFU {e.mfu:.1%}, {assumed.mfu:.1%})",
        *_train_step(e, b),
        *_about_cpu(b),
    ]


def _train_step(e: "Estimate", b: "Basis") -> list[str]:
    assert b.record is not None
    step = b.record.rates.train_step
    if step is None:
        return []
    part = step.model_flops_per_s / (e.request.gpu.bf16_tflops * 1e12)
    return [
        f"measured beside it, not used: a step of {step.preset}, {step.tokens_per_s:,.0f} tokens/s "
        f"(MFU {part:.1%}), peak {step.peak_bytes / GB:.2f} GB where "
        f"{step.predicted_peak_bytes / GB:.2f} were planned"
    ]


def _about_cpu(b: "Basis") -> list[str]:
    assert b.record is not None
    if b.record.device.kind == "cuda":
        return []
    return [
        "a CPU in place of each GPU: products in fp32, links as fast as its memory where none was "
        "measured; bytes are counted as on GPUs, bf16 weights"
    ]
