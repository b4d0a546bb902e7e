"""Results in order, bounded work under way, and ends that leave nothing behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.workers import UNDER_WAY, in_order


def slow_square(number):
    time.sleep(0.01 * (number % 3))  # later tasks are often done before earlier ones
    return number * number


def fail_at_five(number):
    if number == 5:
        raise UserError("five is not liked here")
    return number


def kill_oneself(number):
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_the_order_of_the_tasks(workers):
    assert list(in_order(slow_square, ((n,) for n in range(40)), workers)) == [n * n for n in range(40)]


def test_only_a_few_tasks_are_taken_ahead():
    taken = []

    def tasks():
        for number in range(100):
            taken.append(number)
            yield (number,)

    for result in in_order(abs, tasks(), 2):
        assert len(taken) <= result + 1 + 2 * UNDER_WAY


def test_an_error_in_a_worker_is_the_callers():
    with pytest.raises(UserError, match="five is not liked here"):
        list(in_order(fail_at_five, ((n,) for n in range(50)), 2))


def test_a_worker_that_is_killed_ends_the_run_with_a_message():
    with pytest.raises(UserError, match="a worker process was killed.*fewer --workers"):
        list(in_order(kill_oneself, ((n,) for n in range(50)), 2))


def test_workers_end_with_the_process_that_started_them():
    program = (
        "import time\nfrom diptych.data_prep.pipeline.workers import in_order\n"
        "for n in in_order(abs, ((n,) for n in range(10**9)), 2): print(n, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2
    process.kill()
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
