"""Values of any type in any place of a release's JSON: a preset or a sentence, never a traceback.

Drawn from a list of what hand edits and torn downloads leave; the number of places is what makes it
thorough. Not exercised: damage inside tensors.
"""

import contextlib
import copy
import json
import random

import pytest

from megatron_k2.checkpoint.hf.config import hf_config
from megatron_k2.checkpoint.hf.preset import config_like, preset_from_hf
from megatron_k2.checkpoint.hf.reader import INDEX
from megatron_k2.cli.convert import main
from megatron_k2.errors import UserError
from megatron_k2.presets import K2_TINY
from tests.checkpoint.build_checkpoints import TINY
from tests.checkpoint.hf_directories import QUANTIZATION, as_fp8, random_weights, write_directory

ODD = (None, True, False, 0, -1, 1.5, 10**400, float("nan"), float("inf"), "", "x", [], {}, [None])
ODD = (*ODD, [1, "x"], {"a": 1}, {"type": []}, "\0", 2**63, [[]], [{}])


def places(content, path=()):
    """Every place of a JSON value, as keys and indices."""
    yield path
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items if isinstance(content, dict | list) else ():
        yield from places(value, (*path, key)) if isinstance(value, dict | list) else [(*path, key)]


def changed(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    at = content
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return content


def config():
    classic = hf_config(K2_TINY) | {"quantization_config": QUANTIZATION | {"ignored_layers": ["a"]}}
    modern = {"rope_type": "yarn", "rope_theta": 50000, **classic["rope_scaling"]}
    derived = {"layer_types": None, "head_dim": 16, "num_mtp_layers": 0, "text_config": None}
    return classic | {"rope_parameters": modern} | derived


@pytest.mark.parametrize("path", [path for path in places(config()) if path], ids=str)
def test_any_value_of_a_config_gives_a_preset_or_a_sentence(path):
    for value in ODD:
        said = changed(config(), path, value)
        with contextlib.suppress(UserError):
            preset_from_hf(said)
        with contextlib.suppress(UserError):
            config_like(said, K2_TINY, model_type=None, dtype="bf16")


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / "hf"
    return write_directory(path, TINY, as_fp8(random_weights(TINY)))


def read(path):
    content = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(content), b""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write(path, content, data):
    text = json.dumps(content).encode()
    length = len(text).to_bytes(8, "little") if path.suffix != ".json" else b""
    path.write_bytes(length + text + data)


def refuses(command):
    """Whether a command line is refused by a sentence; other exceptions travel."""
    try:
        main([str(word) for word in command])
    except UserError:
        return True
    return False


@pytest.mark.parametrize("file", ["config.json", INDEX, "model-2-of-3.safetensors"])
def test_any_value_anywhere_leaves_no_traceback_and_no_file(release, tmp_path, capsys, file):
    path = release / file
    content, data = read(path)
    draw = random.Random(0)
    every = list(places(content))
    for i in range(20):
        write(path, changed(content, draw.choice(every), draw.choice(ODD)), data)
        refuses(["audit", release])
        refuses(["inspect", release])
        refuses(["verify", release, release, "--only", "layers.0"])
        target = tmp_path / str(i)
        if refuses(["import", release, target, "--workers", 1]):
            assert not list(tmp_path.glob(f"{i}*"))
    write(path, content, data)
    assert main(["audit", str(release)]) == 0
