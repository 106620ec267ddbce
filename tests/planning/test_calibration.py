"""Measured rates in a plan: the record both ways, hand-computed seconds, files of other machines.

Not exercised: that a rate was measured rightly, which is the self-check's.
"""

import json
from dataclasses import replace

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.optimizer.newton_schulz.cost import newton_schulz_flops
from megatron_k2.planning.calibration import basis, gpu_called, newton_schulz_rate, planned_gpu
from megatron_k2.planning.cost.flops import newton_schulz_segments, orthogonalisation
from megatron_k2.planning.cost.matrices import matrix_shapes
from megatron_k2.planning.estimate import Assumptions, estimate
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.measured_rates import (
    Device,
    Rates,
    SelfcheckRecord,
    TrainStep,
    read_record,
    write_record,
)
from megatron_k2.presets import get_preset
from tests.planning.cost.test_memory import request

K2, H100 = get_preset("kimi-k2"), get_gpu("h100")
GPU = SelfcheckRecord(
    Device("NVIDIA H100 80GB HBM3", "cuda", 85_000_000_000, 8, {"driver": "1.2"}),
    Rates(
        matmul_bf16_flops=0.7 * 989e12,
        copy_bytes_per_s=0.9 * 3.35e12,
        newton_schulz_flops={"2048x7168": 500e12, "8192x7168": 600e12},
        train_step=TrainStep("k2-mini", 100_000.0, 6e8, 3_000_000_000, 2_900_000_000, {"x": 1}),
        intra_node_bytes_per_s=360e9,
    ),
    {"torch": "2.9"},
    ({"name": "doctor", "ok": True},),
)
CPU = SelfcheckRecord(
    Device("EPYC", "cpu", 8_000_000_000, 1),
    Rates(matmul_fp32_flops=1e11, copy_bytes_per_s=1e10, newton_schulz_flops={"64x128": 5e10}),
)
PLAN = ["plan", "--preset", "kimi-k2", "--gpu", "h100", "--world-size", "256"]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "selfcheck.json"
    write_record(path, GPU)
    return path


def test_a_record_read_again_is_the_one_written(written):
    assert read_record(written) == GPU
    content = json.loads(written.read_text())
    assert content["rates"]["matmul_fp32_flops"] is None
    assert content["rates"]["link_bytes_per_s"] == {"intra_node": 360e9, "inter_node": None}
    assert content["device"]["driver"] == "1.2"


def test_every_measured_rate_is_the_one_that_the_plan_uses():
    used = basis(H100, K2, {}, GPU).used
    assert used.gemm == pytest.approx(0.7)
    assert used.hbm == pytest.approx(0.9)
    assert used.nvlink == pytest.approx(360 / 450)
    left = Assumptions()
    kept = "grouped", "attention", "network", "elementwise", "reserved_gb"
    assert all(getattr(used, name) == getattr(left, name) for name in kept)
    assert used.host == left.network  # a rate that was not measured is not another's


def test_seconds_follow_the_measured_rates():
    """By hand: Newton-Schulz' FLOPs over its rate; the exchange over the link's, ring of eight."""
    r = replace(request(world=8, pp=1, ep=8), gpu=H100)
    assumed, measured = (estimate(r, basis(H100, K2, {}, record).used) for record in (None, GPU))
    rate = newton_schulz_rate(K2, GPU.rates.newton_schulz_flops)
    assert rate is not None
    assert measured.newton_schulz_seconds == pytest.approx(
        orthogonalisation(K2) / 8 / rate.flops_per_s, rel=1e-12
    )
    assert assumed.newton_schulz_seconds == pytest.approx(
        orthogonalisation(K2) / 8 / (0.65 * 989e12), rel=1e-12
    )
    assert assumed.expert_seconds / measured.expert_seconds == pytest.approx(0.8 / 0.75, rel=1e-12)


def test_newton_schulz_rate_is_all_flops_over_all_seconds():
    """One matrix at a time; a mean of the rates instead is another number."""
    rates = {"2048x7168": 500e12, "8192x7168": 600e12}
    segments = newton_schulz_segments(K2)
    nearest = {(2048, 7168): 500e12, (7168, 8192): 600e12}
    flops = seconds = covered = 0.0
    for (rows, cols), count in matrix_shapes(K2).items():
        wide = (min(rows, cols), max(rows, cols))
        one = newton_schulz_flops(rows, cols, segments)
        ratios = {
            known: max(one, cost) / min(one, cost)
            for known in nearest
            for cost in [newton_schulz_flops(*known, segments)]
        }
        rate = nearest.get(wide) or nearest[min(ratios, key=lambda known: ratios[known])]
        flops, seconds = flops + count * one, seconds + count * one / rate
        covered += count * one * (wide in nearest)
    found = newton_schulz_rate(K2, rates)
    assert found is not None
    assert found.flops_per_s == pytest.approx(flops / seconds, rel=1e-12)
    assert found.covered == pytest.approx(covered / flops, rel=1e-12)
    assert abs(found.flops_per_s / 550e12 - 1) > 0.05
    assert newton_schulz_rate(K2, {}) is None


def test_what_is_typed_wins_over_what_was_measured():
    found = basis(H100, K2, {"gemm": 0.5}, GPU)
    assert found.used.gemm == 0.5
    assert found.used.hbm == pytest.approx(0.9)
    assert found.used.newton_schulz == pytest.approx(
        newton_schulz_rate(K2, GPU.rates.newton_schulz_flops).flops_per_s / 989e12  # type: ignore[union-attr]
    )


def test_without_a_record_nothing_changes():
    assert basis(H100, K2, {"network": 0.2}, None).used == Assumptions(network=0.2)
    r = request()
    assert estimate(r, Assumptions(nvlink=0.75, host=0.75, newton_schulz=0.65)) == estimate(r)


def test_both_are_printed_and_in_json(written, capsys):
    assert main([*PLAN, "--calibrate", str(written)]) == 0
    text = capsys.readouterr().out
    assert "measured on NVIDIA H100 80GB HBM3" in text
    products = next(line for line in text.splitlines() if "matrix products" in line)
    assert "65%" in products
    assert "70.0%" in products
    assert "measured" in products
    attention = next(line for line in text.splitlines() if line.split()[:1] == ["attention"])
    assert attention.split()[-1] == "assumed"
    assert "with the assumed efficiencies 118.23 s" in text
    assert "peak 3.00 GB where 2.90 were planned" in text
    assert main([*PLAN, "--calibrate", str(written), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["calibration"]
    assert found["efficiencies"]["gemm"] == pytest.approx(
        {"assumed": 0.65, "measured": 0.7, "used": 0.7, "origin": "measured"}
    )
    assert found["assumed_step_seconds"] > found["step_seconds"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_a_drivers_name_is_one_data_sheets_or_none(device, name):
    found = gpu_called(device)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("argv", "device", "message"),
    [
        (["--gpu", "h800"], GPU.device, "--gpu h800 is planned for; plan with --gpu h100"),
        (["--gpu", "h100"], CPU.device, "measured on a CPU (EPYC) and say nothing about --gpu"),
        (["--gpu", "cpu"], GPU.device, "--gpu cpu is planned for; plan with --gpu h100"),
        (
            ["--gpu", "h100"],
            replace(GPU.device, name="NVIDIA A100"),
            "'NVIDIA A100', and --gpu h100 is planned for; data sheets are kept of h100",
        ),
    ],
)
def test_a_record_of_another_machine_is_refused(tmp_path, capsys, argv, device, message):
    path = tmp_path / "selfcheck.json"
    write_record(path, replace(GPU, device=device))
    assert main([*PLAN, *argv, "--calibrate", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_a_cpu_is_planned_for_by_its_own_record(tmp_path, capsys):
    path = tmp_path / "selfcheck.json"
    write_record(path, CPU)
    argv = "plan --preset k2-tiny --gpu cpu --world-size 1 --pp 1 --ep 1 --transformer-impl local"
    argv = [*argv.split(), "--no-fp8-storage", "--calibrate", str(path)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert "on 1 x cpu" in text
    assert "products in fp32" in text
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    flops = orthogonalisation(get_preset("k2-tiny"))
    assert found["newton_schulz_seconds"] == pytest.approx(flops / 5e10, rel=1e-12)
    gpu = planned_gpu("cpu", CPU)
    assert gpu is not None
    assert gpu.bf16_tflops == pytest.approx(0.1)
    assert gpu.memory_gb == 8


def test_a_cpu_that_is_faster_in_bf16_orthogonalises_so(tmp_path, capsys):
    """Its sheet is fp32; a rate that not even its bf16 products have is refused still."""
    fast = replace(CPU.rates, matmul_bf16_flops=4e11, newton_schulz_flops={"64x128": 3e11})
    argv = "plan --preset k2-tiny --gpu cpu --world-size 1 --pp 1 --ep 1 --transformer-impl local"
    path = tmp_path / "selfcheck.json"
    argv = [*argv.split(), "--no-fp8-storage", "--json", "--calibrate", str(path)]
    write_record(path, replace(CPU, rates=fast))
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    flops = orthogonalisation(get_preset("k2-tiny"))
    assert found["newton_schulz_seconds"] == pytest.approx(flops / 3e11, rel=1e-12)
    write_record(path, replace(CPU, rates=replace(fast, newton_schulz_flops={"64x128": 7e11})))
    assert main(argv) == 2
    assert "Newton-Schulz: 7e+11 a second were measured" in capsys.readouterr().err


def test_a_cpu_without_its_rates_is_refused(capsys):
    assert main(["plan", "--preset", "k2-tiny", "--gpu", "cpu", "--world-size", "1"]) == 2
    assert "--calibrate selfcheck.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="lacks: its run was cut off before"):
        planned_gpu("cpu", replace(CPU, rates=Rates(copy_bytes_per_s=1e10)))


def test_a_rate_beyond_the_data_sheet_is_refused():
    fast = replace(GPU, rates=replace(GPU.rates, matmul_bf16_flops=2e15))
    with pytest.raises(UserError, match=r"2e\+15 a second were measured, 2.0 times"):
        basis(H100, K2, {}, fast)


def _set(key, value):
    def damage(text):
        document = json.loads(text)
        *parts, last = key.split(".")
        place = document
        for part in parts:
            place = place[part]
        place[last] = value
        return json.dumps(document)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "is not valid JSON: cut off or another file"),
        (lambda text: "[" * 100_000, "is not valid JSON"),
        (lambda text: "\ud800", "is not valid JSON"),
        (lambda text: "[]", "no schema_version"),
        (lambda text: '{"model_type": "kimi_k2"}', "no schema_version"),
        (lambda text: " " * (17 << 20), "17,825,792 bytes: not a selfcheck.json"),
        (_set("schema_version", 2), "schema_version 2, 1 is read"),
        (_set("device", None), "device is None, expected an object"),
        (_set("device.kind", "tpu"), "device.kind is 'tpu', expected cuda or cpu"),
        (_set("device.count", 1.5), "device.count is 1.5, expected a whole number"),
        (_set("device.memory_bytes", 0), "device.memory_bytes is 0, expected a number above 0"),
        (_set("rates", 3), "rates is 3, expected an object"),
        (_set("rates.matmul_bf16_flops", "fast"), "rates.matmul_bf16_flops is 'fast'"),
        (_set("rates.matmul_bf16_flops", True), "rates.matmul_bf16_flops is True"),
        (_set("rates.copy_bytes_per_s", -1), "copy_bytes_per_s is -1, expected a number above 0"),
        (_set("rates.copy_bytes_per_s", float("nan")), "copy_bytes_per_s is nan"),
        (_set("rates.copy_bytes_per_s", 10**400), "copy_bytes_per_s is 1000"),
        (_set("rates.newton_schulz_flops", {"2048": 1.0}), "is '2048', expected <rows>x<cols>"),
        (_set("rates.newton_schulz_flops", {"2x3": None}), "newton_schulz_flops.2x3 is None"),
        (_set("rates.link_bytes_per_s", None), "link_bytes_per_s is None, expected an object"),
        (_set("rates.train_step", []), "train_step is [], expected an object or null"),
        (_set("rates.train_step.preset", None), "train_step.preset is None"),
        (_set("steps", {}), "steps is {}, expected a list"),
        (_set("steps", [1]), "steps is [1], expected a list of objects"),
    ],
)
def test_a_damaged_or_foreign_file_is_a_sentence(written, capsys, damage, message):
    content = damage(written.read_text())
    written.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert main([*PLAN, "--calibrate", str(written)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(written) in said
    assert len(said.strip().splitlines()) == 1


def test_a_file_that_is_not_there_is_a_sentence(tmp_path, capsys):
    for path in (tmp_path / "absent.json", tmp_path):
        assert main([*PLAN, "--calibrate", str(path)]) == 2
        assert f"{path}: no such file" in capsys.readouterr().err
