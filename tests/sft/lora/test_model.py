"""A model with adapters against a plain one whose weights are ``W + (alpha / rank) B A``.

The oracle forms the product in full, by the definition, and knows nothing of groups, parts or
ranks: forward values must agree, and the gradients of A and B must be what the chain rule makes of
the plain model's ``dW``: ``dB = scale dW Aᵀ``, ``dA = scale Bᵀ dW``. Tolerance: fp32, sums in
another order, 2e-5 of a tensor's largest magnitude.
"""

from dataclasses import replace

import pytest
import torch

from megatron_k2.errors import UserError
from megatron_k2.model.lora.settings import TARGETS, parse_targets, settings_of
from megatron_k2.optimizer.param_groups import muon_matrices
from megatron_k2.planning.cost.adapters import matrix_shapes, total_elements
from megatron_k2.planning.cost.memory import rank_memory
from megatron_k2.planning.gpus import get_gpu
from megatron_k2.planning.request import RunRequest
from tests.support.devices import DEVICES
from tests.support.single_rank import SMALL, build, one_rank, randomise

RANK, ALPHA = 4, 12.0
LORA = f"--lora-rank {RANK} --lora-alpha {ALPHA} --moe-router-load-balancing-type none".split()
PLAIN = "--moe-router-load-balancing-type none".split()
BOUND = 2e-5


@pytest.fixture(scope="module", autouse=True, params=DEVICES)
def _rank(request):
    with one_rank(request.param):
        yield


def product(a, b, scale):
    """``scale B A``; where A has more rows than B columns, gate and up each with their own."""
    num_parts = a.shape[0] // b.shape[1]
    halves = zip(a.chunk(num_parts), b.chunk(num_parts), strict=True)
    return torch.cat([scale * part_b @ part_a for part_a, part_b in halves])


def merged(state, scale=ALPHA / RANK):
    """A plain model's state: every adapter multiplied out and added."""
    plain = {k: v.clone() for k, v in state.items() if ".adapter." not in k and torch.is_tensor(v)}
    for name in state:
        if name.endswith("adapter.lora_a"):
            base = name.removesuffix("adapter.lora_a")
            b = state[f"{base}adapter.lora_b"]
            plain[f"{base}weight"] += product(state[name], b, scale)
    return plain


def loss_of(model):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(SMALL.vocab_size, (2, 33), generator=generator)
    positions = torch.arange(32).expand(2, 32)
    logits = model(tokens[:, :-1], positions, None)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return logits, loss


def both(*flags, scale=ALPHA / RANK):
    """(adapted model, plain model of its merged weights), each with gradients, and their logits."""
    model = build(SMALL, *LORA, *flags).train()
    randomise(model)
    with torch.no_grad():  # products as large as a tenth of the weights, as a trained one's
        for name, param in model.named_parameters():
            param.mul_(0.1 if name.endswith("lora_b") else 1.0)
    plain = build(SMALL, *PLAIN).train()
    plain.load_state_dict(merged(model.state_dict(), scale), strict=False)
    found, loss = loss_of(model)
    loss.backward()
    expected, plain_loss = loss_of(plain)
    plain_loss.backward()
    return model, plain, found.detach(), expected.detach()


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-20)).item()


def expected_gradients(model, plain, scale=ALPHA / RANK):
    """Of every factor, by the chain rule from the plain model's dW."""
    weights = {name: p.grad for name, p in plain.named_parameters()}
    state = dict(model.named_parameters())
    for name in state:
        if not name.endswith("adapter.lora_a"):
            continue
        base = name.removesuffix("lora_a")
        a, b = state[name].detach(), state[f"{base}lora_b"].detach()
        grad = weights[base.removesuffix("adapter.") + "weight"]
        num = a.shape[0] // b.shape[1]
        parts = list(zip(a.chunk(num), b.chunk(num), grad.chunk(num), strict=True))
        yield name, torch.cat([scale * part_b.T @ g for _, part_b, g in parts])
        yield f"{base}lora_b", torch.cat([scale * g @ part_a.T for part_a, _, g in parts])


def worst_gradient(model, plain):
    state = dict(model.named_parameters())
    found = {n: relative(state[n].grad, g) for n, g in expected_gradients(model, plain)}
    assert len(found) == len([n for n in state if ".adapter." in n])
    return max(found.values())


@pytest.mark.parametrize("flags", [(), ("--moe-token-dispatcher-type", "allgather")])
def test_logits_and_gradients_are_those_of_the_merged_model(flags):
    model, plain, found, expected = both(*flags)
    assert relative(found, expected) < BOUND
    assert worst_gradient(model, plain) < BOUND


def test_alpha_applied_twice_is_far_off():
    _, _, found, expected = both(scale=(ALPHA / RANK) ** 2)
    assert relative(found, expected) > 1e-2


@pytest.mark.parametrize(
    "recompute",
    [
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "--recompute-granularity selective --recompute-modules moe_act --moe-grouped-gemm",
    ],
)
def test_recomputed_layers_give_the_same_gradients(recompute):
    model, plain, found, expected = both(*recompute.split())
    assert relative(found, expected) < BOUND
    assert worst_gradient(model, plain) < BOUND


def test_only_adapters_train_and_begin_at_the_base():
    model = build(SMALL, *LORA)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".adapter." in name}
    assert not any("router" in name for name in trained)
    plain = build(SMALL, *PLAIN)
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(loss_of(model)[0], loss_of(plain)[0]), "B begins as zeros"


def test_the_checkpoint_is_the_adapters_alone():
    model = build(SMALL, *LORA)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    metadata = {"singleton_local_shards": False, "dp_cp_group": None}
    assert set(model.sharded_state_dict(metadata=metadata)) == trained
    state = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(state)
    name = min(state)
    with pytest.raises(RuntimeError, match="lacks"):
        model.load_state_dict({k: v for k, v in state.items() if k != name})


def test_gradient_buffers_hold_the_planners_count_and_nothing_frozen():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    model = build(SMALL, *LORA)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    in_buffers = {param for buffer in buffers for param in buffer.params}
    trained = {param for param in model.parameters() if param.requires_grad}
    assert in_buffers == trained
    assert sum(param.numel() for param in trained) == total_elements(SMALL, RANK)
    assert not any(hasattr(p, "main_grad") for p in model.parameters() if not p.requires_grad)
    specs = muon_matrices([model])
    assert set(specs) == trained, "A and B are Muon's"
    assert sum(spec.num_blocks for spec in specs.values()) == matrix_shapes(SMALL, RANK).total()


@pytest.mark.parametrize(
    "recompute",
    ["", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"],
)
def test_a_base_in_fp8_is_the_model_of_its_widened_weights(recompute):
    """To the last bit in logits and factors' gradients; half of bf16's bytes."""
    held = build(SMALL, *LORA, *recompute.split()).train()
    plain = build(SMALL, *LORA, *recompute.split()).train()
    for model in (held, plain):
        randomise(model)
    held.hold_base_in_fp8()
    changed = 0
    for name, param in plain.named_parameters():
        holder, _, own = name.rpartition(".")
        if own == "weight" and not param.requires_grad:
            widened = held.get_submodule(holder).weight
            changed += int(not torch.equal(widened, param))
            param.data.copy_(widened)
    assert changed == 3 * 5 + 2 + 2 * 2 * (1 + SMALL.num_moe_experts), "every linear of a layer"
    found, loss = loss_of(held)
    expected, plain_loss = loss_of(plain)
    assert torch.equal(found, expected)
    loss.backward()
    plain_loss.backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    own = dict(held.named_parameters())
    assert all(torch.equal(own[name].grad, grad) for name, grad in gradients.items())
    kinds = {p.dtype for n, p in own.items() if "parametrizations" in n}
    assert kinds == {torch.uint8}


def test_bytes_of_a_base_in_fp8_are_the_planners():
    """Within 2 %: the planner counts bf16, and no bias of the router; here the rest is fp32."""
    preset = replace(SMALL, hidden_size=256, moe_ffn_hidden_size=128, ffn_hidden_size=512)
    model = build(preset, *LORA)
    model.hold_base_in_fp8()
    plan = RunRequest(
        preset=preset,
        gpu=get_gpu("h200"),
        world_size=1,
        seq_length=64,
        sequences_per_step=1,
        lora_rank=RANK,
        lora_base_fp8=True,
        fp8_storage=False,
    )
    found = sum(2 * p.numel() for p in model.parameters() if p.dtype == torch.float32)
    found += sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)
    scales = (b for name, b in model.named_buffers() if name.endswith("scale_bits"))
    found += sum(4 * b.numel() for b in scales)
    assert rank_memory(plan, 0).weights == pytest.approx(found, rel=0.02)


def test_targets_choose_where_adapters_stand():
    def places(*targets):
        model = build(SMALL, *LORA, "--lora-targets", *targets)
        return {
            name.split(".adapter")[0] for name, _ in model.named_parameters() if "adapter" in name
        }

    kv = places("linear_kv_down_proj")
    assert kv == {f"decoder.layers.{i}.self_attention.linear_kv_down_proj" for i in range(3)}
    experts = places("experts.linear_fc2")
    assert len(experts) == 2 * SMALL.num_moe_experts
    assert all(".local_experts." in name for name in experts)
    assert len(places("linear_fc1")) == 1 + 2 + 2 * SMALL.num_moe_experts


def test_a_full_rank_step_is_one_of_full_width():
    """A the identity, B zeros, scale 1: after a gradient step of B, ``B A = -lr dW``."""
    rank = SMALL.num_attention_heads * SMALL.v_head_dim
    flags = f"--lora-rank {rank} --lora-alpha {rank} --lora-targets linear_proj".split()
    model = build(SMALL, *PLAIN, *flags).train()
    randomise(model)
    adapters = {n: p for n, p in model.named_parameters() if ".adapter." in n}
    with torch.no_grad():
        for name, param in adapters.items():
            param.copy_(torch.eye(rank)) if name.endswith("lora_a") else param.zero_()
    plain = build(SMALL, *PLAIN).train()
    plain.load_state_dict(merged(model.state_dict(), 1.0), strict=False)
    for each in (model, plain):
        loss_of(each)[1].backward()
    rate = 0.5
    before = plain.state_dict()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for name, param in adapters.items():
            if name.endswith("lora_b"):
                param.sub_(rate * param.grad)
        state = merged(model.state_dict(), 1.0)
        for name in [n for n in weights if n.endswith("linear_proj.weight")]:
            stepped = before[name] - rate * weights[name].grad
            torch.testing.assert_close(state[name], stepped, rtol=0, atol=1e-6)
            assert (stepped - before[name]).abs().max() > 1e-3


def test_dropout_acts_in_training_alone():
    model = build(SMALL, *LORA, "--lora-dropout", "0.5")
    randomise(model)
    with torch.no_grad():
        first, second = loss_of(model.train())[0], loss_of(model)[0]
        assert not torch.equal(first, second)
        assert torch.equal(loss_of(model.eval())[0], loss_of(model)[0])


def test_experts_rows_must_fill_16_bytes():
    with pytest.raises(UserError, match="--lora-rank 3 with routed experts in"):
        build(SMALL, *"--lora-rank 3 --lora-targets experts.linear_fc1".split())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: parse_targets(["router"]), "the router stays as it is"),
        (lambda: parse_targets(["linear_qkv"]), "--lora-targets linear_qkv: expected of"),
        (lambda: parse_targets([]), "expected at least one"),
        (lambda: settings_of(0, None, None, 0.0), "--lora-rank 0: expected at least 1"),
        (lambda: settings_of(8, 0.0, None, 0.0), "--lora-alpha 0: expected a number above 0"),
        (lambda: settings_of(8, None, None, 1.0), "--lora-dropout 1: expected from 0"),
    ],
)
def test_wrong_settings_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()


def test_default_is_every_linear_at_scale_2():
    found = settings_of(16, None, None, 0.0)
    assert found.targets == frozenset(TARGETS)
    assert found.scale == 2.0
