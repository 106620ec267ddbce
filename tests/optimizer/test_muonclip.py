"""``--optimizer muonclip``, built by Megatron's factory on one rank, against a hand-written loop.

The loop knows no batches, specs or row scales: one matrix at a time through ``orthogonalize`` (its
own oracle is in ``newton_schulz/test_iteration.py``), one head at a time through QK-Clip, AdamW by
its formula. Both work in fp32 with matrix products batched differently: 2e-6 of a weight of order
one. Several ranks are in ``tests/parallel/test_layouts.py``.
"""

import importlib.util
import math
from argparse import Namespace

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.optimizer.muonclip import check_triton
from megatron_k2.optimizer.newton_schulz.iteration import orthogonalize
from megatron_k2.training.step_log import StepLog
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, arguments, build, one_rank, randomise

LR, DECAY, MU, THRESHOLD = 0.02, 0.1, 0.95, 20.0
FLAGS = f"""
    --optimizer muon --muon-momentum {MU} --muon-nesterov --muon-scale-mode spectral
    --muon-extra-scale-factor 0.2 --muon-coefficient-type simple --muon-num-ns-steps 5
    --weight-decay {DECAY} --clip-grad 0 --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8
    --qk-clip-threshold {THRESHOLD} --muonclip --muonclip-dtype fp32
""".split()


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def _built(is_sharded=False, extra=()):
    """(model in its gradient buffer, its optimizer, the maxima it reads)."""
    ddp, optimizer, hooks = _built_with_hooks(is_sharded, extra)
    return ddp, optimizer, hooks.max_logits


def _built_with_hooks(is_sharded=False, extra=()):
    """Model, optimizer and hooks as a training run builds them.

    Args:
        is_sharded: over Megatron's ``DistributedOptimizer``.
        extra: further flags.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import get_megatron_optimizer
    from megatron.training.training import get_megatron_optimizer_config

    from megatron_k2.training.hooks import TrainingHooks

    host = ["--optimizer", "adam", "--use-distributed-optimizer"] if is_sharded else []
    args = arguments(SMALL, *FLAGS, *host, *extra)
    args.optimizer = "adam" if is_sharded else "muonclip"
    model = build(SMALL, *FLAGS).train()
    randomise(model)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=is_sharded), model
    )
    config, overrides = get_megatron_optimizer_config(args)
    hooks = TrainingHooks(args, None, None)
    optimizer = hooks.get_optimizer(
        get_megatron_optimizer, config, [ddp], config_overrides=overrides
    )
    for group in optimizer.param_groups:
        group["lr"] = LR  # as Megatron's scheduler does before each step
        group["weight_decay"] = DECAY * group.get("wd_mult", 1.0)
    return ddp, optimizer, hooks


def _set_gradients(ddp, step):
    generator = torch.Generator().manual_seed(step)
    for param in ddp.parameters():
        param.main_grad.copy_(torch.randn(param.shape, generator=generator))


def _set_maxima(maxima, step):
    """About a third of the heads over the threshold."""
    generator = torch.Generator().manual_seed(100 + step)
    values = 10 + 15 * torch.rand(maxima.running.shape, generator=generator)
    maxima.running.copy_(values)
    assert 0 < (values > THRESHOLD).sum() < values.numel()
    return values


def _is_matrix(name, param):
    return param.ndim == 2 and "embedding" not in name and "output_layer" not in name


class HandLoop:
    """MuonClip on named tensors, one at a time."""

    def __init__(
        self,
        weights,
        is_fused_split=True,
        are_norms_decayed=True,
        is_per_head=False,
        is_router_muon=True,
    ):
        self.weights = {name: w.detach().clone() for name, w in weights}
        self.state = {}
        self.steps = 0
        self.is_fused_split = is_fused_split
        self.are_norms_decayed = are_norms_decayed
        self.is_per_head = is_per_head
        self.is_router_muon = is_router_muon

    def step(self, gradients, maxima):
        self.steps += 1
        for name, weight in self.weights.items():
            if _is_matrix(name, weight) and (self.is_router_muon or "router" not in name):
                self._muon(name, weight, gradients[name])
            else:
                self._adam(name, weight, gradients[name])
        for layer, heads in enumerate(maxima.tolist()):
            for head, largest in enumerate(heads):
                if largest > THRESHOLD:
                    self._clip(layer, head, THRESHOLD / largest)

    def _muon(self, name, weight, grad):
        momentum = MU * self.state.get(name, torch.zeros_like(grad)) + grad
        self.state[name] = momentum
        direction = grad + MU * momentum
        num = 2 if "linear_fc1" in name and self.is_fused_split else 1
        if self.is_per_head and ("q_up" in name or "kv_up" in name):
            num = SMALL.num_attention_heads
        for part, target in zip(direction.chunk(num), weight.chunk(num), strict=True):
            update = orthogonalize(part, coefficients="jordan", steps=5, dtype=torch.float32)
            target.mul_(1 - LR * DECAY)
            target.sub_(LR * 0.2 * math.sqrt(max(part.shape)) * update)

    def _adam(self, name, weight, grad):
        m, v = self.state.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
        m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
        self.state[name] = (m, v)
        if self.are_norms_decayed or "norm" not in name:
            weight.mul_(1 - LR * DECAY)
        m, v = m / (1 - 0.9**self.steps), v / (1 - 0.95**self.steps)
        weight.sub_(LR * m / (v.sqrt() + 1e-8))

    def _clip(self, layer, head, gamma):
        prefix = f"module.decoder.layers.{layer}.self_attention."
        nope, rope, value = SMALL.qk_head_dim, SMALL.qk_pos_emb_head_dim, SMALL.v_head_dim
        query = self.weights[prefix + "linear_q_up_proj.weight"]
        first = head * (nope + rope)
        query[first : first + nope] *= gamma**0.5
        query[first + nope : first + nope + rope] *= gamma
        key = self.weights[prefix + "linear_kv_up_proj.weight"]
        first = head * (nope + value)
        key[first : first + nope] *= gamma**0.5


def _after_steps(num_steps=3, is_sharded=False, extra=(), **twins):
    """Largest difference of each parameter between optimizer and hand loop."""
    ddp, optimizer, maxima = _built(is_sharded, extra)
    twin = HandLoop(ddp.named_parameters(), **twins)
    for step in range(num_steps):
        _set_gradients(ddp, step)
        gradients = {name: p.main_grad.clone() for name, p in ddp.named_parameters()}
        values = _set_maxima(maxima, step)
        assert optimizer.step()[0]
        twin.step(gradients, values)
    return {
        name: (param - twin.weights[name]).abs().max().item()
        for name, param in ddp.named_parameters()
    }


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_three_steps_equal_the_hand_loop_on_every_parameter(is_sharded):
    differences = _after_steps(is_sharded=is_sharded)
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < 2e-6, f"{worst}: {differences[worst]:.1e}"


OPTIONS = "--muon-per-head --muon-router adamw".split()


@pytest.mark.parametrize("is_sharded", [False, True], ids=["plain", "over DistributedOptimizer"])
def test_heads_of_their_own_and_a_router_by_adamw_equal_the_hand_loop_told_so(is_sharded):
    differences = _after_steps(
        is_sharded=is_sharded, extra=OPTIONS, is_per_head=True, is_router_muon=False
    )
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < 2e-6, f"{worst}: {differences[worst]:.1e}"


def test_the_two_options_change_the_weights_they_name_and_no_other():
    differences = _after_steps(1, extra=OPTIONS)
    wrong = {name for name, difference in differences.items() if difference > 1e-4}
    named = ("linear_q_up_proj", "linear_kv_up_proj", "router")
    assert wrong == {name for name in differences if any(part in name for part in named)}


def test_a_fused_weight_taken_for_one_matrix_is_seen_in_those_weights_only():
    differences = _after_steps(1, is_fused_split=False)
    wrong = {name for name, difference in differences.items() if difference > 1e-4}
    assert wrong == {name for name in differences if "linear_fc1" in name}


def test_norms_that_keep_their_weight_would_be_seen():
    differences = _after_steps(1, are_norms_decayed=False)
    wrong = {name for name, difference in differences.items() if difference > 1e-4}
    assert wrong == {name for name in differences if "norm" in name}


def _attention_weights(ddp):
    return {n: p.detach().clone() for n, p in ddp.named_parameters() if "self_attention" in n}


def _rows_that_differ(one, other):
    return (one != other).any(-1).nonzero().flatten().tolist()


def test_one_hot_head_changes_exactly_its_own_query_and_key_rows():
    results = []
    for largest in (THRESHOLD, 4 * THRESHOLD):
        ddp, optimizer, maxima = _built()
        _set_gradients(ddp, 0)
        maxima.running.fill_(1.0)
        maxima.running[1, 2] = largest
        optimizer.step()
        results.append(_attention_weights(ddp))
    cold, hot = results
    nope, rope, value = SMALL.qk_head_dim, SMALL.qk_pos_emb_head_dim, SMALL.v_head_dim
    differing = {name: rows for name in cold if (rows := _rows_that_differ(cold[name], hot[name]))}
    prefix = "module.decoder.layers.1.self_attention."
    query, key = prefix + "linear_q_up_proj.weight", prefix + "linear_kv_up_proj.weight"
    assert differing == {
        query: list(range(2 * (nope + rope), 3 * (nope + rope))),
        key: list(range(2 * (nope + value), 2 * (nope + value) + nope)),
    }
    first = 2 * (nope + rope)
    assert torch.equal(hot[query][first : first + nope], cold[query][first : first + nope] * 0.5)
    rotary = slice(first + nope, first + nope + rope)
    assert torch.equal(hot[query][rotary], cold[query][rotary] * 0.25)


def test_a_step_takes_the_maxima_and_starts_anew():
    ddp, optimizer, maxima = _built()
    _set_gradients(ddp, 0)
    values = _set_maxima(maxima, 0)
    optimizer.step()
    assert torch.equal(maxima.latest, values)
    assert (maxima.running == -math.inf).all()


def test_an_evaluation_forward_leaves_nothing_for_the_next_step_to_clip():
    ddp, _, maxima = _built()
    tokens, positions = torch.zeros(1, 16, dtype=torch.long), torch.arange(16)[None]
    with torch.no_grad():
        ddp.eval()(tokens, positions, None)
    assert (maxima.running == -math.inf).all()
    ddp.train()(tokens, positions, None)
    assert maxima.running.isfinite().all()


def test_a_step_that_is_skipped_neither_clips_nor_moves_anything():
    """Megatron skips a step with an infinite gradient before the inner optimizer sees it."""
    ddp, optimizer, maxima = _built()
    before = {name: param.detach().clone() for name, param in ddp.named_parameters()}
    _set_gradients(ddp, 0)
    _set_maxima(maxima, 0)
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner.prepare_grads = lambda: True
    success, *_ = optimizer.step()
    assert not success
    assert all(torch.equal(param, before[name]) for name, param in ddp.named_parameters())
    assert maxima.latest.max() == -math.inf


def test_what_a_skipped_step_saw_is_recorded_and_not_carried_into_the_next():
    """An overflow would otherwise hide the next step's hot heads: γ of an infinite logit is 1."""
    ddp, _, hooks = _built_with_hooks()
    hooks.args.consumed_train_samples = 1
    ddp.module.config.finalize_model_grads_func([ddp])
    _set_maxima(hooks.max_logits, 0)
    hooks.max_logits.running[0, 0] = math.inf
    shown = []
    log = StepLog(hooks.args, [ddp], hooks.max_logits, lambda record, table: shown.append(record))
    log.step({}, LR, 1, True, None)
    assert not shown, "a record is shown a step late"
    log.flush()
    (record,) = shown
    assert record.num_nonfinite_heads == 1
    assert record.max_logit == math.inf
    assert record.num_clipped_heads == 0
    assert (hooks.max_logits.running == -math.inf).all()


def test_the_triton_kernels_flag_says_all_none_or_by_measurement():
    """Its own arithmetic is in ``newton_schulz/test_symmetric.py``; a CPU ignores the flag."""
    found = {}
    flag = "muonclip-triton-symmetric"
    for extra in ((), (f"--{flag}",), (f"--no-{flag}",)):
        _, optimizer, _ = _built(is_sharded=True, extra=extra)
        (part,) = optimizer.chained_optimizers
        found[extra] = part.settings.symmetric_on_gpu
    assert list(found.values()) == [None, "triton", "none"]


def test_the_flag_without_triton_is_refused_on_a_gpu_and_ignored_on_a_cpu(monkeypatch):
    args = Namespace(muonclip_triton_symmetric=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_triton(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="pip install triton, or drop it"):
        check_triton(args)
    check_triton(Namespace(muonclip_triton_symmetric=False))
