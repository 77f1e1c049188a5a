"""What is told while a comparison runs: to a file as lines, to a terminal as bars."""

import io
import re
from collections.abc import Iterator

import pytest

from convattn.compare import display
from convattn.compare.display import Display
from convattn.train import Progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that the display sees, as the only element of a list."""
    now = [1000.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    yield now


def progress(run: str = "se-seed0", *, epoch: int = 2, done: float = 0.5, left: float = 42.0) -> Progress:
    known = epoch > 1
    return Progress(run, epoch, 4, done, left, 0.6931 if known else None, 71.255 if known else None)


def test_a_line_for_a_run(clock: list[float]) -> None:
    stream = io.StringIO()
    with Display(stream=stream).watch(4, 1) as shown:
        clock[0] += 30
        shown.update(progress())
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert re.search(r"^se-seed0 +epoch +2 of 4 +loss 0\.693 +validation 71\.2[56] % +42 s left", line)
    # half of a run took 30 seconds, and two and a half are left
    assert "[1 of 4 runs, 2 min left]" in line


def test_before_the_first_epoch_has_ended_there_is_no_loss(clock: list[float]) -> None:
    stream = io.StringIO()
    with Display(stream=stream).watch(1, 0) as shown:
        shown.update(progress(epoch=1, done=0.1))
    assert "epoch   1 of 4" in stream.getvalue()
    assert "loss" not in stream.getvalue() and "validation" not in stream.getvalue()


def test_lines_come_now_and_then_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    with Display(stream=stream).watch(2, 0) as shown:
        for step in range(1, 31):
            clock[0] += 1
            shown.update(progress(done=step / 30))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 4
    assert "done" in lines[-1] and "[1 of 2 runs" in lines[-1]


def test_each_of_several_runs_has_lines_of_its_own(clock: list[float]) -> None:
    stream = io.StringIO()
    with Display(stream=stream).watch(2, 0) as shown:
        for step in range(1, 60):
            clock[0] += 1
            shown.update(progress("baseline-seed0", done=step / 100))
            shown.update(progress("se-seed0", done=step / 120))
    lines = stream.getvalue().splitlines()
    assert 4 <= len(lines) <= 12
    assert any(line.startswith("baseline-seed0") for line in lines)
    assert any(line.startswith("se-seed0") for line in lines)


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with Display(quiet=True, stream=stream).watch(1, 0) as shown:
        shown.say("hello")
        shown.update(progress())
        shown.update(progress(done=1.0))
    assert stream.getvalue() == ""
    shown.warn("left out a.png")
    assert capsys.readouterr() == ("", "convattn: left out a.png\n")


def plainly(text: str) -> str:
    """A terminal's output without its codes."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Display(stream=stream).watch(3, 1) as shown:
        shown.update(progress("baseline-seed0", done=0.5))
        shown.update(progress("se-seed0", done=0.25, left=5.0))
        shown.bars.refresh()
        live = plainly(stream.getvalue())
        shown.update(progress("baseline-seed0", epoch=4, done=1.0))
        shown.say("[a line that stays]")
        assert list(shown.rows) == ["all", "se-seed0"]
    assert re.search(r"baseline-seed0 .*epoch +2 of 4 +loss 0\.693 +validation 71\.2[56] % +42 s left", live)
    assert re.search(r"se-seed0 .*epoch +2 of 4 .* 5 s left", live)
    assert "1 of 3 runs" in live
    text = plainly(stream.getvalue())
    assert re.search(r"baseline-seed0 +epoch +4 of 4 .*done", text)
    assert "[a line that stays]" in text


def test_bars_are_taken_away_after_an_error() -> None:
    stream = Terminal()
    shown = Display(stream=stream)
    with pytest.raises(KeyboardInterrupt), shown.watch(1, 0):
        raise KeyboardInterrupt
    assert shown.bars is None
    # the cursor is shown again
    assert stream.getvalue().rstrip("\n").endswith("\x1b[?25h")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0 s left"), (89, "89 s left"), (90, "2 min left"), (3600, "60 min left"), (7200, "2.0 h left")],
)
def test_times(clock: list[float], seconds: float, expected: str) -> None:
    stream = io.StringIO()
    with Display(stream=stream).watch(1, 0) as shown:
        shown.update(progress(left=seconds))
    assert expected in stream.getvalue()
