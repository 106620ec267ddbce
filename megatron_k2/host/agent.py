"""torchrun, of which a rank that ends on purpose is no crash: ``python -m`` in its place.

torchrun reports every rank that failed in a box, behind a traceback of its own, and ends with 1. Of
an input that a rank refused (``torchrun.refuse``) its sentence is all there is to say, and the exit
code is 2, as from one rank; of a run that stops itself (``torchrun.end``) nothing is left to say,
and the code is its own. Any other failure is torchrun's to report.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_k2.host.torchrun import ENDED, REFUSED


def sentence_of(failure: ProcessFailure) -> str | None:
    """With which the rank refused an input; ``None`` if it did not."""
    data = failure.error_file_data
    found = data.get(REFUSED) if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def ended(failures: dict[int, ProcessFailure]) -> int | None:
    """The code to end with, ``None`` where a rank failed otherwise.

    Args:
        failures: of every rank that failed, those included that torchrun ended because of it.
    """
    every = [one.error_file_data for one in failures.values() if one.exitcode > 0]
    codes = {data.get(ENDED) if isinstance(data, dict) else None for data in every}
    return codes.pop() if len(codes) == 1 else None


def main(argv: list[str]) -> int:
    """Run torchrun's ``argv`` until all ranks have ended."""
    # What they log of a failed rank is in torchrun's report too.
    for module in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}")
        logger.setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError as error:
        code = ended(error.failures)
        if code is None:
            raise
        said = {rank: found for rank, one in error.failures.items() if (found := sentence_of(one))}
        if said and 0 not in said:
            print(next(iter(said.values())), file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
