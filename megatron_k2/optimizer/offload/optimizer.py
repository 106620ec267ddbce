"""MuonClip over ZeRO-1 with part of each rank's optimizer states in host memory.

Kimi K2 report, section 2.4.2: on few nodes part of the optimizer's states is kept on the CPU. At
256 GPUs no two ranks share an expert, so its states are not cut, and 32 GB a GPU is too much beside
the activations. Megatron's own form (``--optimizer-cpu-offload``) is a hybrid optimizer that runs
AdamW on the host; a Newton-Schulz iteration there would take minutes. Here the arithmetic stays on
the device and the states visit it (``host_tensors.py``): momenta when a bucket's directions are
made, masters when its updates are applied. Same operations on same numbers, so weights are
bit-equal.

In host memory are momentum or moments, and the fp32 master where the weight has another dtype. A
master that leaves again has its weight written first; those that QK-Clip scales wait for the clip.
AdamW's are on the device for the whole step, since the host steps all of them at once; they are few
(embedding, head, norms). Checkpoints are those of a run without offload, read from and into the
host's copies.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Set
from typing import Any, Self, override

import torch
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.optimizer.momentum import momentum_of
from megatron_k2.optimizer.offload.choice import chosen_for_host
from megatron_k2.optimizer.offload.host_tensors import HostTensors, host_tensors_for
from megatron_k2.optimizer.qk_clip.apply import row_scales
from megatron_k2.optimizer.qk_clip.max_logits import MaxLogits
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip

logger = logging.getLogger(__name__)

STATE_BYTES = 4
"""fp32, each of momentum, moment and master."""


class OffloadedMuonClip(DistributedMuonClip):
    """``DistributedMuonClip`` whose states live on the host in part (``offload_fraction``)."""

    host_tensors: HostTensors
    model_float16_groups: list[list[torch.nn.Parameter]]
    shard_fp32_from_float16_groups: list[list[Tensor]]

    @classmethod
    @override
    def adopt(cls, optimizer: Any, specs: Any, settings: Any, max_logits: Any, **rest: Any) -> Self:
        if optimizer.ddp_config.fp8_param_gather or optimizer.ddp_config.fp4_param_gather:
            raise UserError(
                "--optimizer-cpu-offload with --fp8-param-gather: MuonClip writes weights shard by "
                "shard, FP8 weights are quantised all at once; drop one of the two"
            )
        adopted: Self = super().adopt(optimizer, specs, settings, max_logits, **rest)
        adopted.host_tensors = host_tensors_for(torch.device(adopted._device()))
        clipped = row_scales(max_logits, settings) if max_logits is not None else ()
        adopted._clipped = {param for param, _ in clipped}
        adopted._move_to_host(settings.offload_fraction)
        return adopted

    def _device(self) -> torch.device:
        return self.buffers[0].grad_data.device

    def _move_to_host(self, fraction: float) -> None:
        """One shard after another, so that no more than today's states are ever on the device."""
        params = list(self.model_param_group_index_map)
        sizes = [self.state_bytes(param) for param in params]
        chosen = list(itertools.compress(params, chosen_for_host(sizes, fraction)))
        for param in chosen:
            self._allocate_state(param)
            for tensor in self._states(param):
                self.host_tensors.take(tensor)
        logger.info(
            "optimizer states on the host: %.2f of %.2f GB of this rank's shards",
            self.host_tensors.bytes_on_host / 1e9,
            sum(sizes) / 1e9,
        )
        self._adamw_states = [
            tensor
            for param in chosen
            if param not in self._main_of
            for tensor in self._states(param)
        ]
        self._written_early = {
            param for param in chosen if param in self._main_of and self._masters(param)
        }

    def state_bytes(self, param: torch.nn.Parameter) -> int:
        """Bytes of this rank's shard: momentum or moments, and a master that is not the weight."""
        main, _ = self._shard(param)
        kinds = 1 if param in self._main_of else 2
        return STATE_BYTES * main.numel() * (kinds + (param.dtype != torch.float32))

    def _states(self, param: torch.nn.Parameter) -> list[Tensor]:
        main, _ = self._shard(param)
        return [tensor for _, tensor in super()._named_state(param, main)]

    def _momenta(self, param: torch.nn.Parameter) -> list[Tensor]:
        return [momentum_of(self.optimizer, self._main_of[param][0])]

    def _masters(self, param: torch.nn.Parameter) -> list[Tensor]:
        main, _ = self._shard(param)
        return [main] if main in self.host_tensors else []

    @override
    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        if self.is_stub_optimizer:
            return super().step_with_ready_grads()
        with self.host_tensors.step(), self.host_tensors.visit(self._adamw_states):
            return super().step_with_ready_grads()

    @override
    def _directions(self, params: list[torch.nn.Parameter]) -> dict[torch.nn.Parameter, Tensor]:
        found: dict[torch.nn.Parameter, Tensor] = {}
        for window in self.host_tensors.in_windows(params, self._momenta):
            made = super()._directions(window)
            if not self.settings.nesterov:  # then it is the momentum itself, which leaves
                made = {param: direction.clone() for param, direction in made.items()}
            found |= made
        return found

    @override
    def _apply(self, updates: dict[torch.nn.Parameter, Tensor]) -> None:
        waiting = {
            main for param in self._clipped & updates.keys() for main in self._masters(param)
        }
        for window in self.host_tensors.in_windows(list(updates), self._masters, waiting):
            super()._apply({param: updates[param] for param in window})
            self._write_weights(set(window) & self._written_early - self._clipped)

    @override
    def _qk_clip(self, max_logits: MaxLogits) -> None:
        super()._qk_clip(max_logits)
        clipped = self._clipped & self._written_early
        self._write_weights(clipped)
        self.host_tensors.send_back([main for param in clipped for main in self._masters(param)])

    def _write_weights(self, params: Set[torch.nn.Parameter]) -> None:
        """Masters to weights, as the host does at the end of a step."""
        if params:
            with self._host_sees(params):
                super()._copy_main_params_to_model_params()

    @override
    def _copy_main_params_to_model_params(self) -> None:
        with self._host_sees(self.model_param_group_index_map.keys() - self._written_early):
            super()._copy_main_params_to_model_params()

    @override
    def _copy_model_params_to_main_params(self, state_dict: Any = None) -> None:
        """Weights to masters: after loading weights without an optimizer."""
        params = list(self.model_param_group_index_map)
        for window in self.host_tensors.in_windows(params, self._masters):
            with self._host_sees(set(window)):
                super()._copy_model_params_to_main_params(state_dict=state_dict)

    @contextlib.contextmanager
    def _host_sees(self, params: Set[torch.nn.Parameter]) -> Iterator[None]:
        """Megatron's loops over weights and masters pass over all but ``params``."""
        weights, masters = self.model_float16_groups, self.shard_fp32_from_float16_groups
        chosen = [
            [(weight, main) for weight, main in zip(*group, strict=True) if weight in params]
            for group in zip(weights, masters, strict=True)
        ]
        self.model_float16_groups = [[weight for weight, _ in group] for group in chosen]
        self.shard_fp32_from_float16_groups = [[main for _, main in group] for group in chosen]
        try:
            yield
        finally:
            self.model_float16_groups, self.shard_fp32_from_float16_groups = weights, masters

    @override
    def _named_state(self, param: torch.nn.Parameter, main: Tensor) -> list[tuple[str, Tensor]]:
        named = super()._named_state(param, main)
        return [(name, self.host_tensors.values(tensor)) for name, tensor in named]
