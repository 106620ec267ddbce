"""The campaign's short form: its table at a few inputs of every class, and that it sees a fault."""

from tests.campaigns import hostile_inputs
from tests.campaigns.hostile_inputs import CLASSES, Input, Outcome, campaign, table


def test_a_few_damaged_inputs_of_every_class_are_refused():
    outcomes = list(campaign(seed=0, each=2))
    wrong = [(one.input, one.code, one.said[-500:]) for one in outcomes if not one.is_right]
    assert len(outcomes) == 2 * len(CLASSES)
    assert not wrong


def test_what_is_accepted_or_ends_in_a_traceback_is_seen(tmp_path, monkeypatch):
    from megatron_k2.cli import main

    def fails(argv):
        raise KeyError("hidden_size")

    codes = []
    for replacement in (fails, lambda argv: 0, lambda argv: 2):
        monkeypatch.setattr(main, "main", replacement)
        place = tmp_path / str(len(codes))
        (place / "out").mkdir(parents=True)
        codes.append(hostile_inputs.try_one(Input("v", "k", "d", ["v"], place / "out"), place))
    crashed, accepted, half_written = codes
    assert (crashed.code, crashed.has_traceback, crashed.is_right) == (70, True, False)
    assert (accepted.code, accepted.is_right) == (0, False)
    assert half_written.half_written == ("out",)
    assert not half_written.is_right
    refused = Outcome(half_written.input, 2, "", has_traceback=False, half_written=())
    assert refused.is_right
    assert table([*codes, refused]).count("4") >= 2
