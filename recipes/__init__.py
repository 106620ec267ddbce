"""Complete run configurations, one function each. Importable as ``megatron_k2.recipes``.

``kimi_k2_<phase>_<N>gpu_<hw>``, ``moonlight_16b_a3b_<phase>_<N>gpu_<hw>`` and, for each phase,
``kimi_k2_<phase>_cpu`` and ``moonlight_16b_a3b_<phase>_cpu``; ``sft``, ``lora`` and ``rl`` are
phases, too. ``kimi_k2_rl_cluster_cpu`` is a twin with engines that are servers of their own.
``kimi_k2_phases_<N>gpu_<hw>`` and ``kimi_k2_phases_cpu`` are chains of them,
``kimi_k2_phases_sft_…`` likewise with fine-tuning behind them.
"""

import difflib
import functools
from collections.abc import Callable

from megatron_k2.errors import UserError
from megatron_k2.launch.blend import DataBlend
from megatron_k2.launch.chat_blend import ChatBlend
from megatron_k2.launch.recipe import Recipe
from megatron_k2.launch.stage import FineTuning
from megatron_k2.recipes import kimi_k2, moonlight, rl
from megatron_k2.recipes.blends import blend_of
from megatron_k2.recipes.cpu import DATA, cpu_twin, rl_cluster_twin, rl_twin, twins

TWIN_LORA_RANK = 8


def _cpu_twins() -> dict[str, Callable[[], Recipe]]:
    small = dict(zip(kimi_k2.PHASES, twins(tuple(kimi_k2.PHASES.values())), strict=True))
    found: dict[str, Callable[[], Recipe]] = {}
    previous = None
    for phase, scaled in small.items():
        name = f"kimi_k2_{phase}_cpu"
        data = blend_of(phase, DATA, is_synthetic=True)
        found[name] = functools.partial(cpu_twin, name, scaled, data, previous)
        previous = name
    alone = DataBlend(DATA, (1.0,), ("train",), is_synthetic=True)
    for model, run, data, published in (
        (
            "kimi_k2",
            kimi_k2.CONTINUE,
            blend_of("continue", DATA, is_synthetic=True),
            "an imported k2-tiny",
        ),
        ("moonlight_16b_a3b", moonlight.PRETRAIN, alone, None),
        ("moonlight_16b_a3b", moonlight.CONTINUE, alone, "an imported k2-tiny"),
    ):
        name = f"{model}_{run.name}_cpu"
        twin = twins((run,))[0]
        found[name] = functools.partial(cpu_twin, name, twin, data, imported=published)
    dialogues = ChatBlend(DATA, (1.0,), ("echo",), is_synthetic=True)
    for model, run in (("kimi_k2", kimi_k2.SFT), ("moonlight_16b_a3b", moonlight.SFT)):
        name, twin = f"{model}_sft_cpu", twins((run,))[0]
        found[name] = functools.partial(cpu_twin, name, twin, dialogues, stage=FineTuning())
    for model, run in (("kimi_k2", kimi_k2.LORA), ("moonlight_16b_a3b", moonlight.LORA)):
        name, twin = f"{model}_lora_cpu", twins((run,))[0]
        before = f"{model}_pretrain_cpu"
        found[name] = functools.partial(
            cpu_twin, name, twin, dialogues, before, stage=FineTuning(), lora_rank=TWIN_LORA_RANK
        )
    for name in ("kimi_k2_rl_cpu", "moonlight_16b_a3b_rl_cpu"):
        found[name] = functools.partial(rl_twin, name)
    name = "kimi_k2_rl_cluster_cpu"
    found[name] = functools.partial(rl_cluster_twin, name)
    return found


RECIPES: dict[str, Callable[[], Recipe]] = {
    **{
        kimi_k2.name(phase, n, gpu): functools.partial(kimi_k2.kimi_k2_pretrain, n, gpu, phase)
        for phase in kimi_k2.RUNS
        for n in kimi_k2.NUM_GPUS
        for gpu in kimi_k2.HARDWARE
    },
    **{
        moonlight.name(n, gpu, run): functools.partial(moonlight.moonlight_pretrain, n, gpu, run)
        for run in moonlight.RUNS
        for n in moonlight.NUM_GPUS
        for gpu in moonlight.HARDWARE
    },
    **{
        kimi_k2.name("sft", n, gpu): functools.partial(kimi_k2.kimi_k2_sft, n, gpu)
        for n in kimi_k2.SFT_NUM_GPUS
        for gpu in kimi_k2.HARDWARE
    },
    **{
        moonlight.name(n, gpu, "sft"): functools.partial(moonlight.moonlight_sft, n, gpu)
        for n in moonlight.NUM_GPUS
        for gpu in moonlight.HARDWARE
    },
    **{
        kimi_k2.name("lora", n, gpu): functools.partial(kimi_k2.kimi_k2_lora, n, gpu)
        for n, gpu in kimi_k2.LORA_SIZES
    },
    **{
        moonlight.name(n, gpu, "lora"): functools.partial(
            moonlight.moonlight_sft, n, gpu, has_adapters=True
        )
        for n in moonlight.NUM_GPUS
        for gpu in moonlight.HARDWARE
    },
    **{
        rl.name("kimi_k2", n, gpu): functools.partial(rl.kimi_k2_rl, n, gpu)
        for n in rl.K2_NUM_GPUS
        for gpu in kimi_k2.HARDWARE
    },
    **{
        rl.name("moonlight_16b_a3b", n, gpu): functools.partial(rl.moonlight_rl, n, gpu)
        for n in rl.MOONLIGHT_NUM_GPUS
        for gpu in moonlight.HARDWARE
    },
    **_cpu_twins(),
}
"""Name -> what builds it; building asks the planner, a few tenths of a second."""

_WHERE = ("cpu", *(f"{n}gpu_{gpu}" for n in kimi_k2.NUM_GPUS for gpu in kimi_k2.HARDWARE))
_CHAINS = {
    **{f"kimi_k2_phases_{where}": kimi_k2.chain(where) for where in _WHERE},
    **{
        f"kimi_k2_phases_sft_{where}": (*kimi_k2.chain(where), f"kimi_k2_sft_{where}")
        for where in _WHERE
    },
    "kimi_k2_pretrain_sft_cpu": ("kimi_k2_pretrain_cpu", "kimi_k2_sft_cpu"),
    "kimi_k2_pretrain_lora_cpu": ("kimi_k2_pretrain_cpu", "kimi_k2_lora_cpu"),
}
CHAINS = {name: parts for name, parts in _CHAINS.items() if set(parts) <= set(RECIPES)}
"""Name -> its recipes, each of which starts from the one before it."""


def get_chain(name: str) -> tuple[Recipe, ...]:
    """The recipes of a chain, or the one recipe called ``name``.

    Raises:
        UserError: see ``get_recipe``.
    """
    return tuple(get_recipe(part) for part in CHAINS.get(name, (name,)))


def get_recipe(name: str) -> Recipe:
    """The recipe called ``name``.

    Raises:
        UserError: if there is none; the message names the nearest.
    """
    if name in RECIPES:
        return RECIPES[name]()
    near = difflib.get_close_matches(name, [*RECIPES, *CHAINS], n=1)
    hint = f"did you mean '{near[0]}'?" if near else "list them: megatron-k2 launch --list"
    raise UserError(f"recipe '{name}' is not known; {hint}")
