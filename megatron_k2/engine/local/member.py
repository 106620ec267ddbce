"""A process of the pool, as the pool sees it."""

import asyncio
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_k2.engine.protocol import Output


@dataclass(eq=False)
class Member:
    """See the module."""

    number: int
    process: BaseProcess
    connection: Connection
    streams: dict[str, "asyncio.Queue[Output | Exception]"] = field(default_factory=dict)
    calls: dict[int, "asyncio.Future[Any]"] = field(default_factory=dict)
    is_alive: bool = True
    loop: asyncio.AbstractEventLoop | None = None
    """Set when it is first used."""
    commands: list[tuple[Any, ...]] = field(default_factory=list)
    """Of this turn of the event loop: requests that come together begin together."""

    def send(self, *command: Any) -> None:
        """Hand it a command at the end of the loop's turn; one that has died gets none."""
        self.commands.append(command)
        asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        commands, self.commands = self.commands, []
        if commands and self.is_alive:
            try:
                self.connection.send(commands)
            except OSError:
                pass  # it is just dying: its reader reports it
