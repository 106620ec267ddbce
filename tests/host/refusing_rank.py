"""A rank that refuses, ends itself or crashes: ``python -m tests.host.refusing_rank HOW RANK``."""

import os
import sys
import time

from megatron_k2.errors import UserError
from megatron_k2.host.torchrun import end, refuse

if __name__ == "__main__":
    how, rank = sys.argv[1:]
    if rank not in ("all", os.environ["RANK"]):
        time.sleep(60)  # torchrun ends it
    if how == "crashes":
        sys.exit(7)
    if how == "ends":
        end(7)
    sys.exit(refuse("program", UserError("no such thing; take another")))
