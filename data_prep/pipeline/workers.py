"""Runs a function over many tasks in worker processes; the results come in the order of the tasks.

    for batch in in_order(stages.run, tasks, workers=2): …

Only a few tasks a worker are under way at a time, so memory is bounded by these, however many there are. A worker that
dies (killed for memory, mostly) ends the run with a message, and workers end when the process that started them does.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from diptych.data_prep.command_line.errors import UserError

Result = TypeVar("Result")

UNDER_WAY = 3
"""Tasks for each worker: one is running, one waits, and the result of one waits for its turn."""

_function: Callable[..., Any] | None = None  # of a worker process; set once, so that it is not sent with each task


def in_order(function: Callable[..., Result], tasks: Iterable[tuple], workers: int) -> Iterator[Result]:
    """`function(*task)` of each task. With one worker, in this process."""
    if workers <= 1:
        yield from (function(*task) for task in tasks)
        return
    # A fork starts at once; a new interpreter needs seconds for its imports, and is started where forks are unsafe
    # (macOS).
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    tasks = iter(tasks)
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,)) as pool:
        try:
            under_way = deque(pool.submit(_run, task) for task in islice(tasks, workers * UNDER_WAY))
            while under_way:
                result = under_way.popleft().result()
                under_way.extend(pool.submit(_run, task) for task in islice(tasks, 1))
                yield result
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely for want of memory. Use fewer --workers, or 1."
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def cores() -> int:
    """The cores that this process may use; in a container these are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(function: Callable[..., Any]) -> None:
    global _function
    _function = function
    gc.freeze()  # objects of the parent are never garbage here: collections skip them
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each worker has one core, and the threads do not survive a fork

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(task: tuple) -> Any:
    return _function(*task)
