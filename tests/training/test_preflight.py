"""Wrong input is refused on flags alone, before torch or Megatron is imported or a rank started."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand
from megatron_k2.run.commit import git_commit
from megatron_k2.run.flags import read_flags
from megatron_k2.run.iterations import TRACKER
from megatron_k2.run.record import RUN_RECORD
from megatron_k2.training import preflight
from megatron_k2.training.preflight import check_run, drop_damaged_index_cache, write_run_record

TINY = ["--preset", "k2-tiny", "--mock-data"]


EP2 = ["--expert-model-parallel-size", "2", "--moe-token-dispatcher-type", "flex"]
NCCL = ["--distributed-backend", "nccl"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (EP2, "its kernels are CUDA's"),
        ([*EP2, *NCCL], "deepep: package deep_ep is not installed"),
        ([*EP2, *NCCL, "--moe-router-dtype", "fp64"], "takes fp32 probabilities"),
        ([*EP2[2:], *NCCL], "no token leaves its rank"),
    ],
)
def test_a_fused_dispatcher_that_cannot_run_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check(*flags, world_size=2)


WORKER = ["--async-save", "--use-persistent-ckpt-worker"]


def test_a_checkpoint_worker_that_cannot_start_is_refused(monkeypatch):
    with pytest.raises(UserError, match="wants a GPU, and without one the run waits"):
        check(*WORKER, "--async-strategy", "mcore")
    find = preflight.importlib.util.find_spec
    names = {"nvidia_resiliency_ext": None}
    monkeypatch.setattr(
        preflight.importlib.util, "find_spec", lambda name: names.get(name, name) and find(name)
    )
    with pytest.raises(UserError, match="nvidia_resiliency_ext is not installed; add --async-str"):
        check(*WORKER, *NCCL)
    check(*WORKER, "--async-strategy", "mcore", *NCCL)
    check("--async-save")


def test_only_muonclips_state_is_kept_over_a_phase():
    with pytest.raises(UserError, match="--keep-optimizer is MuonClip's"):
        check("--keep-optimizer", "--optimizer", "adam")
    check("--keep-optimizer")


def test_imported_weights_have_no_optimizer_to_keep(tmp_path):
    first = ["--keep-optimizer", "--pretrained-checkpoint", str(tmp_path)]
    with pytest.raises(UserError, match=r"has no checkpoint.*keeps_optimizer=false"):
        check(*first)
    (tmp_path / TRACKER).write_text("release")
    with pytest.raises(UserError, match="has release, and no optimizer's state"):
        check(*first)
    check(*first, "--save", str(tmp_path))  # a resume reads its own
    (tmp_path / TRACKER).write_text("20\n")
    check(*first)


def test_the_commit_is_gits_own_in_a_checkout_a_work_tree_and_with_packed_references(tmp_path):
    def git(*words, at=tmp_path / "a"):
        identity = ["-c", "user.name=k2", "-c", "user.email=k2@example.org"]
        command = ["git", "-C", str(at), *identity, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "a").mkdir()
    assert git_commit(tmp_path / "a") is None
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message=one")
    git("worktree", "add", "--quiet", "-b", "side", str(tmp_path / "b"))
    git("commit", "--quiet", "--allow-empty", "--message=two", at=tmp_path / "b")
    heads = {name: git("rev-parse", "HEAD", at=tmp_path / name) for name in "ab"}
    assert heads["a"] != heads["b"]
    for _ in range(2):
        assert {name: git_commit(tmp_path / name) for name in "ab"} == heads
        git("pack-refs", "--all")
    git("checkout", "--quiet", "--detach")
    assert git_commit(tmp_path / "a") == heads["a"]


def test_absent_data_is_named_before_a_model_is_built(tmp_path):
    with pytest.raises(UserError, match=r"absent\.idx does not exist"):
        check("--train-data-path", "1", str(tmp_path / "absent"))
    check("--train-data-path", "1", "msc://bucket/elsewhere")


def check(*flags, world_size=1):
    check_run(read_flags(expand([*TINY, *flags], cuda=False)), world_size)


def test_a_sound_request_passes():
    check("--global-batch-size", "16", world_size=2)
    with pytest.raises(UserError, match="global_batch_size=15"):
        check("--global-batch-size", "15", world_size=2)


@pytest.mark.parametrize(
    ("flags", "world_size", "said"),
    [
        (["--tensor-model-parallel-size", "2"], 3, "world size 3"),
        (["--pipeline-model-parallel-size", "4"], 2, "world size 2"),
        (["--expert-model-parallel-size", "3"], 3, "num_moe_experts=32"),
        (["--tensor-model-parallel-size", "8"], 8, "num_attention_heads=4"),
        (["--context-parallel-size", "2", "--seq-length", "258"], 2, "seq_length=258"),
        (["--global-batch-size", "12"], 1, "global_batch_size=12"),
        (["--num-layers", "seven"], 1, "whole number"),
        (["--fp4-format", "e2m1"], 1, "fp4"),
        (
            [
                *("--pipeline-model-parallel-size", "2"),
                *("--num-virtual-stages-per-pipeline-rank", "2"),
                "--no-overlap-p2p-communication",
            ],
            2,
            "wrong tensors",
        ),
    ],
)
def test_a_layout_that_cannot_run_names_the_value(flags, world_size, said):
    with pytest.raises(UserError, match=said):
        check(*flags, world_size=world_size)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--min-lr", "1"], "--min-lr 1: expected from 0 to --lr 0.004"),
        (["--lr-warmup-init", "1"], "--lr-warmup-init 1: expected at most --lr"),
        (["--lr-warmup-samples", "3840"], "--lr-warmup-samples ends after 3,840 samples"),
        (["--train-iters", "3", "--lr-warmup-iters", "3"], "--lr-warmup-iters ends after 48"),
    ],
)
def test_a_schedule_that_megatron_would_end_without_words_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check(*flags)


def test_a_size_that_is_missing_is_asked_for():
    with pytest.raises(UserError, match=r"--num-layers.*or --preset"):
        check_run(read_flags(["--seq-length", "64"]), 1)


@pytest.mark.parametrize("module", ["pynvml", "cuda.bindings.driver"])
def test_activation_offload_names_the_package_that_megatron_does_not_declare(monkeypatch, module):
    offload = ["--fine-grained-activation-offloading", "--offload-modules", "moe_act"]
    for name in ("cuda", "cuda.bindings", "cuda.bindings.driver", "pynvml"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    check(*offload)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"Megatron imports {module}.*pip install"):
        check(*offload)


def test_optimizer_offload_is_ours_with_muonclip_and_megatrons_with_adam():
    offload = ["--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5"]
    check(*offload, "--use-distributed-optimizer")
    ours = expand([*TINY, *offload, "--use-distributed-optimizer"], cuda=False)
    assert "--muonclip-cpu-offload" in ours
    assert "--optimizer-cpu-offload" not in ours
    theirs = expand([*TINY, *offload, "--optimizer", "adam"], cuda=False)
    assert "--optimizer-cpu-offload" in theirs


def test_recomputation_that_would_free_nothing_is_refused():
    selective = ["--recompute-granularity", "selective", "--recompute-modules"]
    check(*selective, "layernorm", "mlp")
    with pytest.raises(UserError, match=r"mla_up_proj with --transformer-impl local frees nothing"):
        check(*selective, "layernorm", "mla_up_proj")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "add --use-distributed-optimizer"),
        (["--use-distributed-optimizer", "--optimizer-offload-fraction", "1.5"], "fraction 1.5"),
        (["--use-distributed-optimizer", "--optimizer-offload-fraction", "0"], "for none, drop"),
        (["--use-distributed-optimizer", "--async-save"], "--async-save with"),
        (["--use-distributed-optimizer", "--log-params-norm"], "--log-params-norm with"),
        (["--use-distributed-optimizer", "--fp8-param-gather"], "--fp8-param-gather with"),
        (["--use-distributed-optimizer", "--log-muon-steps"], "--log-muon-steps with"),
    ],
)
def test_optimizer_offload_that_could_not_be_exact_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        check("--optimizer-cpu-offload", *flags)


def test_fp4_that_megatron_would_ignore_is_refused(monkeypatch):
    versions = {"transformer-engine": None, "megatron-core": "0.19.2"}
    monkeypatch.setattr(preflight, "installed_version", versions.get)
    with pytest.raises(UserError, match=r"--fp4-format e2m1 needs Transformer Engine"):
        check("--fp4-format", "e2m1")
    versions["transformer-engine"] = "2.20.2"
    check("--fp4-format", "e2m1")


def test_a_checkpoint_of_another_preset_is_refused_with_the_fields_that_differ(tmp_path):
    save = ["--save", str(tmp_path)]
    write_run_record(read_flags(expand([*TINY, *save], cuda=False)), 1)
    check(*save)  # the same model goes on
    with pytest.raises(UserError, match=r"preset k2-tiny.*hidden_size 128 there, 256 here"):
        check(*save, "--hidden-size", "256")


def test_finetuning_from_another_directory_is_not_a_resume(tmp_path):
    write_run_record(read_flags(expand([*TINY, "--save", str(tmp_path)], cuda=False)), 1)
    other = ["--load", str(tmp_path), "--hidden-size", "256"]
    check(*other, "--finetune")
    with pytest.raises(UserError, match="hidden_size 128 there, 256 here"):
        check(*other)


def test_the_run_record_names_versions_and_flags(tmp_path):
    flags = expand([*TINY, "--save", str(tmp_path)], cuda=False)
    write_run_record(read_flags(flags), 2)
    record = json.loads((tmp_path / RUN_RECORD).read_text())
    assert record["flags"] == flags
    assert record["versions"]["megatron-core"]
    assert record["world_size"] == 2


def test_sample_indices_cut_short_are_dropped_and_whole_ones_kept(tmp_path):
    cache = tmp_path / "train" / "cache" / "GPTDataset_indices"
    cache.mkdir(parents=True)
    np.save(cache / "whole.npy", np.arange(1000))
    data = (cache / "whole.npy").read_bytes()
    (cache / "short.npy").write_bytes(data[:-100])
    (cache / "empty.npy").write_bytes(b"")
    drop_damaged_index_cache([str(tmp_path / "train"), str(tmp_path / "absent")])
    assert [path.name for path in cache.iterdir()] == ["whole.npy"]


def test_a_refusal_on_the_command_line_is_one_line_exit_code_two_and_no_torch():
    code = (
        "import sys; from megatron_k2.cli.main import main; "
        "code = main(['pretrain', '--preset', 'k2-tiny', '--mock-data', '--nproc', '3']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("megatron-k2 pretrain: global_batch_size=16")
    assert result.stderr.count("\n") == 1
