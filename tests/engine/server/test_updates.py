"""New weights over HTTP: whole or 503, from the named directory alone."""

import asyncio

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")
httpx = pytest.importorskip("httpx2", reason="needs httpx2, which openai brings")

from megatron_k2.checkpoint.names.mapping import classic_from_transformers  # noqa: E402
from megatron_k2.engine.local.core import Core  # noqa: E402
from megatron_k2.engine.local.engine import LocalEngine  # noqa: E402
from megatron_k2.engine.server.service import ServerLimits  # noqa: E402
from megatron_k2.engine.transfer.bucket_files import BucketFolder  # noqa: E402
from megatron_k2.engine.transfer.buckets import buckets_of  # noqa: E402
from megatron_k2.engine.transfer.manifest import Counted  # noqa: E402
from tests.engine.local.models import TINY, reference, weights_of  # noqa: E402
from tests.engine.server.served import served, tokenizer_in  # noqa: E402

BUCKET_BYTES = 30_000


@pytest.fixture(scope="module")
def model():
    return reference(TINY)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """(client, folder, the engine's weights)."""
    folder = BucketFolder(tmp_path_factory.mktemp("weights"))
    tokenizer = tokenizer_in(tmp_path_factory.mktemp("tokenizer"))
    weights = weights_of(model, TINY)

    def engine():
        return LocalEngine(Core(weights, num_slots=2, max_length=32))

    limits = ServerLimits(seconds=30)
    with (
        served(engine, tokenizer, limits, has_admin=True, weights=folder) as (url, _),
        httpx.Client(base_url=url, timeout=30) as client,
    ):
        yield client, folder, weights


def new_weights(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in classic_from_transformers(model.state_dict()).items()
    }


def post(client, path, body, status=200):
    answer = client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def start(client, version):
    return post(client, "/start_weight_update", {"weight_version": version})


def take(client, file, status=200):
    return post(client, "/update_weights", {"update_info": {"file": file}}, status)


def finish(client, version, manifest, status=200):
    body = {"weight_version": version, "manifest": manifest}
    return post(client, "/finish_weight_update", body, status)


def generate(client):
    body = {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 2, "temperature": 0}}
    return client.post("/inference/v1/generate", json=body)


def whole_round(client, folder, tensors, version):
    counted = Counted(tensors.items(), version)
    start(client, version)
    for bucket in buckets_of(counted, BUCKET_BYTES):
        name = folder.write(bucket)
        take(client, name)
        folder.remove(name)
    return finish(client, version, folder.write_manifest(counted.manifest()))


def test_a_round_replaces_every_bit_and_the_tag(server, model):
    client, folder, weights = server
    init = {"init_info": {"backend": "files"}}
    found = post(client, "/init_weight_transfer_engine", init)
    assert found == {"backend": "files", "directory": str(folder.directory)}
    for seed, version in enumerate(("7", "8")):
        tensors = new_weights(model, seed)
        assert whole_round(client, folder, tensors, version)["weight_version"] == version
        assert all(tensors[name].equal(place) for name, place in weights.held.items())
        assert client.get("/weight_info").json() == {"weight_version": version}
        assert generate(client).json()["weight_versions"] == [version] * 2


def test_nothing_is_answered_while_a_round_is_open_or_after_it_failed(server, model):
    client, folder, _ = server
    tensors = new_weights(model, 3)
    whole_round(client, folder, tensors, "whole")
    buckets = list(buckets_of(tensors.items(), BUCKET_BYTES))
    start(client, "cut")
    assert generate(client).status_code == client.get("/health").status_code == 503
    take(client, folder.write(buckets[0]))
    assert "half in" in generate(client).json()["error"]["message"]
    for path in ("/pause", "/resume"):
        assert client.post(path).status_code == 503
    counted = Counted(buckets[0], "cut")
    list(counted)
    error = finish(client, "cut", folder.write_manifest(counted.manifest()), 503)["error"]
    assert error["update_code"] == "weights"
    assert "never came" in generate(client).json()["error"]["message"]
    assert take(client, folder.write(buckets[0]), 409)["error"]["message"].startswith("no update")
    whole_round(client, folder, tensors, "mended")
    assert generate(client).status_code == 200


def test_a_new_start_ends_what_a_dead_trainer_left(server, model):
    client, folder, _ = server
    tensors = new_weights(model, 4)
    start(client, "dead")
    take(client, folder.write(next(buckets_of(tensors.items(), BUCKET_BYTES))))
    whole_round(client, folder, tensors, "next")
    assert client.get("/weight_info").json()["weight_version"] == "next"


@pytest.mark.parametrize(
    ("fault", "code"), [("swap", "checksum"), ("old tag", "version"), ("two tags", "version")]
)
def test_what_is_not_what_was_sent_is_refused(server, model, fault, code):
    client, folder, _ = server
    tensors = new_weights(model, 5)
    counted = Counted(tensors.items(), "old" if fault == "old tag" else "new")
    sent = dict(counted)
    a, b = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (0, 1))
    if fault == "swap":
        sent[a], sent[b] = sent[b], sent[a]
    start(client, "new")
    take(client, folder.write(list(sent.items())))
    version = "other" if fault == "two tags" else "new"
    error = finish(client, version, folder.write_manifest(counted.manifest()), 503)["error"]
    assert error["update_code"] == code
    assert generate(client).status_code == 503
    whole_round(client, folder, tensors, "mended")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "sub/file", "", ".hidden", "absent", "link"]
)
def test_only_files_of_the_directory_are_read(server, model, tmp_path, name):
    client, folder, _ = server
    tensors = new_weights(model, 6)
    outside = BucketFolder(tmp_path)
    (folder.directory / "link").unlink(missing_ok=True)
    (folder.directory / "link").symlink_to(tmp_path / outside.write(list(tensors.items())))
    start(client, "new")
    take(client, name, 400)
    finish(client, "new", name, 400)
    whole_round(client, folder, tensors, "the round was still open, and is ended by this")


def test_a_file_that_is_no_bucket_fails_the_round(server, model):
    client, folder, _ = server
    (folder.directory / "odd.safetensors").write_bytes(b"\xff" * 100)
    (folder.directory / "odd.json").write_text('{"weight_version": "new", "tensors": {"a": 1}}')
    start(client, "new")
    assert take(client, "odd.safetensors", 503)["error"]["update_code"] == "delivery"
    start(client, "new")
    assert finish(client, "new", "odd.json", 503)["error"]["update_code"] == "delivery"
    whole_round(client, folder, new_weights(model, 7), "mended")


def test_wrong_bodies_are_sentences(server):
    client, *_ = server
    post(client, "/init_weight_transfer_engine", {"init_info": {"backend": "nccl"}}, 400)
    post(client, "/start_weight_update", {}, 400)
    post(client, "/update_weights", {"update_info": {"file": 3}}, 400)
    post(client, "/finish_weight_update", {"weight_version": "1"}, 400)


def test_without_the_switch_or_the_directory_there_is_nothing(model, tmp_path):
    tokenizer = tokenizer_in(tmp_path)

    def engine():
        return LocalEngine(Core(weights_of(model, TINY), num_slots=1, max_length=32))

    body = {"weight_version": "1"}
    with served(engine, tokenizer) as (url, _), httpx.Client(base_url=url) as client:
        assert client.post("/start_weight_update", json=body).status_code == 404
        assert client.get("/weight_info").status_code == 404
    with (
        served(engine, tokenizer, has_admin=True) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        assert "--weights-dir" in client.post("/start_weight_update", json=body).text


def test_shutting_down_ends_an_open_round(model, tmp_path):
    folder = BucketFolder(tmp_path)
    engines = []

    def engine():
        engines.append(LocalEngine(Core(weights_of(model, TINY), num_slots=1, max_length=32)))
        return engines[0]

    tokenizer = tokenizer_in(tmp_path / "tokenizer")
    with (
        served(engine, tokenizer, has_admin=True, weights=folder) as (url, _),
        httpx.Client(base_url=url) as client,
    ):
        start(client, "1")
    assert "shutting down" in engines[0].health().detail
    asyncio.run(engines[0].close())
