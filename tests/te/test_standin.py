"""The stand-ins themselves: known versions only, no kernel silently missing, never shipped."""

import ast

import pytest

from tests.support.paths import REPOSITORY
from tests.te.standin import KNOWN_VERSIONS, require_known_version


def test_a_version_they_were_not_written_against_is_refused():
    for version in KNOWN_VERSIONS:
        require_known_version(version)
    with pytest.raises(RuntimeError, match=r"transformer-engine 2\.99\.0.*2\.17\.1, 2\.20\.2"):
        require_known_version("2.99.0")


def test_a_kernel_without_a_stand_in_raises_where_it_is_called():
    import transformer_engine_torch as tex

    with pytest.raises(NotImplementedError, match="fused_attn_fwd has no CPU stand-in"):
        tex.fused_attn_fwd()


def test_recipes_without_a_stand_in_raise():
    import torch
    from transformer_engine.pytorch import Float8CurrentScalingQuantizer
    from transformer_engine_torch import DType

    quantizer = Float8CurrentScalingQuantizer(DType.kFloat8E4M3, device=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="Float8CurrentScalingQuantizer"):
        quantizer(torch.ones(16, 16))


def test_nothing_of_the_package_imports_the_tests():
    for path in (REPOSITORY / "megatron_k2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path
