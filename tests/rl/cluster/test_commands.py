"""The engines' file and the command of every process: kept as they are, refused by a sentence.

The commands of vLLM over several nodes and of SGLang were not run: what is held here is what they
say, by their documentation.
"""

import dataclasses
import sys
from pathlib import Path

import pytest

from megatron_k2.cli import serve
from megatron_k2.errors import UserError
from megatron_k2.presets import get_preset
from megatron_k2.rl.cluster.commands import (
    VLLM_BACKEND,
    VLLM_DIRECTORY,
    Place,
    command_of,
)
from megatron_k2.rl.cluster.engines import (
    Engines,
    Member,
    members_of,
    model_directory,
    read_engines,
    tokenizer_directory,
)
from tests.rl.cluster.supervising import engines_file

TOKEN = "a-token-that-no-list-of-processes-shows"
PLACE = Place(
    "10.0.0.2", 8101, "10.0.0.1", 8200, Path("/model"), Path("/dev/shm/w"), Path("/private")
)
K2 = {"directory": "/model"}


def words(engines, member, place=PLACE):
    found = command_of(engines, member, place, TOKEN)
    assert TOKEN not in " ".join(found.words)
    return " ".join(found.words[1:]), found


def engines(backend, **more):
    return Engines(backend, 2, K2, weights_directory="/dev/shm", **more)


def test_local():
    options = {"num_slots": 8, "max_length": 512, "dtype": "bfloat16", "batch_invariant": True}
    said, found = words(engines("local", options=options), Member(0, 0, ()))
    assert said == (
        "-m megatron_k2 serve --load /model --load-format dummy --tokenizer /model "
        "--host 10.0.0.2 --port 8101 --api-key-env MEGATRON_K2_ENGINE_KEY "
        "--admin --weights-dir /dev/shm/w --dtype bf16 --num-slots 8 --max-length 512 "
        "--deadline 3600.0 --batch-invariant"
    )
    assert found.words[0] == sys.executable
    assert found.environment == {"MEGATRON_K2_ENGINE_KEY": TOKEN}
    serve._parser().parse_args(found.words[4:])  # it knows all of them
    gpu, more = words(engines("local", gpus_per_node=2), Member(0, 0, (1,)))
    assert gpu.endswith("--device cuda")
    assert more.environment["CUDA_VISIBLE_DEVICES"] == "1"


def test_vllm_over_two_nodes():
    k2 = engines(
        "vllm",
        nodes_per_replica=2,
        gpus_per_node=8,
        colocated=True,
        options={
            "max_model_len": 32768,
            "max_num_seqs": 256,
            "gpu_memory_utilization": 0.85,
            "returns_routed_experts": True,
            "weight_transfer": "ipc",
            "flags": ["--enable-eplb"],
            "environment": {"VLLM_ALL2ALL_BACKEND": "deepep_low_latency"},
        },
    )
    both = (
        "--tokenizer /model --load-format dummy --dtype bfloat16 --max-model-len 32768 "
        "--max-num-seqs 256 --tensor-parallel-size 1 --enable-expert-parallel "
        "--data-parallel-size 16 --data-parallel-size-local 8 --data-parallel-address 10.0.0.1 "
        "--data-parallel-rpc-port 8200"
    )
    rest = (
        "--enable-sleep-mode --gpu-memory-utilization 0.85 "
        '--weight-transfer-config {"backend": "ipc"} --enable-return-routed-experts'
    )
    start = "-m vllm.entrypoints.cli.main serve /model"
    gpus = tuple(range(8))
    leader, found = words(k2, Member(1, 0, gpus))
    assert leader == f"{start} {both} {rest} --host 10.0.0.2 --port 8101 --enable-eplb"
    follower, _ = words(k2, Member(1, 1, gpus))
    assert (
        follower == f"{start} {both} --data-parallel-start-rank 8 {rest} --headless --enable-eplb"
    )
    assert found.environment == {
        "VLLM_API_KEY": TOKEN,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_HOST_IP": "10.0.0.2",
        "VLLM_ALL2ALL_BACKEND": "deepep_low_latency",
        "PYTHONPATH": "/private/vllm",
        "MEGATRON_K2_WEIGHTS_DIR": "/dev/shm/w",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    }


def test_vllm_on_one_node_disaggregated():
    one = engines("vllm", gpus_per_node=8, options={"tensor_parallel_size": 2})
    said, _ = words(one, Member(0, 0, tuple(range(8))))
    assert said == (
        "-m vllm.entrypoints.openai.api_server --model /model --tokenizer /model "
        "--load-format dummy --dtype bfloat16 --tensor-parallel-size 2 --enable-expert-parallel "
        '--data-parallel-size 4 --weight-transfer-config {"backend": "files"} '
        "--host 10.0.0.2 --port 8101"
    )
    with pytest.raises(UserError, match="3 does not divide the 8 GPUs"):
        words(dataclasses.replace(one, options={"tensor_parallel_size": 3}), Member(0, 0, (0,) * 8))


def test_sglang_untested():
    k2 = engines("sglang", nodes_per_replica=2, gpus_per_node=8, colocated=True)
    said, found = words(k2, Member(0, 1, tuple(range(8))))
    assert said == (
        "-m sglang.launch_server --config /private/sglang.yaml --model-path /model "
        "--tokenizer-path /model --load-format dummy --dtype bfloat16 --tp-size 16 --dp-size 16 "
        "--ep-size 16 --enable-dp-attention --nnodes 2 --node-rank 1 "
        "--dist-init-addr 10.0.0.1:8200 --enable-memory-saver --host 10.0.0.2 --port 8101"
    )
    assert found.files == {Path("/private/sglang.yaml"): f'api-key: "{TOKEN}"\n'}


def test_an_option_of_another_backend_is_refused():
    with pytest.raises(UserError, match="max_model_len is no option of backend 'local'; it has"):
        words(engines("local", options={"max_model_len": 1}), Member(0, 0, ()))
    with pytest.raises(UserError, match="num_slots is 'many'; expected int"):
        words(engines("local", options={"num_slots": "many"}), Member(0, 0, ()))


def test_values_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="dtype 'fp8': expected one of float32, bfloat16"):
        words(engines("local", options={"dtype": "fp8"}), Member(0, 0, ()))


def test_the_transport_of_weights_is_given_to_vllm_whole():
    _, found = words(engines("vllm", gpus_per_node=1), Member(0, 0, (0,)))
    module = Path("/private/vllm/megatron_k2_files.py")
    text = found.files[module]
    assert f'BACKEND = "{VLLM_BACKEND}"' in text
    assert f'DIRECTORY = "{VLLM_DIRECTORY}"' in text
    assert "def register()" in text
    assert "from megatron_k2" not in text
    about = {path.parent.name for path in found.files if path != module}
    assert len(about) == 1
    assert about.pop().endswith(".dist-info")
    (entry,) = (text for path, text in found.files.items() if path.name == "entry_points.txt")
    assert "megatron_k2_files = megatron_k2_files:register" in entry


def test_nodes_are_filled_in_order():
    two = engines("vllm", nodes_per_replica=2, gpus_per_node=2)
    found = [(m.replica, m.rank) for node in range(4) for m in members_of(two, node, 4)]
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1)]
    shared = engines("local", gpus_per_node=4)
    assert members_of(shared, 0, 1) == [Member(0, 0, (0, 1)), Member(1, 0, (2, 3))]
    with pytest.raises(UserError, match="2 replicas of 2 nodes on 3 nodes: expected 4 nodes"):
        members_of(two, 0, 3)
    with pytest.raises(UserError, match="2 replicas on a node of 3 GPUs"):
        members_of(engines("local", gpus_per_node=3), 0, 1)
    with pytest.raises(UserError, match="--node 4 of --nodes 4"):
        members_of(two, 4, 4)


def test_a_preset_becomes_a_directory(tmp_path):
    from megatron_k2.checkpoint.stored_model import described_model

    model = {"preset": "k2-tiny", "num_layers": 2, "vocab_size": 512, "tokenizer": "/t"}
    tiny = Engines("local", 1, model)
    directory = model_directory(tiny, tmp_path / "model")
    found = described_model(directory).preset
    expected = dataclasses.replace(get_preset("k2-tiny"), num_layers=2, vocab_size=512)
    assert (found.num_layers, found.vocab_size) == (2, 512)
    assert found.yarn == expected.yarn
    assert tokenizer_directory(tiny, directory) == Path("/t")
    with pytest.raises(UserError, match="depth is no field of a preset"):
        model_directory(Engines("local", 1, model | {"depth": 3}), tmp_path)
    with pytest.raises(UserError, match=r"has no config\.json"):
        model_directory(Engines("local", 1, {"directory": str(tmp_path)}), tmp_path)


def test_files_that_cannot_be_are_refused(tmp_path):
    good = {"backend": "local", "replicas": 1, "model": {"preset": "k2-tiny"}}
    assert read_engines(engines_file(tmp_path, good)).replicas == 1
    for change, said in (
        ({"backend": "ray"}, "backend 'ray': expected one of local, vllm, sglang"),
        ({"replicas": 0}, "replicas 0: expected 1 or more"),
        ({"nodes_per_replica": 2}, "own engine lies on one node"),
        ({"model": {}}, "either 'directory' or 'preset'"),
        ({"options": []}, r"options is \[\]; expected an object"),
        ({"patience": {"silent": 0}}, "patience: silent 0"),
        ({"patience": {"loud": 1}}, "unexpected keyword argument 'loud'"),
        ({"weights_directory": "/no/such"}, "no such directory"),
        ({"replica": 1}, r"\['replica'\]; expected an object of backend"),
    ):
        with pytest.raises(UserError, match=said):
            read_engines(engines_file(tmp_path, good | change))
    for text, said in (("[", "is no JSON"), ("[]", "list; expected an object"), ("{}", "missing")):
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_engines(path)
    with pytest.raises(UserError, match="No such file"):
        read_engines(tmp_path / "none.json")
