"""What a person sees while a comparison runs: a line for every run under way, and the whole."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from convattn import checks
from convattn.train import Progress

# between two lines about the same run where the output is a file
SECONDS_BETWEEN_LINES = 10


class Display:
    """Progress on a terminal as moving bars, elsewhere as plain lines; nothing if `quiet`."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.quiet = quiet
        self.live = not quiet and self.stream.isatty()
        self.runs = self.already = 0
        self.shares: dict[str, float] = {}
        self.last_lines: dict[str, float] = {}
        self.begun = time.monotonic()
        self.bars: Any = None
        self.rows: dict[str, Any] = {}

    def say(self, text: str = "") -> None:
        """A line that stays."""
        if self.quiet:
            return
        text = checks.printable(text)
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            self.stream.write(text + "\n")
            self.stream.flush()

    def warn(self, text: str) -> None:
        """A line to the standard error, whether quiet or not."""
        sys.stderr.write(f"convattn: {checks.printable(text)}\n")

    def count(self, what: str) -> Callable[[int, int], None]:
        """A function that is told how many things are done, and of how many, and says so once in a while."""
        last = time.monotonic()

        def tell(done: int, of: int) -> None:
            nonlocal last
            if time.monotonic() - last > SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                self.say(f"  {done:,} of {of:,} {what}")

        return tell

    def watch(self, runs: int, already: int) -> "Display":
        """Use as a context while `runs` runs are carried out, of which `already` were done before."""
        self.runs, self.begun = runs, time.monotonic()
        self.shares = {f"run {number} of before": 1.0 for number in range(already)}
        self.already = already
        return self

    def __enter__(self) -> "Display":
        if self.live:
            rich = checks.extra("rich.progress", "The progress display")
            self.bars = rich.Progress(
                rich.TextColumn("{task.description}", markup=False),
                rich.BarColumn(bar_width=24),
                rich.TextColumn("{task.fields[about]}", markup=False),
                console=checks.extra("rich.console", "The progress display").Console(file=self.stream),
            )
            self.bars.start()
            self.rows["all"] = self.bars.add_task("all runs", total=1.0, about="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def update(self, progress: Progress) -> None:
        """Take note of where a run stands."""
        self.shares[progress.run] = progress.done
        if self.quiet:
            return
        if self.bars is not None:
            self._move(progress)
        elif progress.done == 1 or time.monotonic() - self.last_lines.get(progress.run, 0) > SECONDS_BETWEEN_LINES:
            self.last_lines[progress.run] = time.monotonic()
            self.say(f"{progress.run:<24} {_about(progress)}   [{self._whole()}]")

    def _move(self, progress: Progress) -> None:
        if progress.run not in self.rows:
            self.rows[progress.run] = self.bars.add_task(progress.run, total=1.0, about="")
        self.bars.update(self.rows[progress.run], completed=progress.done, about=_about(progress))
        self.bars.update(self.rows["all"], completed=sum(self.shares.values()) / self.runs, about=self._whole())
        if progress.done == 1:
            self.bars.remove_task(self.rows.pop(progress.run))
            self.say(f"{progress.run:<24} {_about(progress)}")

    def _whole(self) -> str:
        done = sum(self.shares.values())
        count = sum(share == 1 for share in self.shares.values())
        fresh = done - self.already
        if fresh < 0.2:
            # the first steps are slow, and say nothing yet
            return f"{count} of {self.runs} runs"
        left = (time.monotonic() - self.begun) / fresh * (self.runs - done)
        return f"{count} of {self.runs} runs, {duration(left)} left"


def _about(progress: Progress) -> str:
    text = f"epoch {progress.epoch:>3} of {progress.epochs}"
    if progress.loss is not None:
        text += f"  loss {progress.loss:.3f}  validation {progress.validation_accuracy:.2f} %"
    if progress.diverged:
        return f"{text}  diverged"
    return text + ("  done" if progress.done == 1 else f"  {duration(progress.seconds_left)} left")


def duration(seconds: float) -> str:
    """Seconds for people: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
