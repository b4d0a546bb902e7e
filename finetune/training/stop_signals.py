"""A signal in; the step that is being taken is the last one, saved on all ranks, and the run can go on from it.

    stop = StopRequest()
    stop.listen()                    to SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's --signal=USR1@60)
    …                                there is nothing to save yet: a signal ends the process at once
    stop.defer()                     from here on, a signal only sets `reason`
    while not stop.reason: …         a signal's name, or that the launcher has gone
    stop.ignore()                    the run has ended, and a signal changes nothing

Any rank may be the one that is told: the loop adds up the requests of all ranks with each step's loss. `accelerate
launch` ends alone when it is told to, and leaves the process that trains behind; that notices its parent's end.
"""

import os
import signal
import time
from types import FrameType
from typing import NoReturn

import psutil

from diptych.finetune.commands.exit_codes import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed.run", "deepspeed")

SAME_PRESS = 1.0
"""Seconds. One Ctrl-C reaches a rank twice, from the terminal and from torchrun; what comes later is a second one."""


class StopRequest:
    def __init__(self) -> None:
        self._signal = self._stage = ""
        self._at = 0.0
        self._is_deferred = self._is_over = False
        self._launcher = _launcher()

    def listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def defer(self) -> None:
        """From now on the first signal only sets `reason`; a second Ctrl-C is a KeyboardInterrupt."""
        self._is_deferred = True

    def begin_stage(self, name: str) -> None:
        """There is nothing to save until this stage of a run defers. A signal that came while the one before it ended
        ends the process now, if it is alone; other ranks have to be told, which the stage's first step does."""
        self._is_deferred, self._stage = False, f" of stage {name}"
        if self.reason and os.environ.get("WORLD_SIZE", "1") == "1":
            self._end_now()

    def ignore(self) -> None:
        """The run has ended: a signal that comes now is not to be taken for one that stopped it."""
        self._is_over = True

    @property
    def reason(self) -> str:
        """Empty while nobody wants this process to stop."""
        if self._launcher is not None and os.getppid() != self._launcher:
            return "the end of its launcher"
        return self._signal

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_over:
            return
        is_second = self._signal and number == signal.SIGINT and time.monotonic() - self._at > SAME_PRESS
        if is_second:
            raise KeyboardInterrupt
        if not self._signal:
            self._signal, self._at = signal.Signals(number).name, time.monotonic()
        if not self._is_deferred:
            self._end_now()

    def _end_now(self) -> NoReturn:
        raise Stopped(f"stopped by {self.reason} before the first step{self._stage}: nothing is lost. Run it again.")


def _launcher() -> int | None:
    """The parent process, if that is a launcher: a shell's end is no reason to stop."""
    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    return parent if any(name in word for word in words[:6] for name in LAUNCHERS) else None
