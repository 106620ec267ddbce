"""Harbor task directories: read as tasks, run in containers, and written from ours.

A directory holds ``task.toml``, ``instruction.md``, ``environment/Dockerfile``, a folder of tests
with ``test.sh``, and perhaps a ``solution``; the verifier leaves a number in
``/logs/verifier/reward.txt`` or an object of numbers in ``reward.json``. Their images name absolute
places, so a container engine is needed, docker or podman, without network; without one the verdict
is *unknown*. The tests are copied into the container after the candidate has ended and all it
started, into a folder it never saw; the programs that the tests call are those it leaves, which the
format cannot prevent.

An answer is a shell script: what an agent would have typed.
"""

import asyncio
import json
import re
import secrets
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_k2.errors import UserError
from megatron_k2.files import sha256_of_files
from megatron_k2.gym.judging import NotJudged, SingleAnswerDomain
from megatron_k2.gym.protocol import Task, Verdict, right, wrong

NAME = "harbor"
TESTS, VERIFIER, SOLVER = "tests", "test.sh", "solve.sh"
ENGINES = ("docker", "podman")
_SCRIPT = re.compile(r"```(?:bash|sh|shell)?[ \t]*\n(.*?)```", re.DOTALL)
_BUILD_SECONDS = 600.0


def read_directory(folder: Path) -> Task:
    """A task directory as a task.

    Raises:
        UserError: a file is missing, or ``task.toml`` is none.
    """
    for name in ("task.toml", "instruction.md", "environment/Dockerfile", f"{TESTS}/{VERIFIER}"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no Harbor task: {name} is missing")
    try:
        facts = tomllib.loads((folder / "task.toml").read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise UserError(f"{folder / 'task.toml'}: {problem}") from None
    seconds = {
        name: float(facts.get(name, {}).get("timeout_sec", default))
        for name, default in (("agent", 600), ("verifier", 600))
    }
    reference = {
        "folder": str(folder.resolve()),
        "tests_sha256": sha256_of_files([p for p in (folder / TESTS).iterdir() if p.is_file()]),
        "seconds": seconds,
    }
    prompt = (folder / "instruction.md").read_text("utf-8")
    return Task(NAME, prompt, reference, id=folder.name, source=NAME)


def read_directories(root: Path) -> list[Task]:
    """Every task directory below a folder, by name.

    Raises:
        UserError: there is none, or one is broken.
    """
    found = [read_directory(path.parent) for path in sorted(root.rglob("task.toml"))]
    if not found:
        raise UserError(f"{root} holds no Harbor task: no task.toml below it")
    return found


class Harbor(SingleAnswerDomain):
    """Runs candidates in containers.

    Args:
        engine: docker or podman, a path too; the first that is installed by default.
        num_slots: containers at one time.
    """

    name = NAME

    def __init__(self, engine: str | None = None, num_slots: int = 2) -> None:
        installed = (name for name in ENGINES if shutil.which(name))
        self._engine = engine or next(installed, None)
        self._free = asyncio.Semaphore(num_slots)

    async def _judged(self, task: Task, answer: str) -> Verdict:
        if self._engine is None:
            raise NotJudged(f"Harbor tasks need a container engine: {' or '.join(ENGINES)}")
        if not (script := script_of(answer)):
            return wrong("the answer holds no shell script")
        folder = Path(task.reference["folder"])
        tests = [path for path in (folder / TESTS).iterdir() if path.is_file()]
        if sha256_of_files(tests) != task.reference["tests_sha256"]:
            raise NotJudged(f"{folder / TESTS} has changed since the task was read")
        async with self._free:
            return await self._in_container(folder, script, task.reference["seconds"])

    async def _in_container(self, folder: Path, script: str, seconds: dict[str, float]) -> Verdict:
        name = f"harbor-{secrets.token_hex(6)}"
        image = f"megatron-k2-harbor-{folder.name.lower()}"
        await self._call(["build", "-q", "-t", image, str(folder / "environment")], _BUILD_SECONDS)
        begin = ["run", "-d", "--rm", "--network=none", "--name", name, image, "sleep", "infinity"]
        try:
            await self._call(begin, 120)
            code, said = await self._exec(name, ["bash", "-s"], seconds["agent"], script.encode())
            # What the candidate left running ends here, and cannot wait for the verifier's reward.
            await self._call(["restart", "-t", "0", name], 120)
            await self._call(["exec", name, "mkdir", "-p", "/logs/verifier"], 60)
            await self._call(["cp", str(folder / TESTS), f"{name}:/tests"], 60)
            _, log = await self._exec(
                name, ["bash", f"/{TESTS}/{VERIFIER}"], seconds["verifier"], b""
            )
            reward = await self._reward(name)
        finally:
            await self._call(["rm", "-f", name], 60, may_fail=True)
        details = {"exit_code": code, "output": said[-2000:], "verifier": log[-2000:]}
        verdict = right if reward == 1.0 else wrong
        return verdict(f"their reward is {reward:g}", reward=reward, **details)

    async def _reward(self, name: str) -> float:
        for file in ("reward.json", "reward.txt"):
            place = f"/logs/verifier/{file}"
            code, text = await self._exec(name, ["cat", place], 30, b"")
            if code == 0:
                return reward_of(file, text)
        raise NotJudged("the verifier left no reward")

    async def _exec(
        self, name: str, command: Sequence[str], seconds: float, given: bytes
    ) -> tuple[int, str]:
        return await self._process(["exec", "-i", name, *command], seconds, given)

    async def _call(
        self, command: Sequence[str], seconds: float, *, may_fail: bool = False
    ) -> None:
        code, said = await self._process(command, seconds, b"")
        if code and not may_fail:
            raise NotJudged(f"{self._engine} {command[0]} failed: {said.strip()[-200:]}")

    async def _process(
        self, command: Sequence[str], seconds: float, given: bytes
    ) -> tuple[int, str]:
        """Exit code (124: late) and both outputs."""
        assert self._engine is not None
        process = await asyncio.create_subprocess_exec(
            self._engine,
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(seconds):
                said, _ = await process.communicate(given)
            return process.returncode or 0, said.decode("utf-8", "replace")
        except TimeoutError:
            return 124, f"took more than {seconds:g} seconds"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def script_of(answer: str) -> str:
    """The last fenced script of an answer; nothing where there is none."""
    found = _SCRIPT.findall(answer)
    return found[-1] if found else ""


def reward_of(file: str, text: str) -> float:
    """The reward that a verifier left; of an object the entry ``reward``, or the least.

    Raises:
        NotJudged: it is no number.
    """
    try:
        value: Any = json.loads(text) if file.endswith(".json") else text.strip()
        if isinstance(value, dict):
            value = value.get("reward", min(map(float, value.values())))
        return float(value)
    except (TypeError, ValueError):
        raise NotJudged(f"{file} holds no reward: {text.strip()[:100]!r}") from None


def write_directory(
    folder: Path, instruction: str, dockerfile: str, tests: dict[str, str], solution: str = ""
) -> None:
    """A task directory of ours, for theirs to run.

    Args:
        folder: new; its name is the task's.
        instruction: what the agent reads.
        dockerfile: of its environment.
        tests: by name, ``test.sh`` among them, which leaves the reward.
        solution: a script that solves it.

    Raises:
        UserError: the folder exists, or no test is named ``test.sh``.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose a new folder")
    if VERIFIER not in tests:
        raise UserError(f"tests {sorted(tests)}: expected {VERIFIER} among them")
    files = {
        "task.toml": 'version = "1.0"\n\n[agent]\ntimeout_sec = 600.0\n\n[verifier]\n'
        "timeout_sec = 600.0\n",
        "instruction.md": instruction,
        "environment/Dockerfile": dockerfile,
        **{f"{TESTS}/{name}": text for name, text in tests.items()},
    }
    if solution:
        files[f"solution/{SOLVER}"] = solution
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
