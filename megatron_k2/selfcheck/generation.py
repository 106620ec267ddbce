"""Step: greedy text from a checkpoint that the device has just trained, on the device and the CPU.

Token for token the same, but where the CPU's two best logits are nearer than a rounding.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megatron_k2.presets import K2_TINY
from megatron_k2.selfcheck.findings import Figure, Findings, judged
from megatron_k2.selfcheck.two_sides import both_sides

PROMPTS, PROMPT_TOKENS = 4, 8
NEW_TOKENS, STEPS = {"full": 48, "small": 8}, {"full": 10, "small": 2}
NEAR = 1e-4
"""Of the largest logit: two candidates nearer than this are a tie between devices."""


def side(workload: str, checkpoint: str) -> dict[str, Any]:
    """Tokens that follow each prompt, and the gap of the two best logits before each, relative."""
    from megatron_k2.engine.mcore.generate import generate
    from megatron_k2.engine.mcore.ranks import opened_model, process_group
    from megatron_k2.engine.mcore.saved_args import read_saved_args
    from megatron_k2.engine.protocol import SamplingParams
    from megatron_k2.parallel.layout import Layout

    greedy = SamplingParams(NEW_TOKENS[workload], temperature=0)
    directory, saved = read_saved_args(Path(checkpoint), None)
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(2, K2_TINY.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=generator)
    answers, gaps = [], []
    with process_group() as device, opened_model(directory, saved, Layout()) as model:
        for prompt in prompts.tolist():
            new = list(generate(model, prompt, greedy, layout=Layout(), device=device))
            whole = torch.tensor([prompt + new], device=device)
            logits = model.whole_logits(whole, slice(PROMPT_TOKENS - 1, whole.shape[1] - 1))[0]
            best = logits.topk(2).values.cpu()
            answers.append(new)
            gaps.append(((best[:, 0] - best[:, 1]) / best[:, 0].abs().max()).tolist())
    return {"answers": answers, "gaps": gaps}


def measure(device: str, workload: str) -> Findings:
    """Train, then both sides."""
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder), STEPS[workload])
        found, expected = both_sides(__name__, device, workload, (folder,))
    different, ties = 0, 0
    for ours, theirs, gaps in zip(
        found["answers"], expected["answers"], expected["gaps"], strict=True
    ):
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if at is not None:  # from there on the two read different texts
            ties += gaps[at] <= NEAR
            different += gaps[at] > NEAR
    smallest = min(gap for gaps in expected["gaps"] for gap in gaps)
    figures = [
        Figure("answers that differ", different, bar=0),
        Figure("answers that part at a tie", ties),
        Figure("smallest gap of the two best logits", smallest),
    ]
    note = f"{PROMPTS} prompts, {NEW_TOKENS[workload]} tokens each, after {STEPS[workload]} steps"
    return judged(note, figures)


def _train(folder: Path, steps: int) -> None:
    words = (
        f"pretrain --preset {K2_TINY.name} --mock-data --tokenizer-type NullTokenizer "
        f"--vocab-size {K2_TINY.vocab_size} --train-iters {steps} --eval-iters 0 --no-save-optim"
    )
    command = [sys.executable, "-m", "megatron_k2", *words.split(), "--save", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"pretrain ended with {done.returncode}: {' | '.join(said[-4:])}")
