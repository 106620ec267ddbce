"""``megatron-k2 evaluate``: loss and perplexity of a Megatron checkpoint."""

from megatron_k2.engine.mcore.options import (
    check_evaluate,
    evaluate_parser,
    without_nproc,
)
from megatron_k2.host.torchrun import launch


def main(argv: list[str]) -> int:
    """Check what can be checked, then start the ranks."""
    args = evaluate_parser().parse_args(argv)
    check_evaluate(args)
    if args.nproc > 1:  # a rank's error would come wrapped in torchrun's report
        from megatron_k2.engine.mcore.jobs import evaluate_job

        evaluate_job(args, args.nproc)
    return launch("megatron_k2.engine.mcore.ranks", ["evaluate", *without_nproc(argv)], args.nproc)
