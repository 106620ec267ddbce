"""A preset's model pushes round after round: is what the engine holds an export's, to the last bit?

    python tests/campaigns/weight_rounds.py [--preset k2-mini] [--rounds 5]

At TP1, and at TP2xEP2xPP2 over four ranks with gloo, all on this machine. Weights change in
between, by the same numbers at every layout; compared is ``convert export`` of the first weights,
changed so too. Beside a round's seconds those of one copy of every tensor. Not exercised: several
machines.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_k2.checkpoint.convert.export_hf import ExportOptions, export
from tests.support.distributed import run_ranks

LAYOUTS = {
    "TP1": (1, []),
    "TP2xEP2xPP2": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1 --pipeline-model-parallel-size 2".split(),
    ),
}
WORKER = "tests.weight_sync.preset_worker"


def pushed(layout, case, root):
    """How each round of a layout went."""
    world_size, flags = LAYOUTS[layout]
    out = root / f"{layout}.json"
    run_ranks(WORKER, world_size, [case | {"flags": flags, "out": str(out)}], root / layout)
    return json.loads(out.read_text())


def said(layout, found):
    """A line of figures."""
    wrong = sum(each["num_wrong"] for each in found)
    seconds, floor = (
        statistics.median(each[name] for each in found) for name in ("seconds", "floor_seconds")
    )
    return (
        f"{layout}: {len(found)} rounds of {found[0]['num_tensors']:,} tensors, "
        f"{found[0]['num_bytes'] / 1e6:,.0f} MB; {wrong} tensors not bit-equal; median "
        f"{seconds:.2f} s a round, {floor:.3f} s one copy"
    )


def main(argv=None):
    """Run the campaign; exit code 1 if a tensor was not the export's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="k2-mini")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layouts", nargs="*", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument(
        "--stale", action="store_true", help="compare with the round before, which must fail"
    )
    options = parser.parse_args(argv)
    num_wrong = 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        base, hf = root / "iter_0000001", root / "hf"
        case = {"preset": options.preset, "base": str(base), "out": ""}
        run_ranks(WORKER, 1, [case | {"flags": []}], root / "first")
        export(base, hf, ExportOptions(options.preset, dtype="fp32"))
        case |= {"export": str(hf), "rounds": options.rounds, "is_stale": options.stale}
        for layout in options.layouts:
            found = pushed(layout, case, root)
            print(said(layout, found), flush=True)
            num_wrong += sum(each["num_wrong"] for each in found)
    return min(num_wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
