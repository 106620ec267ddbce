"""What a rank of a real run holds behind a step: ``python -m tests.planning.rl.held_worker JSON``.

Model, MuonClip and learner are built by the program of ``megatron-k2 rl``; in place of its loop the
learner takes one iteration of recorded groups, and every storage is counted once, by who has it:
here, by ``rl/phases.py``, and by that again while the trainer rests. Leaves ``<out>/<rank>.json``.
"""

import json
import sys
from pathlib import Path

from tests.rl.recorded import iteration, stamped
from tests.support.cases import run_each

FLAGS = """
    --preset k2-tiny --seq-length 64 --max-position-embeddings 64 --log-interval 1
    --iterations 2 --prompts-per-iteration 4 --group-size 4 --lr-warmup-iters 0 --console megatron
    --eval-every 0 --qk-clip-threshold 20
""".split()


def _bytes(tensors, seen):
    """Of the storages that nobody before has counted."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _states(optimizer):
    """Masters and states of every part of a chain."""
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if hasattr(value, "untyped_storage"))


def counted(learner):
    params = [param for stage in learner.stages for param in stage.parameters()]
    seen: set[int] = set()
    return {
        "weights": _bytes(params, seen),
        "gradients": _bytes([param.main_grad for param in params], seen),
        "optimizer": _bytes(_states(learner._stepper.optimizer), seen),
        "elements": sum(param.numel() for param in params),
    }


def run_case(case):
    from megatron_k2.rl import assembly
    from megatron_k2.rl.phases import Phases, held
    from megatron_k2.rl.train import program
    from megatron_k2.training.pretrain import run

    async def counted_run(args, learner, make_side, show):
        learner.learn(stamped(iteration(), learner.version))
        assert learner.version == 1, "a step was taken: states are there"
        path = Path(case["out"]) / f"{args.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = (learner.stages, learner._stepper.optimizer)
        found = {"train": counted(learner), "told": held(*own)._asdict()}
        Phases(*own).rest(keeps_weights=True)
        found["update"] = held(*own)._asdict()
        path.write_text(json.dumps(found))

    assembly._run = counted_run
    run([*FLAGS, *case["flags"]], program(None))


if __name__ == "__main__":
    run_each(run_case, json.loads(Path(sys.argv[1]).read_text()))
