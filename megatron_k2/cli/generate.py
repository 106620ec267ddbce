"""``megatron-k2 generate``: text from a Megatron checkpoint."""

from megatron_k2.engine.mcore.options import (
    check_generate,
    generate_parser,
    without_nproc,
)
from megatron_k2.host.torchrun import launch


def main(argv: list[str]) -> int:
    """Check what can be checked, then start the ranks."""
    args = generate_parser().parse_args(argv)
    check_generate(args)
    if args.nproc > 1:  # a rank's error would come wrapped in torchrun's report
        from megatron_k2.engine.mcore.jobs import generate_job

        generate_job(args, args.nproc)
    return launch("megatron_k2.engine.mcore.ranks", ["generate", *without_nproc(argv)], args.nproc)
