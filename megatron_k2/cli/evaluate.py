"""``megatron-k2 evaluate``: loss and perplexity of a Megatron checkpoint."""

from megatron_k2.inference.options import check_evaluate, evaluate_parser
from megatron_k2.parallel.launch import launch


def main(argv: list[str]) -> int:
    """Check what needs no model, then start the ranks."""
    args = evaluate_parser().parse_args(argv)
    check_evaluate(args)
    return launch("megatron_k2.inference.ranks", ["evaluate", *argv], args.nproc)
