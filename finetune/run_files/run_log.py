"""What a run prints while it trains: a bar, and lines with units; metrics.jsonl and trackers get the same figures.

    step 200/1500 | loss 1.873 nats/token | 41.2k tokens/s | fill 96% | MFU 34% | 2.1 GB | lr 2.4e-4 | 01:02 left
    step 200/1500 | validation loss 1.902 nats/token | chrf 41.2 | best so far

Tokens are source and target tokens without padding, over all ranks. Fill is their share of the batches' tensors. MFU
is what they cost, as a share of what the machine's matrix products reach (throughput.py). Memory is the most so far.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from diptych.data_prep.command_line.errors import UserError, message_line


class RunLog:
    """Writes on the main process only. Lines after the checkpoint that a run goes on from are cut off, because they
    will be written again."""

    def __init__(self, folder: Path, accelerator: Accelerator, written: dict[str, int]):
        self.accelerator = accelerator
        self.files = {name: folder / name for name in ("metrics.jsonl", "samples.jsonl")}
        if accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            for name, file in self.files.items():
                size = written.get(name, 0)
                kept = _cut_back(file, size)
                if kept < size:
                    self.say(
                        f"{file} has {kept:,} of the {size:,} bytes that it had at this checkpoint. What is missing is"
                        f" not written again, and loss.png and `diptych compare` lack it; the run goes on."
                    )
            self.files["metrics.jsonl"].touch()

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(message_line(text))
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
    """Cuts a log to its first `size` bytes, and to whole lines; returns how many bytes are left. UserError for what is
    no log."""
    if not os.path.lexists(file):
        return 0
    if file.is_symlink() or not file.is_file():
        raise UserError(f"{file} is a link or no file, and a run cuts and continues it. Put the file itself there.")
    with file.open("r+b") as stream:
        lines = stream.read(size).splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{file} line {number} is no JSON ({error}). Bring the file back from a copy, or move it away: the"
                    f" run then goes on without its earlier lines."
                ) from None
        return stream.truncate(sum(map(len, lines)))


class Pace:
    """The bar, and the pace of training without evaluation and saving."""

    def __init__(self, total_steps: int, done: int, shown: bool):
        self.left = total_steps - done
        hidden = not shown or not sys.stderr.isatty()  # in a file, a bar would be thousands of lines
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
        self.bar.set_postfix_str(f"loss {loss:.3f}, {tqdm.format_sizeof(tokens / seconds)} tokens/s", refresh=False)
        self.bar.update()

    def per_second(self) -> tuple[float, float]:
        """Tokens, and floating-point operations, since the last time this was asked."""
        pace = self.window_tokens / self.window_seconds, self.window_work / self.window_seconds
        self.window_seconds, self.window_tokens, self.window_work = 0.0, 0, 0.0
        return pace

    def seconds_left(self) -> float:
        return self.left * self.seconds / self.steps


def train_line(entry: dict[str, Any], total_steps: int, seconds_left: float, unit: str) -> str:
    """`unit` of the loss. Of preferences, accuracy and margin follow it."""
    pace, left = tqdm.format_sizeof(entry["tokens_per_second"]), tqdm.format_interval(seconds_left)
    shown = {"reward": "reward {:.2f} | ", "accuracy": "accuracy {:.0%} | ", "margin": "margin {:.2f} | "}
    of_preferences = "".join(text.format(entry[name]) for name, text in shown.items() if name in entry)
    return (
        f"step {entry['step']}/{total_steps} | loss {entry['loss']:.3f}{unit} | {of_preferences}{pace} tokens/s | "
        f"fill {entry['fill']:.0%} | MFU {entry['mfu']:.0%} | {entry['memory_bytes'] / 1e9:.1f} GB | "
        f"lr {entry['learning_rate']:.1e} | {left} left"
    ).replace("e-0", "e-")


def validation_line(entry: dict[str, Any], total_steps: int, is_best: bool, unit: str) -> str:
    figures = {name: value for name, value in entry.items() if name not in ("step", "split", "loss")}
    parts = [f"step {entry['step']}/{total_steps}", f"{entry['split']} loss {entry['loss']:.3f}{unit}"]
    parts += [f"{name} {_shown(name, value, 1 if unit else 2)}" for name, value in figures.items()]
    return " | ".join(parts + ["best so far"] * is_best)


def _shown(name: str, value: float, digits: int) -> str:
    if name == "accuracy":
        return f"{value:.0%}"
    return f"{round(value, digits) + 0.0:.{digits}f}" if isinstance(value, float) else str(value)  # no -0.00


def selection_line(step: int, total_steps: int, figure: str, value: float, sets: int, is_best: bool) -> str:
    """The figure by which the best checkpoint is chosen, where there are several validation sets."""
    mean = "" if "/" in figure else f"mean over {sets} validation sets: "
    return " | ".join([f"step {step}/{total_steps}", f"{mean}{figure} {value:.3f}"] + ["best so far"] * is_best)
