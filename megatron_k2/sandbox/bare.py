"""Programs without confinement: limits of the kernel and the watch's, and nothing else.

For machines where no other back-end runs and programs that are trusted; only ever by name.
"""

import os
import signal
import subprocess
import sys

from megatron_k2.sandbox.box import ChildProcess, FolderBox, kernel_limits
from megatron_k2.sandbox.folder import Folder
from megatron_k2.sandbox.protocol import Limits


class Bare:
    """A plain child process."""

    name = "bare"
    starts_here = True

    def missing(self) -> str | None:
        """Never."""
        return None

    def version(self) -> str:
        """Of nothing."""
        return sys.platform

    def open(self, limits: Limits) -> FolderBox:
        """A box whose programs run as whoever runs this."""
        return FolderBox(_start, limits, None)


class _Group(ChildProcess):
    def kill(self) -> None:
        """SIGKILL to the whole group; who left it survives."""
        if self._child.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)


def _start(
    command: list[str], variables: dict[str, str], folder: Folder, limits: Limits
) -> ChildProcess:
    child = subprocess.Popen(
        [*kernel_limits(limits), *command],
        env=variables,
        cwd=folder.path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    return _Group(child)
