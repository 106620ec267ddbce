"""Evaluates and generates at several layouts: ``python -m tests.engine.mcore.worker JSON``.

One case is ``{"layout": {...}, "load": DIR, "tokens": [...], "prompt": [...], "out": FILE}``.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from megatron_k2.engine.protocol import SamplingParams
from megatron_k2.parallel.layout import Layout

SEQ_LENGTH = 32
NEW_TOKENS = 6
GREEDY = SamplingParams(NEW_TOKENS, temperature=0)
DRAWN = SamplingParams(NEW_TOKENS, temperature=1.0, top_p=0.9, seed=3)


def answers(case: dict, device) -> dict:
    """Loss, log-probabilities, greedy and drawn tokens of the checkpoint at the case's layout."""
    from megatron_k2.engine.mcore.evaluate import evaluate
    from megatron_k2.engine.mcore.generate import generate
    from megatron_k2.engine.mcore.ranks import opened_model
    from megatron_k2.engine.mcore.saved_args import read_saved_args

    layout = Layout(**case["layout"])
    directory, saved = read_saved_args(Path(case["load"]), None)
    with opened_model(directory, saved, layout) as model:
        tokens = np.array(case["tokens"])
        loss = evaluate(model, tokens, seq_length=SEQ_LENGTH, micro_batch_size=2, device=device)
        greedy = generate(model, case["prompt"], GREEDY, layout=layout, device=device)
        drawn = generate(model, case["prompt"], DRAWN, layout=layout, device=device)
        return {
            "loss": loss.loss_nats,
            "num_tokens": loss.num_tokens,
            "greedy": list(greedy),
            "drawn": list(drawn),
            "scores": scores(model, windows(case["tokens"]), device).tolist(),
        }


def windows(tokens) -> torch.Tensor:
    """Some rows of ids, [b, SEQ_LENGTH]."""
    return torch.tensor(tokens[: 4 * SEQ_LENGTH]).view(4, SEQ_LENGTH)


def scores(model, rows: torch.Tensor, device) -> torch.Tensor:
    """Log-probabilities of every token of the rows but the first, [b, SEQ_LENGTH - 1]."""
    logprobs = model.whole_logits(rows.to(device)).log_softmax(-1).cpu()
    return logprobs[:, :-1].gather(2, rows[:, 1:, None])[..., 0]


def main() -> None:
    from megatron_k2.engine.mcore.ranks import process_group

    with process_group() as device:
        for case in json.loads(Path(sys.argv[1]).read_text()):
            found = answers(case, device)
            path = Path(case["out"]).with_suffix(f".{os.environ['RANK']}.json")
            path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
