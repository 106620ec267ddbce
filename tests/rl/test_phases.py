"""What a rank gives away while answers are sampled, and takes again: bytes, and every bit.

On a CPU gradients alone go; on a GPU all does (``pytest -m gpu``). Communicators of several ranks
are not exercised here.
"""

import pytest
import torch

from megatron_k2.rl.phases import Phases, held
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, arguments, build, one_rank, randomise

FLAGS = "--muonclip --qk-clip-threshold 20 --lr 1e-3".split()


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def device(request):
    with one_rank(request.param):
        yield request.param


@pytest.fixture(params=[False, True], ids=["whole", "ZeRO-1"])
def built(request):
    """A wrapped model with gradients, and its optimizer after a step."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_k2.training.hooks import TrainingHooks

    zero = ["--optimizer", "adam", "--use-distributed-optimizer"] if request.param else []
    args = arguments(SMALL, *FLAGS, *zero)
    args.optimizer = "adam" if request.param else "muonclip"
    model = build(SMALL, *FLAGS).train()
    randomise(model)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=request.param)
    stage = DistributedDataParallel(model.config, settings, model)
    config, overrides = get_megatron_optimizer_config(args)
    hooks = TrainingHooks(args, None, None)
    optimizer = hooks.get_optimizer(
        get_megatron_optimizer, config, [stage], config_overrides=overrides
    )
    fill(stage)
    optimizer.step()
    fill(stage)
    return stage, optimizer


def fill(stage):
    for number, param in enumerate(stage.parameters()):
        param.main_grad.fill_(0.01 * (number + 1))


def numbers(stage, optimizer):
    """Weights and states, copied."""
    states = [
        value
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    ]
    return [each.detach().clone() for each in (*stage.parameters(), *states)]


def test_bytes_are_those_of_the_tensors(built):
    stage, optimizer = built
    found, params = held([stage], optimizer), list(stage.parameters())
    count = sum(param.numel() for param in params)
    assert found.weights == pytest.approx(4 * count, rel=0.02)
    assert found.gradients == pytest.approx(4 * count, rel=0.02)
    matrices = sum(param.numel() for param in params if param.ndim == 2)
    assert found.optimizer > 4 * matrices, "a momentum each; AdamW has two"
    assert found.optimizer < 8 * count


def test_what_is_given_away_comes_back_as_it_was(built, device):
    stage, optimizer = built
    before, whole = numbers(stage, optimizer), held([stage], optimizer)
    phases = Phases([stage], optimizer)
    phases.rest(keeps_weights=True)
    update = held([stage], optimizer)
    assert (update.weights, update.gradients) == (whole.weights, 0)
    phases.rest(keeps_weights=False)
    rollout = held([stage], optimizer)
    if device == "cpu":
        assert rollout == whole._replace(gradients=0)
    else:
        assert rollout == (0, 0, 0)
    phases.wake()
    phases.wake()
    assert held([stage], optimizer) == whole
    for found, expected in zip(numbers(stage, optimizer), before, strict=True):
        assert torch.equal(found, expected)
    assert all(not param.main_grad.any() for param in stage.parameters())
    fill(stage)
    assert optimizer.step()[0], "it learns as before"
