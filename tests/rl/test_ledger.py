"""What a ledger says of a run: terms, cursor, checkpoints, sizes."""

import os

import pytest

from megatron_k2.errors import UserError
from megatron_k2.records.rollouts import End
from megatron_k2.rl.journal_reader import JOURNAL, PAYLOAD
from megatron_k2.rl.ledger import Ledger
from tests.rl.collecting import made, two_sets


def filled(folder, number=4, **more):
    m = made(folder, **more)
    found = [m.collect(i) for i in range(number)]
    return m, found


def test_the_cursor_is_the_oldest_prompt_that_was_not_trained_on(tmp_path):
    m, found = filled(tmp_path)
    done = {group.ordinal for each in found for group in each.groups}
    assert m.ledger.cursor == min(set(range(m.ledger.next_ordinal)) - done)
    assert m.ledger.cursor < m.ledger.next_ordinal
    assert set(m.ledger.open_groups) == set(range(m.ledger.next_ordinal)) - done


@pytest.mark.parametrize(
    ("changed", "why"),
    [({"seed": 6}, "a run of seed 5, not 6"), ({"sets": two_sets()[:1]}, "a run of task_sets")],
)
def test_a_run_of_other_terms_is_refused(tmp_path, changed, why):
    m, _ = filled(tmp_path, 1)
    m.close()
    with pytest.raises(UserError, match=why):
        made(tmp_path, **changed)


def test_a_second_process_is_refused(tmp_path):
    first = made(tmp_path)
    with pytest.raises(UserError, match="in use by another process"):
        made(tmp_path)
    first.close()
    made(tmp_path).close()


def test_a_checkpoint_names_its_ledger(tmp_path):
    m, _ = filled(tmp_path / "one", 4)
    early, late = m.ledger.position(2), m.ledger.position(4)
    assert m.ledger.check_position(early) == 2
    assert m.ledger.check_position(late) == 4
    assert m.ledger.check_position(m.ledger.position(0)) == 0
    other, _ = filled(tmp_path / "other", 4, seed=6)
    with pytest.raises(UserError, match="not the ledger of this checkpoint"):
        other.ledger.check_position(early)


def test_a_checkpoint_that_knows_more_than_the_ledger_is_refused(tmp_path):
    m, _ = filled(tmp_path, 4)
    late = m.ledger.position(4)
    m.close()
    path = tmp_path / JOURNAL
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match="or lost what was in it"):
        made(tmp_path).ledger.check_position(late)


def test_payloads_that_no_checkpoint_needs_are_removed(tmp_path):
    whole, _ = filled(tmp_path / "whole", 8)
    m, _ = filled(tmp_path / "pruned", 6)
    before = m.ledger.sizes()
    removed = m.ledger.prune(oldest=5)
    after = m.ledger.sizes()
    assert removed == sum(before.payload_bytes.values()) - sum(after.payload_bytes.values()) > 0
    assert after.journal_bytes == before.journal_bytes
    m.close()
    again = made(tmp_path / "pruned")
    assert again.collect(5).groups == whole.collect(5).groups
    for number in (6, 7):
        assert again.collect(number).groups == whole.collect(number).groups
    with pytest.raises(UserError, match="was removed, and is needed"):
        again.collect(0)


def test_an_answer_of_the_iteration_under_way_that_a_power_cut_took_is_played_again(tmp_path):
    class Stopped(Exception):  # noqa: N818
        pass

    class Stops(Ledger):
        def end(self, *more, **facts):
            raise Stopped

    expected = filled(tmp_path / "whole", 1)[1]
    m = made(tmp_path / "cut", ledger_class=Stops)
    with pytest.raises(Stopped):
        m.collect(0)
    m.close()
    payload = tmp_path / "cut" / PAYLOAD / "0000000.bin"
    os.truncate(payload, payload.stat().st_size // 2)
    told = []
    again = made(tmp_path / "cut", tell=told.append)
    assert again.collect(0).groups == expected[0].groups
    assert any("is played again" in each for each in told)


def test_damage_to_what_was_handed_out_is_refused(tmp_path):
    m, _ = filled(tmp_path, 2)
    payload = tmp_path / PAYLOAD / "0000000.bin"
    os.truncate(payload, payload.stat().st_size // 2)
    with pytest.raises(UserError, match="are not as they were written"):
        m.collect(0)


def test_what_is_durable_when(tmp_path, monkeypatch):
    m, synced = made(tmp_path), []
    append = m.ledger._journal.append

    def noted(record, *, is_durable=True):
        synced.append((record["kind"], record.get("end"), is_durable))
        return append(record, is_durable=is_durable)

    monkeypatch.setattr(m.ledger._journal, "append", noted)
    for number in range(6):
        m.collect(number)
    assert {each for each in synced if each[0] != "answer"} == {
        ("begin", None, True),
        ("iteration", None, True),
    }
    answers = [each for each in synced if each[0] == "answer"]
    assert all(is_durable for _, end, is_durable in answers if end == End.ENVIRONMENT)
    num = sum(is_durable for _, end, is_durable in answers if end != End.ENVIRONMENT)
    assert 0 < num < len(answers) / 2
