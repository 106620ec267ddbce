"""A step's own process: ``python -m megatron_k2.selfcheck.body MODULE DEVICE WORKLOAD OUT``.

Its last words are in ``OUT``; what it or Megatron printed is the caller's log.
"""

import importlib
import json
import sys
import traceback
from pathlib import Path

from megatron_k2.errors import UserError
from megatron_k2.files import write_atomically
from megatron_k2.selfcheck.findings import Findings


def main(argv: list[str]) -> int:
    """Run a module's ``measure(device, workload)``; an exception is a failed step, in one line."""
    module, device, workload, out = argv
    try:
        found = importlib.import_module(f"megatron_k2.selfcheck.{module}").measure(device, workload)
    except (Exception, SystemExit) as error:  # the table must say so, whatever it was
        traceback.print_exc()
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        found = Findings("FAIL", f"{name}{said}"[:300])
    write_atomically(Path(out), json.dumps(found.to_json(), allow_nan=True).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
