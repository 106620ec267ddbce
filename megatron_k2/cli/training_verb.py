"""What ``pretrain`` and ``sft`` have in common: expand, check, start the ranks."""

from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.flags.words import last_value
from megatron_k2.host.torchrun import is_rank, launch
from megatron_k2.lock.directory import hold
from megatron_k2.run.flags import read_flags
from megatron_k2.run.record import RUN
from megatron_k2.training.pretrain import Program
from megatron_k2.training.resume import check_resume


def start(argv: list[str], program: Program, module: str, usage: str) -> int:
    """Start the ranks of a run; returns the exit code.

    Args:
        argv: of the verb.
        program: what is run.
        module: the same, as ``python -m`` takes it.
        usage: shown for ``--help`` and without arguments.
    """
    if not argv or "-h" in argv or "--help" in argv:
        print(usage, end="")
        return 0
    num_processes, argv = _take_nproc(argv)
    if "--print-args" in argv:
        return _print_flags([flag for flag in argv if flag != "--print-args"], program)
    if is_rank(num_processes):
        return launch(module, argv, num_processes)
    flags = read_flags(program.expand(argv, cuda=_has_driver()))
    program.check(flags, num_processes)
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


def _print_flags(argv: list[str], program: Program) -> int:
    import torch

    line = ""
    for flag in program.expand(argv, cuda=torch.cuda.is_available()):
        if flag.startswith("--") and line:
            print(line)
            line = flag
        else:
            line = f"{line} {flag}".strip()
    print(line)
    return 0
