"""TRL's GRPOTrainer as a second peer of ``rl_iteration.py``, under a Python that has it.

Its own loop on the same weights: ``transformers.generate``, a group a micro-batch, its loss without
a reference model, its default optimizer (AdamW: no Newton-Schulz to pay) and no second pass for
pi_old, which one step on fresh answers does not need. It cannot end rows at given lengths, so
answers are all of one length.
"""

import argparse
import contextlib
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
from datasets import Dataset
from rl_iteration_peer import Work
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids as words, so that a prompt is exactly the ids it was drawn as."""
    model = WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t0")
    words = Tokenizer(model)
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", eos_token="t1", padding_side="left"
    )


class Clock(TrainerCallback):
    """Seconds of the wall and of this process's CPU of each step, generation with it."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []

    def on_step_begin(self, *_args: object, **_more: object) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(self, *_args: object, **_more: object) -> None:
        wall, cpu = self._began
        self.steps.append((time.perf_counter() - wall, time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("directory", type=Path, help="a Hugging Face directory, with work.json")
    add("--attention", required=True)
    add("--experts", required=True)
    add("--steps", type=int, required=True)
    add("--seed", type=int, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    said = json.loads((options.directory / "work.json").read_text())
    tensors = (torch.tensor(said[name]) for name in ("prompts", "lengths", "rewards"))
    work = Work(*tensors, said["tau"], said["lr"], said["decay"])
    with contextlib.redirect_stdout(sys.stderr):  # its tables of figures
        clock = train(options, work)
    print(json.dumps(clock.steps))


def train(options: argparse.Namespace, work: Work) -> Clock:
    """As many steps as asked for, timed."""
    model = DeepseekV3ForCausalLM.from_pretrained(options.directory, dtype=torch.float32)
    model.set_attn_implementation(options.attention)
    model.set_experts_implementation(options.experts)
    (num_prompts, group_size), longest = work.lengths.shape, int(work.lengths.max())
    config = GRPOConfig(
        output_dir=str(options.directory / "trl"),
        per_device_train_batch_size=group_size,
        gradient_accumulation_steps=num_prompts,
        steps_per_generation=num_prompts,
        num_generations=group_size,
        max_steps=options.steps,
        max_completion_length=longest,
        generation_kwargs={"min_new_tokens": longest},
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        learning_rate=work.lr,
        weight_decay=work.decay,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=options.seed,
    )
    rows = [" ".join(f"t{i}" for i in ids) for ids in work.prompts.tolist()]
    rewards = work.rewards[0].tolist()
    clock = Clock()
    GRPOTrainer(
        model,
        lambda completions, **_more: (rewards * len(completions))[: len(completions)],
        args=config,
        train_dataset=Dataset.from_dict({"prompt": rows * options.steps}),
        processing_class=tokenizer(model.config.vocab_size),
        callbacks=[clock],
    ).train()
    return clock


if __name__ == "__main__":
    main()
