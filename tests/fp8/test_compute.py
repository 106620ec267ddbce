"""``--fp8-compute`` as flags, its guards, and Transformer Engine asked for where it is absent."""

import sys
import types

import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags import megatron as flags_module
from megatron_k2.flags.megatron import expand, last_value
from megatron_k2.fp8.compute import FP32_SCALES, check_fp8, choose_scale_format
from megatron_k2.host import repairs
from megatron_k2.run.flags import read_flags
from megatron_k2.training import preflight
from megatron_k2.training.preflight import check_run

TINY = ["--preset", "k2-tiny"]
TE = ["--transformer-impl", "transformer_engine"]


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("blockwise", ("e4m3", "blockwise")),
        ("mxfp8", ("e4m3", "mxfp8")),
        ("delayed", ("hybrid", "delayed")),
    ],
)
def test_a_recipe_is_megatrons_flags_and_the_users_win(name, chosen):
    flags = expand([*TINY, "--fp8-compute", name], cuda=True)
    assert "--fp8-compute" not in flags
    assert (last_value(flags, "--fp8-format"), last_value(flags, "--fp8-recipe")) == chosen
    flags = expand([*TINY, "--fp8-compute", name, "--fp8-format", "mine"], cuda=True)
    assert last_value(flags, "--fp8-format") == "mine"


def test_computing_in_fp8_is_no_ones_default():
    for arguments in (TINY, [*TINY, *TE], ["--preset", "kimi-k2", *TE]):
        assert last_value(expand(arguments, cuda=True), "--fp8-format") is None


def test_an_unknown_recipe_is_refused():
    with pytest.raises(UserError, match=r"--fp8-compute nvfp4: expected one of blockwise, mxfp8"):
        expand([*TINY, "--fp8-compute", "nvfp4"], cuda=True)


def test_transformer_engines_modules_bring_their_fusions_on_cuda_only():
    on_cuda = expand([*TINY, *TE], cuda=True)
    assert {"--moe-grouped-gemm", "--moe-permute-fusion", "--moe-router-fusion"} <= set(on_cuda)
    assert last_value(on_cuda, "--attention-backend") == "fused"
    assert "--moe-grouped-gemm" not in expand(TINY, cuda=True)
    assert "--moe-permute-fusion" not in expand([*TINY, *TE], cuda=False)


def test_gradients_are_added_up_in_the_product_only_where_apex_can(monkeypatch):
    flag = "--no-gradient-accumulation-fusion"
    assert flag in expand([*TINY, *TE], cuda=True)
    monkeypatch.setattr(flags_module.importlib.util, "find_spec", lambda name: object())
    assert flag not in expand([*TINY, *TE], cuda=True)


@pytest.fixture
def installed(monkeypatch):
    """Says which Transformer Engine is installed."""

    original = repairs.installed_version

    def say(version):
        def found(name):
            return version if name == "transformer-engine" else original(name)

        for module in (repairs, preflight):
            monkeypatch.setattr(module, "installed_version", found)

    return say


@pytest.mark.parametrize(
    ("version", "arguments", "message"),
    [
        (None, TE, r"Transformer Engine is not installed.*--transformer-impl local"),
        ("2.8.0", TE, r"2\.8\.0 is installed, 2\.14 or newer"),
        (None, ["--fp8-compute", "blockwise"], r"not installed.*train in bf16"),
        ("2.20.2", ["--fp8-compute", "blockwise"], r"--transformer-impl is local"),
        ("2.20.2", [*TE, "--fp8-format", "e4m3", "--moe-router-dtype", "bf16"], "routes are"),
        ("2.20.2", [*TE, "--fp8-format", "e4m3", "--fp8-output-proj"], "head stays in bf16"),
        ("2.20.2", [*TE, "--fp8-dot-product-attention"], "S_max"),
        ("2.20.2", ["--fp8-param-gather", "--use-cpu-initialization"], "uninitialised memory"),
        ("2.20.2", [*TE, "--fp8-multi-head-attention"], "S_max"),
    ],
)
def test_what_cannot_run_or_must_not_be_fp8_is_refused(installed, version, arguments, message):
    installed(version)
    with pytest.raises(UserError, match=message):
        check_run(read_flags(expand([*TINY, *arguments], cuda=True)), 1)


def test_what_can_run_passes(installed):
    installed("2.20.2")
    check_run(read_flags(expand([*TINY, *TE, "--fp8-compute", "blockwise"], cuda=True)), 1)
    installed(None)
    check_run(read_flags(expand(TINY, cuda=True)), 1)


def test_guards_are_for_the_flags_given():
    nothing = {"fp8_format": None, "router_dtype": None, "te_version": None}
    check_fp8([], transformer_impl="local", **nothing)


def test_blockwise_asks_for_fp32_scales_unless_the_user_chose(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    for recipe, before, after in [
        ("blockwise", {}, {FP32_SCALES: "1"}),
        ("blockwise", {FP32_SCALES: "0"}, {FP32_SCALES: "0"}),
        ("mxfp8", {}, {}),
        (None, {}, {}),
    ]:
        environment = dict(before)
        choose_scale_format(recipe, environment)
        assert environment == after


def test_the_switch_comes_too_late_once_transformer_engine_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    with pytest.raises(UserError, match=FP32_SCALES):
        choose_scale_format("blockwise", {})
    choose_scale_format("blockwise", {FP32_SCALES: "0"})
