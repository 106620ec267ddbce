"""Dense and expert optimizers as one, in a checkpoint too: no numbering that depends on EP."""

from typing import Any, override

from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_k2.errors import UserError
from megatron_k2.optimizer.muonclip_chain import MuonAdamWChain
from megatron_k2.optimizer.sharded.optimizer import DistributedMuonClip

FORMAT = "megatron_k2/parameter-space/1"


class MuonClipChain(MuonAdamWChain):
    """Megatron's chain with ``checkpoint_by_name`` as its checkpoint format.

    Its optimizers are all ``DistributedMuonClip``, or stubs. ``muonclip.build`` turns Megatron's
    chain into this class.
    """

    def gather_weights_once(self) -> None:
        """Leave the gather of all weights to the last optimizer.

        Without ``--overlap-param-gather`` each optimizer of a chain gathers the weights of every
        one, so upstream gathers everything twice (distrib_optimizer.py:3185).
        """
        *earlier, last = self._live()
        for optimizer in earlier:
            optimizer._defer_param_sync = optimizer.model_chunks == last.model_chunks

    def _live(self) -> list[DistributedMuonClip]:
        return [o for o in self.chained_optimizers if isinstance(o, DistributedMuonClip)]

    @override
    def adamw_parameters(self, optimizer: MegatronOptimizer) -> list[Tensor]:
        shards: list[Tensor] = optimizer.get_parameters()
        if not isinstance(optimizer, DistributedMuonClip):
            return shards
        muons = {id(main) for main in optimizer.muon_shards()}
        return [shard for shard in shards if id(shard) not in muons]

    @override
    def muon_of(self, optimizer: MegatronOptimizer) -> DistributedMuonClip | None:
        return optimizer if isinstance(optimizer, DistributedMuonClip) else None

    @override
    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        del is_loading, kwargs  # the same description serves both ways
        state: dict[str, Any] = {}
        num_steps = 0
        for number, optimizer in enumerate(self._live()):
            params = list(optimizer.model_param_group_index_map)
            by_id = get_param_id_to_sharded_param_map(model_sharded_state_dict, iter(params))
            entries = {param: by_id[index] for index, param in enumerate(params)}
            state[str(number)] = optimizer.state_by_name(entries)
            num_steps = max(num_steps, optimizer.num_steps)
        return {"format": FORMAT, "step": num_steps, "parameters": state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        found = state_dict.get("format")
        if found != FORMAT:
            raise UserError(
                f"the checkpoint's optimizer state has format {found!r}, expected {FORMAT!r}: it "
                "was not written by MuonClip with --use-distributed-optimizer; load the weights "
                "alone with --no-load-optim, or --finetune"
            )
        for number, optimizer in enumerate(self._live()):
            optimizer.load_state_by_name(state_dict["parameters"][str(number)], state_dict["step"])
