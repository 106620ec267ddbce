"""What a log file sees of a conversion: there is no terminal to draw a bar on."""

from megatron_k2.cli import convert


def test_a_log_gets_a_line_now_and_then_with_the_rate_of_what_this_run_wrote(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)

    def run(progress):
        nonlocal now
        progress(4_000_000_000, 10_000_000_000)  # found finished from a run that was killed
        for done in (5, 6, 7):
            now += 4
            progress(done * 1_000_000_000, 10_000_000_000)
        return "done"

    assert convert._with_progress(run) == ("done", 12.0)
    # after 4 s nothing, after 8 s the first line, then none before 13 s; 2 GB in 8 s, 4 GB to go
    assert capsys.readouterr().err == "6.0 of 10.0 GB written, 0.25 GB/s, 16 s left\n"
