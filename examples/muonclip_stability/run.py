"""Vanilla Muon lets attention logits grow without bound; MuonClip holds them at the threshold.

A two-layer MLA transformer learns to repeat a random sequence (induction), three ways: AdamW, Muon,
and Muon with QK-Clip. It shows the mechanism of Figure 2 of the Kimi K2 report (arXiv:2507.20534)
at a hidden size of 128, not its numbers. Optimizer arithmetic is the package's; the model is plain
torch.

    python examples/muonclip_stability/run.py --steps 300 --seeds 0 1
"""

import argparse
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_k2.optimizer.muon import muon_step
from megatron_k2.optimizer.qk_clip.factors import (
    clip_factor,
    mla_key_value_row_scale,
    mla_query_row_scale,
    num_clipped,
    scale_rows_,
)

HIDDEN, HEADS, LAYERS, FFN = 128, 4, 2, 256
QK_HEAD, QK_ROPE, V_HEAD, Q_LORA, KV_LORA = 32, 16, 32, 64, 32
VOCAB, SEQUENCE, BATCH, WARMUP_STEPS = 64, 64, 16, 20
LEARNING_RATE = {"adamw": 3e-3, "muon": 0.02, "muonclip": 0.02}
WEIGHT_DECAY = 0.1


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding over the last dimension by the position on the one before it."""
    dim = x.shape[-1]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angle = torch.arange(x.shape[-2])[:, None] * frequency
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat(
        (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1
    )


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class MLA(nn.Module):
    """Multi-head latent attention that records each head's largest logit, as K2's kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.q_down, self.q_norm = linear(HIDDEN, Q_LORA), nn.RMSNorm(Q_LORA)
        self.q_up = linear(Q_LORA, HEADS * (QK_HEAD + QK_ROPE))
        self.kv_down, self.kv_norm = linear(HIDDEN, KV_LORA + QK_ROPE), nn.RMSNorm(KV_LORA)
        self.kv_up = linear(KV_LORA, HEADS * (QK_HEAD + V_HEAD))
        self.out = linear(HEADS * V_HEAD, HIDDEN)
        self.max_logit = torch.full((HEADS,), -math.inf)

    def forward(self, x: Tensor) -> Tensor:
        batch, sequence, _ = x.shape
        latent, rotary_key = self.kv_down(x).split((KV_LORA, QK_ROPE), -1)
        q = self.q_up(self.q_norm(self.q_down(x))).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        kv = self.kv_up(self.kv_norm(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        shared = rotate(rotary_key)[:, None].expand(batch, HEADS, sequence, QK_ROPE)
        q = torch.cat((q[..., :QK_HEAD], rotate(q[..., QK_HEAD:])), -1)
        k = torch.cat((kv[..., :QK_HEAD], shared), -1)
        logits = q @ k.mT / math.sqrt(QK_HEAD + QK_ROPE)
        future = torch.ones(sequence, sequence, dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, -math.inf)
        self.max_logit = logits.detach().amax((0, 2, 3))
        context = logits.softmax(-1) @ kv[..., QK_HEAD:]
        return self.out(context.transpose(1, 2).flatten(2))

    @torch.no_grad()
    def clip(self, threshold: float) -> int:
        """QK-Clip on this layer; the number of heads it scaled."""
        gamma = clip_factor(self.max_logit, threshold)
        query = mla_query_row_scale(gamma, QK_HEAD, QK_ROPE)
        key_value = mla_key_value_row_scale(gamma, QK_HEAD, V_HEAD)
        for weight, scale in ((self.q_up.weight, query), (self.kv_up.weight, key_value)):
            scale_rows_(weight.view(-1), scale, weight.shape[1], 0, weight.numel())
        return int(num_clipped(gamma))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(HIDDEN), MLA()
        self.ffn_norm = nn.RMSNorm(HIDDEN)
        self.gate, self.up, self.down = (
            linear(HIDDEN, FFN),
            linear(HIDDEN, FFN),
            linear(FFN, HIDDEN),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(VOCAB, HIDDEN), nn.RMSNorm(HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = linear(HIDDEN, VOCAB)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def attentions(self) -> list[MLA]:
        return [module for module in self.modules() if isinstance(module, MLA)]


@dataclass
class History:
    """One run, a value per step."""

    optimizer: str
    seed: int
    loss: list[float]
    max_logit: list[float]
    num_clipped: list[int]

    def final_loss(self) -> float:
        return sum(self.loss[-20:]) / len(self.loss[-20:])

    def steps_to(self, loss: float) -> int | None:
        return next((i for i, value in enumerate(self.loss) if value < loss), None)


def run(optimizer: str, seed: int, num_steps: int, threshold: float) -> History:
    """Train once; AdamW takes embedding, head and norms in every run, all else in ``adamw``."""
    torch.manual_seed(seed)
    model = Transformer()
    generator = torch.Generator().manual_seed(1234 + seed)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and optimizer != "adamw"]
    momenta = [torch.zeros_like(p) for p in matrices]
    owned = {id(p) for p in matrices}
    adamw = torch.optim.AdamW(
        [p for p in model.parameters() if id(p) not in owned],
        betas=(0.9, 0.95),
        weight_decay=WEIGHT_DECAY,
    )
    history = History(optimizer, seed, [], [], [])
    for step in range(num_steps):
        half = torch.randint(0, VOCAB, (BATCH, SEQUENCE // 2), generator=generator)
        tokens = torch.cat((half, half), dim=1)
        # The loss is on the repetition only: the first half cannot be predicted.
        predictions = model(tokens)[:, SEQUENCE // 2 - 1 : -1]
        loss = F.cross_entropy(predictions.flatten(0, 1), half.flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = LEARNING_RATE[optimizer] * min(1.0, (step + 1) / WARMUP_STEPS)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        with torch.no_grad():
            for weight, momentum in zip(matrices, momenta, strict=True):
                muon_step(weight, weight.grad, momentum, lr=lr, weight_decay=WEIGHT_DECAY)
        history.loss.append(loss.item())
        history.max_logit.append(max(a.max_logit.max().item() for a in model.attentions()))
        # S_max was measured on the weights before the step; the clip acts on those after it.
        clips = [a.clip(threshold) for a in model.attentions()] if optimizer == "muonclip" else []
        history.num_clipped.append(sum(clips))
    return history


def plot(histories: list[History], threshold: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), dpi=100)
    colours = {"adamw": "tab:grey", "muon": "tab:red", "muonclip": "tab:blue"}
    names = {"adamw": "AdamW", "muon": "Muon", "muonclip": f"MuonClip, τ = {threshold:g}"}
    first_seed = min(h.seed for h in histories)
    for h in histories:
        label = names[h.optimizer] if h.seed == first_seed else None
        left.plot(h.max_logit, color=colours[h.optimizer], lw=1, label=label)
        right.semilogy(h.loss, color=colours[h.optimizer], lw=1, label=label)
    left.axhline(threshold, color="black", ls=":", lw=1)
    left.set(xlabel="step", ylabel="largest attention logit")
    right.set(xlabel="step", ylabel="loss on the repetition")
    left.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        figure.savefig(file, format="png")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threshold", type=float, default=30.0, help="τ; the report uses 100")
    parser.add_argument(
        "--optimizers", nargs="+", default=list(LEARNING_RATE), choices=LEARNING_RATE
    )
    parser.add_argument("--plot", type=Path, default=Path("runs/muonclip_stability.png"))
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    histories = []
    print("| optimizer | seed | peak logit | logit at end | last-20 loss | loss < 0.5 at step |"
          " clipped head-steps | seconds |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for optimizer in arguments.optimizers:
        for seed in arguments.seeds:
            start = time.perf_counter()
            h = run(optimizer, seed, arguments.steps, arguments.threshold)
            histories.append(h)
            print(
                f"| {optimizer} | {seed} | {max(h.max_logit):.1f} | {h.max_logit[-1]:.1f} "
                f"| {h.final_loss():.4f} | {h.steps_to(0.5)} "
                f"| {sum(h.num_clipped)} of {arguments.steps * HEADS * LAYERS} "
                f"| {time.perf_counter() - start:.0f} |",
                flush=True,
            )
    plot(histories, arguments.threshold, arguments.plot)
    peaks = {
        name: max(max(h.max_logit) for h in histories if h.optimizer == name)
        for name in arguments.optimizers
    }
    figures = " ".join(f"peak_logit_{name}={value:.1f}" for name, value in peaks.items())
    print(f"RESULT threshold={arguments.threshold:g} {figures} plot={arguments.plot}")


if __name__ == "__main__":
    main()
