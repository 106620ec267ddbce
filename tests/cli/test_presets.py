"""``megatron-k2 presets``: complete, exact, and quick because it imports no torch."""

import json
import subprocess
import sys

from megatron_k2.cli import main as cli
from megatron_k2.presets import PRESETS


def _run(capsys, *argv):
    code = cli.main(["presets", *argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_preset_is_listed_with_its_source(capsys):
    code, out, _ = _run(capsys)
    assert code == 0
    for preset in PRESETS.values():
        assert f"\n{preset.name}\n" in "\n" + out
        assert preset.source in out


def test_kimi_k2_is_shown_to_the_last_parameter(capsys):
    _, out, _ = _run(capsys, "kimi-k2")
    assert "1,026,408,232,448" in out
    assert "1,026,408,209,408" in out
    assert "k2-tiny" not in out


def test_json_holds_the_same_numbers(capsys):
    _, out, _ = _run(capsys, "--json")
    by_name = {entry["name"]: entry for entry in json.loads(out)}
    assert set(by_name) == set(PRESETS)
    counts = by_name["kimi-k2"]["parameters"]
    assert counts["total"] == counts["trainable"] + counts["router_biases"] == 1_026_408_232_448
    assert counts["activated_with_embedding"] - counts["activated"] == 163840 * 7168
    assert by_name["moonlight-16b-a3b"]["shape"]["q_lora_rank"] is None


def test_an_unknown_name_is_answered_with_the_nearest(capsys):
    code, _, err = _run(capsys, "kimi-k3")
    assert code == 2
    assert "did you mean 'kimi-k2'?" in err


def test_no_heavy_module_is_imported():
    """What keeps the answer under a third of a second."""
    program = (
        "import sys; from megatron_k2.cli.main import main; code = main(['presets']); "
        "heavy = {'torch', 'numpy', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules); "
        "sys.exit(code or (f'imported {heavy}' if heavy else 0))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
