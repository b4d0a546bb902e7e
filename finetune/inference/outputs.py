"""What generation returns, how its rows are batched, and the bar that shows its progress."""

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm


class Output(NamedTuple):
    text: str
    """The generated text without special tokens, up to the template's stop string."""
    finished: bool
    """True if the model ended the text (end token or stop string), False if the limit on new tokens did."""
    ids: tuple[int, ...] = ()
    """The generated tokens, including the end token."""
    log_probability: float | None = None
    """Log-probability of `ids` in nats, given the source and the forced tokens; None unless it was asked for."""
    lowest_log_probability: float | None = None
    """Of a single token; also with the above."""
    unread: tuple[str, ...] | None = None
    """Parts of the source that were not looked at; None unless it was asked for."""

    def scored(self, nats: Sequence[float]) -> "Output":
        """With the log-probabilities of its tokens."""
        return self._replace(log_probability=math.fsum(nats), lowest_log_probability=min(nats, default=0.0))


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Row numbers in batches, the longest rows first: `[3, 9, 4], 2` -> `[[1, 2], [0]]`.

    Rows of similar length need little padding, and a batch that does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def map_by_length(work: Callable[[list[int]], Sequence[Any]], lengths: Sequence[int], batch_size: int) -> list[Any]:
    """Calls `work(row numbers)` for each batch, and returns its results in the order of the rows."""
    found: dict[int, Any] = {}
    for rows in batches_by_length(lengths, batch_size):
        found |= zip(rows, work(rows), strict=True)
    return [found[row] for row in range(len(lengths))]


class GenerationBar(tqdm):
    """A progress bar over rows that also shows the new tokens per second."""

    def __init__(self, rows: int, done: int = 0, shown: bool = True):
        # In a log file each refresh is a line, so refresh every 30 seconds only.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        settings = {"unit": "rows", "disable": not shown, "mininterval": interval}
        super().__init__(desc="generate", total=rows, initial=done, **settings)
        self.tokens = 0

    def advance(self, rows: int, outputs: Sequence[Output]) -> None:
        self.tokens += sum(len(output.ids) for output in outputs)
        if not self.disable:
            rate = self.tokens / max(self.format_dict["elapsed"], 1e-9)
            self.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self.update(rows)
