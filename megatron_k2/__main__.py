"""``python -m megatron_k2``: the command ``megatron-k2``."""

import sys

from megatron_k2.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
