"""Router replay: a token goes, in the trainer, where the engine sent it.

About one routing in ten differs between an engine and a trainer, and runs without replay collapsed
(Megatron-LM #4168). Only the choice is replayed: the chosen experts' weights are this forward
pass's scores, so that the router keeps its gradient (ISEEKYAN/Megatron-LM #79 replayed weights, and
lost it).

The seam is Megatron's ``router.router_replay``, which it asks for the top-k in place of computing
it. Upstream's own ``RouterReplay`` wants experts for every row and is told by its caller whether a
pass is a forward pass or a recomputation; here rows without a record (padding, curated data, what
an engine did not say) are routed as ever, and the two passes are told apart by what they are: a
layer that will be computed again runs without gradients first.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, override

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from torch import Tensor

from megatron_k2.errors import UserError


class RecordedRoutes(RouterReplay):
    """Of one router: where the rows of its micro-batches go.

    Micro-batches are computed again in the order in which they were computed, in every schedule of
    Megatron's.
    """

    def __init__(self) -> None:
        super().__init__()
        self._routes: Tensor | None = None
        self._is_training = False
        self._waiting: deque[Tensor | None] = deque()

    def begin(self, routes: Tensor | None, *, is_training: bool) -> None:
        """Say where the next micro-batch's rows go.

        Args:
            routes: [rows of this rank, top-k] ids of all experts, -1 in rows without a record;
                ``None``: as ever.
            is_training: whether a backward pass will follow.
        """
        self._routes, self._is_training = routes, is_training

    def _of_this_pass(self) -> Tensor | None:
        has_gradients = torch.is_grad_enabled()
        if has_gradients and self._waiting:
            return self._waiting.popleft()  # the layer is computed again, in the backward pass
        if self._is_training and not has_gradients:
            self._waiting.append(self._routes)
        return self._routes

    @override
    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scores [rows, top-k] and experts, those on record first; see upstream."""
        assert default_compute_topk is not None
        values, chosen = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        routes = self._of_this_pass()
        if routes is None:
            return values, chosen
        if routes.shape != chosen.shape:
            raise UserError(
                f"routes on record are {list(routes.shape)}, this router's {list(chosen.shape)}: "
                "expected [rows, top-k] of this model"
            )
        chosen = torch.where(routes >= 0, routes.to(chosen.dtype), chosen)
        return scores.gather(1, chosen), chosen


class Replay:
    """Every decoder router of this rank's stages; those of prediction layers have no record.

    Args:
        stages: this rank's model, one for each virtual stage.
        moe_layer_freq: 1 for each decoder layer of the whole model that has experts, else 0.
        tensor_group: over which the rows are split (sequence parallelism); ``None``: over none.

    Raises:
        UserError: the fused router, which asks nobody.
    """

    def __init__(
        self, stages: Sequence[torch.nn.Module], moe_layer_freq: Sequence[int], tensor_group: Any
    ) -> None:
        self._tensor_group = tensor_group
        self.num_layers = sum(moe_layer_freq)
        """MoE layers of the whole model."""
        self._of: dict[int, list[tuple[int, RecordedRoutes]]] = {}
        for stage in stages:
            found = self._of[id(stage)] = []
            for name, module in stage.named_modules():
                if not isinstance(module, TopKRouter) or "mtp" in name.split("."):
                    continue
                if module.config.moe_router_fusion:
                    raise UserError(
                        "--router-replay with --moe-router-fusion: the fused router takes no "
                        "choice from outside; drop one of the two"
                    )
                module.router_replay = RecordedRoutes()
                assert module.layer_number is not None
                number = sum(moe_layer_freq[: module.layer_number - 1])
                found.append((number, module.router_replay))

    def begin(self, stage: torch.nn.Module, routes: Tensor | None) -> None:
        """Before a stage's forward pass over a micro-batch.

        Args:
            stage: one of those it was made with.
            routes: [s / CP, MoE layers of the model, top-k] of any integers, on any device; -1 in
                rows without a record. ``None``: none of the pack's has one.

        Raises:
            UserError: of a model with another number of MoE layers.
        """
        if routes is not None and routes.shape[1] != self.num_layers:
            raise UserError(
                f"routes of {routes.shape[1]} MoE layers are on record, this model has "
                f"{self.num_layers}; the engine serves another model"
            )
        if routes is not None:
            routes = routes.to(next(stage.parameters()).device, non_blocking=True)
        if routes is not None and self._tensor_group is not None:
            routes = routes.chunk(self._tensor_group.size())[self._tensor_group.rank()]
        is_training = torch.is_grad_enabled()
        for number, router in self._of[id(stage)]:
            own = None if routes is None else routes[:, number]
            router.begin(own, is_training=is_training)
