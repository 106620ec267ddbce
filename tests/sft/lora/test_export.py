"""Adapters out of Megatron and back: merged, as PEFT's, and PEFT's own, all by their logits.

The oracle of a merge is dense: whole matrices of the checkpoint, ``W + (alpha / rank) B A`` in
fp32, written here from the definition; equal to the last bit. PEFT on transformers is an
independent implementation of the adapters; logits to 1e-5 of the largest.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_k2.checkpoint.names.mapping import expand
from megatron_k2.checkpoint.run_config import settle_preset
from megatron_k2.checkpoint.stored_model import open_model
from megatron_k2.checkpoint.torch_dist.reader import MegatronSource
from megatron_k2.cli.main import main
from megatron_k2.engine.mcore.compare_logits import logits_of
from megatron_k2.host.cpu import megatron_host
from megatron_k2.run.iterations import find_iteration
from tests.parallel import test_layouts as whole
from tests.support.distributed import run_ranks

peft = pytest.importorskip("peft", reason="PEFT is not installed; pip install peft")

pytestmark = pytest.mark.slow

RANK, ALPHA = 8, 24.0
LORA = f"--lora-rank {RANK} --lora-alpha {ALPHA} --lr 2e-2 --min-lr 2e-2".split()
BOUND = 1e-5
LONGER = 512
"""Positions that the adapters were trained for; the base had fewer."""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A base of one step, ``base``, and adapters of five, ``run``, with a rate that moves them."""
    root = tmp_path_factory.mktemp("export")
    once = "--train-samples 1 --save-interval 1".split()
    base = [*whole.MODEL, *whole.batch_of(1), *once, "--save", str(root / "base")]
    flags = [*whole.MODEL, *whole.batch_of(4), *LORA, "--save", str(root / "run")]
    flags += ["--load", str(root / "base"), "--moe-router-load-balancing-type", "none"]
    flags += ["--max-position-embeddings", str(LONGER)]
    cases = [{"flags": words, "inject": False} for words in (base, flags)]
    run_ranks("tests.parallel.worker", 1, cases, root / "logs", "gloo")
    assert main(["convert", "export", str(root / "base"), str(root / "base-hf"), *FP32]) == 0
    assert main(["convert", "export", str(root / "run"), str(root / "peft")]) == 0
    merged = ["convert", "export", str(root / "run"), str(root / "merged"), "--merge-lora", *FP32]
    assert main(merged) == 0
    return root


FP32 = "--dtype fp32 --model-type deepseek_v3 --workers 1".split()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def dense_merge(root: Path, scale: float = ALPHA / RANK) -> dict[str, torch.Tensor]:
    """Hugging Face name -> merged weight, from whole matrices of both checkpoints."""
    base, run = (MegatronSource(find_iteration(root / name)) for name in ("base", "run"))
    merged = {}
    for pair in expand(settle_preset(base.args, None, None)):
        weight = base.read(pair.megatron).tensor()[: pair.megatron_shape[0]].clone()
        name = pair.megatron.removesuffix("weight") + "adapter.lora_"
        if f"{name}a" in run.shapes:
            a, b = run.read(f"{name}a").tensor(), run.read(f"{name}b").tensor()
            if len(a) == 2 * RANK:
                gate, up = (scale * (y @ x) for x, y in zip(a.chunk(2), b.chunk(2), strict=True))
                weight += torch.cat([gate, up])
            else:
                weight += scale * (b @ a)
        merged |= dict(zip(pair.hf, pair.rule.operation.split(weight), strict=True))
    return merged


def test_a_merge_equals_a_dense_one_to_the_last_bit(root):
    expected, found = dense_merge(root), weights(root / "merged")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    moved = [n for n, w in weights(root / "base-hf").items() if not torch.equal(w, found[n])]
    assert len(moved) > 90
    assert not [n for n in moved if "norm" in n or n.endswith(("gate.weight", "lm_head.weight"))]


def test_an_engine_reads_the_merge_without_an_export(root):
    expected, read = weights(root / "merged"), dict(open_model(root / "run").tensors())
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_what_is_read_at_once_is_the_adapters_run_to_say(root):
    """And not the base's: an engine refused slots that the adapters were trained for."""
    assert open_model(root / "base").preset.max_position_embeddings < LONGER
    assert open_model(root / "run").preset.max_position_embeddings == LONGER
    config = json.loads((root / "merged" / "config.json").read_text())
    assert config["max_position_embeddings"] == LONGER


def test_alpha_applied_twice_or_a_transposed_product_differ(root):
    twice, found = dense_merge(root, (ALPHA / RANK) ** 2), weights(root / "merged")
    name = "model.layers.1.self_attn.o_proj.weight"
    assert (twice[name] - found[name]).abs().max() > 1e-3
    base = weights(root / "base-hf")[name]
    assert base.shape[0] == base.shape[1], "square, so that a transposed product would fit"
    transposed = base + (found[name] - base).T
    assert (transposed - found[name]).abs().max() > 1e-3


def test_a_bf16_merge_is_rounded_once(root, tmp_path):
    out = str(tmp_path / "bf16")
    assert main(["convert", "export", str(root / "run"), out, "--merge-lora"]) == 0
    exact, found = weights(root / "merged"), weights(tmp_path / "bf16")
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert torch.equal(found[name], exact[name].bfloat16())
    base = weights(root / "base-hf")[name].bfloat16()
    assert not torch.equal(found[name], (base + (exact[name] - base.float()).bfloat16()))


def tokens():
    return torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(2))


def with_peft(root: Path, adapter: Path):
    from transformers import DeepseekV3ForCausalLM

    base = DeepseekV3ForCausalLM.from_pretrained(root / "base-hf", dtype=torch.float32)
    base.config._attn_implementation = "eager"
    return peft.PeftModel.from_pretrained(base, adapter).eval()


def megatron_logits(run: Path):
    with megatron_host():
        return logits_of(run, tokens())


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def test_peft_on_transformers_gives_our_logits(root):
    with torch.inference_mode():
        found = with_peft(root, root / "peft")(tokens()).logits
    ours = megatron_logits(root / "run")
    assert relative(found, ours) < BOUND
    assert relative(logits_of(root / "merged", tokens()), ours) < BOUND
    assert relative(megatron_logits(root / "base"), ours) > 1e-2, "the adapters are seen"


def made_by_peft(root: Path, out: Path, **config):
    """An adapter that PEFT made and saved, away from its first values."""
    from transformers import DeepseekV3ForCausalLM

    base = DeepseekV3ForCausalLM.from_pretrained(root / "base-hf", dtype=torch.float32)
    base.config._attn_implementation = "eager"
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    generator = torch.Generator().manual_seed(4)
    for name, param in sorted(model.named_parameters()):
        if "lora_B" in name:
            noise = torch.randn(param.shape, generator=generator) * 0.05
            param.data.copy_(noise)
    model.save_pretrained(out)
    with torch.inference_mode():
        return model(tokens()).logits


BY_OLD_NAMES = ["gate_proj", "up_proj", "down_proj"]
"""Of experts, which PEFT fuses: gate and up with a block-diagonal B of twice the rank."""
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["q_b_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        {
            "r": 4,
            "lora_alpha": 4,
            "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"],
        },
        {
            "r": 8,
            "lora_alpha": 8,
            "target_modules": ["o_proj", "q_b_proj"],
            "rank_pattern": {"q_b_proj": 4},
        },
        {"r": 4, "lora_alpha": 8, "target_modules": [], "target_parameters": ["experts.down_proj"]},
    ],
    ids=["attention", "experts", "experts by old names", "two ranks", "down alone"],
)
def test_an_adapter_of_pefts_gives_its_logits_here(root, tmp_path, config):
    expected = made_by_peft(root, tmp_path / "made", **config)
    words = [str(tmp_path / "made"), str(tmp_path / "ours"), "--base", str(root / "base")]
    assert main(["convert", "import", *words]) == 0
    assert relative(megatron_logits(tmp_path / "ours"), expected) < BOUND


def test_there_and_back_is_the_same_adapter(root, tmp_path):
    words = [str(root / "peft"), str(tmp_path / "back"), "--base", str(root / "base")]
    assert main(["convert", "import", *words]) == 0
    run, back = (MegatronSource(find_iteration(path)) for path in (root / "run", tmp_path / "back"))
    assert run.shapes == back.shapes
    assert all(run.read(n).tensor().equal(back.read(n).tensor()) for n in run.shapes)
    assert back.args.lora_alpha == ALPHA
    assert set(back.args.lora_targets) == {
        *("linear_kv_down_proj", "linear_kv_up_proj", "linear_proj", "linear_q_down_proj"),
        *("linear_q_up_proj", "mlp.linear_fc1", "mlp.linear_fc2", "experts.linear_fc1"),
        *("experts.linear_fc2", "shared_experts.linear_fc1", "shared_experts.linear_fc2"),
    }


def refused(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    return capsys.readouterr().err


def test_what_cannot_be_converted_is_said(root, tmp_path, capsys):
    base, run, out = str(root / "base"), str(root / "run"), str(tmp_path / "out")
    assert "no adapters; drop it" in refused(capsys, "convert", "export", base, out, "--merge-lora")
    assert "give --base RUN" in refused(capsys, "convert", "import", str(root / "peft"), out)
    gone = refused(capsys, "convert", "export", run, out, "--base", "/nowhere")
    assert "its base /nowhere is not there" in gone
    changed = tmp_path / "changed"
    changed.mkdir()
    tensors = load_file(root / "peft" / "adapter_model.safetensors")
    config = json.loads((root / "peft" / "adapter_config.json").read_text())
    for said, name, value in (
        ("use_dora True", "use_dora", True),
        ("peft_type 'IA3'", "peft_type", "IA3"),
        ("bias 'all'", "bias", "all"),
    ):
        (changed / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        save_file(tensors, changed / "adapter_model.safetensors")
        words = ("convert", "import", str(changed), out, "--base", base)
        assert said in refused(capsys, *words)
    (changed / "adapter_config.json").write_text(json.dumps(config))
    half = {name: t for name, t in tensors.items() if "shared_experts.up_proj" not in name}
    save_file(half, changed / "adapter_model.safetensors")
    assert "train both or neither" in refused(capsys, *words)
    save_file(
        tensors | {"base_model.model.other.lora_A.weight": torch.ones(1)},
        changed / "adapter_model.safetensors",
    )
    assert "1 tensors of the adapter have no place" in refused(capsys, *words)
    assert not Path(out).exists()
