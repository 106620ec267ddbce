"""Boxes that are pods: sandboxes of a warm pool, claimed through k8s-agent-sandbox.

For more programs at one time than a machine holds: ten thousand alive are a cluster's business, and
here only the client of one. A claim is made for each box and deleted with it, so nothing of a
program is left for the next. What isolates pods (gVisor, Kata, network policies, memory) is their
template's; ``megatron-k2 sandbox check --backend kubernetes`` runs the escape suite in them.

Named by ``MEGATRON_K2_SANDBOX_POOL`` (a SandboxWarmPool), ``MEGATRON_K2_SANDBOX_NAMESPACE`` and
``MEGATRON_K2_SANDBOX_ROUTER`` (the router's address; without it pods are reached from inside the
cluster). Tested against a server that speaks as the API and the router do, not against a cluster.
"""

import asyncio
import base64
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import secrets
import signal
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.sandbox import pod_runner
from megatron_k2.sandbox.box import BASE_ENVIRONMENT, Closing
from megatron_k2.sandbox.protocol import Limits, Result, Status

POOL, NAMESPACE, ROUTER = (
    f"MEGATRON_K2_SANDBOX_{name}" for name in ("POOL", "NAMESPACE", "ROUTER")
)
_PACKAGE = "k8s-agent-sandbox"
_MARGIN_SECONDS = 15
"""Between a program's wall deadline and giving up on its pod; ours."""
_LIFE_SECONDS = 900
"""After which the cluster deletes a claim that nobody closed, beyond the program's own; ours."""


class Kubernetes:
    """Pods of one warm pool."""

    name = "kubernetes"
    starts_here = False

    def __init__(self) -> None:
        self._pool = os.environ.get(POOL, "")
        self._namespace = os.environ.get(NAMESPACE, "default")
        self._router = os.environ.get(ROUTER, "")
        self._client: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._num_claimed = 0

    def missing(self) -> str | None:
        """Why it cannot be used here."""
        if not self._pool:
            return (
                f"set {POOL} to the name of a SandboxWarmPool, {NAMESPACE} and {ROUTER} beside it"
            )
        try:
            from k8s_agent_sandbox import AsyncSandboxClient  # noqa: F401
        except ImportError:
            return f"{_PACKAGE} is not installed; pip install 'megatron-k2[kubernetes]'"
        return None

    def version(self) -> str:
        """Of the client, with the pool: another template is another sandbox."""
        return f"{importlib.metadata.version(_PACKAGE)} {self._namespace}/{self._pool}"

    def open(self, limits: Limits) -> "PodBox":
        """A box whose pod is claimed when it is first used."""
        return PodBox(self, limits)

    async def claim(self, seconds: float) -> Any:
        """A pod that is ready.

        Args:
            seconds: after which the cluster deletes it, closed or not.
        """
        if self._loop is not (loop := asyncio.get_running_loop()):
            self._client, self._loop, self._num_claimed = self._connected(), loop, 0
        self._num_claimed += 1
        try:
            return await self._client.create_sandbox(
                self._pool, self._namespace, shutdown_after_seconds=int(seconds)
            )
        except BaseException:
            await self._left()
            raise

    async def release(self, pod: Any) -> None:
        """Delete a pod's claim."""
        try:
            await self._client.delete_sandbox(pod.claim_name, self._namespace)
        finally:
            await self._left()

    async def _left(self) -> None:
        """One claim less; with the last one the connections go."""
        self._num_claimed -= 1
        if not self._num_claimed:
            client, self._client, self._loop = self._client, None, None
            await client.close()

    def _connected(self) -> Any:
        from k8s_agent_sandbox import AsyncSandboxClient
        from k8s_agent_sandbox.models import (
            SandboxDirectConnectionConfig,
            SandboxInClusterConnectionConfig,
        )

        inside = SandboxInClusterConnectionConfig()
        way = SandboxDirectConnectionConfig(api_url=self._router) if self._router else inside
        return AsyncSandboxClient(connection_config=way)


class PodBox(Closing):
    """One pod, claimed late and released early.

    Files are sent with the next command; a request and its answer are one upload and one call.
    """

    def __init__(self, backend: Kubernetes, limits: Limits) -> None:
        self.limits = limits
        self._backend = backend
        self._files: dict[str, bytes] = {}
        self._pod: Any = None

    async def run(
        self, command: list[str], *, stdin: bytes = b"", environment: dict[str, str] | None = None
    ) -> Result:
        """Run a command in the box's folder, to its end."""
        request = {
            "command": command,
            "stdin": base64.b64encode(stdin).decode(),
            "environment": {**BASE_ENVIRONMENT, "HOME": "/tmp", **(environment or {})},
            "limits": dataclasses.asdict(self.limits),
        }
        found = await self._asked(request)
        if "error" in found:
            return Result(Status.KILLED, -1, b"", b"", 0.0, 0.0, found["error"])
        return _result(found, self.limits)

    async def write(self, name: str, content: bytes) -> None:
        """Put a file into the folder, before the next command.

        Raises:
            UserError: a name that leaves the folder.
        """
        path = os.path.normpath(name)
        if os.path.isabs(path) or path.split(os.sep)[0] in ("..", "."):
            raise UserError(f"file {name!r}: expected a relative name inside the folder")
        self._files[path] = content

    async def read(self, name: str) -> bytes:
        """A file of the folder.

        Raises:
            UserError: there is no such file.
        """
        found = await self._asked({"read": name, "most": self.limits.disk_bytes})
        if "error" in found:
            raise UserError(f"file {name!r}: {found['error']}")
        return base64.b64decode(found["content"])

    async def close(self) -> None:
        """Delete the claim; the pod goes with it."""
        pod, self._pod = self._pod, None
        if pod is not None:
            await self._backend.release(pod)

    async def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request to the runner in the pod; ``error`` where none of it came back."""
        seconds = self.limits.wall_seconds + _MARGIN_SECONDS
        identity = secrets.token_hex(8)
        files = {name: base64.b64encode(content).decode() for name, content in self._files.items()}
        text = json.dumps({**request, "files": files, "id": identity})
        try:
            async with asyncio.timeout(seconds + _LIFE_SECONDS):
                if self._pod is None:
                    self._pod = await self._backend.claim(seconds + _LIFE_SECONDS)
                    runner = Path(pod_runner.__file__).read_bytes()
                    await self._pod.files.write("runner.py", runner)
                await self._pod.files.write("request.json", text.encode())
                said = await self._pod.commands.run("python3 runner.py", timeout=int(seconds))
        except Exception as problem:  # the client's own, and those of what is under it
            return {"error": f"the pod did not answer: {type(problem).__name__}: {problem}"[:300]}
        self._files.clear()
        return _answer(said.stdout, identity)


def _answer(said: str, identity: str) -> dict[str, Any]:
    mark = f"{pod_runner.MARK}{identity} "
    for line in reversed(said.splitlines()):
        if line.startswith(mark):
            with contextlib.suppress(ValueError):
                found = json.loads(line.removeprefix(mark))
                if isinstance(found, dict):
                    return found
    return {"error": "the runner was ended from inside its pod"}


def _result(found: dict[str, Any], limits: Limits) -> Result:
    code, reason = int(found["exit_code"]), found["reason"]
    cpu, wall = float(found["cpu_seconds"]), float(found["wall_seconds"])
    status, why = Status.OK, ""
    if reason == "wall":
        status, why = Status.TIMEOUT, f"{limits.wall_seconds:g} wall seconds"
    elif reason == "cpu" or cpu > limits.cpu_seconds:
        status, why = Status.TIMEOUT, f"{limits.cpu_seconds:g} CPU seconds"
    elif reason == "output":
        status, why = Status.VIOLATION, f"{limits.output_bytes} bytes of output"
    elif code < 0:
        status, why = Status.KILLED, signal.Signals(-code).name
    output = [base64.b64decode(found[name])[: limits.output_bytes] for name in ("stdout", "stderr")]
    return Result(status, code, output[0], output[1], cpu, wall, why)
