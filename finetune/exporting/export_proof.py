"""A model and its export in; whether they write the same, and what each costs.

    compare(model, exported, examples, …) -> Comparison(rows=11, same_rows=11, max_logit_difference=2.1e-05, …)

Both write each row greedily, the likeliest token after the other, with no rule of a generation config. Tokens are
compared row by row; where they part, torch's logits of the two tokens say whether it was a tie. Logits are compared at
every step of what the export wrote, which torch is given to read: so all steps count, also those after a difference.
Texts are compared by BLEU and chrF, with torch's as references, and both with the rows' own where they have any.

In float32 an export is right where the rows are the same but for ties, and no logit is further off than TOLERANCE
times the largest one. B rows of a batch, T tokens written, V vocabulary.
"""

import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import own_languages
from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY, Template, stored_golden
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id, target_side
from diptych.finetune.doctor.doctor_rows import SENTENCES
from diptych.finetune.evaluating.metrics import score_texts
from diptych.finetune.inference.detokenize import text_of
from diptych.finetune.inference.generate_file import read_prompts, render_prompts
from diptych.finetune.inference.generation import Prompter, pad_sources
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loading import position_limit

TOLERANCE = 1e-3
"""Of the largest logit. fp32 on two engines is off by some 1e-6 of it; a wrong conversion by more than a tenth."""
ROWS_WITH_LOGITS = 64
"""Of so many rows all logits are compared: (T, V) numbers each."""
TEXT_METRICS = ("bleu", "chrf")


class Exported(Protocol):
    """What an export has to do to be compared."""

    def greedy(
        self, sources: Sequence[Sequence[int]], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> list[list[int]]: ...

    def greedy_with_logits(
        self, source_ids: Sequence[int], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]: ...


class Example(NamedTuple):
    source_ids: list[int]
    references: list[str]
    """What should be written, if the row says it."""


class Task(NamedTuple):
    """How both of them write."""

    prefix: list[int]
    """The ids that follow the decoder's start, whatever a model would write."""
    ends: list[int]
    tokens: int
    """No row gets longer."""
    batch_size: int


@dataclass(frozen=True)
class Comparison:
    rows: int
    same_rows: int
    tied_rows: int
    """Of the others, those that part where torch gives both tokens the same logit, within the tolerance."""
    tokens: int
    """That torch wrote."""
    same_tokens: int
    """From the start of each row up to the first that differs."""
    max_logit_difference: float
    largest_logit: float
    rows_with_logits: int
    torch_tokens_per_second: float
    exported_tokens_per_second: float
    texts: dict[str, float]
    """BLEU and chrF of what the export wrote, with what torch wrote as references."""
    torch_figures: dict[str, float] = field(default_factory=dict)
    """BLEU and chrF with the rows' own references, where each row has one."""
    exported_figures: dict[str, float] = field(default_factory=dict)
    signatures: dict[str, str] = field(default_factory=dict)
    first_difference: str = ""
    """The first row that parts without a tie, in words."""

    def fault(self) -> str:
        """What is not right in float32, in words; "" where it is."""
        if self.first_difference:
            return self.first_difference
        allowed = TOLERANCE * max(1.0, self.largest_logit)
        if not self.max_logit_difference <= allowed:  # also where it is no number
            return (
                f"logits are off by up to {self.max_logit_difference:.2g} (the largest is {self.largest_logit:.3g}; "
                f"{allowed:.2g} would be rounding)"
            )
        return ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examples_of(
    file: str, tokenizer: PreTrainedTokenizerBase, template: Template | None, max_source_tokens: int | None
) -> tuple[list[Example], str, Languages]:
    """Rows of a JSONL file, `output` or `outputs` being their references; without a file, the examples that travel
    with the template and built-in sentences. And what they are, in words; and their languages, which are the same for
    all, since one task is compared."""
    if not file:
        texts = [_built_in(template, instruction, text) for instruction, text, _ in SENTENCES]
        golden = stored_golden(tokenizer) if TOKENIZER_KEY in tokenizer.init_kwargs else []
        ids = [sum(entry["input_ids"], []) for entry in golden if not isinstance(entry["input_ids"], str)]
        ids += [encoding.ids() for encoding in split_sources(tokenizer, texts)]
        examples = [Example(row[:max_source_tokens], []) for row in ids]
        return examples, "built-in sentences", own_languages(tokenizer)
    if template is None:
        raise UserError(
            "rows are prompts, and the tokenizer carries no template to render them with. Give --template."
        )
    rows, prompts = render_prompts(read_prompts(file), Prompter(tokenizer, template, max_source_tokens))
    for number, row in enumerate(rows, start=1):
        if row.error:
            raise UserError(f"{file} row {number}: {row.error}. Mend it, or take it out.")
    languages = [of_row for _, of_row in prompts.values()]
    if len(set(languages)) > 1:
        raise UserError(f"{file} has rows of several languages, and one direction is compared. Give rows of one.")
    encodings = split_sources(tokenizer, [text for text, _ in prompts.values()], languages)
    references = [_references(file, index, rows[index].fields) for index in prompts]
    examples = [
        Example(encoding.ids(max_source_tokens), own) for encoding, own in zip(encodings, references, strict=True)
    ]
    return examples, f"{counted(len(examples), 'row')} of {Path(file).name}", languages[0]


def _built_in(template: Template | None, instruction: str, text: str) -> str:
    return template.render_source(instruction, text) if template else f"{instruction} {text}".strip()


def _references(file: str, index: int, fields: dict[str, Any]) -> list[str]:
    given = fields.get("output", fields.get("outputs", []))
    references = [given] if isinstance(given, str) else given
    if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
        raise UserError(f"{file} row {index + 1}: output must be a text, or outputs a list of texts.")
    return references


def task_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    tokens: int,
    batch_size: int,
    languages: Languages | None = None,
) -> Task:
    """Prefix and ends as generation has them for this model; `tokens` at most, within its positions."""
    config = model.generation_config
    start, *prefix = given_tokens(model, tokenizer, template, languages)
    if start != decoder_start_token(model):
        raise UserError(
            f"the decoder of {model.config.model_type} starts with the language code of each row, an export with one. "
            f"Set decoder_start_token_id in its generation_config.json to that of one language ({start} here)."
        )
    if not prefix and config.forced_bos_token_id is not None:
        prefix = [config.forced_bos_token_id]
    end = target_side(tokenizer).eos_token_id if config.eos_token_id is None else config.eos_token_id
    limit = position_limit(model)
    tokens = tokens if limit is None else max(1, min(tokens, limit - len(prefix)))
    return Task(prefix, end if isinstance(end, list) else [end], tokens, batch_size)


def compare(
    model: PreTrainedModel,
    exported: Exported,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
) -> Comparison:
    sources = [example.source_ids for example in examples]
    ours, torch_speed = _timed(lambda batch: torch_greedy(model, tokenizer, batch, task), sources, task)
    theirs, exported_speed = _timed(
        lambda batch: exported.greedy(batch, task.prefix, task.tokens, task.ends), sources, task
    )
    same = tied = same_tokens = 0
    first = ""
    for number, (source, ids, other) in enumerate(zip(sources, ours, theirs, strict=True), start=1):
        place = _first_difference(ids, other)
        same_tokens += len(ids) if place is None else place
        if place is None:
            same += 1
        elif gap := _gap(model, source, ids, other, place, task):
            first = first or f"row {number} parts at token {place + 1}: {gap}"
        else:
            tied += 1
    difference, largest = _logit_difference(model, exported, sources[:ROWS_WITH_LOGITS], task)
    texts = [
        [text_of(tokenizer, [token for token in ids if token not in task.ends]) for ids in side]
        for side in (ours, theirs)
    ]
    figures, signatures = score_texts(TEXT_METRICS, texts[1], [[text] for text in texts[0]])
    own: list[dict[str, float]] = [{}, {}]
    if all(example.references for example in examples):
        references = [example.references for example in examples]
        own = [score_texts(TEXT_METRICS, side, references)[0] for side in texts]
    return Comparison(
        rows=len(sources),
        same_rows=same,
        tied_rows=tied,
        tokens=sum(map(len, ours)),
        same_tokens=same_tokens,
        max_logit_difference=difference,
        largest_logit=largest,
        rows_with_logits=min(len(sources), ROWS_WITH_LOGITS),
        torch_tokens_per_second=torch_speed,
        exported_tokens_per_second=exported_speed,
        texts=figures,
        torch_figures=own[0],
        exported_figures=own[1],
        signatures=signatures,
        first_difference=first,
    )


def _timed(write: Any, sources: Sequence[Sequence[int]], task: Task) -> tuple[list[list[int]], float]:
    """What is written for each source, in their order, and tokens a second; the first batch runs once before."""
    order = sorted(range(len(sources)), key=lambda row: -len(sources[row]))
    batches = [order[start : start + task.batch_size] for start in range(0, len(order), task.batch_size)]
    write([sources[row] for row in batches[0]])
    written: list[list[int]] = [[] for _ in sources]
    began = time.perf_counter()
    for rows in batches:
        for row, ids in zip(rows, write([sources[row] for row in rows]), strict=True):
            written[row] = ids
    return written, sum(map(len, written)) / (time.perf_counter() - began)


@torch.no_grad()
def torch_greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Sequence[int]], task: Task
) -> list[list[int]]:
    """As `Exported.greedy`."""
    start = decoder_start_token(model)
    inputs = pad_sources(sources, tokenizer.pad_token_id or 0)
    inputs["decoder_input_ids"] = torch.tensor([[start, *task.prefix]] * len(sources))
    with _plain_generation(model, tokenizer, task):
        sequences = model.generate(**{name: ids.to(model.device) for name, ids in inputs.items()}).tolist()
    return [_up_to_end(ids[1 + len(task.prefix) :], task.ends) for ids in sequences]


@contextmanager
def _plain_generation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task):
    """generate fills what a call leaves open with the model's own config, so that this one is the model's for now."""
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=task.tokens,
        eos_token_id=task.ends,
        pad_token_id=padding_id(tokenizer) or 0,
        decoder_start_token_id=decoder_start_token(model),
    )
    try:
        yield
    finally:
        model.generation_config = own


def _up_to_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


def _first_difference(ids: Sequence[int], other: Sequence[int]) -> int | None:
    if list(ids) == list(other):
        return None
    pairs = enumerate(zip(ids, other, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(ids), len(other)))


@torch.no_grad()
def _torch_logits(model: PreTrainedModel, source: Sequence[int], ids: Sequence[int], task: Task) -> torch.Tensor:
    """(T, V): what each of `ids` would be taken from, were those before it written."""
    before = [decoder_start_token(model), *task.prefix, *ids[:-1]]
    outputs = model(
        input_ids=torch.tensor([list(source)], device=model.device),
        decoder_input_ids=torch.tensor([before], device=model.device),
    )
    return outputs.logits[0, len(task.prefix) :].float().cpu()


def _gap(
    model: PreTrainedModel, source: Sequence[int], ids: Sequence[int], other: Sequence[int], place: int, task: Task
) -> str:
    """By how much torch prefers its own token where two rows part, in words; "" for a tie."""
    if place >= min(len(ids), len(other)):
        return f"one of them ends there, torch with {len(ids)} tokens, the export with {len(other)}"
    logits = _torch_logits(model, source, ids[: place + 1], task)[-1]
    gap = (logits[ids[place]] - logits[other[place]]).item()
    if abs(gap) <= TOLERANCE * max(1.0, logits.abs().max().item()):
        return ""
    return f"torch writes token {ids[place]}, whose logit is {gap:.3g} above that of {other[place]}, the export's"


def _logit_difference(
    model: PreTrainedModel, exported: Exported, sources: Sequence[Sequence[int]], task: Task
) -> tuple[float, float]:
    """The largest difference of any logit at any step, and the largest logit."""
    difference = largest = 0.0
    for source in sources:
        ids, theirs = exported.greedy_with_logits(source, task.prefix, task.tokens, task.ends)
        ours = _torch_logits(model, source, ids, task)
        off = (ours - theirs.float()).abs().max().item()
        difference = off if not off <= difference else difference  # NaN stays
        largest = max(largest, ours.abs().max().item())
    return difference, largest
