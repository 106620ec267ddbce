"""The escape suite: how a program is judged, and that what confines here holds all of it."""

import asyncio
import json

import pytest

from megatron_k2.cli import sandbox as verb
from megatron_k2.errors import UserError
from megatron_k2.sandbox import choose
from megatron_k2.sandbox.bare import Bare
from megatron_k2.sandbox.escapes import judge as judging
from megatron_k2.sandbox.escapes.judge import Verdict, judge, try_all, try_escape
from megatron_k2.sandbox.escapes.read import Escape, escapes_in, suite
from megatron_k2.sandbox.escapes.scene import Scene
from megatron_k2.sandbox.protocol import Result, Status

MANY = 100
QUICK = ("read_secret", "environment", "write_host", "kill_victim", "loopback_tcp", "io_uring",
         "abstract_socket", "unix_socket_path", "inherited_descriptors", "own_input", "own_files",
         "own_shell", "memory_2g")  # fmt: skip


def result(status: Status = Status.OK, code: int = 0, said: str = "") -> Result:
    return Result(status, code, said.encode(), b"", 0.1, 0.1)


@pytest.mark.parametrize(
    ("must", "found", "reached", "has_held"),
    [
        ("blocked", result(said="no"), "", True),
        ("blocked", result(code=1), "", True),
        ("blocked", result(said="ESCAPED\nno\n\n"), "", True),  # the last line is judged
        ("blocked", result(said="no\nESCAPED 600"), "", False),
        ("blocked", result(said="no"), "a canary file was read", False),
        ("killed", result(Status.TIMEOUT, -9), "", True),
        ("killed", result(code=1), "", True),
        ("killed", result(said="still here"), "", False),
        ("killed", result(Status.VIOLATION, -9, "ESCAPED"), "", False),
        ("allowed", result(said="OK"), "", True),
        ("allowed", result(said="42"), "", True),
        ("allowed", result(), "", False),
        ("allowed", result(code=1, said="OK"), "", False),
        ("allowed", result(said="no: 3 of 40"), "", False),
        ("allowed", result(Status.TIMEOUT, -9, "OK"), "", False),
    ],
)
def test_a_program_is_judged_by_its_last_line_and_by_what_it_reached(
    must, found, reached, has_held
):
    assert judge(Escape("x", "", must), found, reached).has_held is has_held


def test_the_suite_has_its_programs_and_each_of_them_compiles():
    programs = suite()
    assert len({program.name for program in programs}) == len(programs) >= MANY
    for program in programs:
        compile(program.code, program.name, "exec")


def test_a_scene_sees_what_was_reached():
    with Scene({}) as scene:
        assert scene.escape_of(result(said="nothing")) == ""
        secret = open(scene.environment["HO_SECRET"]).read()
        assert "canary" in scene.escape_of(result(said=f"it is {secret}!"))
        open(scene.environment["HO_FOLDER"] + "/pwned", "w").close()
        assert "pwned" in scene.escape_of(result())


def test_a_users_canary_is_handed_on_and_watched(tmp_path):
    canary = tmp_path / "canary"
    canary.write_text("a secret of the user's")
    with Scene({"HO_MINE": str(canary), "OTHER": "x"}) as scene:
        assert scene.environment["HO_MINE"] == str(canary)
        assert "OTHER" not in scene.environment
        assert "canary" in scene.escape_of(result(said="a secret of the user's"))
        canary.write_text("changed, and longer than it was")
        assert str(canary) in scene.escape_of(result())


def test_bare_is_seen_to_hold_nothing():
    """The wrong variant: programs that do no harm get out where nothing confines."""
    programs = [each for each in suite() if each.name in ("read_secret", "loopback_tcp")]
    found = asyncio.run(try_all(Bare(), programs))
    assert [verdict.has_held for verdict in found] == [False, False]


def test_programs_that_end_us_are_not_run_where_a_stranger_was_killed(monkeypatch):
    run = []

    async def tried(backend, escape):
        run.append(escape.name)
        return Verdict(escape.name, escape.must, escape.name != "kill_victim", "")

    monkeypatch.setattr(judging, "try_escape", tried)
    programs = [each for each in suite() if "kill" in each.name or "stop" in each.name]
    found = {v.name: v for v in asyncio.run(try_all(Bare(), programs))}
    assert not {"kill_everything", "kill_parent"} & set(run)
    assert found["kill_everything"].why.startswith("not run")


@pytest.mark.parametrize("name", QUICK)
def test_a_few_of_the_suite_are_held(confining, name):
    (escape,) = [each for each in suite() if each.name == name]
    if confining.name == "sandlock" and name == "own_shell":
        pytest.skip("sandlock 0.9 refuses some honest forks")
    verdict = asyncio.run(try_escape(confining, escape))
    assert verdict.has_held, verdict


@pytest.mark.slow
def test_the_default_back_end_holds_the_whole_suite():
    backend = next((b for b in (choose.SANDBOXES[n]() for n in choose.STRONGEST_FIRST)
                    if not b.missing()), None)  # fmt: skip
    if backend is None:
        pytest.skip("no back-end can run on this machine")
    found = asyncio.run(try_all(backend, suite()))
    hindered = {"own_shell", "own_many_forks"} if backend.name == "sandlock" else set()
    assert [v for v in found if not v.has_held and v.name not in hindered] == []


def test_a_users_programs_are_read_and_complaints_name_the_line(tmp_path):
    path = tmp_path / "p.jsonl"
    good = {"name": "a", "code": "print(1)", "must": "allowed"}
    path.write_text(json.dumps(good) + "\n\n")
    assert escapes_in(path) == [Escape("a", "print(1)", "allowed")]
    for bad, why in (
        ({**good, "name": "b", "must": "maybe"}, "must is 'maybe'; expected blocked, killed"),
        ({"name": "b", "must": "killed"}, "code is NoneType; expected a string"),
        (good, "named 'a' was there before"),
    ):
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad))
        with pytest.raises(UserError, match=f"p.jsonl:2: .*{why}"):
            escapes_in(path)


def test_the_verb_judges_a_users_programs(tmp_path, capsys, confining):
    path = tmp_path / "p.jsonl"
    rows = [
        {"name": "fine", "code": "print('OK')", "must": "allowed"},
        {"name": "out", "code": "print('ESCAPED')", "must": "blocked"},
    ]
    path.write_text(json.dumps(rows[0]))
    assert verb.main(["check", "--backend", confining.name, "--programs", str(path)]) == 0
    assert f"chosen: {confining.name}" in capsys.readouterr().out
    path.write_text("\n".join(map(json.dumps, rows)))
    assert verb.main(["check", "--backend", confining.name, "--programs", str(path)]) == 1
    out = capsys.readouterr().out
    assert "held 1 of 2" in out
    assert "out (blocked): it says 'ESCAPED'" in out


def test_the_verb_does_not_turn_the_suite_loose_on_this_machine():
    with pytest.raises(UserError, match="bare confines nothing"):
        verb.main(["check", "--backend", "bare"])


class Absent:
    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str:
        return "not here"


def test_without_any_back_end_the_reasons_and_the_way_out_are_said(monkeypatch):
    for name in choose.STRONGEST_FIRST:
        monkeypatch.setitem(choose.SANDBOXES, name, lambda name=name: Absent(name))
    with pytest.raises(UserError, match=r"bwrap: not here; sandlock: not here.*`bare`"):
        asyncio.run(choose.default_backend())
    with pytest.raises(UserError, match="no sandbox can run on this machine"):
        verb.main(["check"])


def test_a_back_end_that_does_not_hold_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    class Weak(Bare):
        name = "bwrap"

    class Strong(Bare):
        name = "sandlock"

    async def tried(backend, programs):
        return [Verdict("x", "blocked", backend.name == "sandlock", "")]

    monkeypatch.setitem(choose.SANDBOXES, "bwrap", Weak)
    monkeypatch.setitem(choose.SANDBOXES, "sandlock", Strong)
    monkeypatch.setattr(choose, "try_all", tried)
    assert asyncio.run(choose.default_backend()).name == "sandlock"
    monkeypatch.delattr(choose, "try_all")  # the verdicts are kept: nothing is tried again
    assert asyncio.run(choose.default_backend()).name == "sandlock"
