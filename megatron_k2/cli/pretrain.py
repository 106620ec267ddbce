"""``megatron-k2 pretrain``: expand, check, start the ranks."""

import sys
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.megatron import expand
from megatron_k2.flags.words import last_value
from megatron_k2.host.torchrun import is_rank, launch
from megatron_k2.lock.directory import hold
from megatron_k2.run.flags import read_flags
from megatron_k2.run.record import RUN
from megatron_k2.training.preflight import check_run
from megatron_k2.training.resume import check_resume

HELP = """\
usage: megatron-k2 pretrain --preset NAME --data DIR [--save RUN] [--nproc N] [Megatron flags]

Trains on Megatron's own loop. Started again with the same --save, it resumes from the last
checkpoint. The same program is 'torchrun --nproc-per-node N examples/pretrain_k2.py <flags>'.

  --preset NAME   model and training defaults ('megatron-k2 presets' lists them)
  --data DIR      made by 'megatron-k2 data prepare'; or --mock-data
  --load RUN      start from another run's checkpoint, until --save has one of its own
  --start-over    start from there again, or anew, although --save has one
  --save RUN      checkpoints, metrics.jsonl, TensorBoard, logs, report.png
  --nproc N       ranks on this machine (default 1)
  --yarn          rotary scaling for the released context length
  --optimizer muonclip (default of every preset) or any of Megatron's
  --console megatron   Megatron's own output on the terminal
  --print-args    print the flags this expands to, one a line, and stop

Any other flag is Megatron's, and overrides the preset's.
"""


def main(argv: list[str]) -> int:
    """``megatron-k2 pretrain``: start the ranks; returns the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    num_processes, argv = _take_nproc(argv)
    if "--print-args" in argv:
        return _print_flags([flag for flag in argv if flag != "--print-args"])
    module = "megatron_k2.training.pretrain"
    if is_rank(num_processes):
        return launch(module, argv, num_processes)
    flags = read_flags(expand(argv, cuda=_has_driver()))
    check_run(flags, num_processes)
    check_resume(flags)
    if flags.save is None:
        return launch(module, argv, num_processes)
    with hold(Path(flags.save), RUN) as held, held.handed_over():
        return launch(module, argv, num_processes)


def _has_driver() -> bool:
    """Whether there is NVIDIA's driver: torch would say more, and takes seconds to."""
    return Path("/dev/nvidiactl").exists()


def _take_nproc(argv: list[str]) -> tuple[int, list[str]]:
    text = last_value(argv, "--nproc")
    if text is None:
        return 1, argv
    if not text.isdigit():
        raise UserError(f"--nproc {text}: expected a whole number of ranks")
    at = argv.index("--nproc") if "--nproc" in argv else argv.index(f"--nproc={text}")
    width = 2 if argv[at] == "--nproc" else 1
    return int(text), argv[:at] + argv[at + width :]


def _print_flags(argv: list[str]) -> int:
    import torch

    line = ""
    for flag in expand(argv, cuda=torch.cuda.is_available()):
        if flag.startswith("--") and line:
            print(line)
            line = flag
        else:
            line = f"{line} {flag}".strip()
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
