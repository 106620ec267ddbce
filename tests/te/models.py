"""The same small model from local and from TE modules, with the same weights."""

import re

import torch

from tests.support.devices import is_same
from tests.support.single_rank import SMALL, build, randomise

LOCAL_FLAGS = "--muonclip --attention-backend unfused".split()
"""Unfused attention is the one backend of TE's that is Python; the choice is the process's."""
TE_FLAGS = [*LOCAL_FLAGS, *"--transformer-impl transformer_engine --moe-grouped-gemm".split()]


def local_name(te_name: str) -> str:
    """The local modules' name of a TE parameter."""
    name = re.sub(r"linear_(q|kv)_up_proj\.layer_norm_weight", r"\1_layernorm.weight", te_name)
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return re.sub(
        r"experts\.(linear_fc[12])\.weight(\d+)", r"experts.local_experts.\2.\1.weight", name
    )


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by the local modules' names."""
    return {
        local_name(name): value
        for name, value in model.state_dict().items()
        if torch.is_tensor(value)
    }


def pair(*flags: str, preset=SMALL):
    """(local model, TE model), equal in every weight."""
    local = build(preset, *LOCAL_FLAGS, *flags).train()
    randomise(local)
    te = build(preset, *TE_FLAGS, *flags).train()
    copy_weights(local, te)
    return local, te


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Every tensor of ``target`` from the one of the same local name."""
    values = tensors(source)
    for name, tensor in tensors(target).items():
        if torch.is_tensor(values.get(name)) and not name.endswith("_extra_state"):
            tensor.data.copy_(values[name])


def batch(preset=SMALL, seed: int = 0, sequence: int = 32, size: int = 2):
    """tokens, positions, labels [b, s]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(preset.vocab_size, (size, sequence + 1), generator=generator)
    positions = torch.arange(sequence).expand(size, -1).contiguous()
    return tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous()


def token_losses(model: torch.nn.Module, tokens, positions, labels):
    """[b, s] of one forward pass, on the device of the model."""
    device = next(model.parameters()).device
    tokens, positions, labels = (t.to(device) for t in (tokens, positions, labels))
    length = tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).triu_(1)
    return model(tokens, positions, mask, labels=labels)


def loss_and_gradients(model: torch.nn.Module, preset=SMALL):
    """Mean loss over the batch, and each parameter's gradient by its local name."""
    loss = token_losses(model, *batch(preset)).mean()
    loss.backward()
    gradients = {local_name(name): param.grad for name, param in model.named_parameters()}
    return loss.detach(), gradients


def differing(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same operations' result."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    return [name for name in expected if not is_same(found[name], expected[name])]


def largest_difference(found, expected) -> tuple[float, str]:
    """Over all names, the largest |difference| relative to the tensor's largest magnitude."""
    assert set(found) == set(expected), set(found) ^ set(expected)
    return max(
        (((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item(), n)
        for n in expected
    )
