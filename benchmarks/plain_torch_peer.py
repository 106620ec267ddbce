"""The peer of ``train_step.py``: transformers' DeepSeek-V3 in a plain loop with a textbook Muon.

Nothing here is of this project except the shape of the model. The Muon is torch.optim.Muon's loop
in fp32 and with the RMS match of Moonlight; one matrix at a time, in place where it can be.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

JORDAN = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5


def newton_schulz(G: Tensor) -> Tensor:
    """torch.optim.Muon's ``_zeropower_via_newtonschulz``, without its cast to bf16."""
    a, b, c = JORDAN
    X = G.T if G.size(0) > G.size(1) else G
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(NS_STEPS):
        gram = X @ X.T
        update = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        X = torch.addmm(X, update, X, beta=a)
    return X.T if G.size(0) > G.size(1) else X


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, Newton-Schulz, decoupled decay, a matrix at a time.

    3-D parameters (transformers' experts) are looped over as matrices; fused gate and up as two,
    which is what they are, and costs fewer FLOPs than the fused one.
    """

    def __init__(self, params: list[Tensor], fused: set[Tensor], lr: float, decay: float) -> None:
        super().__init__(params, {"lr": lr})
        self._fused, self._decay = fused, decay

    def _matrices(self, param: Tensor) -> Iterator[Tensor]:
        for matrix in param.unbind() if param.ndim == 3 else (param,):
            yield from matrix.chunk(2) if param in self._fused else (matrix,)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].mul_(0.95).add_(param.grad)
                direction = torch.add(param.grad, momentum, alpha=0.95)
                param.mul_(1 - group["lr"] * self._decay)
                for weight, matrix in zip(
                    self._matrices(param), self._parts(direction, param), strict=True
                ):
                    scale = 0.2 * math.sqrt(max(matrix.shape))
                    weight.add_(newton_schulz(matrix), alpha=-group["lr"] * scale)

    def _parts(self, value: Tensor, param: Tensor) -> Iterator[Tensor]:
        for matrix in value.unbind() if value.ndim == 3 else (value,):
            yield from matrix.chunk(2) if param in self._fused else (matrix,)


class Peer:
    """One model and its two optimizers."""

    def __init__(self, config: object, lr: float, decay: float) -> None:
        from transformers import DeepseekV3ForCausalLM

        self.model = DeepseekV3ForCausalLM(config).float().train()
        matrices, rest, fused = [], [], set()
        for name, param in self.model.named_parameters():
            is_matrix = param.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if is_matrix else rest).append(param)
            if name.endswith("gate_up_proj"):
                fused.add(param)
        self.muon = Muon(matrices, fused, lr, decay)
        self.adam = torch.optim.AdamW(
            rest, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay, foreach=True
        )

    def implementations(self) -> list[tuple[str, str]]:
        """Every (attention, experts) implementation that could run on a CPU in fp32."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        experts = ["eager", *sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())]
        return [(attention, expert) for attention in ("sdpa", "eager") for expert in experts]

    def use(self, attention: str, experts: str) -> None:
        self.model.set_attn_implementation(attention)
        self.model.set_experts_implementation(experts)

    def forward_backward(self, tokens: Tensor, labels: Tensor) -> float:
        self.model.zero_grad(set_to_none=True)
        logits = self.model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        return loss.item()

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.muon.step()
        self.adam.step()
