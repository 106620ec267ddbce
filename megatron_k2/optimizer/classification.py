"""Who gets what: the table of Muon's and AdamW's parameters that a run prints at its start."""

from collections import Counter

import torch

from megatron_k2.optimizer.param_groups import K2_OPTIONS, MatrixOptions, MatrixSpec, muon_matrices
from megatron_k2.terminal import as_text, table

HEADER = ("optimizer", "role", "module", "parameters", "shape", "matrices", "of shape")


def classification_table(
    model_chunks: list[torch.nn.Module], options: MatrixOptions = K2_OPTIONS
) -> str:
    """What this rank trains, one line a kind: same role, module class, shape and optimizer.

    A role is the module's path without the numbers of layers and experts. Shapes are those of this
    rank's tensor-parallel shard.

    Raises:
        ValueError: for a matrix that is not classified (``muon_matrices``).
    """
    specs = muon_matrices(model_chunks, options)
    kinds: Counter[tuple[str, ...]] = Counter()
    matrices: Counter[tuple[str, ...]] = Counter()
    for chunk in model_chunks:
        for name, module in chunk.named_modules():
            for own_name, param in module.named_parameters(recurse=False):
                if not param.requires_grad:
                    continue
                spec = specs.get(param)
                kind = _kind(f"{name}.{own_name}", module, param, spec)
                kinds[kind] += 1
                matrices[kind] += spec.num_blocks if spec else 0
    listed = table(*HEADER)
    for kind in sorted(kinds, key=lambda kind: kind[0] != "Muon"):  # else in the model's order
        optimizer, role, module_class, shape, block = kind
        count = f"{matrices[kind]:,}" if block else ""
        listed.add_row(optimizer, role, module_class, f"{kinds[kind]:,}", shape, count, block)
    num_muon = sum(p.numel() for p in specs)
    trained = [p for chunk in model_chunks for p in chunk.parameters() if p.requires_grad]
    num_all = sum(p.numel() for p in trained)
    num_matrices = sum(matrices.values())
    total = f"Muon: {num_matrices:,} matrices, {num_muon:,} of {num_all:,} parameters here"
    return as_text(listed, total)


def _kind(
    name: str, module: torch.nn.Module, param: torch.nn.Parameter, spec: MatrixSpec | None
) -> tuple[str, ...]:
    """(optimizer, role, module class, shape, shape of one matrix's local part)."""
    words = [word for word in name.split(".") if not word.isdigit() and word != "module"]
    words[-1] = words[-1].rstrip("0123456789")  # grouped storage: weight0, weight1, ...
    block = ""
    if spec is not None:
        block = _text((param.shape[:-1].numel() // spec.num_blocks, param.shape[-1]))
    optimizer = "Muon" if spec is not None else "AdamW"
    return optimizer, ".".join(words), type(module).__name__, _text(param.shape), block


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)
