"""Whole runs from the same recorded rollouts at every layout, against one rank; the reports' tests.

Two iterations of two mini-batches each, segments of two versions, MuonClip with QK-Clip at work.
Bounds are pretraining's (``tests/parallel/test_layouts.py``): losses 1e-6 relative, weights 1e-6
absolute at a rate of the report's size. The oracle of packs, in which answers share their prompt's
rows, is a run with one answer a pack.

AdamW's epsilon is above the rounding of a gradient: a token that is read once or twice has elements
of its embedding whose gradient is hardly more than that, and would be moved by its sign.

With context parallelism the curated packs are others, since documents are padded: no PTX there.
Runs with PTX are taught judging as well.

Not exercised: bf16, Transformer Engine, more than four ranks.
"""

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from tests.parallel.test_layouts import CP2, EP2, PP2, TP2, VPP2, ZERO, _load
from tests.rl.recorded import group, iteration
from tests.sft.build_set import write_set
from tests.support.distributed import BACKENDS, run_ranks
from tests.weight_sync.worker import expected_of

pytestmark = [pytest.mark.dist, pytest.mark.slow]

BOUND = 1e-6
ITERATIONS = 2
RUN = f"""
    --iterations {ITERATIONS} --prompts-per-iteration 4 --group-size 4 --mini-batches 2
    --policy-tau 1.5 --save-interval 9 --qk-clip-threshold 0.02 --adam-eps 1e-5
""".split()
OVERLAP = "--overlap-grad-reduce --ddp-bucket-size 20000".split()
LONG = "--seq-length 256 --max-position-embeddings 256".split()
EACH = "--save-interval 1".split()
PP4 = "--pipeline-model-parallel-size 4".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
MOE = "--recompute-granularity selective --recompute-modules moe".split()
KINDS = {
    "": [],
    "token": "--policy-loss token".split(),
    "window": "--policy-loss window --policy-window -0.01 0.01".split(),
    "per token": "--policy-length-scale per-token".split(),
    "replay": [],
    "PTX": "--ptx-weight 0.5 --ptx-packs 3 --critic-weight 0.7".split(),
    "MTP": "--mtp-num-layers 1 --clip-grad 0".split(),
    "no MTP": "--clip-grad 0 --no-shared-prompts".split(),
    "LoRA": "--lora-rank 4 --lora-alpha 8 --lr 2e-3 --min-lr 2e-3".split(),
}
LAYOUTS = {
    2: {
        "TP2+SP": TP2,
        "TP2+SP, replay, whole layers again": [*TP2, *FULL],
        "TP2+SP, LoRA": TP2,
        "EP2": EP2,
        "EP2, long packs that end early": [*EP2, *LONG],
        "EP2, replay, experts again": [*EP2, *MOE],
        "PP2": PP2,
        "PP2, replay, whole layers again": [*PP2, *FULL],
        "PP2xVPP2, PTX": VPP2,
        "CP2": CP2,
        "CP2, token": CP2,
        "CP2, replay": CP2,
        "DP2 ZeRO-1 overlapped, window": [*ZERO, *OVERLAP],
        "DP2 ZeRO-1, PTX": ZERO,
    },
    4: {"PP4": PP4, "TP2xPP2, PTX": [*TP2, *PP2]},
}
ALL = [name for layouts in LAYOUTS.values() for name in layouts]


def _at(root: Path, name: str) -> Path:
    return root / re.sub(r"\W", "_", name)


def _kind(name: str) -> str:
    return next((kind for kind in KINDS if kind and name.endswith(kind)), "") or next(
        (kind for kind in KINDS if f", {kind}," in name), ""
    )


def _case(root: Path, name: str, flags: list[str], kind: str, **more) -> dict:
    groups = "with_routes" if kind == "replay" else "groups"
    start = root / ("start_MTP" if "MTP" in kind else "start")
    ptx = ["--ptx-data", str(root / "set")] if kind == "PTX" else []
    load = ["--load", str(start)] if not name.startswith("start") else []
    if kind == "LoRA":
        load = ["--lora-base", str(start / "iter_0000002")]
    save = ["--save", str(_at(root, name))]
    return {
        "flags": [*RUN, *flags, *KINDS[kind], *ptx, *load, *save],
        "groups": str(root / f"{groups}.pkl"),
        "out": str(_at(root, f"{name} out")),
        "is_taught": kind == "PTX",
        **more,
    }


def _write(path: Path, iterations) -> None:
    path.write_bytes(pickle.dumps(list(iterations)))


def _lagging(seed: int, *, has_routes: bool = False):
    """An iteration of which every group's first two answers were begun a version ago."""
    found = iteration(seed, has_routes=has_routes)
    if seed == 0:
        return found  # there is no version before the first
    late = []
    for g in found:
        rewards = [each.reward for each in g.trajectories[:2]]
        begun = group(g.ordinal, rewards, 7, has_routes=has_routes, lags=(1, 0))
        late.append(replace(g, trajectories=(*begun.trajectories, *g.trajectories[2:])))
    return late


def _dead(seed: int):
    return [group(4 * seed + i, (0.5,) * 4) for i in range(4)]


@pytest.fixture(scope="module", params=BACKENDS)
def runs(request, tmp_path_factory) -> Path:
    """All runs, a start-up for each world size; each starts from weights that one rank saved."""
    root = tmp_path_factory.mktemp("rl")
    write_set(root / "set")
    for name, has_routes in (("groups", False), ("with_routes", True)):
        _write(
            root / f"{name}.pkl", [_lagging(s, has_routes=has_routes) for s in range(ITERATIONS)]
        )
    _write(root / "six.pkl", [iteration(seed) for seed in range(6)])
    live = [[g for g in _lagging(s) if g.is_live] for s in range(ITERATIONS)]
    _write(root / "live.pkl", live)
    _write(root / "dead.pkl", [_dead(0)])
    _write(root / "then_dead.pkl", [_lagging(0), _dead(1)])
    run_ranks("tests.rl.learner_worker", 1, _on_one_rank(root), root / "logs1", request.param)
    for world_size, layouts in LAYOUTS.items():
        cases = [_case(root, name, flags, _kind(name)) for name, flags in layouts.items()]
        cases += _further(root)[world_size]
        logs = root / f"logs{world_size}"
        run_ranks("tests.rl.learner_worker", world_size, cases, logs, request.param)
    return root


def _fresh(root: Path, first: int = 0) -> dict:
    """Iterations from ``first`` on, of which no token is of an older version."""
    path = root / f"fresh_{first}.pkl"
    _write(path, [iteration(seed) for seed in range(first, 2)])
    return {"groups": str(path)}


def _on_one_rank(root: Path) -> list[dict]:
    dead = {"groups": str(root / "dead.pkl")}
    cases = [
        _case(root, "start", ["--iterations", "1"], "") | dead,
        _case(root, "start_MTP", ["--iterations", "1"], "MTP") | dead,
    ]
    cases += [_case(root, f"one rank, {kind}", [], kind) for kind in KINDS]
    alone = ["--no-shared-prompts"]
    cases.append(_case(root, "alone", alone, "", wrong="one answer a pack"))
    cases.append(_case(root, "own prompts, replay", alone, "replay"))
    cases.append(_case(root, "forgotten", [], "", wrong="answers forget their prompt"))
    dead = {"groups": str(root / "then_dead.pkl")}
    cases.append(_case(root, "then dead", EACH, "PTX") | dead)
    cases.append(_case(root, "dead groups count", EACH, "PTX", wrong="dead groups count") | dead)
    reset = [*ZERO, "--reset-optimizer", *EACH]
    cases.append(_case(root, "reset", [*reset, "--iterations", "2"], "", **_fresh(root)))
    again = _case(root, "not reset", [*ZERO, "--iterations", "1"], "", **_fresh(root, 1))
    again["flags"] += ["--load", str(root / "reset"), "--ckpt-step", "2"]
    cases.append(again)
    cases.append(_case(root, "live", ["--mini-batches", "1"], "", groups=str(root / "live.pkl")))
    cases.append(_case(root, "all", ["--mini-batches", "1"], ""))
    cases.append(_case(root, "heads move the trunk", [], "MTP", wrong="heads move the trunk"))
    cases.append(_case(root, "masks ignore versions", [], "", wrong="masks ignore versions"))
    return cases


def _further(root: Path) -> dict[int, list[dict]]:
    """Of two ranks and of four."""
    stopped = _case(root, "stopped", ZERO, "PTX")
    exits = {**stopped, "flags": [*stopped["flags"], "--exit-interval", "1"]}
    samples = {"samples": True}
    five = [*PP2, *"--iterations 6 --mini-batches 1 --save-interval 1".split()]
    six = {"groups": str(root / "six.pkl")}
    one = "--iterations 1 --prompts-per-iteration 2 --mini-batches 1 --seq-length 64".split()
    return {
        2: [
            _case(root, "PP2, five", five, "") | six,
            _case(root, "PP2, five, stale", five, "", wrong="a stage sends what it held") | six,
            _case(root, "shares", CP2, "", wrong="shares squared alone"),
            exits,
            stopped,
            _case(root, "at rest", [*ZERO, "--offload-in-rollout"], "PTX", held=True),
            _case(root, "TP2 sampled", [*TP2, *one], "") | samples,
            _case(root, "PP2 sampled", [*PP2, *one], "") | samples,
            _case(root, "no replay", [*TP2, *one, "--no-router-replay"], "") | samples,
        ],
        4: [_case(root, "bounds", PP4, "", wrong="middle stages without bounds")],
    }


def _tensors(directory: Path, number: int = 2 * ITERATIONS, wanted: str = "") -> dict:
    """A checkpoint's tensors by global name: weights, and with ``wanted`` the optimizer's too."""
    at = directory / f"iter_{number:07d}"
    metadata = FileSystemReader(at).read_metadata().state_dict_metadata
    names = re.compile(wanted or r"^(decoder|embedding|output_layer|lora|adapters)")
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if names.search(key) and hasattr(entry, "size")
    }
    _load(state, at)
    return state


def _difference(a: dict, b: dict) -> float:
    assert a.keys() >= b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in b)


def _lines(directory: Path) -> list[dict]:
    return [
        json.loads(line) for line in (directory / "rl" / "updates.jsonl").read_text().splitlines()
    ]


def _steps(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", ALL)
def test_a_run_equals_one_rank(runs, layout, record_property):
    found, expected = _at(runs, layout), _at(runs, f"one rank, {_kind(layout)}")
    for a, b in zip(_lines(found), _lines(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-6)
        for name in ("entropy", "kl", "log_ratio"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6)
        for name in ("ptx_nll", "lesson_nll"):
            assert a[name] == (b[name] and pytest.approx(b[name], rel=1e-6))
        for name in ("largest", "mean_absolute", "num_tokens"):
            assert a["mismatch"][name] == pytest.approx(b["mismatch"][name], rel=1e-5)
    for a, b in zip(_steps(found), _steps(expected), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
        assert a["max_logit_per_layer"] == pytest.approx(b["max_logit_per_layer"], rel=1e-4)
        assert a["num_clipped_heads"] == b["num_clipped_heads"]
    difference = _difference(_tensors(found), _tensors(expected))
    record_property("difference", difference)
    record_property("bar", BOUND)
    assert difference < BOUND


def test_the_runs_move_far_more_than_the_bound_and_differ_by_their_flags(runs):
    start = _tensors(runs / "start", 2)
    kinds = ["", "token", "window", "per token", "replay", "PTX"]
    ends = [_tensors(_at(runs, f"one rank, {kind}")) for kind in kinds]
    assert all(_difference(end, start) > 100 * BOUND for end in ends)
    assert all(_difference(end, ends[0]) > 100 * BOUND for end in ends[1:])
    lines = _lines(_at(runs, "one rank, "))
    assert [line["kl"] > 0 for line in lines] == [False, True] * ITERATIONS
    assert any(step["num_clipped_heads"] for step in _steps(_at(runs, "one rank, ")))
    biases = [key for key in start if "expert_bias" in key]
    assert biases
    assert all(end[key].equal(start[key]) for end in ends for key in biases)


def test_packed_answers_on_four_stages_equal_each_in_a_pack_of_its_own(runs):
    """Megatron-Bridge #2952: middle stages without the documents' bounds."""
    alone = _at(runs, "alone")
    for layout in ("PP4", "one rank, "):
        for a, b in zip(_lines(_at(runs, layout)), _lines(alone), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-6)
        assert _difference(_tensors(_at(runs, layout)), _tensors(alone)) < BOUND
    assert _difference(_tensors(_at(runs, "bounds")), _tensors(alone)) > 100 * BOUND


def test_answers_that_share_their_prompts_rows_learn_the_same(runs):
    """Loss, gradients and S_max, with routes and without; the wrong variant is far off."""
    for found, own in (("one rank, ", "alone"), ("one rank, replay", "own prompts, replay")):
        lines = [_lines(_at(runs, name)) for name in (found, own)]
        for a, b in zip(*lines, strict=True):
            assert a["num_tokens"] + a["num_saved"] == b["num_tokens"]
            assert a["num_saved"] > b["num_saved"] == 0
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-6, abs=1e-6)
        for a, b in zip(_steps(_at(runs, found)), _steps(_at(runs, own)), strict=True):
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
            assert a["max_logit_per_layer"] == pytest.approx(b["max_logit_per_layer"], rel=1e-4)
        assert _difference(_tensors(_at(runs, found)), _tensors(_at(runs, own))) < BOUND
    forgotten = _tensors(_at(runs, "forgotten"))
    assert _difference(forgotten, _tensors(_at(runs, "alone"))) > 100 * BOUND


def test_shares_of_an_answer_are_joined_before_they_are_squared(runs):
    """slime's own test of context parallelism; here the wrong variant is far off."""
    expected = _tensors(_at(runs, "one rank, "))
    assert _difference(_tensors(_at(runs, "shares")), expected) > 100 * BOUND


def test_a_dead_group_changes_neither_gradients_nor_their_scale(runs):
    """slime #657, TRL #6367 and #5588: to the bit, as if it had not been sampled."""
    found, expected = (_tensors(_at(runs, name), ITERATIONS) for name in ("all", "live"))
    assert _difference(found, expected) == 0
    assert [line["num_live_groups"] for line in _lines(_at(runs, "all"))] == [3] * ITERATIONS


def test_a_batch_without_a_live_group_takes_no_step_nor_does_ptx_alone(runs):
    """Weights, momenta and schedule to the bit; the wrong variant moves them by PTX alone."""
    wanted = r"^(optimizer\.|decoder|embedding|output_layer)"
    for name, is_same in (("then dead", True), ("dead groups count", False)):
        before, after = (_tensors(_at(runs, name), number, wanted) for number in (2, 4))
        assert any(key.startswith("optimizer.") for key in before)
        assert all(before[key].equal(after[key]) for key in before) is is_same
    lines = _lines(_at(runs, "then dead"))
    assert [(line["is_taken"], line["version"]) for line in lines] == [
        *((True, 1), (True, 2)),
        *[(False, 2)] * 2,
    ]
    asked = json.loads((_at(runs, "then dead out") / "collector.json").read_text())["asked"]
    assert asked == [[0, 0], [1, 2]]


def test_prediction_layers_learn_and_leave_the_trunk_alone(runs):
    """verl #6432: the trunk is that of a run without them, to the bit."""
    trunk = _tensors(_at(runs, "one rank, no MTP"))
    with_heads = _tensors(_at(runs, "one rank, MTP"))
    assert _difference(with_heads, trunk) == 0
    start = _tensors(runs / "start_MTP", 2, r"^mtp")
    end = _tensors(_at(runs, "one rank, MTP"), wanted=r"^mtp")
    assert start
    assert _difference(end, start) > 100 * BOUND
    assert _difference(_tensors(_at(runs, "heads move the trunk")), trunk) > 100 * BOUND


def test_segments_of_an_older_version_are_masked(runs):
    """slime #1445: an iteration whose first answers were begun a version before."""
    lines = _lines(_at(runs, "one rank, ")), _lines(_at(runs, "masks ignore versions"))
    trained = [[line["num_trained_tokens"] for line in found] for found in lines]
    assert trained[0][:2] == trained[1][:2]
    assert all(a < b for a, b in zip(trained[0][2:], trained[1][2:], strict=True))
    ends = (_tensors(_at(runs, name)) for name in ("one rank, ", "masks ignore versions"))
    assert _difference(*ends) > 100 * BOUND


def test_replayed_routes_give_the_engines_log_probabilities(runs):
    """Megatron-LM #4168: the engine chose other experts than the trainer would."""
    for name in ("TP2 sampled", "PP2 sampled"):
        (line,) = _lines(_at(runs, name))
        assert line["mismatch"]["num_tokens"] == 96
        assert line["mismatch"]["largest"] < 1e-5
    (line,) = _lines(_at(runs, "no replay"))
    assert line["mismatch"]["largest"] > 1e-2


def test_a_run_that_was_ended_goes_on_as_if_it_had_not_been(runs):
    found, expected = _at(runs, "stopped"), _at(runs, "DP2 ZeRO-1, PTX")
    wanted = r"^(optimizer\.|decoder|embedding|output_layer)"
    a, b = (_tensors(directory, wanted=wanted) for directory in (found, expected))
    assert all(a[key].equal(b[key]) for key in b)
    lines = [
        [{k: v for k, v in line.items() if "second" not in k} for line in each]
        for read in (_lines, _steps)
        for each in (read(found), read(expected))
    ]
    assert lines[0] == lines[1]
    assert lines[2] == lines[3]
    assert lines[2][-1]["consumed_tokens"] == sum(line["num_tokens"] for line in lines[0])
    told = json.loads((_at(runs, "stopped out") / "collector.json").read_text())
    assert told == {"asked": [[1, 2]], "commits": [1]}


def test_an_optimizer_that_is_reset_is_one_that_never_stepped(runs):
    """Momenta, moments and their bias correction; the same steps from weights alone."""
    found, expected = _tensors(_at(runs, "reset"), 4), _tensors(_at(runs, "not reset"), 2)
    assert _difference(found, expected) == 0


def test_after_every_update_the_engine_holds_the_checkpoints_bits(runs, tmp_path):
    """SkyRL #1345: stale caches of a pipeline's collectives. To the bit, never "it changed"."""
    for name in ("PP2, five", "PP2, five, stale"):
        differing = []
        for number in range(1, 6):
            held = torch.load(_at(runs, f"{name} out") / f"engine_{number}.pt")
            out = tmp_path / name / str(number)
            export(_at(runs, name) / f"iter_{number:07d}", out, ExportOptions(dtype="fp32"))
            expected = expected_of(out, 0)
            assert held.keys() == expected.keys()
            differing.append(sum(not held[key].equal(expected[key]) for key in held))
        assert (sum(differing) == 0) is (name == "PP2, five")


@pytest.mark.parametrize("kind", ["", "optimizer"])
def test_gradients_that_are_freed_in_a_rollout_change_no_bit(runs, kind):
    found = _tensors(_at(runs, "at rest"), wanted=kind)
    expected = _tensors(_at(runs, "DP2 ZeRO-1, PTX"), wanted=kind)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_what_a_rank_holds_by_phase(runs):
    """fp32 and ZeRO-1 over two ranks: a gradient a weight, states and no master of half of them."""
    for rank in range(2):
        phases = json.loads((_at(runs, "at rest out") / f"held_{rank}.json").read_text())
        train, update, rollout = (phases[name] for name in ("train", "update", "rollout"))
        assert train["gradients"] == pytest.approx(train["weights"], rel=0.02)
        assert 0.4 * train["weights"] < train["optimizer"] < 0.65 * train["weights"]
        for phase in (update, rollout):
            assert phase == {**train, "gradients": 0}, "on a CPU nothing else moves"
