"""Fine-tuning's recipes: what differs from pretraining, what the planner makes of packs."""

import re

import pytest

from megatron_k2.cli.main import main
from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.overrides import apply
from megatron_k2.planning.cost.activations import attention_rows, packed_attention_bytes
from megatron_k2.planning.cost.flops import attention_forward
from megatron_k2.planning.cost.memory import layer_activations
from megatron_k2.planning.estimate import estimate
from megatron_k2.presets import K2_TINY, KIMI_K2
from megatron_k2.recipes import RECIPES, get_recipe
from megatron_k2.run.flags import read_flags
from megatron_k2.sft.checks import check_sft
from tests.sft.build_set import write_set

NAME = "kimi_k2_sft_256gpu_h800"


def test_sizes_and_twins_are_there():
    found = {name for name in RECIPES if "_sft_" in name}
    kimi = {
        f"kimi_k2_sft_{n}gpu_{gpu}" for n in (256, 512, 1024) for gpu in ("h800", "h100", "h200")
    }
    assert kimi | {"kimi_k2_sft_cpu", "moonlight_16b_a3b_sft_cpu"} <= found
    assert {f"moonlight_16b_a3b_sft_{n}gpu_h800" for n in (8, 16, 32, 64)} <= found


def test_the_program_is_fine_tunings_and_its_flags_need_no_set_at_hand():
    recipe = get_recipe(NAME)
    flags = recipe.to_megatron_args("runs/b", "runs/a")
    assert last_value(flags, "--sft-data") == "data/chat"
    assert last_value(flags, "--micro-batch-size") == "1"
    assert last_value(flags, "--moe-router-load-balancing-type") == "none"
    assert last_value(flags, "--train-samples") == str(recipe.steps * 128)
    assert (last_value(flags, "--lr"), last_value(flags, "--min-lr")) == ("2e-05", "2e-06")
    assert last_value(flags, "--pretrained-checkpoint") == "runs/a"
    assert "--keep-optimizer" not in flags
    assert "--rope-type" in flags
    assert last_value(flags, "--rope-type") == "yarn", "as the weights it starts from"
    per_sample = apply(recipe, ["stage.average=sample", "data.root=/lustre"])
    flags = per_sample.to_megatron_args("runs/b")
    assert last_value(flags, "--sft-loss") == "sample"
    assert last_value(flags, "--sft-data") == "/lustre/chat"
    check_sft(read_flags([*get_recipe("kimi_k2_sft_cpu").to_megatron_args("runs/x")]), 1)


def test_the_dry_run_names_program_loss_and_where_it_starts(capsys):
    assert main(["launch", NAME, "--dry-run"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "on_every_rank megatron_k2.sft.train" in found
    assert "mean over targets of a step" in found
    assert "starts from runs/kimi_k2_yarn_128k_256gpu_h800: weights, empty momentum" in found
    assert "--start-from DIR" in found


def test_recipes_of_adapters_name_rank_and_ask_for_a_base(capsys, tmp_path, monkeypatch):
    recipe = get_recipe("kimi_k2_lora_32gpu_h200")
    flags = recipe.to_megatron_args("runs/b")
    assert last_value(flags, "--lora-rank") == "32"
    assert last_value(flags, "--moe-router-bias-update-rate") == "0"
    assert last_value(flags, "--lora-base") is None
    assert estimate(recipe.layout).fits
    assert main(["launch", recipe.name, "--dry-run"]) == 0
    found = " ".join(capsys.readouterr().out.split())
    assert "nothing yet: the frozen weights are --start-from's" in found
    gigabytes = re.search(r"--checkpoint-gb (\d+)", found)
    assert gigabytes is not None
    assert 100 < int(gigabytes[1]) < 200, "of the adapters, not of the model"
    monkeypatch.chdir(tmp_path)  # where no run lies
    assert main(["launch", "kimi_k2_lora_cpu", "--executor", "local"]) == 2
    assert "run kimi_k2_pretrain_cpu first" in capsys.readouterr().err
    names = {f"moonlight_16b_a3b_lora_{n}gpu_h800" for n in (8, 16, 32, 64)}
    assert names | {"kimi_k2_lora_64gpu_h800", "moonlight_16b_a3b_lora_cpu"} <= set(RECIPES)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("stage.average=mean", "token, sample"),
        ("data.weights=1,2", "2 weights for 1 sets"),
        ("data.weights=0", "0 is not a weight"),
        ("layout.document_tokens=-1", "a length from 0"),
        ("layout.micro_batch_size=2", "one pack at a time"),
    ],
)
def test_a_wrong_assignment_is_refused(assignment, words):
    with pytest.raises(UserError, match=words):
        apply(get_recipe(NAME), [assignment])


def test_a_blend_of_sets_keeps_its_weights_and_refuses_another_vocabulary(tmp_path):
    write_set(tmp_path / "small")
    blend = ChatBlend(str(tmp_path), (3.0, 1.0), ("far", "small"))
    assert blend.parts == (("far", 0.75), ("small", 0.25))
    with pytest.raises(UserError, match="128 ids, the model's 4096"):
        blend.flags(K2_TINY)
    words = ChatBlend("data", (3.0, 1.0), ("chat", "text")).flags(KIMI_K2)
    assert words[:5] == ["--sft-data", "3", "data/chat", "1", "data/text"]
    assert last_value(words, "--null-tokenizer-eod-id") == str(KIMI_K2.eos_token_id)


def test_attention_over_documents_costs_their_square_and_wider_values():
    whole, packed = (attention_forward(KIMI_K2, 32768), attention_forward(KIMI_K2, 4096))
    assert packed.attention / whole.attention == pytest.approx(4097 / 32769)
    assert packed.gemm == whole.gemm
    wide = attention_forward(KIMI_K2, 4096, is_packed=True)
    assert wide.attention / packed.attention == pytest.approx((192 + 192) / (192 + 128))


def test_the_planner_knows_packs():
    layout = get_recipe(NAME).layout
    whole = layout.replace(document_tokens=0)
    assert estimate(layout).step_seconds < estimate(whole).step_seconds
    plain, packed = (layer_activations(r, is_moe=True).on_device for r in (whole, layout))
    heads_by_width = 64 * 192 * 2
    assert packed - plain == pytest.approx(layout.tokens_per_microbatch * heads_by_width)
    values = next(row for row in attention_rows(KIMI_K2, 1) if row.name == "value")
    kept = packed_attention_bytes(KIMI_K2, 1, frozenset()) - heads_by_width
    assert kept == values.bytes_per_token / 2, "values kept, half as wide again"


def test_the_command_plans_packs(capsys):
    base = "plan --preset kimi-k2 --world-size 256 --seq-length 32768 --cp 8 --json".split()
    base += ["--sequences-per-step", "128"]
    seconds = []
    for words in ([], ["--document-tokens", "4096"]):
        assert main([*base, *words]) == 0
        found = capsys.readouterr().out
        seconds.append(float(re.search(r'"step_seconds": ([0-9.]+)', found)[1]))
    assert seconds[1] < seconds[0]
