"""Records and payloads after a kill, a flipped bit, a missing line.

Wrong variants are what is refused: a record that is changed, gone, or in another place.
"""

import random

import pytest

from megatron_k2.errors import UserError
from megatron_k2.rl.journal import Journal
from megatron_k2.rl.journal_reader import JOURNAL, PAYLOAD, JournalReader, Payload, Ref


def payload(place):
    content = {"tokens": list(range(place * 10)), "x": 0.1 * place}
    return Payload(content, bytes(range(place)))


def filled(folder, number=5):
    journal = Journal(folder)
    refs = []
    for place in range(number):
        refs.append(journal.put(place // 2, payload(place)))
        journal.append({"kind": "answer", "ref": refs[-1], "place": place})
    journal.close()
    return refs


def test_what_was_written_is_read_again(tmp_path):
    refs = filled(tmp_path)
    journal = Journal(tmp_path)
    assert [record["place"] for _, record in journal.records()] == [0, 1, 2, 3, 4]
    assert journal.record(3)["place"] == 3
    for place, ref in enumerate(refs):
        assert journal.get(Ref(*journal.record(place)["ref"])) == journal.get(ref)
        assert journal.get(ref) == payload(place)
    assert journal.append({"kind": "more"}) == 5
    journal.close()
    assert Journal(tmp_path).num_records == 6


def test_a_torn_end_is_cut_off_wherever_it_is_torn_and_said(tmp_path):
    filled(tmp_path)
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(last + 1, len(whole)):
        path.write_bytes(whole[:end])
        told = []
        journal = Journal(tmp_path, told.append)
        assert journal.num_records == 4
        assert "the last record was not whole" in told[0]
        journal.append({"kind": "again"})
        journal.close()
        assert Journal(tmp_path, told.append).num_records == 5
        assert len(told) == 1
    path.write_bytes(whole[:last])
    assert Journal(tmp_path, told.append).num_records == 4
    assert len(told) == 1  # nothing was torn


def damaged(whole, how):
    lines = whole.splitlines(keepends=True)
    match how:
        case "changed":
            lines[2] = lines[2].replace(b'"place":2', b'"place":7')
        case "gone":
            del lines[1]
        case "twice":
            lines.insert(1, lines[1])
        case "moved":
            lines[1], lines[2] = lines[2], lines[1]
        case "half":
            lines[2] = lines[2][:20]
    return b"".join(lines)


@pytest.mark.parametrize("how", ["changed", "gone", "twice", "moved", "half"])
def test_damage_elsewhere_is_refused(tmp_path, how):
    filled(tmp_path)
    path = tmp_path / JOURNAL
    path.write_bytes(damaged(path.read_bytes(), how))
    with pytest.raises(
        UserError, match=r"journal.jsonl:[234]: the record is not as it was written"
    ):
        Journal(tmp_path)


def test_every_flipped_bit_of_a_payload_is_found(tmp_path):
    refs, rng = filled(tmp_path), random.Random(1)
    path = tmp_path / PAYLOAD / "0000001.bin"
    whole, ref = path.read_bytes(), refs[3]
    journal = Journal(tmp_path)
    for _ in range(20):
        place = ref.offset + rng.randrange(ref.size)
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(flipped))
        with pytest.raises(UserError, match="are not as they were written"):
            journal.get(ref)
    path.write_bytes(whole[: ref.offset + ref.size - 1])
    with pytest.raises(UserError, match="are not as they were written"):
        journal.get(ref)
    path.unlink()
    with pytest.raises(UserError, match="was removed, and is needed"):
        journal.get(ref)


def test_what_a_kill_left_of_a_payload_is_in_nobodys_way(tmp_path):
    filled(tmp_path)
    with (tmp_path / PAYLOAD / "0000002.bin").open("ab") as stream:
        stream.write(b"half a payl")
    journal = Journal(tmp_path)
    ref = journal.put(2, Payload({"new": 1}))
    journal.append({"kind": "answer", "ref": ref})
    assert journal.get(ref) == Payload({"new": 1})


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    filled(tmp_path)
    journal = Journal(tmp_path)
    size = (tmp_path / JOURNAL).stat().st_size

    def full(stream, content):
        stream.write(content[:7])
        raise OSError(28, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr("megatron_k2.rl.journal._write_all", full)
        with pytest.raises(OSError, match="no space"):
            journal.append({"kind": "more"})
    assert (tmp_path / JOURNAL).stat().st_size == size
    journal.append({"kind": "more"})
    assert Journal(tmp_path).num_records == 6


def test_a_position_is_of_one_journal(tmp_path):
    filled(tmp_path / "a")
    filled(tmp_path / "b", 3)
    a, b = Journal(tmp_path / "a"), Journal(tmp_path / "b")
    early, late = a.position(3), a.position(5)
    assert a.has(early)
    assert a.has(late)
    assert b.has(early)  # they began alike
    assert not b.has(late)
    b.append({"kind": "other"})
    assert not b.has(a.position(4))
    assert a.has(a.position(0))


def test_sizes_and_removal(tmp_path):
    refs = filled(tmp_path)
    journal = Journal(tmp_path)
    sizes = journal.sizes()
    assert sizes.journal_bytes == (tmp_path / JOURNAL).stat().st_size
    assert set(sizes.payload_bytes) == {0, 1, 2}
    assert f"{sum(ref.size for ref in refs):,} of payload in 3 files" in str(sizes)
    assert journal.remove({0}) == sizes.payload_bytes[0]
    assert journal.segments() == [1, 2]
    assert journal.get(refs[2]) == payload(2)


def test_a_reader_beside_the_writer_sees_whole_records_alone_and_changes_nothing(tmp_path):
    writer = Journal(tmp_path)
    reader = JournalReader(tmp_path)
    ref = writer.put(0, Payload([1, 2]))
    writer.append({"kind": "answer", "ref": ref})
    assert reader.num_records == 0
    reader.look()
    assert [record["kind"] for _, record in reader.records()] == ["answer"]
    assert reader.get(Ref(*reader.record(0)["ref"])) == Payload([1, 2])
    assert reader.position(1) == writer.position(1)
    writer.append({"kind": "more"})
    writer.append({"kind": "last"})
    path = tmp_path / JOURNAL
    whole = path.read_bytes()
    for end in range(len(whole) - len("last"), len(whole)):
        path.write_bytes(whole[:end])  # as far as a write has come
        reader.look()
        assert reader.num_records == 2
    assert path.read_bytes() == whole[:-1]
    path.write_bytes(whole)
    reader.look()
    assert [record["kind"] for _, record in reader.records(1)] == ["more", "last"]


def test_a_reader_refuses_what_was_changed_behind_it(tmp_path):
    writer = Journal(tmp_path)
    writer.append({"kind": "one"})
    reader = JournalReader(tmp_path)
    for kind in ("two", "three"):
        writer.append({"kind": kind})
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes().replace(b"two", b"too"))
    with pytest.raises(UserError, match=r"journal.jsonl:2: the record is not as it was written"):
        reader.look()
