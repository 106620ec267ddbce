"""The peer of ``rl_iteration.py``: one iteration of RL as a plain loop writes it.

``transformers.generate`` samples a batch that goes on until its longest answer ends, answers are
padded to it, a group of them is a micro-batch, and the report's objective is differentiated in
plain torch; textbook Muon and AdamW step (``plain_torch_peer.py``). Nothing has to be handed on
to an engine. It runs in a process of its own, outside the CPU host's redirections, and does an
iteration each time it is told to.
"""

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from plain_torch_peer import Peer
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, StoppingCriteria

Seconds = dict[str, tuple[float, float]]
"""By phase, of the wall and of this process's CPU."""


@dataclass(frozen=True)
class Work:
    """What an iteration is: the same for both sides."""

    prompts: Tensor
    """[P, prompt] ids."""
    lengths: Tensor
    """[P, K], tokens of each answer."""
    rewards: Tensor
    """[P, K]."""
    tau: float
    lr: float
    decay: float


class _Ends(StoppingCriteria):
    """Each row at its own length."""

    def __init__(self, ends: Tensor) -> None:
        self._ends = ends

    def __call__(self, input_ids: Tensor, scores: Tensor, **_more: object) -> Tensor:
        return input_ids.shape[1] >= self._ends


class PlainLoop:
    """A model of transformers with its two optimizers."""

    def __init__(self, directory: Path, work: Work) -> None:
        loaded = DeepseekV3ForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._peer = Peer(loaded.config, work.lr, work.decay)
        self.model = self._peer.model
        self.model.load_state_dict(loaded.state_dict())
        self.model.generation_config.eos_token_id = None
        self.work = work
        self._choices = {"sample": ("sdpa", "eager"), "train": ("sdpa", "eager")}

    def scores(self, rows: Tensor, num_read: int) -> Tensor:
        """Log-probabilities of all tokens after the prompt, [rows, padded answer]."""
        kept = rows.shape[1] - num_read + 1
        logits = self.model(rows, use_cache=False, logits_to_keep=kept).logits[:, :-1]
        found = logits.log_softmax(-1)
        return found.gather(2, rows[:, num_read:, None])[..., 0]

    def sample(self, prompts: Tensor, lengths: Tensor) -> Tensor:
        """All answers in one batch, padded to the longest, [P * K, longest row]."""
        ends = prompts.shape[1] + lengths.flatten()
        return self.model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            num_return_sequences=lengths.shape[1],
            max_new_tokens=int(lengths.max()),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            stopping_criteria=[_Ends(ends)],
        )

    def groups(self, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A group a micro-batch, padded to its own longest answer, with the mask of answers."""
        num_read, found = self.work.prompts.shape[1], []
        for group, lengths in zip(
            rows.chunk(len(self.work.prompts)), self.work.lengths, strict=True
        ):
            longest = int(lengths.max())
            mask = torch.arange(longest) < lengths[:, None]
            found.append((group[:, : num_read + longest].clone(), mask))
        return found

    def old(self, groups: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Of pi_old, log-probabilities of whole answers, [K] a group."""
        num_read = self.work.prompts.shape[1]
        with torch.no_grad():
            return [(self.scores(rows, num_read) * mask).sum(1) for rows, mask in groups]

    def step(self, groups: list[tuple[Tensor, Tensor]], olds: list[Tensor]) -> None:
        """The report's objective over 2 tau, its gradient, and an optimizer step."""
        work, num_read = self.work, self.work.prompts.shape[1]
        self.model.zero_grad(set_to_none=True)
        for (rows, mask), old, rewards in zip(groups, olds, work.rewards, strict=True):
            whole = (self.scores(rows, num_read) * mask).sum(1)
            residual = rewards - rewards.mean() - work.tau * (whole - old)
            loss = residual.square().mean() / (2 * work.tau) / len(work.prompts)
            loss.backward()
        self._peer.optimizer_step()

    def iteration(self) -> Seconds:
        """Sampling, pi_old, a step."""
        clock: Seconds = {}
        self._peer.use(*self._choices["sample"])
        with torch.inference_mode():
            rows = _timed(
                clock, "sample", lambda: self.sample(self.work.prompts, self.work.lengths)
            )
        self._peer.use(*self._choices["train"])
        groups = self.groups(rows)
        olds = _timed(clock, "old", lambda: self.old(groups))
        _timed(clock, "step", lambda: self.step(groups, olds))
        return clock

    def choose(self) -> str:
        """The fastest implementations that run here, for steps of decoding and for training."""
        few = torch.full_like(self.work.lengths, 4)
        short, some = self.work.prompts[:, :8], self.work.prompts[:1, :128]

        def trained() -> None:
            self.scores(some, 64).sum().backward()

        self._choices = {
            "sample": self._fastest(lambda: self.sample(short, few)),
            "train": self._fastest(trained),
        }
        self._peer.use(*self._choices["train"])
        self.model.zero_grad(set_to_none=True)
        return ", ".join(f"{name} {'/'.join(each)}" for name, each in self._choices.items())

    def _fastest(self, call: Callable[[], object]) -> tuple[str, str]:
        found = {}
        for choice in self._peer.implementations():
            try:
                self._peer.use(*choice)
                call()
                begin = time.process_time()
                call()
                found[choice] = time.process_time() - begin
            except (RuntimeError, ImportError, ValueError, NotImplementedError):
                continue  # not for a CPU in fp32
        return min(found, key=lambda choice: found[choice])


def _timed[T](clock: Seconds, name: str, call: Callable[[], T]) -> T:
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    clock[name] = (time.perf_counter() - wall, time.process_time() - cpu)
    return found


def serve(connection: Connection, directory: Path, work: Work, seed: int) -> None:
    """The peer's process: its choices, then what it is sent: rows to score, or a turn to take."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(seed)
    loop = PlainLoop(directory, work)
    connection.send(loop.choose())
    while (told := connection.recv()) is not None:
        if isinstance(told, Tensor):
            with torch.no_grad():
                connection.send(loop.scores(told, work.prompts.shape[1]))
        else:
            connection.send(loop.iteration())
