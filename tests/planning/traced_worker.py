"""Training cases on this rank, watched: ``python -m tests.planning.traced_worker JSON``.

Writes ``<name>-<rank>.json`` for each case: the order of forwards and backwards of its first step
as (kind, micro-batch, virtual stage), and the payload of every collective in bytes, by the call and
the size of its group, in forward and backward and in the optimizer's step apart.
"""

import importlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.cases import run_each

PAYLOAD = {
    "all_to_all_single": lambda a, k: a[1] if len(a) > 1 else k["input"],
    "reduce_scatter_tensor": lambda a, k: a[1] if len(a) > 1 else k["input"],
    "all_gather_into_tensor": lambda a, k: a[0] if a else k["output_tensor"],
    "isend": lambda a, k: a[0] if a else k["tensor"],
    "all_gather": lambda a, k: torch.cat([t.flatten() for t in (a[0] if a else k["tensor_list"])]),
}
"""Call -> the whole payload among its arguments: the larger side of a gather or scatter."""
MEGATRONS_NAME = {
    "reduce_scatter_tensor": "dist_reduce_scatter_func",
    "all_gather_into_tensor": "dist_all_gather_func",
}
BOUND_AT_IMPORT = (
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.tensor_parallel.layers",
)
"""Modules that keep the two functions under Megatron's own names."""


class Watch:
    """Counts bytes while entered, under the current phase's name."""

    def __init__(self):
        self.bytes, self.phase = Counter(), "other"

    def __enter__(self):
        self._originals = {name: getattr(dist, name) for name in PAYLOAD}
        for name, original in self._originals.items():
            self._set(name, self._counted(name, original))
        return self

    def __exit__(self, *_exception):
        for name, original in self._originals.items():
            self._set(name, original)

    @staticmethod
    def _set(name, function):
        setattr(dist, name, function)
        setattr(dist.distributed_c10d, name, function)  # where a P2POp looks for what it may hold
        for module in map(importlib.import_module, BOUND_AT_IMPORT):
            setattr(module, MEGATRONS_NAME.get(name, name), function)

    def _counted(self, name, original):
        def call(*args, **kwargs):
            tensor = PAYLOAD[name](args, kwargs)
            size = dist.get_world_size(kwargs.get("group"))
            self.bytes[f"{self.phase} {name} {size}"] += tensor.numel() * tensor.element_size()
            return original(*args, **kwargs)

        return call


def _record_order(order):
    """Wrap Megatron's two step functions of the pipeline."""
    from megatron.core.pipeline_parallel import schedules

    forward, backward = schedules.forward_step, schedules.backward_step
    made = {}

    def forward_step(*args, **kwargs):
        result = forward(*args, **kwargs)
        unit = (kwargs.get("current_microbatch"), kwargs.get("vp_stage") or 0)
        order.append(("F", *unit))
        output = result[0]
        made[id(output[0] if isinstance(output, list) else output)] = (unit, output)
        return result

    def backward_step(*args, **kwargs):
        output = args[1] if len(args) > 1 else kwargs["output_tensor"]
        order.append(("B", *made[id(output[0] if isinstance(output, list) else output)][0]))
        return backward(*args, **kwargs)

    schedules.forward_step, schedules.backward_step = forward_step, backward_step


def run_case(case: dict) -> None:
    import megatron_k2.training.hooks as hooks_module
    from megatron_k2.training.pretrain import run

    order, watch = [], Watch()

    class Instrumented(hooks_module.TrainingHooks):
        def get_optimizer(self, factory, config, model, **kwargs):
            optimizer = super().get_optimizer(factory, config, model, **kwargs)
            inner = optimizer.step

            def step():
                watch.phase = "optimizer"
                result = inner()
                watch.phase = "done"
                return result

            optimizer.step = step
            watch.phase = "step"
            return optimizer

    hooks_module.TrainingHooks = Instrumented
    _record_order(order)
    with watch:
        run([*case["flags"], "--console", "megatron"])
    path = Path(case["out"]) / f"{case['name']}-{os.environ['RANK']}.json"
    path.write_text(json.dumps({"order": order, "bytes": watch.bytes}))


def main() -> None:
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
