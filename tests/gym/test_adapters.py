"""Other gyms' tasks: NeMo-Gym over HTTP, Harbor directories, tasksets of verifiers."""

import asyncio
import json
import random
import stat
import sys

import pytest

from megatron_k2.errors import UserError
from megatron_k2.gym.adapters import harbor, nemo_gym
from megatron_k2.gym.episode import Action, play
from megatron_k2.gym.judging import NotJudged
from megatron_k2.gym.protocol import Outcome
from megatron_k2.records.messages import Message, ToolCall
from megatron_k2.records.rollouts import End

ADD = {
    "type": "function", "name": "add", "description": "adds",
    "parameters": {"type": "object", "properties": {"number": {"type": "integer"}}},
}  # fmt: skip


class Server:
    """A counter a session, by cookie; the verifier compares it, or the answer's text."""

    def __init__(self, web):
        self.web, self.sessions, self.calls = web, {}, 0

    async def seed(self, request):
        row = await request.json()
        name = f"s{len(self.sessions)}"
        self.sessions[name] = {"sum": 0, "goal": row["goal"]}
        answer = self.web.json_response({})
        answer.set_cookie("session", name)
        return answer

    async def add(self, request):
        given = await request.json()
        if not isinstance(given, dict) or not isinstance(given.get("number"), int):
            return self.web.json_response({"detail": "number is no integer"}, status=422)
        mine = self.sessions[request.cookies["session"]]
        mine["sum"] += given["number"]
        return self.web.json_response({"sum": mine["sum"]})

    async def verify(self, request):
        body = await request.json()
        if body.get("breaks"):
            return self.web.json_response({"detail": "no"}, status=500)
        mine = self.sessions[request.cookies["session"]]
        said = [
            o["content"][0]["text"] for o in body["response"]["output"] if o["type"] == "message"
        ]
        is_right = mine["sum"] == mine["goal"] or said[-1:] == [f"It is {mine['goal']}."]
        reward = None if body.get("silent") else float(is_right)
        return self.web.json_response({**body, "reward": reward, "sum": mine["sum"]})


def row(goal, **more):
    params = {"input": [{"role": "user", "content": f"Reach {goal}."}], "tools": [ADD]}
    return {"responses_create_params": params, "goal": goal, **more}


def served(work):
    web = pytest.importorskip("aiohttp.web", reason="needs the extra remote")

    async def whole():
        server = Server(web)
        app = web.Application()
        routes = {"/seed_session": server.seed, "/add": server.add, "/verify": server.verify}
        app.add_routes([web.post(path, to) for path, to in routes.items()])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            return await work(nemo_gym.NemoGym(f"http://127.0.0.1:{port}"))
        finally:
            await runner.cleanup()

    return asyncio.run(whole())


def adder(*numbers):
    turns = iter([*numbers, None])

    async def policy(view):
        number = next(turns)
        if number is None:
            return Action(Message("assistant", "Done."))
        call = ToolCall("functions.add:0", "add", json.dumps({"number": number}))
        return Action(Message("assistant", "", tool_calls=(call,)))

    return policy


def test_sessions_of_nemo_gym_do_not_mix():
    async def work(domain):
        tasks = [nemo_gym.task_of(row(goal)) for goal in range(1, 21)]
        assert tasks[0].tools[0].name == "add"
        plays = [
            play(adder(goal, int(goal % 2 == 0)), domain.environment(), task)
            for goal, task in enumerate(tasks, start=1)
        ]
        return await asyncio.gather(*plays)

    found = served(work)
    assert [each.reward for each in found] == [float(goal % 2 == 1) for goal in range(1, 21)]


def test_a_single_answer_and_calls_that_are_wrong():
    async def work(domain):
        task = nemo_gym.task_of(row(7))
        yes, no = await domain.judge(task, "It is 7."), await domain.judge(task, "It is 8.")
        odd = await play(adder("seven", [], 7), domain.environment(), task)
        return yes.outcome, no.outcome, odd

    yes, no, odd = served(work)
    assert (yes, no) == (Outcome.RIGHT, Outcome.WRONG)
    assert odd.reward == 1.0
    assert "no integer" in odd.messages[2].content


@pytest.mark.parametrize("more", [{"breaks": True}, {"silent": True}])
def test_a_server_that_fails_leaves_it_unknown(more):
    async def work(domain):
        task = nemo_gym.task_of(row(7, **more))
        verdict = await domain.judge(task, "It is 7.")
        return verdict, await play(adder(7), domain.environment(), task)

    verdict, rollout = served(work)
    assert verdict.outcome is Outcome.UNKNOWN
    assert rollout.reward is None


def test_no_server_is_unknown():
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    domain = nemo_gym.NemoGym("http://127.0.0.1:9")
    found = asyncio.run(domain.judge(nemo_gym.task_of(row(7)), "It is 7."))
    assert found.outcome is Outcome.UNKNOWN


def test_a_row_of_another_form_is_refused():
    with pytest.raises(ValueError, match="responses_create_params"):
        nemo_gym.task_of({"input": "x"})


ENGINE = '''#!{python}
"""Docker's verbs over folders: what a container sees as / is a folder here."""
import os, pathlib, shutil, subprocess, sys
root = pathlib.Path({root!r})
verb, *rest = sys.argv[1:]
if verb in ("build", "restart"):
    sys.exit(0)
if verb == "run":
    assert "--network=none" in rest
    name = rest[rest.index("--name") + 1]
    (root / name / "app").mkdir(parents=True)
    sys.exit(0)
if verb == "rm":
    shutil.rmtree(root / rest[-1], ignore_errors=True)
    sys.exit(0)
if verb == "cp":
    name, path = rest[1].split(":")
    shutil.copytree(rest[0], root / name / path.lstrip("/"))
    sys.exit(0)
rest = [each for each in rest if each != "-i"]
name, *command = rest
here = root / name
command = [str(here) + each if each.startswith("/") else each for each in command]
environment = {{**os.environ, "ROOT": str(here)}}
sys.exit(subprocess.run(command, cwd=here / "app", env=environment).returncode)
'''
TEST = (
    'if [ "$(cat "$ROOT/app/answer" 2>/dev/null)" = 42 ]; then echo 1; else echo 0; fi'
    ' > "$ROOT/logs/verifier/reward.txt"\n'
)


@pytest.fixture
def engine(tmp_path):
    path = tmp_path / "engine"
    (tmp_path / "containers").mkdir()
    path.write_text(ENGINE.format(python=sys.executable, root=str(tmp_path / "containers")))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def task(tmp_path):
    folder = tmp_path / "tasks" / "answer"
    solution = "echo 42 > answer\n"
    harbor.write_directory(
        folder, "Write 42 to answer.", "FROM debian\n", {"test.sh": TEST}, solution
    )
    (found,) = harbor.read_directories(tmp_path / "tasks")
    return found


def judged(engine, task, *answers):
    domain = harbor.Harbor(str(engine))

    async def whole():
        return [await domain.judge(task, answer) for answer in answers]

    return asyncio.run(whole())


def test_a_harbor_directory_written_read_and_run(engine, task, tmp_path):
    solved = "```bash\necho 42 > answer\n```"
    cheat = (
        '```bash\nmkdir -p "$ROOT/logs/verifier"; echo 1 > "$ROOT/logs/verifier/reward.txt"\n```'
    )
    found = judged(engine, task, solved, "```bash\necho 41 > answer\n```", "words", cheat)
    assert [each.outcome for each in found] == [Outcome.RIGHT, *[Outcome.WRONG] * 3]
    assert not list((tmp_path / "containers").iterdir())
    assert task.prompt == "Write 42 to answer."


def test_tests_that_changed_are_not_believed(engine, task):
    path = harbor.Path(task.reference["folder"], "tests", "test.sh")
    path.write_text("exit 0\n")
    assert judged(engine, task, "```bash\ntrue\n```")[0].outcome is Outcome.UNKNOWN


def test_without_an_engine_nothing_is_known(task, monkeypatch):
    monkeypatch.setattr(harbor.shutil, "which", lambda _: None)
    found = asyncio.run(harbor.Harbor().judge(task, "```bash\ntrue\n```"))
    assert found.outcome is Outcome.UNKNOWN
    assert "docker or podman" in found.evidence


@pytest.mark.parametrize(
    ("file", "text", "reward"),
    [
        ("reward.txt", "1\n", 1.0),
        ("reward.json", '{"reward": 0.5}', 0.5),
        ("reward.json", '{"a": 1, "b": 0}', 0.0),
    ],
)
def test_rewards(file, text, reward):
    assert harbor.reward_of(file, text) == reward


@pytest.mark.parametrize("text", ["", "yes", "{}"])
def test_what_is_no_reward(text):
    with pytest.raises(NotJudged):
        harbor.reward_of("reward.json" if text == "{}" else "reward.txt", text)


def test_a_folder_that_is_no_task(tmp_path):
    with pytest.raises(UserError, match=r"no task\.toml"):
        harbor.read_directories(tmp_path)
    (tmp_path / "task.toml").write_text("")
    with pytest.raises(UserError, match=r"instruction\.md is missing"):
        harbor.read_directories(tmp_path)


def test_a_taskset_of_verifiers():
    vf = pytest.importorskip("verifiers.v1", reason="needs the extra verifiers")
    from megatron_k2.gym.adapters.verifiers import VerifiersDomain

    class SumsData(vf.TaskData):
        answer: str

    class SumsTask(vf.Task[SumsData]):
        @vf.reward(weight=1.0)
        async def correct(self, trace: vf.Trace) -> float:
            if trace.last_reply == "hang":
                await asyncio.sleep(60)
            if trace.last_reply == "raise":
                raise RuntimeError("no")
            return float(trace.last_reply == self.data.answer)

    class SumsConfig(vf.TasksetConfig):
        num_tasks: int = 5

    class SumsTaskset(vf.Taskset[SumsTask, SumsConfig]):
        def load(self):
            order = random.Random(0)
            for _ in range(self.config.num_tasks):
                a, b = order.randrange(100), order.randrange(100)
                data = SumsData(prompt=f"What is {a} + {b}?", answer=str(a + b))
                yield SumsTask(data, self.config.task)

    domain = VerifiersDomain(SumsTaskset(SumsConfig(id="sums")), seconds=1)

    async def whole():
        found = []
        for task in domain.tasks():
            a, b = (int(x.strip("?")) for x in task.prompt.split() if x.strip("?").isdigit())
            for answer in (str(a + b), str(a + b + 1), "", "hang", "raise"):
                found.append((await domain.judge(task, answer)).outcome)
        task = domain.tasks()[0]

        async def policy(view):
            return Action(Message("assistant", "no idea"))

        return found, await play(policy, domain.environment(), task)

    found, rollout = asyncio.run(whole())
    expected = [Outcome.RIGHT, Outcome.WRONG, Outcome.WRONG, Outcome.UNKNOWN, Outcome.UNKNOWN]
    assert found == expected * 5
    assert (rollout.reward, rollout.end) == (0.0, End.OVER)
