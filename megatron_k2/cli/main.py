"""``megatron-k2 <verb> …``: finds the verb's module and hands it the rest of the command line.

A verb's module defines ``main(argv) -> int`` and imports torch or Megatron inside it, so that
``megatron-k2 --help`` answers at once.
"""

import difflib
import importlib
import sys

from megatron_k2 import __version__
from megatron_k2.errors import UserError
from megatron_k2.quiet import quieten

VERBS = {
    "presets": "list the model presets with their exact parameter counts",
    "doctor": "what this machine has, and which features that turns on or off",
    "selfcheck": "run the tests on this machine's devices, one table of what they measured",
    "plan": "memory, time and layout of a run on a cluster; schedule; MuonClip's plan (optimizer)",
    "data": "prepare: text to Megatron indexed datasets; chat: dialogues to packed sequences",
    "pretrain": "train a preset on Megatron's own loop (any Megatron flag may follow)",
    "sft": "fine-tune on packed dialogues, on the same loop",
    "rl": "reinforcement learning on tasks that are judged, sampled by the embedded engine",
    "launch": "run a recipe: on this machine (CPU twins) or as a Slurm job",
    "convert": "checkpoints between Hugging Face and Megatron, both ways",
    "evaluate": "loss and perplexity of a Megatron checkpoint on a dataset",
    "generate": "sample text from a Megatron checkpoint",
    "chat": "talk to a checkpoint; render and parse: dialogues to K2's tokens and back",
    "serve": "an OpenAI-compatible server over the embedded engine",
    "rephrase": "plan, run, report, mix: pretraining text said again by a model; score, calibrate",
    "critic": "calibrate: how far is a judge to be trusted? best-of-n, pairs",
    "engine": "check: does an engine compute what its weights say?",
    "gym": "list, card, sample, verify: tasks whose answers a program can check",
    "sandbox": "check: what gets out of the sandboxes of this machine",
    "report": "draw a run's metrics.jsonl as a PNG",
}


def _help() -> str:
    from megatron_k2.terminal import as_text, pairs

    return as_text(
        f"megatron-k2 {__version__}: Kimi-K2-class training on unmodified Megatron-Core",
        "\nusage: megatron-k2 <verb> [options]      megatron-k2 <verb> --help\n",
        pairs(VERBS.items()),
    )


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a wrong input ends with one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"one of: {', '.join(VERBS)}"
        print(f"megatron-k2: unknown verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    quieten()
    module = importlib.import_module(f"megatron_k2.cli.{verb}")
    try:
        return int(module.main(rest))
    except UserError as error:
        print(f"megatron-k2 {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"megatron-k2 {verb}: interrupted", file=sys.stderr)
        return 130
