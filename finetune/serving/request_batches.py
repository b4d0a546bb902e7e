"""Prompts that come one by one, at any time; batches of those that wait together; answers as they are written.

    engine = Engine(model, tokenizer, template, batch_size=16, queue_size=256, batch_wait_ms=5)
    job = Job([12, 7, 1], Decoding(max_new_tokens=64), on_event=print)
    engine.submit([job])    # then, from the engine's thread: Piece(0, "나는"), Piece(0, " 학생"), …, Ended([…])

Jobs that decode alike are generated together, by generate.py's own function, so that an answer is what `diptych
generate` writes, whatever else is in its batch. Sampled ones go alone, since what is drawn depends on who is drawn
with. A job that is dropped ends its row at the next step; when no row is left, the batch ends. One thread does it
all.
"""

import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.inference.detokenize import UNKNOWN_ID, text_of
from diptych.finetune.inference.generation import generate_batch
from diptych.finetune.inference.generation_config import end_tokens, generation_config
from diptych.finetune.inference.scoring import output_log_probabilities
from diptych.finetune.inference.targets import given_tokens


class Decoding(NamedTuple):
    """How an answer is written. Jobs with equal ones can share a batch."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    n: int = 1
    """Answers to a prompt; more than one are sampled."""
    stop: tuple[str, ...] = ()
    seed: int | None = None
    num_beams: int = 1
    """With more than one, the text comes when it is whole."""
    repetition_penalty: float = 1.0
    scores: bool = False
    """Log-probabilities of the tokens, which take another pass."""

    def generation_kwargs(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"num_beams": self.num_beams}
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
            settings |= {"num_return_sequences": self.n}
        if self.repetition_penalty != 1:
            settings |= {"repetition_penalty": self.repetition_penalty}
        return settings


class Answer(NamedTuple):
    text: str
    finished: bool
    """By the model, not by the cap on new tokens."""
    ids: tuple[int, ...]
    """The tokens that were written, the one that ends it included."""
    scored: tuple[tuple[str, float], ...] = ()
    """Of each token its part of the text and its log-probability in nats, where the decoding asks for scores."""

    @property
    def tokens(self) -> int:
        return len(self.ids)


class Piece(NamedTuple):
    """The next part of an answer's text."""

    index: int
    """Of the job's `n` answers."""
    text: str


class Ended(NamedTuple):
    """The last event of a job that was not dropped. Where it has asked for pieces, they make up the texts."""

    answers: list[Answer]


class Failed(NamedTuple):
    """The last event of a job whose batch broke."""

    error: Exception


class QueueFull(Exception):
    pass


@dataclass(eq=False)
class Job:
    source_ids: Sequence[int]
    decoding: Decoding
    on_event: Callable[[Piece | Ended | Failed], None]
    """Called by the engine's thread."""
    wants_pieces: bool = False
    is_dropped: bool = False
    """Set it, and nothing more is done for this job."""
    created: float = field(default_factory=time.monotonic)
    given: Sequence[int] | None = None
    """What the decoder is given first (`targets.given_tokens`); by the tokenizer's own languages unless given."""


class Engine:
    """The thread that generates."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        *,
        batch_size: int,
        queue_size: int,
        batch_wait_ms: float,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.batch_size, self.queue_size, self.batch_wait_ms = batch_size, queue_size, batch_wait_ms
        self.running: list[Job] = []
        self.on_batch: Callable[[int], None] = lambda rows: None
        """Told how many jobs a batch has, when it begins."""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return sum(not job.is_dropped for job in list(self._waiting))

    def submit(self, jobs: Sequence[Job]) -> None:
        """All of them or none.

        Raises:
            QueueFull: so many cannot wait.
        """
        with self._changed:
            if self.waiting + sum(not job.is_dropped for job in jobs) > self.queue_size:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """After what is under way; jobs that still wait are not begun."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._next_batch():
            self.running = jobs
            self.on_batch(len(jobs))
            try:
                events = [Ended(answers) for answers in self._generate(jobs)]
            except Exception as error:  # the thread outlives it: it is these jobs' alone, and they are told
                show_place(error)
                events = [Failed(error)] * len(jobs)
            self.running = []
            for job, event in zip(jobs, events, strict=True):
                if not job.is_dropped:
                    job.on_event(event)

    def _next_batch(self) -> list[Job]:
        """The one that waits longest, and those that decode like it; [] when the engine is closed."""
        with self._changed:
            while not self._is_closed and not self._drop_waiting():
                self._changed.wait()
            if self._is_closed:
                return []
            until = time.monotonic() + self.batch_wait_ms / 1000
            while len(self._waiting) < self.batch_size and (left := until - time.monotonic()) > 0:
                self._changed.wait(left)
            self._drop_waiting()
            if not self._waiting:
                return self._next_batch()
            first = self._waiting[0]
            alike = (job for job in self._waiting if job is first or _can_share(first.decoding, job.decoding))
            jobs = list(itertools.islice(alike, self.batch_size))
            for job in jobs:
                self._waiting.remove(job)
            return jobs

    def _drop_waiting(self) -> int:
        """How many wait, without those that were dropped."""
        for job in [job for job in self._waiting if job.is_dropped]:
            self._waiting.remove(job)
        return len(self._waiting)

    def _generate(self, jobs: list[Job]) -> list[list[Answer]]:
        decoding = jobs[0].decoding
        template = replace(self.template, stop=(*self.template.stop, *decoding.stop))
        rows = [(job, index) for job in jobs for index in range(decoding.n)]
        config, _ = generation_config(self.model, self.tokenizer, {})
        own = given_tokens(self.model, self.tokenizer, self.template)
        writer = RowWriter(self.tokenizer, template, end_tokens(config), rows)
        watching = {"stopping_criteria": [DroppedRows(rows)]}
        if decoding.num_beams == 1:
            watching["streamer"] = writer
        if decoding.temperature:
            torch.manual_seed(torch.seed() if decoding.seed is None else decoding.seed)
        outputs, _ = generate_batch(
            self.model,
            self.tokenizer,
            [job.source_ids for job in jobs],
            decoding.max_new_tokens,
            template,
            decoding.generation_kwargs() | watching,
            [job.given or own for job in jobs],
        )
        for place, (job, _) in enumerate(rows):
            if job.wants_pieces and not job.is_dropped:
                writer.send(place, outputs[place].text)
        answers = [Answer(output.text, output.finished, output.ids) for output in outputs]
        if decoding.scores:
            sources, given = zip(*((job.source_ids, job.given or own) for job in jobs), strict=True)
            nats = output_log_probabilities(self.model, self.tokenizer, sources, given, outputs, len(outputs))
            answers = [
                answer._replace(scored=tuple(zip(self._texts_of(answer), of_row, strict=True)))
                for answer, of_row in zip(answers, nats, strict=True)
            ]
        return [answers[place : place + decoding.n] for place in range(0, len(answers), decoding.n)]

    def _texts_of(self, answer: Answer) -> list[str]:
        """The part of each token in the text. A character of several tokens is the last one's."""
        lengths = [
            len(text_of(self.tokenizer, answer.ids[:tokens]).rstrip(UNKNOWN_ID)) for tokens in range(answer.tokens)
        ]
        ends = [*itertools.accumulate(lengths, max), len(answer.text)]
        return [answer.text[start:end] for start, end in itertools.pairwise(ends)]


def show_place(error: Exception) -> None:
    """Where a mistake of our own arose, for whoever runs the server; without its words, which may be a client's."""
    if not isinstance(error, UserError):
        traceback.print_tb(error.__traceback__)
        print(f"{type(error).__name__} while answering: please report it.", file=sys.stderr, flush=True)


def _can_share(first: Decoding, other: Decoding) -> bool:
    return first == other and not first.temperature


class DroppedRows(StoppingCriteria):
    """Ends the rows (B × k, T) of jobs that were dropped; beam search asks for k candidates of each."""

    def __init__(self, rows: Sequence[tuple[Job, int]]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        dropped = torch.tensor([job.is_dropped for job, _ in self.rows], device=input_ids.device)
        return dropped.repeat_interleave(len(input_ids) // len(self.rows))


class RowWriter(BaseStreamer):
    """Gets the (B,) tokens of each step, and sends what has become text to the jobs that want it.

    Text is sent when no later token can change it: not half a character, nor what a stop string may begin with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        ends: Sequence[int | None],
        rows: Sequence[tuple[Job, int]],
    ):
        self.tokenizer, self.template, self.ends, self.rows = tokenizer, template, ends, rows
        self.ids: list[list[int]] = [[] for _ in rows]
        self._sent = [""] * len(rows)
        self._is_over = [False] * len(rows)

    def put(self, value: torch.Tensor) -> None:
        if value.ndim > 1:  # what the decoder was given
            return
        for place, token in enumerate(value.tolist()):
            if self._is_over[place]:
                continue  # padding
            self.ids[place].append(token)
            job, _ = self.rows[place]
            self._is_over[place] = token in self.ends or job.is_dropped
            if job.wants_pieces and not self._is_over[place]:
                self.send(place, self._settled(text_of(self.tokenizer, self.ids[place])))

    def end(self) -> None:
        pass

    def _settled(self, text: str) -> str:
        cut = self.template.cut_at_stop(text)
        if cut != text:
            return cut
        text = text.rstrip(UNKNOWN_ID)
        held = max((_overlap(text, stop) for stop in self.template.stop), default=0)
        return text[: len(text) - held]

    def send(self, place: int, text: str) -> None:
        """What of `text` was not sent yet."""
        sent = self._sent[place]
        if len(text) > len(sent) and text.startswith(sent):
            job, index = self.rows[place]
            job.on_event(Piece(index, text[len(sent) :]))
            self._sent[place] = text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first ones of `stop`."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)
