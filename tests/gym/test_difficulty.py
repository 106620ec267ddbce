"""pass@k against counting every draw; ``gym difficulty`` on a server, killed and gone on with."""

import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("aiohttp", reason="needs the extra remote")

from megatron_k2.cli.gym import main
from megatron_k2.cli.gym_rollouts import ROLLOUTS, read_rollouts
from megatron_k2.errors import UserError
from megatron_k2.gym.difficulty import Passed, in_band
from megatron_k2.gym.protocol import Task
from megatron_k2.gym.task_sets import read_set, write_set


@pytest.mark.parametrize(("c", "n", "k"), [(0, 5, 2), (1, 5, 2), (3, 6, 3), (5, 5, 1), (4, 6, 4)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(c, n, k):
    answers = [1] * c + [0] * (n - c)
    draws = list(itertools.combinations(answers, k))
    assert Passed(c, n, 0).at(k) == pytest.approx(sum(map(any, draws)) / len(draws))
    # The wrong variant, which is biased: 1 - (1 - c/n)^k.
    if 0 < c < n and k > 1:
        assert Passed(c, n, 0).at(k) != pytest.approx(1 - (1 - c / n) ** k)


def test_pass_at_k_of_too_few_answers_is_none():
    assert Passed(1, 3, 5).at(4) is None
    assert Passed(0, 0, 5).rate is None


def test_the_band_leaves_out_what_teaches_nothing():
    tasks = [Task("m", str(i), {}, difficulty=d) for i, d in enumerate((0.0, 0.5, 1.0, None))]
    assert [task.prompt for task in in_band(tasks)] == ["1"]
    with pytest.raises(UserError, match="expected two pass rates"):
        in_band(tasks, (0.9, 0.1))


class Model(BaseHTTPRequestHandler):
    """Adds rightly where the first number is even or the draw is; counts what it was asked."""

    asked: list = []  # noqa: RUF012 - of the test that serves it

    def do_GET(self):
        self._say({"data": [{"id": "adder"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body["seed"])
        a, b = map(int, re.findall(r"\d+", body["messages"][-1]["content"]))
        is_right = a % 3 == 0 or (a % 3 == 1 and body["seed"] % 2)
        content = f"The answer is {a + b + (not is_right)}."
        self._say({"choices": [{"message": {"role": "assistant", "content": content}}]})

    def _say(self, value):
        text = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def served():
    Model.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def task_set(tmp_path):
    tasks = [
        Task("mathematics", f"{a} + {a + 1} = ?", {"reference": str(2 * a + 1)})
        for a in range(30, 42)
    ]
    write_set(tmp_path / "set", tasks, "CC0-1.0", {"generator": "here"})
    return tmp_path / "set"


def run(served, task_set, output, *more):
    verb = ["difficulty", str(task_set), "--endpoint", served, "--output", str(output)]
    return main([*verb, "--number", "8", "--concurrency", "4", *more])


def test_the_middle_band_becomes_a_set(served, task_set, tmp_path, capsys):
    assert run(served, task_set, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "pass@1:" in said
    assert "4 kept, 4 too hard, 4 too easy" in said
    card, kept = read_set(tmp_path / "out")
    assert all(int(task.prompt.split()[0]) % 3 == 1 for task in kept)
    assert all(0.1 <= task.difficulty <= 0.9 for task in kept)
    assert card.lineage["difficulty"]["model"] == "adder"
    assert len(Model.asked) == len(set(Model.asked)) == 96
    assert (
        main(["page", str(tmp_path / "out" / ROLLOUTS), "--output", str(tmp_path / "p.html")]) == 0
    )
    with pytest.raises(UserError, match="holds a task set"):
        run(served, task_set, tmp_path / "out")


def test_an_interrupted_run_goes_on(served, task_set, tmp_path):
    with pytest.raises(UserError, match="no task has"):
        run(served, task_set, tmp_path / "out", "--band", "0.01:0.02")
    path = tmp_path / "out" / ROLLOUTS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:40]) + lines[40][:30])
    Model.asked.clear()
    assert run(served, task_set, tmp_path / "out") == 0
    assert len(Model.asked) == 96 - 40
    assert len(read_rollouts(path)) == 96


def test_other_settings_are_refused(served, task_set, tmp_path):
    with pytest.raises(UserError, match="no task has"):
        run(served, task_set, tmp_path / "out", "--band", "0.01:0.02")
    with pytest.raises(UserError, match=r"begun with temperature 1\.0, now 0\.5"):
        run(served, task_set, tmp_path / "out", "--temperature", "0.5")


@pytest.mark.parametrize("band", ["0.5", "a:b", "0.9:0.1", "-1:2"])
def test_a_band_that_is_none_is_refused(served, task_set, tmp_path, band):
    with pytest.raises(UserError, match="--band"):
        run(served, task_set, tmp_path / "out", f"--band={band}")
