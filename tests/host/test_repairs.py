"""Each repair of ``repairs.py``: the defect without it, its absence with it.

A test named ``upstream_still_...`` fails when upstream has fixed the defect; then the repair and
the test can go.
"""

import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from multiprocessing import resource_tracker
from types import SimpleNamespace

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.host import repairs
from tests.support.paths import REPOSITORY
from tests.support.single_rank import one_rank


@pytest.fixture
def original(monkeypatch):
    """Puts back what a repair replaces."""
    import megatron.core.datasets.utils as dataset_utils
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    monkeypatch.setattr(dataset_utils, "compile_helpers", _unrepaired(dataset_utils))
    for name in REPAIRED:
        method = getattr(DistributedOptimizer, name)
        monkeypatch.setattr(DistributedOptimizer, name, getattr(method, "__wrapped__", method))
    monkeypatch.setattr(DistributedOptimizer, "_k2_restores_without_te", False, raising=False)


REPAIRED = ("sharded_state_dict", "_set_main_param_and_optimizer_states", "load_state_dict")


def _unrepaired(dataset_utils):
    """A fresh copy of upstream's function, whoever replaced it in this process."""
    import importlib.util

    spec = importlib.util.find_spec(dataset_utils.__name__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh.compile_helpers


def _versions(monkeypatch, found):
    def version(distribution):
        assert distribution == "megatron-core"
        if found is None:
            raise PackageNotFoundError(distribution)
        return found

    monkeypatch.setattr(repairs.importlib.metadata, "version", version)


def test_the_installed_megatron_was_checked():
    assert repairs.require_checked_megatron() in repairs.CHECKED_MEGATRON_VERSIONS


@pytest.mark.parametrize(
    ("found", "message"),
    [("0.20.0", r"0\.20\.0 is installed.*pip install megatron-core=="), (None, "not installed")],
)
@pytest.mark.parametrize(
    "repair",
    [
        repairs.require_checked_megatron,
        repairs.skip_helpers_compilation,
        repairs.restore_distributed_optimizer_without_te,
        repairs.keep_checkpoint_queue_through_sigterm,
        repairs.norms_without_te,
        repairs.guard_checkpoint_worker,
    ],
)
def test_every_repair_refuses_a_version_it_was_not_checked_against(
    repair, found, message, monkeypatch
):
    _versions(monkeypatch, found)
    with pytest.raises(UserError, match=message):
        repair()


@pytest.mark.parametrize(
    ("found", "is_refused"), [(None, False), ("0.4.1", True), ("0.6.0", False)]
)
def test_an_extension_that_breaks_megatrons_import_is_refused(found, is_refused, monkeypatch):
    versions = {"megatron-core": "0.19.2", "nvidia-resiliency-ext": found}
    monkeypatch.setattr(repairs, "installed_version", versions.get)
    if not is_refused:
        assert repairs.require_checked_megatron() == "0.19.2"
        return
    with pytest.raises(UserError, match=r"0\.4\.1 makes .* pip uninstall nvidia-resiliency-ext"):
        repairs.require_checked_megatron()


@pytest.mark.usefixtures("original")
def test_upstream_still_ships_no_makefile_to_compile_its_helpers_with(capfd):
    import megatron.core.datasets.utils as dataset_utils

    with pytest.raises(SystemExit):
        dataset_utils.compile_helpers()
    assert "no makefile found" in capfd.readouterr().err.lower()


@pytest.mark.usefixtures("original")
def test_the_repaired_start_compiles_nothing_and_the_shipped_helpers_are_there():
    from megatron.core.datasets import helpers_cpp
    from megatron.core.datasets import utils as dataset_utils

    repairs.skip_helpers_compilation()
    dataset_utils.compile_helpers()
    assert hasattr(helpers_cpp, "build_sample_idx_int32")


@pytest.fixture(scope="module", autouse=True)
def _rank():
    with one_rank():
        yield


def _distributed_adam():
    """A model of two matrices in Megatron's gradient buffer, and its DistributedOptimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True
    )

    class Model(MegatronModule):
        def __init__(self):
            super().__init__(config)
            generator = torch.Generator().manual_seed(0)
            self.first = torch.nn.Parameter(torch.randn(16, 16, generator=generator))
            self.second = torch.nn.Parameter(torch.randn(16, 16, generator=generator))

    ddp = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True), Model()
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=True, clip_grad=0.0),
        [ddp],
    )
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return ddp, optimizer


def _step(ddp, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in ddp.parameters():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator))
    optimizer.step()


def _inner(optimizer):
    return getattr(optimizer, "chained_optimizers", [optimizer])[0]


def _loading_template(ddp, optimizer):
    """What a load asks of a fresh optimizer: which tensors to read, and where."""
    from megatron.core.dist_checkpointing import ShardedTensor

    model = {
        name: ShardedTensor.from_rank_offsets(name, param, replica_id=(0, 0, 0))
        for name, param in ddp.named_parameters()
    }
    return _inner(optimizer).sharded_state_dict(
        model, is_loading=True, metadata={"distrib_optim_sharding_type": "dp_reshardable"}
    )


@pytest.mark.usefixtures("original")
def test_upstream_still_shares_one_step_among_all_parameters_after_a_load():
    """AdamW increments it once for each parameter: wrong bias correction, silently."""
    ddp, optimizer = _distributed_adam()
    _step(ddp, optimizer, 0)
    inner = _inner(optimizer)
    inner.load_state_dict(inner.state_dict())
    steps = [state["step"] for state in inner.optimizer.state.values()]
    assert len(steps) == 2
    assert steps[0] is steps[1]
    _step(ddp, optimizer, 1)
    assert steps[0].item() == 3  # after two steps


@pytest.mark.usefixtures("original")
def test_a_repaired_load_leaves_the_next_steps_as_if_there_had_been_none():
    repairs.restore_distributed_optimizer_without_te()
    weights = []
    for is_loaded in (False, True):
        ddp, optimizer = _distributed_adam()
        _step(ddp, optimizer, 0)
        if is_loaded:
            inner = _inner(optimizer)
            moments = {
                param: {key: value.clone() for key, value in state.items()}
                for param, state in inner.optimizer.state.items()
            }
            inner.load_state_dict(inner.state_dict())
            for param, state in inner.optimizer.state.items():
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key].copy_(moments[param][key])
        for seed in (1, 2):
            _step(ddp, optimizer, seed)
        weights.append([param.detach().clone() for param in ddp.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.usefixtures("original")
def test_upstream_still_asserts_on_a_fresh_optimizer_that_is_to_load():
    ddp, optimizer = _distributed_adam()
    with pytest.raises(AssertionError):
        _loading_template(ddp, optimizer)
    repairs.restore_distributed_optimizer_without_te()
    assert _loading_template(ddp, optimizer)
    assert len(_inner(optimizer).optimizer.state) == 2


@pytest.mark.usefixtures("original")
def test_upstream_still_misses_step_when_it_sets_a_parameters_state():
    ddp, optimizer = _distributed_adam()
    _step(ddp, optimizer, 0)
    inner, param = _inner(optimizer), next(ddp.parameters())
    read = inner._get_main_param_and_optimizer_states(param)
    tensors = {key: value.clone() for key, value in read.items() if key != "step"}
    with torch.no_grad(), pytest.raises(KeyError, match="step"):
        inner._set_main_param_and_optimizer_states(param, tensors)
    repairs.restore_distributed_optimizer_without_te()
    tensors["exp_avg"].fill_(3.0)
    with torch.no_grad():
        inner._set_main_param_and_optimizer_states(param, tensors)
    found = inner._get_main_param_and_optimizer_states(param)
    assert (found["exp_avg"] == 3.0).all()


@pytest.mark.usefixtures("original")
def test_a_repair_applied_twice_is_applied_once():
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    repairs.restore_distributed_optimizer_without_te()
    once = SimpleNamespace(**{name: getattr(DistributedOptimizer, name) for name in REPAIRED})
    repairs.restore_distributed_optimizer_without_te()
    assert all(getattr(DistributedOptimizer, name) is getattr(once, name) for name in REPAIRED)


def test_upstreams_gradient_norm_still_makes_a_tensor_of_a_list_of_norms():
    """If this fails, upstream has been repaired: drop ``repairs.norms_without_te``."""
    from megatron.core.utils import local_multi_tensor_l2_norm

    assert "torch.norm(torch.tensor(l2))" in inspect.getsource(local_multi_tensor_l2_norm)


def test_the_norm_on_the_device_is_the_norm_of_everything_and_replaces_upstreams(monkeypatch):
    from megatron.core.optimizer import clip_grads
    from megatron.core.utils import local_multi_tensor_l2_norm

    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 70, 1)]
    monkeypatch.setattr(clip_grads, "l2_norm_impl", local_multi_tensor_l2_norm)
    repairs.norms_without_te()
    found, _ = clip_grads.l2_norm_impl(0, None, [tensors], False)
    torch.testing.assert_close(found, torch.cat(tensors).norm()[None])
    wrong = torch.stack([t.norm() for t in tensors]).sum()[None]
    assert not torch.allclose(found, wrong)


def test_a_norm_that_is_another_kernels_is_left_alone(monkeypatch):
    from megatron.core.optimizer import clip_grads

    monkeypatch.setattr(clip_grads, "l2_norm_impl", "a fused kernel")
    repairs.norms_without_te()
    assert clip_grads.l2_norm_impl == "a fused kernel"


def _in_a_process(program):
    """What ``program`` did as a process of its own; output is read until its children end too."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_megatrons_norm_recomputation_still_needs_transformer_engine():
    """If this fails, upstream has been repaired: drop ``repairs.recompute_without_te``."""
    program = (
        "import torch\n"
        "from megatron.core.tensor_parallel.random import CheckpointWithoutOutput\n"
        "from megatron_k2.host.repairs import recompute_without_te\n"
        "from tests.support.single_rank import one_rank\n"
        "def run():\n"
        "    x = torch.ones(3, requires_grad=True)\n"
        "    checkpoint = CheckpointWithoutOutput()\n"
        "    y = checkpoint.checkpoint(torch.exp, x * 2)\n"
        "    z = y * y\n"
        "    checkpoint.discard_output_and_register_recompute(z)\n"
        "    z.sum().backward()\n"
        "    return x.grad\n"
        "with one_rank():\n"
        "    try:\n"
        "        run()\n"
        "    except NameError as error:\n"
        "        assert 'FP8GlobalStateManager' in str(error)\n"
        "    else:\n"
        "        raise SystemExit('upstream works')\n"
        "    recompute_without_te()\n"
        "    expected = 4 * torch.ones(3).mul(4).exp()\n"
        "    torch.testing.assert_close(run(), expected)\n"
    )
    done = _in_a_process(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_megatrons_checkpoint_queue_still_dies_of_the_signal_that_asks_for_a_save(monkeypatch):
    """If this fails, upstream is repaired: ``keep_checkpoint_queue_through_sigterm`` can go."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    unrepaired = filesystem_async.get_write_results_queue
    monkeypatch.setattr(filesystem_async, "get_write_results_queue", unrepaired)

    def passes_through_a_sigterm():
        resource_tracker._resource_tracker._stop()  # as in a process that just started
        monkeypatch.setattr(filesystem_async, "_results_queue", None)
        others = set(multiprocessing.active_children())
        queue = filesystem_async.get_write_results_queue()
        (process,) = set(multiprocessing.active_children()) - others
        os.kill(process.pid, signal.SIGTERM)
        process.join(2)
        try:
            queue.put("saved")
            return queue.get() == "saved"
        except OSError:
            return False
        finally:
            process.kill()

    assert not passes_through_a_sigterm()
    repairs.keep_checkpoint_queue_through_sigterm()
    assert passes_through_a_sigterm()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.slow
def test_the_queue_ends_with_a_rank_that_is_killed():
    program = (
        "import multiprocessing, os, signal\n"
        "from megatron.core.dist_checkpointing.strategies import filesystem_async\n"
        "from megatron_k2.host.repairs import keep_checkpoint_queue_through_sigterm\n"
        "if __name__ == '__main__':\n"
        "    keep_checkpoint_queue_through_sigterm()\n"
        "    filesystem_async.get_write_results_queue().put(1)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = _in_a_process(program)
    assert done.returncode == -signal.SIGKILL
    left_over = int(done.stdout)
    for _ in range(50):
        if not os.path.exists(f"/proc/{left_over}"):
            return
        time.sleep(0.1)
    os.kill(left_over, signal.SIGKILL)
    raise AssertionError("the queue's process outlived its rank")


def _padded_pack():
    """Documents of 3 and 2 tokens in rows of 4, and their targets."""
    from megatron_k2.model.packed import describe, lay_out

    layout = lay_out([3, 2], 8, 4)
    packed = describe(layout, layout.rows_of_rank(1, 0), "cpu")
    tokens = torch.tensor([[11, 12, 13, -1, 21, 22, -1, -1]])
    return packed, tokens, torch.tensor([[0.0, 1, 1, 0, 1, 1, 0, 0]])


def test_upstream_still_takes_padding_for_a_documents_next_token_and_weighs_by_the_pack():
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    packed, tokens, targets = _padded_pack()
    rolled, _ = roll_tensor(tokens, packed_seq_params=packed)
    assert rolled[0, [2, 5]].tolist() == [-1, -1]
    _, divisor = roll_tensor(targets, packed_seq_params=packed)
    assert divisor == 3, "targets left after the roll, of 4 before it"


def test_repaired_rolls_end_with_a_documents_tokens_and_divide_by_all_targets(monkeypatch):
    import megatron.core.transformer.multi_token_prediction as mtp

    from megatron_k2.host.repairs import roll_packed_documents
    from megatron_k2.model.packed import next_in_document

    monkeypatch.setattr(mtp, "roll_tensor", original := mtp.roll_tensor)
    roll_packed_documents(next_in_document)
    packed, tokens, targets = _padded_pack()
    packed.loss_weight = targets.sum()
    assert mtp.roll_tensor(tokens, packed_seq_params=packed)[0][0, [2, 5]].tolist() == [0, 0]
    for _ in range(2):
        targets, divisor = mtp.roll_tensor(targets, packed_seq_params=packed)
        assert divisor == 4
    for found, expected in zip(mtp.roll_tensor(tokens), original(tokens), strict=True):
        assert torch.equal(found, expected), "without a pack it is upstream's"


def _waits_for_a_worker(signal_number, then, *, is_repaired):
    """As a rank does whose worker gets a signal; run in a fork.

    Args:
        signal_number: what the worker gets, 0 for nothing.
        then: ``wait`` for it, ``close`` it, or ``end`` by an error.
        is_repaired: whether the worker is guarded.
    """
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    def worker(rank, queue, preload_q, *_):
        os.kill(os.getpid(), signal_number)
        preload_q.get()
        preload_q.task_done()
        queue.get()
        queue.task_done()

    PersistentAsyncCaller.async_loop = staticmethod(worker)
    if is_repaired:
        repairs.guard_checkpoint_worker()
    caller = PersistentAsyncCaller()
    caller.process = PersistentAsyncCaller._get_process(0, "fork")
    if then == "end":
        raise KeyError("as any error of a rank")
    PersistentAsyncCaller._persistent_preload_q.put(1)
    PersistentAsyncCaller._persistent_preload_q.join()
    caller.close()
    time.sleep(1.5)


def _exit_code_of(seconds, *args, **kwargs):
    """``None`` if it is still there after so many seconds."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_waits_for_a_worker, args=args, kwargs=kwargs)
    process.start()
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_still_waits_for_ever_for_a_checkpoint_worker_that_a_signal_ended(number):
    """If this fails, upstream looks after its worker: ``guard_checkpoint_worker`` can go."""
    import megatron.core.dist_checkpointing.strategies.async_utils as async_utils

    assert not hasattr(async_utils.PersistentAsyncCaller._get_process, "_k2_is_guarded")
    assert _exit_code_of(3, number, "wait", is_repaired=False) is None


def test_a_guarded_worker_outlives_a_sigterm_and_a_rank_ends_with_one_that_is_killed(capfd):
    import megatron.core.dist_checkpointing.strategies.async_utils  # noqa: F401

    assert _exit_code_of(20, signal.SIGKILL, "wait", is_repaired=True) == 1
    assert "has died (exit code -9; -9 is the kernel's" in capfd.readouterr().err
    for number in (0, signal.SIGTERM):
        assert _exit_code_of(20, number, "wait", is_repaired=True) == 0
    assert capfd.readouterr().err == ""
    assert _exit_code_of(20, 0, "end", is_repaired=True) == 1
    assert "has died" not in capfd.readouterr().err
