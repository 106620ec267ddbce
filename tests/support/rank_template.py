"""A process that has Megatron imported and forks into ranks: one start-up for all, not one each.

``python -m tests.support.rank_template`` reads JSON from standard input, an object a line, and
answers so:

- ``{"module", "arguments", "environment", "log"}`` starts ``python -m module arguments`` in a
  process group of its own, its output in ``log``: ``{"pid"}``;
- ``{"poll": pid}``: ``{"code"}``, ``null`` while it runs;
- ``{"end": true}`` ends it, without an answer.

Nothing of CUDA may be touched before the fork, so only imports are done here.
"""

import contextlib
import gc
import importlib
import importlib.util
import json
import os
import runpy
import sys

from tests.support.checkpoint_writer import fork_result_queue

PRELOADED = (
    "torch.distributed.checkpoint",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.tokenizers.text",
    "megatron.training",
    "megatron.training.checkpointing",
    "megatron_k2.engine.local.engine",
    "megatron_k2.model.build",
    "megatron_k2.optimizer.muonclip",
    "megatron_k2.rl.assembly",
    "megatron_k2.training.hooks",
    "megatron_k2.training.pretrain",
    "megatron_k2.training.providers",
)


def preload() -> None:
    """Import what every rank needs, for good.

    Frozen, it is not walked by a rank's garbage collector again and again, which was an eighth of
    the CPU of a small run.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        # core/jit.py binds torch.compile where it is imported; the CPU host turns that off.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name in PRELOADED:
        importlib.import_module(name)
    if importlib.util.find_spec("tensorboard") is not None:  # an archive of the tests lacks it
        importlib.import_module("torch.utils.tensorboard")
    gc.collect()
    gc.freeze()


def _become(request: dict) -> None:
    """What ``python -m`` would be: this process's last act."""
    os.setpgid(0, 0)  # the helpers Megatron starts are ended with it
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["module"], *request["arguments"]]
    fork_result_queue()
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answer until standard input ends."""
    codes: dict[int, int] = {}
    # Not by iterating over sys.stdin: a fork must not inherit lines read ahead.
    while line := sys.stdin.buffer.raw.readline():
        request = json.loads(line)
        if "end" in request:
            return None
        if "poll" in request:
            pid = request["poll"]
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = {"code": codes.get(pid)}
        else:
            pid = os.fork()
            if pid == 0:
                return _become(request)
            with contextlib.suppress(OSError):  # it may have done so itself, or have ended
                os.setpgid(pid, pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    return None


if __name__ == "__main__":
    preload()
    serve()
