"""Results, limits and files of each back-end that this machine has."""

import asyncio

import pytest

from megatron_k2.errors import UserError
from megatron_k2.sandbox.choose import backend_named
from megatron_k2.sandbox.folder import Folder
from megatron_k2.sandbox.interpreter import as_input, waiting_python
from megatron_k2.sandbox.pool import Pool
from megatron_k2.sandbox.protocol import MEBIBYTE, Limits, Result, Status
from megatron_k2.sandbox.watch import watch

BURN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"


def run(backend, program: str, stdin: bytes = b"", **limits: float) -> Result:
    async def one() -> Result:
        async with backend.open(Limits(**limits)) as box:
            result = await box.run(waiting_python(), stdin=as_input(program, stdin))
        assert not box.folder.path.exists()
        return result

    return asyncio.run(one())


def test_a_program_has_its_input_and_says_how_it_ended(backend):
    found = run(backend, "import sys\nprint(input(), sys.stdin.read())\nsys.exit(3)", b"a\nb\nc")
    assert (found.status, found.exit_code, found.stdout) == (Status.OK, 3, b"a b\nc\n")
    assert not found.is_success
    assert found.reason == ""
    failed = run(backend, "1 / 0")
    assert failed.exit_code == 1
    assert failed.stderr.endswith(b"ZeroDivisionError: division by zero\n")


def test_cpu_seconds_are_the_programs_and_its_childrens(backend):
    program = (
        "import os\nfor _ in range(2):\n    if os.fork() == 0:\n"
        "        import time\n        while time.process_time() < 0.3: pass\n        os._exit(0)\n"
        "os.wait(), os.wait()\n"
    )
    found = run(backend, program)
    assert found.status is Status.OK
    # sandlock's supervisor waits for the program: seen are looks at it while it ran.
    least = 0.2 if backend.name == "sandlock" else 0.55
    assert least <= found.cpu_seconds <= 1.2


def test_the_deadline_is_of_cpu_seconds_not_of_wall_seconds(backend):
    spun = run(backend, "while True: pass", cpu_seconds=0.5)
    assert (spun.status, spun.reason) == (Status.TIMEOUT, "more than 0.5 CPU seconds")
    slept = run(backend, "import time; time.sleep(1.2); print('done')", cpu_seconds=0.5)
    assert (slept.status, slept.stdout) == (Status.OK, b"done\n")
    held = run(backend, "import time; time.sleep(60)", wall_seconds=0.5)
    assert (held.status, held.reason) == (Status.TIMEOUT, "more than 0.5 seconds")
    assert held.wall_seconds < 5


def test_a_program_that_dies_of_a_signal_was_killed(backend):
    found = run(backend, "import os; os.kill(os.getpid(), 11)")
    assert (found.status, found.exit_code, found.reason) == (Status.KILLED, -11, "signal 11")


def test_too_much_output_or_disk_is_a_violation(backend):
    flood = run(backend, "while True: print('x' * 1000)", output_bytes=10_000)
    assert flood.status is Status.VIOLATION
    assert flood.reason == "wrote more than 10000 bytes"
    assert len(flood.stdout) + len(flood.stderr) == 10_000
    fill = "for n in range(10 ** 6): open(f'f{n}', 'wb').write(b'x' * (1 << 20))"
    full = run(backend, fill, disk_bytes=4 * MEBIBYTE)
    assert full.status is Status.VIOLATION
    assert full.reason == f"more than {4 * MEBIBYTE} bytes on disk"


def test_output_of_exactly_the_limit_is_fine(backend):
    found = run(backend, "print('x' * 9_999)", output_bytes=10_000)
    assert (found.status, len(found.stdout)) == (Status.OK, 10_000)


def test_files_go_in_and_out_and_stay_between_programs(backend):
    async def several() -> tuple[Result, bytes]:
        async with backend.open(Limits()) as box:
            await box.write("in/a.txt", b"given")
            first = await box.run(["/bin/sh", "-c", "cat in/a.txt > in/b.txt; pwd >> in/b.txt"])
            await box.run(["/bin/sh", "-c", "cat in/b.txt in/b.txt > c"])
            with pytest.raises(UserError, match="'absent' in the box"):
                await box.read("absent")
            return first, await box.read("c")

    first, content = asyncio.run(several())
    assert first.is_success, first
    assert content.count(b"given") == 2


def test_a_cancelled_run_leaves_no_process_and_no_folder(backend):
    async def cancelled() -> tuple[int, object]:
        async with backend.open(Limits()) as box:
            process = box.start(["/bin/sleep", "50"])
            task = asyncio.ensure_future(watch(process, box.limits, box.folder, b""))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return process.pid, box.folder.path

    pid, path = asyncio.run(cancelled())
    with pytest.raises(ProcessLookupError):
        __import__("os").kill(pid, 0)
    assert not path.exists()


def test_a_pool_runs_many_at_once_each_with_a_folder_of_its_own(backend):
    program = (
        "import os\nopen('mark', 'x').write('')\nprint(sorted(os.listdir('.')), input())\nexit()"
    )

    async def many(num_warm: int) -> list[Result]:
        async with Pool(backend, num_slots=3, num_warm=num_warm) as pool:
            tasks = [pool.run(program, b"%d\n" % n, {"given": b"x"}) for n in range(8)]
            return await asyncio.gather(*tasks)

    for num_warm in (0, 2):
        found = asyncio.run(many(num_warm))
        expected = [f"['given', 'mark'] {number}" for number in range(8)]
        assert [result.last_line for result in found] == expected


def test_a_program_longer_than_a_command_line_and_not_text_is_still_a_result(backend):
    found = run(backend, "x = '" + "y" * 300_000 + "'\nprint(len(x))")
    assert found.stdout == b"300000\n"
    assert run(backend, "print('\ud800')").exit_code == 1


def test_hostile_programs_do_not_change_what_their_neighbours_get(backend):
    hostile = ["while True: pass", "while True: print('x' * 999)"]
    limits = Limits(cpu_seconds=0.5, output_bytes=100_000)

    async def mixed() -> list[Result]:
        async with Pool(backend, limits, num_slots=8) as pool:
            honest = [pool.run(BURN.format(0.05) + f"print({n})") for n in range(8)]
            bad = [pool.run(program) for program in hostile]
            return await asyncio.gather(*honest, *bad)

    found = asyncio.run(mixed())
    assert [result.last_line for result in found[:8]] == [str(n) for n in range(8)]
    assert all(result.status is not Status.OK for result in found[8:])


def test_limits_and_names_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="cpu_seconds=0: expected a positive number"):
        Limits(cpu_seconds=0)
    with pytest.raises(UserError, match="no sandbox back-end 'docker'; one of: bwrap"):
        backend_named("docker")


def test_a_folder_is_watched_while_nothing_is_said():
    """The oracle of the disk limit: a folder's bytes by ``du``."""
    import subprocess

    folder = Folder()
    try:
        for number in range(20):
            folder.write(f"d{number}/f", b"x" * (number * 1000))
        said = subprocess.run(["du", "-s", "-B1", folder.path], capture_output=True, text=True)
        assert abs(folder.num_bytes(1 << 40) - int(said.stdout.split()[0])) <= 41 * 4096
    finally:
        folder.remove()
