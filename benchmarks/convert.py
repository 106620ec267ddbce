"""Import and export of a generated Hugging Face directory, beside ``cp`` and Megatron-Bridge.

Three tables. The conversion alone, with everything imported, in one process and with a worker a
core (the command's default): seconds, GB/s of source bytes, share of ``cp`` of the same bytes
(flushed, as the conversions flush), peak anonymous memory (RssAnon) above the imports of the one
process. The same as commands, from start to exit. And, where a Python with
Megatron-Bridge is given, its ``import_ckpt`` and ``export_ckpt`` on the same directory in the same
rounds. The fastest round counts.

    python benchmarks/convert.py [--peer-python PATH]
    python benchmarks/convert.py --fp8
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from generated_release import generate, give_a_tokenizer
from harness import machine_lock, print_inputs, print_result

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from megatron_k2.checkpoint.convert.import_hf import ImportOptions, import_hf
from megatron_k2.presets import K2_TINY

ANCHOR = dataclasses.replace(
    K2_TINY,
    num_layers=9,
    hidden_size=1024,
    ffn_hidden_size=4096,
    num_attention_heads=16,
    q_lora_rank=512,
    kv_lora_rank=256,
    qk_head_dim=64,
    qk_pos_emb_head_dim=32,
    v_head_dim=64,
    num_moe_experts=32,
    moe_ffn_hidden_size=512,
    vocab_size=4096,
)
"""895 tensors, 0.93 GB in bf16."""

PEER_VARIABLE = "MEGATRON_K2_BRIDGE_PYTHON"
INSTALL = f"""no Megatron-Bridge given: --peer-python or {PEER_VARIABLE} names a Python with it:
  python -m venv BRIDGE, with torch and megatron-core 0.19.2 in it, then
  BRIDGE/bin/pip install --no-deps megatron-bridge==0.6.2
  BRIDGE/bin/pip install transformers==5.12.1 datasets accelerate peft wandb==0.29.0 einops \\
      nvidia-modelopt omegaconf hydra-core megatron-energon"""


@dataclasses.dataclass(frozen=True, order=True)
class Cost:
    """Seconds and memory that one call took; they compare by wall time first."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int = 0
    """RssAnon above what it was at the start."""


def rss_anon_bytes() -> int:
    """Anonymous memory of this process now: mapped files do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def cpu_seconds() -> float:
    """Of this process, and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measured(call: Callable[[], object]) -> Cost:
    """Of ``call`` in this process; memory is without its workers'."""
    os.sync()  # nobody waits for what another has left unwritten
    before, peak, is_over = rss_anon_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_over.wait(0.005):
            peak = max(peak, rss_anon_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), cpu_seconds()
    call()
    wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
    is_over.set()
    watcher.join()
    return Cost(wall, cpu, max(0, peak - before))


def run_command(command: list[str]) -> tuple[Cost, str]:
    """A process from start to exit, and what it printed last."""
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    wall = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - wall
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu), done.stdout.strip()


def copy(source: Path, target: Path) -> None:
    """``cp`` and flush of its files, as the conversions flush theirs."""
    subprocess.run(["cp", "-r", source, target], check=True)
    subprocess.run(["sync", target, *target.iterdir()], check=True)


class Rounds:
    """The fastest cost of each candidate."""

    def __init__(self) -> None:
        self.best: dict[str, Cost] = {}

    def take(self, name: str, cost: Cost) -> None:
        self.best[name] = min(self.best.get(name, cost), cost)


def one_round(rounds: Rounds, folder: Path, dtype: str, peer: str | None) -> None:
    """Every candidate once; leaves the disk as it was."""
    source, megatron, back = folder / "hf", folder / "megatron", folder / "back"
    options = ExportOptions(dtype=dtype)
    rounds.take("cp", measured(lambda: copy(source, folder / "copy")))
    shutil.rmtree(folder / "copy")
    rounds.take("import", measured(lambda: import_hf(source, megatron, ImportOptions())))
    rounds.take("export", measured(lambda: export(megatron, back, options)))
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    parallel = {"num_workers": os.cpu_count() or 1}
    many = ImportOptions(**parallel)
    rounds.take("import, a worker a core", measured(lambda: import_hf(source, megatron, many)))
    split = ExportOptions(dtype=dtype, **parallel)
    rounds.take("export, a worker a core", measured(lambda: export(megatron, back, split)))
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    convert = [sys.executable, "-m", "megatron_k2", "convert"]
    commands = {
        "import command": [*convert, "import", str(source), str(megatron)],
        "export command": [*convert, "export", str(megatron), str(back), "--dtype", dtype],
    }
    for name, command in commands.items():
        rounds.take(name, run_command(command)[0])
    shutil.rmtree(megatron)
    shutil.rmtree(back)
    if peer is not None:
        peer_round(rounds, peer, source, megatron, back)


def peer_round(rounds: Rounds, peer: str, source: Path, megatron: Path, back: Path) -> None:
    """Bridge's two conversions: as commands, and without their imports and model building."""
    script = [peer, "-W", "ignore", str(Path(__file__).with_name("bridge_peer.py"))]
    for verb in ("import", "export"):
        arguments = [str(source), str(megatron), *([str(back)] if verb == "export" else [])]
        cost, printed = run_command([*script, verb, *arguments])
        rounds.take(f"Bridge {verb} command", cost)
        found = json.loads(printed.splitlines()[-1])
        own = [step for name, step in found["steps"].items() if name not in ("import", "build")]
        wall, cpu = (sum(values) for values in zip(*own, strict=True))
        rounds.take(f"Bridge {verb}", Cost(wall, cpu, found["peak_bytes_above_imports"]))
        wall, cpu = found["steps"]["convert"]
        rounds.take(f"Bridge {verb}, model to model", Cost(wall, cpu))
    shutil.rmtree(megatron)
    shutil.rmtree(back)


def report(rounds: Rounds, num_bytes: int) -> None:
    best = rounds.best
    print("| what | wall s | CPU s | GB/s of source | of cp | peak RssAnon above imports, MiB |")
    print("|---|---|---|---|---|---|")
    for name, cost in best.items():
        rate = num_bytes / cost.wall_seconds / 1e9
        share = best["cp"].wall_seconds / cost.wall_seconds
        peak = f"{cost.peak_bytes >> 20}" if cost.peak_bytes or name in ("import", "export") else ""
        print(
            f"| {name} | {cost.wall_seconds:.2f} | {cost.cpu_seconds:.2f} | {rate:.2f} "
            f"| {share:.2f} | {peak} |"
        )
    figures: dict[str, object] = {"gigabytes": num_bytes / 1e9}
    for name in ("import", "export"):
        if (peer := best.get(f"Bridge {name}")) is not None:
            wall = best[f"{name}, a worker a core"].wall_seconds
            figures[f"bridge_over_{name}_by_a_worker_a_core"] = peer.wall_seconds / wall
    for name in ("import", "export", "import command", "export command"):
        figures[f"{name.replace(' ', '_')}_seconds"] = best[name].wall_seconds
        if (peer := best.get(f"Bridge {name}")) is not None:
            ratio = peer.wall_seconds / best[name].wall_seconds
            figures[f"bridge_over_{name.replace(' ', '_')}"] = ratio
            cpu_ratio = peer.cpu_seconds / best[name].cpu_seconds
            figures[f"bridge_over_{name.replace(' ', '_')}_cpu"] = cpu_ratio
    print_result(**figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fp8", action="store_true", help="block-FP8 source")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest counts")
    parser.add_argument(
        "--peer-python", default=os.environ.get(PEER_VARIABLE), help="with megatron-bridge"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with machine_lock(), tempfile.TemporaryDirectory() as folder:
        print_inputs(**vars(arguments))
        run(Path(folder), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    source = folder / "hf"
    num_bytes = generate(source, ANCHOR, is_fp8=arguments.fp8)
    give_a_tokenizer(source)
    if arguments.peer_python is None:
        print(INSTALL)
    rounds = Rounds()
    for _ in range(arguments.rounds):
        one_round(rounds, folder, "fp8" if arguments.fp8 else "bf16", arguments.peer_python)
    report(rounds, num_bytes)


if __name__ == "__main__":
    main()
