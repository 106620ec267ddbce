"""``megatron-k2 generate``: text from a Megatron checkpoint."""

from megatron_k2.inference.options import check_generate, generate_parser
from megatron_k2.parallel.launch import launch


def main(argv: list[str]) -> int:
    """Check what needs no model, then start the ranks."""
    args = generate_parser().parse_args(argv)
    check_generate(args)
    return launch("megatron_k2.inference.ranks", ["generate", *argv], args.nproc)
