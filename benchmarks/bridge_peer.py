"""Megatron-Bridge's conversion of a directory, there and back, for ``benchmarks/convert.py``.

Run by a Python that has megatron-bridge (see ``INSTALL`` there), never imported:

    BRIDGE_PYTHON benchmarks/bridge_peer.py import HF_DIR MEGATRON_DIR
    BRIDGE_PYTHON benchmarks/bridge_peer.py export HF_DIR MEGATRON_DIR NEW_HF_DIR

The steps are those of Bridge's ``import_ckpt`` and ``export_ckpt``. Prints one JSON object: wall
and CPU seconds of each step, and the peak anonymous memory. Bridge 0.6.2 with Megatron-Core 0.19.2
runs on a CPU only with the patches named here; none of them touches the conversion itself:

- ``_import_without_transformer_engine``: peft/lora_layers.py imports it unguarded;
- ``_accept_mla_widths``: the local core attention refuses MLA's ``k_channels``;
- the rest is Megatron's CPU host, as this package runs it (``megatron_k2.host.cpu``).
"""

import builtins
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class PeakMemory:
    """Largest RssAnon of this process, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
            time.sleep(0.01)


def _import_without_transformer_engine() -> None:
    """Answer the one unguarded import; everyone else still sees that TE is absent."""
    original = builtins.__import__
    classes = {n: type(n, (), {}) for n in ("Linear", "LayerNormLinear", "GroupedLinear")}
    ops = types.SimpleNamespace(Sequential=type("Sequential", (), {}))
    pytorch = types.SimpleNamespace(**classes, ops=ops)

    def patched(name: str, space: Any = None, *rest: Any, **named: Any) -> Any:
        importer = (space or {}).get("__name__")
        if name == "transformer_engine.pytorch" and importer == "megatron.bridge.peft.lora_layers":
            return types.SimpleNamespace(pytorch=pytorch)
        return original(name, space, *rest, **named)

    builtins.__import__ = patched


def _accept_mla_widths() -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    original = DotProductAttention.__init__

    def patched(self: Any, *args: Any, k_channels: Any = 0, v_channels: Any = 0, **kw: Any) -> None:
        original(self, *args, **kw)

    DotProductAttention.__init__ = patched


def _build(bridge: Any) -> list[Any]:
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    provider = bridge.to_megatron_provider(load_weights=False)
    for name in (
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "gradient_accumulation_fusion",
        "cross_entropy_loss_fusion",
        "moe_shared_expert_overlap",
        "masked_softmax_fusion",
        "persist_layer_norm",
        "bias_activation_fusion",
    ):
        setattr(provider, name, False)
    provider.moe_token_dispatcher_type = "allgather"
    provider.cross_entropy_fusion_impl = "native"
    provider.transformer_impl = "local"
    provider.use_cpu_initialization = True
    provider.perform_initialization = False  # random numbers that the load would overwrite
    provider.bf16, provider.params_dtype = True, torch.bfloat16
    _accept_mla_widths()
    provider.finalize()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return [provider.provide()]


def _import(bridge: Any, source: str, target: str, lap: Callable[[str], None]) -> None:
    model = _build(bridge)
    lap("build")
    bridge.load_hf_weights(model, source)
    lap("convert")
    bridge.save_megatron_model(model, target, hf_tokenizer_path=source, low_memory_save=True)
    lap("write")


def _export(bridge: Any, source: str, target: str, lap: Callable[[str], None]) -> None:
    _accept_mla_widths()
    model = bridge.load_megatron_model(source, wrap_with_ddp=False)
    lap("read")
    bridge.save_hf_pretrained(model, target)
    lap("convert")


def main() -> None:
    verb, hf_dir, megatron_dir, *back = sys.argv[1:]
    os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    logging.disable(logging.WARNING)
    memory = PeakMemory()
    steps: dict[str, tuple[float, float]] = {}
    began = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal began
        now = time.perf_counter(), time.process_time()
        steps[name], began = (now[0] - began[0], now[1] - began[1]), now

    _import_without_transformer_engine()
    import torch
    import torch.distributed as dist
    from megatron.bridge import AutoBridge

    from megatron_k2.host.cpu import cpu_host

    torch.set_num_threads(1)
    lap("import")
    imported = memory.peak_bytes
    meeting = Path(tempfile.mkdtemp()) / "meet"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    with cpu_host():
        bridge = AutoBridge.from_hf_pretrained(hf_dir)
        if verb == "import":
            _import(bridge, hf_dir, megatron_dir, lap)
        else:
            _export(bridge, megatron_dir, back[0], lap)
    written = Path(back[0] if back else megatron_dir).rglob("*")
    subprocess.run(["sync", *written], check=True)
    lap("flush")
    above = memory.peak_bytes - imported
    print(json.dumps({"steps": steps, "peak_bytes_above_imports": above}))
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(print(__doc__))  # a part of convert.py
    main()
