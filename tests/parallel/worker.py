"""Runs training cases, one after another, on this rank: ``python -m tests.parallel.worker JSON``.

A case is a list of flags for ``megatron_k2.training.pretrain``. With ``inject`` its gradients and
maximum logits are replaced before each optimizer step by values that depend only on a parameter's
global name and position, so that any layout's optimizer sees the same numbers.
"""

import json
import sys
import zlib
from pathlib import Path

import torch

from tests.support.cases import run_each


def _box(sharded, key_suffix: str) -> torch.Tensor:
    """This rank's part of a random tensor that is drawn whole from the global name."""
    generator = torch.Generator().manual_seed(zlib.crc32((sharded.key + key_suffix).encode()))
    whole = torch.randn(sharded.global_shape, generator=generator) * 1e-4
    prepended = sharded.prepend_axis_num
    for offset in sharded.global_offset[:prepended]:
        whole = whole[offset]
    for dim, (offset, size) in enumerate(
        zip(sharded.global_offset[prepended:], sharded.data.shape, strict=True)
    ):
        whole = whole.narrow(dim, offset, size)
    return whole


def _sharded_entries(model):
    """Sharded description of each parameter of this rank, by the parameter's storage."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.utils import get_attr_wrapped_model

    entries = {}
    for chunk in model:
        state = get_attr_wrapped_model(chunk, "sharded_state_dict", return_model_obj=True)
        for entry in state.sharded_state_dict().values():
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory)):
                entries[entry.data.data_ptr()] = entry
    return entries


def _leaves(built):
    if isinstance(built, dict):
        built = list(built.values())
    return (
        [leaf for part in built for leaf in _leaves(part)] if isinstance(built, list) else [built]
    )


def inject(hooks, step: int) -> None:
    """Overwrite gradients and maximum logits with what any layout would get."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    entries = _sharded_entries(hooks.model)
    for chunk in hooks.model:
        for param in chunk.parameters():
            if not param.requires_grad:
                continue
            entry, suffix = entries[param.data_ptr()], f"/{step}"
            if isinstance(entry, ShardedTensorFactory):
                built = entry.build_fn(
                    entry.key, param.main_grad, entry.replica_id, entry.flattened_range
                )
                for leaf in _leaves(built):
                    leaf.data.copy_(_box(leaf, suffix))
            else:
                param.main_grad.copy_(_box(entry, suffix))
    from megatron.core import parallel_state

    running = hooks.max_logits.running
    first = parallel_state.get_tensor_model_parallel_rank() * running.shape[1]
    for row, attention in zip(running, hooks.max_logits.attentions, strict=True):
        for head in range(running.shape[1]):
            row[head] = 15.0 + (7 * attention.layer_number + 3 * (first + head) + step) % 11


def _watch_margin(model, margins: list[float]) -> None:
    """Smallest gap between the last chosen and the first rejected selection score, any token."""
    from megatron_k2.model.moe import routers

    def hook(router, inputs):
        scores = torch.sigmoid(router.gating(inputs[0]).flatten(0, -2)) + router.expert_bias
        top = scores.topk(router.topk + 1, dim=-1).values
        margins.append((top[:, -2] - top[:, -1]).min().item())

    for router in routers(model):
        router.register_forward_pre_hook(hook)


def _experts_named_by_rank() -> None:
    """What Megatron-Bridge does: adapters of experts begin by their place on a rank."""
    from megatron_k2.model.lora import model

    model._whole_name = lambda name, *_: name


def run_case(case: dict) -> None:
    import megatron_k2.training.hooks as hooks_module
    from megatron_k2.training.pretrain import run

    if case.get("experts_named_by_rank"):
        _experts_named_by_rank()

    margins: list[float] = []

    class Instrumented(hooks_module.TrainingHooks):
        def get_optimizer(self, factory, config, model, **kwargs):
            optimizer = super().get_optimizer(factory, config, model, **kwargs)
            if case.get("watch_margin"):
                _watch_margin(model, margins)
            if case.get("inject"):
                inner = optimizer.step

                def step():
                    inject(self, self.args.curr_iteration)
                    return inner()

                optimizer.step = step
            return optimizer

    hooks_module.TrainingHooks = Instrumented
    run([*case["flags"], "--console", "megatron"])
    if case.get("watch_margin"):
        save = Path(case["flags"][case["flags"].index("--save") + 1])
        (save / "margin.json").write_text(json.dumps(min(margins)))


def main() -> None:
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
