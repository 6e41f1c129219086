"""What the bar says of a run that goes on with another."""

import pytest

from blip2rt import progress


def test_the_speed_is_of_this_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """6,000 of 10,000 were there; 10 more in 5 seconds are 2 a second, and the other 3,990 take 1,995 seconds."""
    now = [100.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    bar = progress.Progress("caption", 10_000, log_seconds=1, done=6_000)
    now[0] += 5
    bar.advance(10)
    assert "6010/10000  2.0/s  1995 s left" in capsys.readouterr().err
