"""What a run says while it trains: a bar, lines with units, and the same figures as metrics.jsonl and to trackers.

    step 200/1500 | loss 1.873 nats/token | 41.2k tokens/s | fill 96% | MFU 34% | 2.1 GB | lr 2.4e-4 | 1m02s left
    step 200/1500 | validation loss 1.902 nats/token | chrf 41.2 | best so far

Tokens are source and target tokens without padding, over all ranks. Fill is their share of the tensors that held
them; MFU what they cost, as a share of what the machine's matrix products reach (speed.py); memory the most so far.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from diptych.data_prep.command_line.errors import UserError


class RunLog:
    """Writes on the main process only. What was written after the checkpoint that a run goes on from is cut off, and
    will be written again: no line is missing and none comes twice."""

    def __init__(self, folder: Path, accelerator: Accelerator, written: dict[str, int]):
        self.accelerator = accelerator
        self.files = {name: folder / name for name in ("metrics.jsonl", "samples.jsonl")}
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            self.files["metrics.jsonl"].touch()
            for name, file in self.files.items():
                size = written.get(name, 0)
                kept = _cut_back(file, size)
                if kept < size:
                    self.say(
                        f"{file} has {kept:,} of the {size:,} bytes that it had at this checkpoint. What is missing is"
                        f" not written again, and loss.png and `diptych compare` lack it; the run goes on."
                    )

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)
            sys.stdout.flush()

    def add_figures(self, entry: dict[str, Any]) -> None:
        """One line of metrics.jsonl: step, split, and figures."""
        self._append("metrics.jsonl", [entry])
        figures = {f"{entry['split']}/{name}": entry[name] for name in entry if name not in ("step", "split")}
        self.accelerator.log(figures, step=entry["step"])

    def add_samples(self, samples: list[dict[str, Any]]) -> None:
        self._append("samples.jsonl", samples)

    def bytes_written(self) -> dict[str, int]:
        return {name: file.stat().st_size for name, file in self.files.items() if file.exists()}

    def _append(self, name: str, entries: list[dict[str, Any]]) -> None:
        if not self.accelerator.is_main_process:
            return
        with self.files[name].open("a", encoding="utf-8") as stream:
            stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            stream.flush()
            os.fsync(stream.fileno())


def _cut_back(file: Path, size: int) -> int:
    """To its first `size` bytes, or to the whole lines of fewer; how many are left. UserError for what is no log."""
    if not file.exists():
        return 0
    with file.open("r+b") as stream:
        lines = stream.read(size).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except ValueError as error:
                raise UserError(
                    f"{file} line {number} is no JSON ({error}). Bring the file back from a copy, or move it away: the"
                    f" run then goes on without its earlier lines."
                ) from None
        return stream.truncate(sum(map(len, lines)))


class Pace:
    """The bar, and how fast it moves. Evaluation and saving do not count."""

    def __init__(self, total_steps: int, done: int, shown: bool):
        self.left = total_steps - done
        # A bar in a log file would be thousands of lines; there the log lines must do.
        hidden = not shown or not sys.stderr.isatty()
        self.bar = tqdm(desc="train", total=total_steps, initial=done, unit="step", disable=hidden)
        self.seconds, self.steps = 0.0, 0
        self.window_seconds, self.window_tokens, self.window_work = 0.0, 0, 0.0

    def advance(self, loss: float, tokens: int, work: float, seconds: float) -> None:
        self.left -= 1
        self.steps += 1
        self.seconds += seconds
        self.window_seconds += seconds
        self.window_tokens += tokens
        self.window_work += work
        self.bar.set_postfix_str(f"loss {loss:.3f}, {short(tokens / seconds)} tokens/s", refresh=False)
        self.bar.update()

    def per_second(self) -> tuple[float, float]:
        """Tokens, and floating-point operations, since the last time this was asked."""
        pace = self.window_tokens / self.window_seconds, self.window_work / self.window_seconds
        self.window_seconds, self.window_tokens, self.window_work = 0.0, 0, 0.0
        return pace

    def seconds_left(self) -> float:
        return self.left * self.seconds / self.steps


def train_line(entry: dict[str, Any], total_steps: int, seconds_left: float) -> str:
    return (
        f"step {entry['step']}/{total_steps} | loss {entry['loss']:.3f} nats/token | "
        f"{short(entry['tokens_per_second'])} tokens/s | fill {entry['fill']:.0%} | MFU {entry['mfu']:.0%} | "
        f"{entry['memory_bytes'] / 1e9:.1f} GB | lr {entry['learning_rate']:.1e} | {duration(seconds_left)} left"
    ).replace("e-0", "e-")


def validation_line(entry: dict[str, Any], total_steps: int, is_best: bool) -> str:
    figures = {name: value for name, value in entry.items() if name not in ("step", "split", "loss")}
    parts = [f"step {entry['step']}/{total_steps}", f"{entry['split']} loss {entry['loss']:.3f} nats/token"]
    parts += [
        f"{name} {value:.1f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    ]
    return " | ".join(parts + ["best so far"] * is_best)


def selection_line(step: int, total_steps: int, figure: str, value: float, sets: int, is_best: bool) -> str:
    """What decides which checkpoint is best, where there are several validation sets."""
    mean = "" if "/" in figure else f"mean over {sets} validation sets: "
    return " | ".join([f"step {step}/{total_steps}", f"{mean}{figure} {value:.3f}"] + ["best so far"] * is_best)


def short(number: float) -> str:
    """41234 -> 41.2k, 8137216 -> 8.1M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """62 -> 1m02s, 3700 -> 1h01m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
