"""``megatron_k2.training.pretrain`` that writes its optimizer down: ``python -m … DIR <flags>``.

``loaded<rank>.pt`` after Megatron's load, ``saved<rank>.pt`` before a save: each parameter's state,
in order, and each group's rates.
"""

import os
import sys
from pathlib import Path

import torch

from megatron_k2.training import hooks, pretrain

LOAD, SAVE = hooks.TrainingHooks.load, hooks.TrainingHooks.save
directory = Path()


def _tensors(optimizer):
    found = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state.get(param, {})
                found.append({name: torch.as_tensor(v).clone() for name, v in state.items()})
                found[-1]["master"] = param.detach().clone()
    return found


def _write(name, optimizer):
    rates = [[group[key] for key in ("lr", "max_lr", "min_lr")] for group in optimizer.param_groups]
    muons = [m for o in optimizer.chained_optimizers if (m := optimizer.muon_of(o)) is not None]
    peaks = torch.cat([muon.matrix_group.peaks for muon in muons])
    found = {"tensors": _tensors(optimizer), "rates": rates, "peaks": peaks.clone()}
    torch.save(found, directory / f"{name}{os.environ['RANK']}.pt")


def load(self, original, model, optimizer, scheduler, **kwargs):
    result = LOAD(self, original, model, optimizer, scheduler, **kwargs)
    _write("loaded", optimizer)
    return result


def save(self, original, iteration, model, optimizer, *rest, **kwargs):
    _write("saved", optimizer)
    return SAVE(self, original, iteration, model, optimizer, *rest, **kwargs)


if __name__ == "__main__":
    directory = Path(sys.argv.pop(1))
    directory.mkdir(parents=True, exist_ok=True)
    hooks.TrainingHooks.load, hooks.TrainingHooks.save = load, save
    pretrain.main()
