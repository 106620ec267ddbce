"""A recipe as NeMo-RL's overrides: keys against those recorded from v0.7.0, values against ours.

Not exercised: NeMo-RL.
"""

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.launch.nemo_rl import _scalar, nemo_rl_yaml
from megatron_k2.launch.overrides import apply
from megatron_k2.recipes import get_recipe
from tests.support.paths import REPOSITORY

yaml = pytest.importorskip("yaml", reason="PyYAML is not in this environment")

K2 = "kimi_k2_rl_256gpu_h800"
RECORDED = set(
    (REPOSITORY / "tests" / "launch" / "nemo_rl_v0.7.0_keys.txt").read_text().split("\n")
)


def _keys(values, prefix=""):
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


@pytest.mark.parametrize("name", [K2, "moonlight_16b_a3b_rl_16gpu_h100"])
def test_every_key_is_one_that_was_recorded(name):
    read = yaml.safe_load(nemo_rl_yaml(get_recipe(name), "runs/x"))
    assert set(_keys(read)) - RECORDED == {"defaults"}


def test_values_are_the_recipes(capsys):
    assert main(["launch", K2, "--nemo-rl-yaml"]) == 0
    text = capsys.readouterr().out
    assert "nothing of this was run" in text
    read = yaml.safe_load(text)
    assert read["grpo"]["num_prompts_per_step"] == 128
    assert read["policy"]["train_global_batch_size"] == 256
    megatron = read["policy"]["megatron_cfg"]
    first, last = (megatron[f"num_layers_in_{end}_pipeline_stage"] for end in ("first", "last"))
    assert (first, last, megatron["pipeline_model_parallel_size"]) == (7, 6, 8)
    assert first + last + 6 * 8 == 61
    assert megatron["optimizer"]["lr"] == 1e-6
    assert read["policy"]["generation"]["vllm_cfg"]["expert_parallel_size"] == 32
    assert read["cluster"] == {"gpus_per_node": 8, "num_nodes": 32}


def test_engines_apart_have_resources_of_their_own():
    recipe = apply(get_recipe(K2), ["stage.engines.is_colocated=false"])
    read = yaml.safe_load(nemo_rl_yaml(recipe, "runs/x"))
    assert read["policy"]["generation"]["colocated"] == {
        "enabled": False,
        "resources": {"gpus_per_node": 8, "num_nodes": 32},
    }
    assert read["cluster"]["num_nodes"] == 64


def test_small_numbers_stay_numbers():
    for value in (1e-6, 5e-07, 1.5e-06, 0.0, 0.89):
        assert yaml.safe_load(_scalar(value)) == value
    assert isinstance(yaml.safe_load("1e-06"), str), "why they are written otherwise"


@pytest.mark.parametrize("name", ["kimi_k2_rl_cluster_cpu", "kimi_k2_sft_256gpu_h800"])
def test_another_recipe_is_refused(name):
    with pytest.raises(UserError, match="a recipe of RL on GPUs"):
        nemo_rl_yaml(get_recipe(name), "runs/x")
