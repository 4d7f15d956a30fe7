from __future__ import annotations

from pathlib import Path

import pytest

from distcnn.console import Console, duration, percent

UGLY = "runs/[/b]x [red]y[/red] :smile: \\[z"  # what rich would take for markup, closing what was never opened


def test_what_is_said_is_plain_whatever_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(speaks=True)
    console.log_to(tmp_path / "log.txt")
    console.say(UGLY)
    console.warn(UGLY)
    console.table(UGLY, {"run": UGLY, UGLY: "x"})
    said = capsys.readouterr()
    assert said.out.startswith(f"{UGLY}\n") and said.err == f"warning: {UGLY}\n"
    assert said.out.count(UGLY) == 4 and "\x1b" not in said.out
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in log] == [UGLY, f"warning: {UGLY}", f"run: {UGLY}", f"{UGLY}: x"]


def test_a_pipe_is_no_terminal_whatever_the_environment_says(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notebooks set FORCE_COLOR for the commands in their cells."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(speaks=True)
    with console.progress("epoch 1/2", 3) as advance:
        advance(3, "")
    console.table("a", {"b": "c"})
    assert "\x1b" not in capsys.readouterr().out


def test_quiet_says_warnings_only_and_other_ranks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for console in (Console(speaks=True, quiet=True), Console(speaks=False)):
        console.log_to(tmp_path / "log.txt")
        console.say("a")
        console.table("b", {"c": "d"})
        with console.progress("e", 3) as advance:
            advance(3, "f")
        console.warn("g")
    said = capsys.readouterr()
    assert said.out == "" and said.err == "warning: g\n"
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 3


def test_progress_in_a_pipe_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("distcnn.console.time.monotonic", lambda: now[0])
    with Console(speaks=True).progress("epoch 1/2", 100, done=20) as advance:
        for seconds in (1, 9, 11, 19, 22, 40):
            now[0] = seconds
            advance(10, f"at {seconds}")
        now[0] = 99
        advance(20, "the end")
    assert capsys.readouterr().out == (
        "epoch 1/2 50/100  at 11  18.3 s left\n"
        "epoch 1/2 70/100  at 22  13.2 s left\n"
        "epoch 1/2 80/100  at 40  13.3 s left\n"
    )


def test_a_log_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(speaks=True)
    console.log_to(tmp_path / "no" / "log.txt")
    console.say("a")
    assert capsys.readouterr().out == "a\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (6.74, "6.7 s"),
        (59.94, "59.9 s"),
        (59.96, "1:00"),
        (60, "1:00"),
        (245.4, "4:05"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (360000, "100:00:00"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("share", "text"), [(0, "0.00 %"), (1, "100.00 %"), (0.98333, "98.33 %")])
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text
