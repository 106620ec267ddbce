"""torchrun, of which an input that a rank refuses is one sentence: ``python -m`` in its place.

torchrun reports every rank that failed in a box, behind a traceback of its own, and ends with 1.
an input that a rank refused (``torchrun.refuse``) its sentence is all there is to say, and the exit
code is 2, as from one rank. Any other failure is torchrun's to report.
"""

import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_k2.host.torchrun import REFUSED


def sentence_of(failure: ProcessFailure) -> str | None:
    """With which the rank refused an input; ``None`` if it did not."""
    data = failure.error_file_data
    found = data.get(REFUSED) if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def refusal(failures: dict[int, ProcessFailure]) -> str | None:
    """The sentence to end with, ``None`` where a rank failed otherwise.

    Args:
        failures: of every rank that failed, those included that torchrun ended because of it.
    """
    sentences = [found for one in failures.values() if (found := sentence_of(one)) is not None]
    others = [one for one in failures.values() if sentence_of(one) is None and one.exitcode > 0]
    return sentences[0] if sentences and not others else None


def main(argv: list[str]) -> int:
    """Run torchrun's ``argv`` until all ranks have ended."""
    # What they log of a failed rank is in torchrun's report too.
    for module in ("api", "errors.error_handler"):
        logger = logging.getLogger(f"torch.distributed.elastic.multiprocessing.{module}")
        logger.setLevel(logging.CRITICAL)
    try:
        run.main(argv)
    except ChildFailedError as error:
        said = refusal(error.failures)
        if said is None:
            raise
        if 0 not in error.failures or sentence_of(error.failures[0]) is None:
            print(said, file=sys.stderr)  # else rank 0 has said it
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
