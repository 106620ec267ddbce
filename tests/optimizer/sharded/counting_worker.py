"""One training case on this rank, its optimizer step watched: ``python -m … JSON``.

Writes ``counts<rank>.json`` into the run's directory: collectives of each step by the file that
started them, values read back to the host by file and line, matrices orthogonalised, elements of
optimizer state.
"""

import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import megatron_k2

READS = {
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.cpu,
    torch.Tensor.__bool__,
    torch.Tensor.__float__,
    torch.Tensor.__int__,
}
COLLECTIVES = ("all_reduce", "all_to_all_single", "all_gather", "all_gather_into_tensor")


def _caller() -> str:
    """file:line of the innermost frame that is neither torch's nor this file's.

    Our own files from ``megatron_k2/`` on, others by their last three names.
    """
    for frame in reversed(traceback.extract_stack()):
        path = frame.filename
        if "/torch/" not in path and path != __file__ and "host/cpu" not in path:
            return f"{_short(Path(path))}:{frame.lineno}"
    return "?"


def _short(path: Path) -> str:
    (package,) = megatron_k2.__path__
    if path.is_relative_to(package):
        return f"megatron_k2/{path.relative_to(package)}"
    return "/".join(path.parts[-3:])


class _HostReads(TorchFunctionMode):
    """Counts every value that Python reads out of a tensor."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.found[_caller()] += 1
        return func(*args, **(kwargs or {}))


class Watch:
    """Counts while entered."""

    def __init__(self):
        self.collectives, self.reads = Counter(), _HostReads()

    def __enter__(self):
        self._originals = {name: getattr(torch.distributed, name) for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counted(name, original))
        self.reads.__enter__()
        return self

    def __exit__(self, *exception):
        self.reads.__exit__(*exception)
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)

    def _counted(self, name, original):
        def call(*args, **kwargs):
            op = kwargs.get("op")
            kind = f"{name} MAX" if op == torch.distributed.ReduceOp.MAX else name
            self.collectives[f"{kind} from {_caller().split(':')[0]}"] += 1
            return original(*args, **kwargs)

        return call


def _report(hooks, optimizer, watches) -> dict:
    from megatron_k2.optimizer.param_groups import muon_matrices
    from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip

    parts = [o for o in optimizer.chained_optimizers if isinstance(o, DistributedMuonClip)]
    specs = muon_matrices(hooks.model)
    return {
        "collectives": [dict(w.collectives) for w in watches],
        "reads": [dict(w.reads.found) for w in watches],
        "orthogonalized": sum(o.matrix_group.exchange.num_orthogonalized for o in parts),
        "buckets": [len({m.bucket for m in o.matrix_group.matrices}) for o in parts],
        "are_experts": [all(m.spec.is_expert for m in o.matrix_group.matrices) for o in parts],
        "num_cut_experts": sum(
            sum(end > start for start, end in m.pieces) > 1
            for o in parts
            for m in o.matrix_group.matrices
            if m.spec.is_expert
        ),
        "group_sizes": [o.matrix_group.exchange.group.size() for o in parts],
        "imbalance": [o.matrix_group.assignment.imbalance for o in parts],
        "state_elements": sum(
            value.numel()
            for o in parts
            for state in o.optimizer.state.values()
            for name, value in state.items()
            if name != "step"
        ),
        "expected_state": sum(
            p.numel() * (1 if p in specs else 2) / o.data_parallel_group.size()
            for o in parts
            for buffer in o.buffers
            for p in buffer.params
        ),
        "num_matrices": sum(spec.num_blocks for spec in specs.values()),
    }


def main() -> None:
    import megatron_k2.training.hooks as hooks_module
    from megatron_k2.training.pretrain import run

    case = json.loads(Path(sys.argv[1]).read_text())
    built, watches = {}, []

    class Instrumented(hooks_module.TrainingHooks):
        def get_optimizer(self, factory, config, model, **kwargs):
            optimizer = super().get_optimizer(factory, config, model, **kwargs)
            inner = optimizer.step

            def step():
                with Watch() as watch:
                    result = inner()
                watches.append(watch)
                return result

            optimizer.step = step
            built.update(hooks=self, optimizer=optimizer)
            return optimizer

    hooks_module.TrainingHooks = Instrumented
    run([*case["flags"], "--console", "megatron"])
    path = Path(case["out"]) / f"counts{os.environ['RANK']}.json"
    path.write_text(json.dumps(_report(built["hooks"], built["optimizer"], watches)))


if __name__ == "__main__":
    main()
