"""Training runs over the stand-ins, one after another: ``python -m tests.te.training_worker``.

The argument is a JSON file: a list of ``{"flags": [...], "record": path or null}``, with
``documents`` where packs of that seed are fine-tuned on. With ``record`` the master weights around
QK-Clip, and masters and FP8 weights after the last step, are saved there. Where activations are
offloaded a CPU's are handed over as a GPU's would be.
"""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import torch

from tests.support.cases import run_each


def _fp8_weights(model):
    """Name -> codes, inverse scales and value of each parameter that is kept in FP8."""
    found = {}
    for name, param in model.named_parameters():
        if hasattr(param, "_rowwise_data"):
            found[name] = {
                "codes": param._rowwise_data.clone(),
                "scale_inv": param._rowwise_scale_inv.clone(),
                "shape": tuple(param.shape),
            }
    return found


def _on_cpu(values):
    if isinstance(values, dict):
        return {key: _on_cpu(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_on_cpu(value) for value in values)
    return values.cpu() if torch.is_tensor(values) else values


def _let_a_cpu_offload() -> None:
    import megatron.core.pipeline_parallel.utils as utils
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    def manages(tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, torch.nn.Parameter)

    if not torch.cuda.is_available():
        sys.modules.setdefault("pynvml", types.ModuleType("pynvml"))
        utils.set_ideal_affinity_for_current_gpu = lambda: None
        ChunkOffloadHandler._can_manage_tensor_for_offload = staticmethod(manages)


def _program(case: dict):
    """Pretraining, or fine-tuning on in-memory packs where a case has ``documents``."""
    from megatron_k2.training.pretrain import PRETRAIN

    if "documents" not in case:
        return PRETRAIN
    from megatron_k2.sft import providers
    from tests.sft.worker import packs

    providers.open_packs = lambda *_, **__: packs(case["documents"]) * 2
    ours = (providers.datasets_provider, providers.forward_step)
    return replace(PRETRAIN, name="sft", providers=lambda: ours)


def run_case(case: dict) -> None:
    import megatron_k2.flags.megatron as flags_module
    import megatron_k2.optimizer.sharded.optimizer as distributed
    from megatron_k2.training.pretrain import run

    clip = distributed.DistributedMuonClip._qk_clip
    copy_masters = distributed.DistributedMuonClip._copy_main_params_to_model_params
    record: dict = {"clipped": {}, "masters": {}, "weights": {}}

    def recorded_clip(self, max_logits):
        names = {p: n for chunk in self.model_chunks for n, p in chunk.named_parameters()}

        def masters():
            return {names[p]: self._shard(p)[0].clone() for p in self.model_param_group_index_map}

        before = masters()
        clip(self, max_logits)
        record["clipped"] |= {n: (before[n], after) for n, after in masters().items()}

    def recorded_copy(self):
        """Before the all-gather: gloo's coalesced one turns the codes into bf16 numbers."""
        copy_masters(self)
        names = {p: n for chunk in self.model_chunks for n, p in chunk.named_parameters()}
        for param in self.model_param_group_index_map:
            record["masters"][names[param]] = self._shard(param)[0].clone()
        for chunk in self.model_chunks:
            record["weights"] |= _fp8_weights(chunk)

    if "--fine-grained-activation-offloading" in case["flags"]:
        _let_a_cpu_offload()
    if case["record"]:  # FP8 primary weights start from what the GPU initialised, see check_fp8
        kept = [f for f in flags_module.CPU_FLAGS if f != "--use-cpu-initialization"]
        flags_module.CPU_FLAGS = kept
        distributed.DistributedMuonClip._qk_clip = recorded_clip
        distributed.DistributedMuonClip._copy_main_params_to_model_params = recorded_copy
    try:
        run([*case["flags"], "--console", "megatron"], _program(case))
    finally:  # Megatron stops at --exit-interval by an exit
        if case["record"]:
            torch.save(_on_cpu(record), case["record"])


def main() -> None:
    from megatron_k2.fp8.compute import choose_scale_format
    from tests.te.standin import prepare

    choose_scale_format("blockwise")
    prepare()
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))


if __name__ == "__main__":
    main()
