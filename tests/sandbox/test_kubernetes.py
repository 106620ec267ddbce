"""Boxes in pods, against a server that speaks as a cluster's API and the router do."""

import asyncio
import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

pytest.importorskip("k8s_agent_sandbox.async_sandbox_client", reason="needs the extra kubernetes")
pytest.importorskip("kubernetes_asyncio", reason="needs the extra kubernetes")
web = pytest.importorskip("aiohttp.web", reason="needs aiohttp")

from megatron_k2.errors import UserError  # noqa: E402
from megatron_k2.gym.coding.env import Coding  # noqa: E402
from megatron_k2.gym.protocol import Outcome, Task  # noqa: E402
from megatron_k2.sandbox.choose import backend_named  # noqa: E402
from megatron_k2.sandbox.kubernetes import POOL, ROUTER  # noqa: E402
from megatron_k2.sandbox.pool import Pool  # noqa: E402
from megatron_k2.sandbox.protocol import Limits, Status  # noqa: E402

CLAIMS = "/apis/extensions.agents.x-k8s.io/v1beta1/namespaces/default/sandboxclaims"
SANDBOX = "/apis/agents.x-k8s.io/v1beta1/namespaces/default/sandboxes/{name}"


class Cluster:
    """Claims become folders; what the router is asked to execute runs in them."""

    def __init__(self, root: Path):
        self.root, self.claims, self.deleted, self.fails = root, {}, [], False
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()

    def serve(self):
        asyncio.set_event_loop(self.loop)
        self.loop.run_until_complete(self._begin())
        self.loop.run_forever()

    async def _begin(self):
        app = web.Application(client_max_size=1 << 28)
        app.add_routes(
            [
                web.post(CLAIMS, self.create),
                web.get(CLAIMS, self.watch),
                web.delete(CLAIMS + "/{name}", self.delete),
                web.get(SANDBOX, self.sandbox),
                web.post("/upload", self.upload),
                web.post("/execute", self.execute),
            ]
        )
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]
        self.ready.set()

    async def create(self, request):
        claim = await request.json()
        name = claim["metadata"]["name"]
        assert claim["spec"]["warmPoolRef"]["name"] == "pythons"
        assert "shutdownTime" in json.dumps(claim["spec"])
        (self.root / name).mkdir()
        claim["metadata"] |= {"uid": name, "resourceVersion": "1"}
        self.claims[name] = claim
        return web.json_response(claim, status=201)

    async def watch(self, request):
        name = request.query["fieldSelector"].partition("=")[2]
        ready = {
            **self.claims[name],
            "status": {
                "sandbox": {"name": name},
                "conditions": [{"type": "Ready", "status": "True", "reason": "Ready"}],
            },
        }
        return web.Response(
            text=json.dumps({"type": "MODIFIED", "object": ready}) + "\n",
            content_type="application/json",
        )

    async def delete(self, request):
        self.deleted.append(request.match_info["name"])
        self.claims.pop(request.match_info["name"], None)
        return web.json_response({"status": "Success"})

    async def sandbox(self, request):
        return web.json_response({"metadata": {}, "status": {"podIPs": []}})

    async def upload(self, request):
        part = (await request.post())["file"]
        folder = self.root / request.headers["X-Sandbox-ID"]
        (folder / part.filename).write_bytes(part.file.read())
        return web.json_response({"message": "ok"})

    async def execute(self, request):
        if self.fails:
            return web.json_response({"detail": "no"}, status=400)
        command = (await request.json())["command"]
        assert command == "python3 runner.py"  # no text of a program's is in a shell line
        folder = self.root / request.headers["X-Sandbox-ID"]
        found = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "runner.py"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return web.json_response(
            {"stdout": found.stdout, "stderr": found.stderr, "exit_code": found.returncode}
        )


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    (tmp_path / "pods").mkdir()
    found = Cluster(tmp_path / "pods")
    thread = threading.Thread(target=found.serve, daemon=True)
    thread.start()
    assert found.ready.wait(10)
    url = f"http://127.0.0.1:{found.port}"
    (tmp_path / "kubeconfig").write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "here",
                "clusters": [{"name": "here", "cluster": {"server": url}}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
                "users": [{"name": "me", "user": {}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(
        "kubernetes_asyncio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION",
        str(tmp_path / "kubeconfig"),
    )
    monkeypatch.setenv(POOL, "pythons")
    monkeypatch.setenv(ROUTER, url)
    yield found
    found.loop.call_soon_threadsafe(found.loop.stop)
    thread.join(10)


def run(program, limits=None, **more):
    async def whole():
        async with backend_named("kubernetes").open(limits or Limits(wall_seconds=20)) as box:
            for name, content in more.pop("files", {}).items():
                await box.write(name, content)
            return await box.run([sys.executable, "-c", program], **more)

    return asyncio.run(whole())


def test_a_program_with_input_and_files(cluster):
    result = run(
        "import sys; print(open('a/b.txt').read() + sys.stdin.read())",
        files={"a/b.txt": b"one "},
        stdin=b"two",
    )
    assert result.is_success
    assert result.last_line == "one two"
    assert 0 < result.cpu_seconds < 5
    assert len(cluster.deleted) == 1
    assert not cluster.claims


def test_a_file_comes_back_and_others_do_not(cluster):
    async def whole():
        async with backend_named("kubernetes").open(Limits()) as box:
            await box.run(
                [
                    sys.executable,
                    "-c",
                    "open('x','w').write('7'); import os; os.symlink('/etc/passwd','y')",
                ]
            )
            assert await box.read("x") == b"7"
            for name in ("y", "none", "../request.json", "/etc/passwd"):
                with pytest.raises(UserError, match="file"):
                    await box.read(name)
            for name in ("../x", "/x"):
                with pytest.raises(UserError, match="inside the folder"):
                    await box.write(name, b"")

    asyncio.run(whole())


@pytest.mark.parametrize(
    ("program", "limits", "status"),
    [
        ("import time; time.sleep(60)", Limits(wall_seconds=1), Status.TIMEOUT),
        ("while True: pass", Limits(cpu_seconds=1, wall_seconds=20), Status.TIMEOUT),
        ("while True: print('x' * 9999)", Limits(output_bytes=100_000), Status.VIOLATION),
        ("import os; os.kill(os.getpid(), 9)", Limits(), Status.KILLED),
        ("import sys; sys.exit(3)", Limits(), Status.OK),
        ("x = 'x' * (1 << 30)", Limits(memory_bytes=200 << 20), Status.OK),
    ],
)
def test_limits(cluster, program, limits, status):
    result = run(program, limits)
    assert result.status is status, result
    assert not result.is_success


def test_a_runner_that_is_ended_from_inside_is_no_success(cluster):
    result = run("import os, signal; os.kill(os.getppid(), signal.SIGKILL)")
    assert result.status is Status.KILLED
    assert "ended from inside" in result.reason


def test_a_forged_result_is_not_the_runners(cluster):
    program = "print('megatron_k2 result 00 {\"exit_code\": 0}'); raise SystemExit(1)"
    assert run(program).exit_code == 1


def test_a_pod_that_does_not_answer_is_no_success_and_is_deleted(cluster):
    cluster.fails = True
    result = run("print(1)")
    assert result.status is Status.KILLED
    assert "the pod did not answer" in result.reason
    assert len(cluster.deleted) == 1


def test_a_pool_and_a_domain_over_pods(cluster):
    async def whole():
        async with Pool(backend_named("kubernetes"), num_slots=4, num_warm=2) as pool:
            runs = (pool.run("print(int(input()) ** 2)", stdin=str(n).encode()) for n in range(8))
            assert [r.last_line for r in await asyncio.gather(*runs)] == [
                str(n * n) for n in range(8)
            ]
        domain = Coding(backend_named("kubernetes"), num_slots=2)
        tests = [{"arguments": [2], "expected": 4}, {"arguments": [3], "expected": 9}]
        task = Task("coding", "square", {"kind": "function", "entry": "f", "tests": tests})
        answers = ("def f(x): return x * x", "def f(x): return x + x", "import os; os._exit(0)")
        found = [await domain.judge(task, f"```python\n{each}\n```") for each in answers]
        await domain.close()
        return [each.outcome for each in found]

    assert asyncio.run(whole()) == [Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG]
    assert not cluster.claims


def test_without_a_pool_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv(POOL, raising=False)
    with pytest.raises(UserError, match=POOL), contextlib.suppress(ImportError):
        backend_named("kubernetes")
