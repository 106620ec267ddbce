"""A real vLLM on the CPU over exports of ours: ``make test-vllm``, which builds its environment.

Its server runs in a process and an environment of its own, computing in fp32; here its answers are
compared by ``engine check`` with transformers, and its greedy tokens with our engine's. Its MLA
kernel (of 512 + 64 wide latents alone) is ``benchmarks/rollout_vllm.py``'s. Not exercised: its own
transports of weights, GPUs.
"""

import asyncio
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
if not VLLM_PYTHON:
    pytest.skip("make test-vllm builds vLLM's environment and names it", allow_module_level=True)

from megatron_k2.chat.completion import parse_completion  # noqa: E402
from megatron_k2.chat.lexer import TextLexer  # noqa: E402
from megatron_k2.checkpoint.hf.config import hf_config, without_yarn  # noqa: E402
from megatron_k2.checkpoint.names.mapping import classic_from_transformers  # noqa: E402
from megatron_k2.cli.main import main  # noqa: E402
from megatron_k2.engine import check  # noqa: E402
from megatron_k2.engine.local.engine import LocalEngine  # noqa: E402
from megatron_k2.engine.local.opened import core_of  # noqa: E402
from megatron_k2.engine.protocol import UpdateError  # noqa: E402
from megatron_k2.engine.remote.endpoints import Endpoint  # noqa: E402
from megatron_k2.engine.remote.engine import RemoteEngine  # noqa: E402
from megatron_k2.engine.transfer.manifest import Counted  # noqa: E402
from megatron_k2.presets import YarnScaling  # noqa: E402
from megatron_k2.rl.cluster import commands  # noqa: E402
from tests.checkpoint.hf_directories import as_fp8, write_directory  # noqa: E402
from tests.engine.local.models import TINY, reference  # noqa: E402
from tests.engine.server.served import tokenizer_in  # noqa: E402
from tests.support.distributed import free_port  # noqa: E402

pytestmark = pytest.mark.slow

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_MLA_DISABLE": "1",  # its kernel takes latents of 512 + 64 alone
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # its routes for whoever trains
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
RIGHT = ("-cc", '{"custom_ops":["none"]}')
"""Its CPU rotary op is wrong on queries of three dimensions, silently."""
START_SECONDS = 300
LENGTH = 128


def shape(vocab_size, yarn=None, num_dense_layers=1):
    found = replace(
        TINY,
        hidden_size=128,
        ffn_hidden_size=256,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_head_dim=32,
        qk_pos_emb_head_dim=16,
        v_head_dim=32,
        num_moe_experts=16,
        moe_router_topk=4,
        moe_ffn_hidden_size=64,
        vocab_size=vocab_size,
        num_dense_layers=num_dense_layers,
    )
    found = without_yarn(found) if yarn is None else replace(found, yarn=yarn)
    return replace(found, max_position_embeddings=512)


def export_into(folder, dtype=torch.float32, yarn=None, seed=0, num_dense_layers=1):
    """A random model as a Hugging Face directory with a tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    tokenizer = tokenizer_in(folder)
    preset = shape(tokenizer.vocab_size, yarn, num_dense_layers)
    named = classic_from_transformers(reference(preset, seed).state_dict())
    kept = {
        k: v.contiguous() if k.endswith("correction_bias") else v.to(dtype).contiguous()
        for k, v in named.items()
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = hf_config(preset, model_type="deepseek_v3")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plugged(folder):
    """A search path on which vLLM finds our transport, as a supervisor makes it."""
    for path, content in commands.vllm_plugin(folder).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return str(folder)


@contextlib.contextmanager
def vllm(folder, *flags, weights_dir=None):
    """The address of a server over a directory; its last lines where it does not come up."""
    port = free_port()
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", str(LENGTH), "--served-model-name", "m", *flags]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS
    if weights_dir is not None:
        command += ["--weight-transfer-config", json.dumps({"backend": commands.VLLM_BACKEND})]
        own = {"PYTHONPATH": plugged(folder / "plugged")}
        environment |= own | {commands.VLLM_DIRECTORY: str(weights_dir)}
    log = folder / "vllm.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not _is_up(url):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(url):
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


async def greedy(folder, url, vocab_size):
    """Of both engines: prompts, greedy answers and their scores."""
    remote = await RemoteEngine.connect([Endpoint(url)], vocab_size=vocab_size)
    ours = LocalEngine(core_of(folder, num_slots=4, max_length=LENGTH))
    try:
        probes = check.drawn_probes(vocab_size, seed=1)
        return await check.scored_by(remote, probes), await check.scored_by(ours, probes)
    finally:
        await ours.close()
        await remote.close()


@pytest.mark.parametrize(
    ("dtype", "yarn"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, YarnScaling(8.0, 64, 32.0, 1.0, 1.0, 1.0)),
    ],
    ids=["fp32", "bf16 computed in fp32", "fp32 with YaRN"],
)
def test_vllm_computes_what_transformers_and_our_engine_do(tmp_path, capsys, dtype, yarn):
    folder = export_into(tmp_path, dtype, yarn)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    with vllm(folder, *RIGHT) as url:
        flags = ["--engine", url, "--reference", str(folder), "--tolerance", "2e-5"]
        assert main(["engine", "check", *flags]) == 0, capsys.readouterr().err
        print(capsys.readouterr().out)
        theirs, ours = asyncio.run(greedy(folder, url, vocab_size))
    assert [one.ids for one in theirs] == [one.ids for one in ours]


def test_what_bf16_compute_is_off_by_is_reported(tmp_path, capsys):
    """And is no agreement: experts are chosen otherwise where scores are near."""
    folder = export_into(tmp_path, torch.bfloat16)
    with vllm(folder, *RIGHT, "--dtype", "bfloat16") as url:
        flags = ["--engine", url, "--reference", str(folder), "--tolerance"]
        assert main(["engine", "check", *flags, "10"]) == 0
        print(capsys.readouterr().out)
        assert main(["engine", "check", *flags, "1e-3"]) == 2


def test_block_fp8_is_refused_on_a_cpu(tmp_path):
    """Fails when upstream has a kernel for it: then its numbers are to be compared."""
    preset = shape(tokenizer_in(tmp_path).vocab_size)
    named = classic_from_transformers(reference(preset, 0).state_dict())
    kept = {
        name: tensor if name.endswith("correction_bias") else tensor.bfloat16()
        for name, tensor in named.items()
    }
    folder = write_directory(tmp_path / "fp8", preset, as_fp8(kept))
    for path in tmp_path.glob("token*"):
        shutil.copy(path, folder)
    with (
        pytest.raises(AssertionError),
        vllm(folder, *RIGHT, "--dtype", "bfloat16"),
    ):
        pass
    said = (folder / "vllm.log").read_text()
    assert "Failed to find a kernel that can implement the ScaledMM linear layer" in said


def test_its_rotary_op_is_found_out(tmp_path, capsys):
    """Fails when upstream has mended it: then ``RIGHT`` is of no use any longer."""
    folder = export_into(tmp_path)
    with vllm(folder) as url:
        assert main(["engine", "check", "--engine", url, "--reference", str(folder)]) == 2
    assert "does not compute what the reference does" in capsys.readouterr().err


def reload(url, folder):
    """Let it read weights into its running model again; its answer says nothing."""
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    request = urllib.request.Request(
        f"{url}/collective_rpc",
        json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.loads(answer.read()) == {"results": [None]}


def test_a_dense_model_takes_new_weights_exactly(tmp_path, capsys):
    old, new = (
        export_into(tmp_path / str(seed), seed=seed, num_dense_layers=3) for seed in range(2)
    )
    flags = ["--reference", str(new), "--tolerance", "2e-5"]
    with vllm(old, *RIGHT) as url:
        assert main(["engine", "check", "--engine", url, *flags]) == 2
        reload(url, new)
        assert main(["engine", "check", "--engine", url, *flags]) == 0, capsys.readouterr().err


def weights_in(folder):
    """A directory's weights, as a trainer sends them."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [(name, file.get_tensor(name)) for name in file.keys()]


class Mistaken(Counted):
    """A transport that does not give on what it was given."""

    def __init__(self, mistake, *given):
        super().__init__(*given)
        self._mistake = mistake

    def __iter__(self):
        return iter(self._mistake(list(super().__iter__())))


def swapped(pairs):
    """Two of equal shape exchanged."""
    names = [n for n, _ in pairs if n.endswith("o_proj.weight")][:2]
    to = dict(zip(names, reversed(names), strict=True))
    return [(to.get(name, name), tensor) for name, tensor in pairs]


MISTAKES = {"one dropped": lambda pairs: pairs[:-1], "two swapped": swapped}


def test_a_dense_model_takes_rounds_by_the_protocol(tmp_path, capsys):
    """Files, vLLM's verbs, our receiver in it; what was not sent so is refused, and not served."""
    old, new = (
        export_into(tmp_path / str(seed), seed=seed, num_dense_layers=3) for seed in range(2)
    )
    vocab_size = json.loads((new / "config.json").read_text())["vocab_size"]
    weights_dir = tmp_path / "incoming"
    weights_dir.mkdir()
    flags = ["--reference", str(new), "--tolerance", "2e-5"]

    async def send(url, folder, version, make=Counted):
        endpoint = Endpoint(url, weights_dir=weights_dir)
        engine = await RemoteEngine.connect([endpoint], vocab_size=vocab_size, bucket_bytes=1 << 18)
        try:
            counted = make(weights_in(folder), version)
            await engine.update_weights(counted, version, counted.manifest)
            return engine.health()
        finally:
            await engine.close()

    with vllm(old, *RIGHT, weights_dir=weights_dir) as url:
        assert asyncio.run(send(url, new, "1")).weight_version == "1"
        assert main(["engine", "check", "--engine", url, *flags]) == 0, capsys.readouterr().err
        for mistake in MISTAKES.values():
            with pytest.raises(UpdateError):
                asyncio.run(send(url, old, "2", functools.partial(Mistaken, mistake)))
            with urllib.request.urlopen(f"{url}/is_paused", timeout=5) as answer:
                assert json.loads(answer.read()) == {"is_paused": True}
    assert not list(weights_dir.iterdir())


def test_its_reload_of_experts_is_found_out(tmp_path, capsys):
    """The same weights again, and it answers otherwise. Fails when upstream has mended it."""
    folder = export_into(tmp_path / "moe")
    flags = ["--reference", str(folder)]
    with vllm(folder, *RIGHT) as url:
        assert main(["engine", "check", "--engine", url, *flags]) == 0, capsys.readouterr().err
        reload(url, folder)
        assert main(["engine", "check", "--engine", url, *flags]) == 2
    assert "252 of 252 log-probabilities" in capsys.readouterr().err


SECTION = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
CALL = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
ANSWERS = [
    "No call at all.",
    "ok" + SECTION.format(CALL.format("functions.get_weather:0", '{"city": "Paris"}')),
    SECTION.format(
        CALL.format("functions.get_weather:0", '{"city": "Z\u00fcrich \\"x\\""}')
        + CALL.format("functions.add:1", '{"a": 1, "b": [2, {"c": null}]}')
    ),
    "A <b>tag</b> and {braces}." + SECTION.format(CALL.format("functions.add:3", "{}")),
]
"""Of a model that keeps to the template; what breaks it is our parser's alone to judge."""


def test_its_tool_parser_reads_what_ours_reads(tmp_path):
    tokenizer_in(tmp_path)
    command = [VLLM_PYTHON, str(Path(__file__).with_name("read_calls.py")), str(tmp_path)]
    done = subprocess.run(
        command,
        input=json.dumps(ANSWERS),
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | SETTINGS,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("CALLS "))
    theirs = json.loads(line.removeprefix("CALLS "))
    for text, their in zip(ANSWERS, theirs, strict=True):
        ours = parse_completion(TextLexer(), text + "<|im_end|>")
        assert their["content"] == ours.content
        read = [(call.id, call.name, json.loads(call.arguments)) for call in ours.tool_calls]
        assert [(i, n, json.loads(a)) for i, n, a in their["calls"]] == read
