"""The campaign's short form, and that it sees a control token that leaks."""

from tests.campaigns.hostile_chat import PLACES, campaign, main, toy_tokenizer


def test_two_thousand_hostile_texts_leave_no_control_token(capsys):
    assert main(["--seed", "1", "--number", "2000"]) == 0
    assert "2,000 texts, 0 not as they should be" in capsys.readouterr().out


def test_a_leaking_tokenizer_is_seen(tmp_path, monkeypatch):
    """One that reads names in text once the check at its construction is over."""
    tokenizer = toy_tokenizer(tmp_path)
    monkeypatch.setattr("megatron_k2.chat.control._leaking", lambda *_: [])
    tokenizer._tokenizer.encode_special_tokens = False
    counts, wrong = campaign(tokenizer, seed=1, number=200)
    assert set(counts) == set(PLACES)
    assert len(wrong) > 100
    assert any("control ids" in one for one in wrong)
    assert any("letters made a tool call" in one for one in wrong)
