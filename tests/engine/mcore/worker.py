"""Evaluates and generates at several layouts: ``python -m tests.engine.mcore.worker JSON``.

One case is ``{"layout": {...}, "load": DIR, "tokens": [...], "prompt": [...], "out": FILE}``.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from megatron_k2.parallel.layout import Layout

SEQ_LENGTH = 32
NEW_TOKENS = 6


def answers(case: dict, device) -> dict:
    """Loss, greedy and drawn tokens of the checkpoint at the case's layout."""
    from megatron_k2.engine.mcore.evaluate import evaluate
    from megatron_k2.engine.mcore.generate import generate
    from megatron_k2.engine.mcore.ranks import opened_model
    from megatron_k2.engine.mcore.saved_args import read_saved_args

    layout = Layout(**case["layout"])
    directory, saved = read_saved_args(Path(case["load"]), None)
    with opened_model(directory, saved, layout) as model:
        tokens = np.array(case["tokens"])
        loss = evaluate(model, tokens, seq_length=SEQ_LENGTH, micro_batch_size=2, device=device)
        settings = {"layout": layout, "max_new_tokens": NEW_TOKENS, "device": device}
        greedy = generate(model, case["prompt"], temperature=0, **settings)
        drawn = generate(model, case["prompt"], temperature=1.0, top_p=0.9, seed=3, **settings)
        return {
            "loss": loss.loss_nats,
            "num_tokens": loss.num_tokens,
            "greedy": list(greedy),
            "drawn": list(drawn),
        }


def main() -> None:
    from megatron_k2.engine.mcore.ranks import process_group

    with process_group() as device:
        for case in json.loads(Path(sys.argv[1]).read_text()):
            found = answers(case, device)
            path = Path(case["out"]).with_suffix(f".{os.environ['RANK']}.json")
            path.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
