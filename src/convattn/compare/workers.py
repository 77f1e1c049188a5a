"""Carry out runs: here one after the other, or several at a time in processes of their own."""

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from convattn import checks, files
from convattn.data import Images
from convattn.errors import ConvattnError, InvalidOption, RunFailed
from convattn.train import Progress, RunSpec, describe, execute, finished
from convattn.train.store import ERROR, RUNS


def run_all(
    specs: Sequence[RunSpec], images: Images, folder: Path, jobs: int, watch: Callable[[Progress], None]
) -> None:
    """Carry out the runs that are not done yet, `jobs` at a time.

    Raises:
        RunFailed: a run broke; the others that were done stay done.
    """
    waiting = []
    for spec in specs:
        if finished(folder / RUNS / spec.name) is None:
            waiting.append(spec)
        else:
            describe(folder / RUNS / spec.name, spec.plan())
    if jobs == 1 or len(waiting) == 1:
        for spec in waiting:
            _execute(spec, images, folder, watch)
    elif waiting:
        _run_in_processes(waiting, folder, min(jobs, len(waiting)), watch)


def _execute(spec: RunSpec, images: Images, folder: Path, watch: Callable[[Progress], None]) -> None:
    own = folder / RUNS / spec.name
    try:
        execute(spec, images, own, watch)
    except ConvattnError:
        raise
    except OSError as error:
        raise files.explained(error, folder) from error
    # a function of the user may end the process, which is no way to end a run
    except (Exception, SystemExit) as error:
        with contextlib.suppress(OSError):
            files.write(own / ERROR, traceback.format_exc())
        raise RunFailed(
            f"The run {spec.name} broke: {type(error).__name__}: {checks.reason(error)} ({own / ERROR})."
        ) from error


def _run_in_processes(specs: Sequence[RunSpec], folder: Path, jobs: int, watch: Callable[[Progress], None]) -> None:
    # spawned, as everywhere else than on Linux: forked processes inherit the threads of torch half-alive
    context = multiprocessing.get_context("spawn")
    tasks, events = context.Queue(), context.Queue()
    for spec in specs:
        tasks.put(spec)
    # the end, once for each
    for _ in range(jobs):
        tasks.put(None)
    workers = [context.Process(target=_work, args=(folder, tasks, events), daemon=True) for _ in range(jobs)]
    try:
        with _interrupts_held():
            for worker in workers:
                _start(worker)
        _follow(len(specs), workers, events, watch)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()


def _start(worker: Any) -> None:
    try:
        worker.start()
    # in a process that runs the user's script once more, to import what is in it
    except RuntimeError as error:
        raise InvalidOption(
            'compare: with jobs above 1 a script has to call this below `if __name__ == "__main__":`, since every '
            "process imports the script; or take jobs=1."
        ) from error


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start children that no interrupt reaches: it is the parent's to handle, once all of them have been started."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    # it would let interrupts through again when it is started with the first child
    multiprocessing.resource_tracker.ensure_running()
    held: list[int] = []
    # the mask is what children inherit; it is that of this thread alone, and another one may be interrupted
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)
    if held:
        raise KeyboardInterrupt


def _follow(count: int, workers: Sequence[Any], events: Any, watch: Callable[[Progress], None]) -> None:
    done = 0
    while done < count:
        try:
            event = events.get(timeout=1)
        except queue.Empty:
            dead = [worker for worker in workers if not worker.is_alive()]
            if dead:
                raise RunFailed(
                    f"A process that trained was ended from outside (exit code {dead[0].exitcode}; out of memory?). "
                    f"The same command goes on where it was; try fewer --jobs."
                ) from None
            continue
        if isinstance(event, Progress):
            watch(event)
        elif isinstance(event, BaseException):
            raise event
        else:
            done += 1


def _work(folder: Path, tasks: Any, events: Any) -> None:
    # an interrupt is the parent's to handle; and without a parent there is nobody to work for
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    images = Images.load(folder)
    while True:
        try:
            spec = tasks.get()
        # a function that this process does not find: one of a notebook, or of a script without its guard
        except AttributeError as error:
            events.put(InvalidOption(f"compare: no other process finds a function ({error}): take jobs=1."))
            continue
        if spec is None:
            # held open until the parent has read what was sent
            threading.Event().wait()
            return
        try:
            _execute(spec, images, folder, events.put)
            events.put(spec.name)
        except ConvattnError as error:
            events.put(type(error)(str(error)))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
