"""``megatron_k2.training.pretrain`` with one spoiled batch: ``python -m … STEP <flags>``."""

import sys
from unittest.mock import patch

import torch
from megatron.training import get_args

from megatron_k2.training import pretrain, providers

SOUND = providers.get_batch


def _spoiled(step):
    """``get_batch`` whose labels are, in the batch of ``step``, drawn anew from all ids."""

    def get_batch(iterator, vp_stage):
        tokens, labels, *rest = SOUND(iterator, vp_stage)
        args = get_args()
        if labels is not None and args.curr_iteration + 1 == step:
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randint(args.padded_vocab_size, labels.shape, generator=generator)
            labels = drawn.to(labels)
        return [tokens, labels, *rest]

    return get_batch


if __name__ == "__main__":
    step = int(sys.argv.pop(1))
    with patch.object(providers, "get_batch", _spoiled(step)):
        pretrain.main()
