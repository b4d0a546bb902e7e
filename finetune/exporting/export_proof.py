"""A model and its export in; whether they write the same, and what each costs.

    compare_export(loaded, exported, examples, rules) -> ExportComparison(rows=11, same_rows=11, …)

Both write each row greedily, without any rule of a generation config. Their tokens are compared row by row; where they
differ, torch's logits of the two tokens tell whether it was a tie. Logits are compared at every step of the export's
output, which torch reads with teacher forcing; so steps after a difference count too. Texts are compared by BLEU and
chrF: with torch's texts as references, and with the rows' own references if all rows have some.

A float32 export is right if all rows are the same except for ties, and no logit differs by more than TOLERANCE times
the largest logit. B rows of a batch, T tokens written, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from transformers import GenerationConfig

from diptych.data_prep.command_line.errors import UserError, counted
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import own_languages
from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY, stored_golden
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.batches.padded_rows import pad_sources
from diptych.finetune.evaluating.metrics import score_texts
from diptych.finetune.generating.prompt_files import read_prompts, render_prompts
from diptych.finetune.inference.generation import up_to_end
from diptych.finetune.inference.outputs import batches_by_length, map_by_length
from diptych.finetune.inference.prompts import Prompter
from diptych.finetune.inference.target_tokens import given_tokens, text_of
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit

TOLERANCE = 1e-3
"""Of the largest logit. Two fp32 engines differ by about 1e-6 of it, a wrong conversion by more than a tenth."""
ROWS_WITH_LOGITS = 64
"""Logits, (T, V) numbers per row, are compared for this many rows."""
TEXT_METRICS = ("bleu", "chrf")
SENTENCES = [
    ("Translate English to French:", "Go."),
    ("Name the capital of Peru.", ""),
    ("Add.", "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43"),
    ("Say it shorter.", "At this point in time it is the case that it rains, and it rains a lot."),
    ("Count to twenty.", ""),
    ("Why is the sky blue, and why is it red in the evening?", ""),
]
"""Instructions and inputs that are compared if no rows are given."""


class GreedyRules(NamedTuple):
    """How both write."""

    prefix: list[int]
    """Forced tokens after the decoder's start token."""
    ends: list[int]
    tokens: int
    """The most tokens per row."""
    batch_size: int


class Written(NamedTuple):
    ids: list[int]
    """Without the prefix, up to and including an end token."""
    logits: torch.Tensor | None = None
    """(T, V): the logits that each token was chosen from."""


class ExportedModel(Protocol):
    """What an export must do to be compared."""

    computed_in: str

    def write_greedily(
        self, sources: Sequence[Sequence[int]], rules: GreedyRules, keep_logits: bool = False
    ) -> list[Written]: ...


class ProofRow(NamedTuple):
    source_ids: list[int]
    references: list[str]


@dataclass(frozen=True)
class ExportComparison:
    rows: int
    same_rows: int
    tied_rows: int
    """Rows that differ at a token where torch gives both tokens the same logit, within the tolerance."""
    tokens: int
    """Written by torch."""
    same_tokens: int
    """Of each row those before the first difference."""
    max_logit_difference: float
    largest_logit: float
    rows_with_logits: int
    torch_tokens_per_second: float
    exported_tokens_per_second: float
    texts: dict[str, float]
    """BLEU and chrF of the export's texts with torch's texts as references."""
    torch_figures: dict[str, float]
    """BLEU and chrF with the rows' own references; empty if a row has none."""
    exported_figures: dict[str, float]
    signatures: dict[str, str]
    first_difference: str
    """The first row that differs without a tie, in words; "" if there is none."""

    def fault(self) -> str:
        """What is wrong with a float32 export, in words; "" if nothing is."""
        if self.first_difference:
            return self.first_difference
        allowed = TOLERANCE * max(1.0, self.largest_logit)
        if not self.max_logit_difference <= allowed:  # also true for NaN
            return (
                f"logits are off by up to {self.max_logit_difference:.2g} (the largest is {self.largest_logit:.3g}; "
                f"{allowed:.2g} would be rounding)"
            )
        return ""


def proof_rows(file: str, loaded: LoadedModel, max_source_tokens: int | None) -> tuple[list[ProofRow], str, Languages]:
    """Rows to compare on, their description, and their languages (one direction, because the rules are for one).

    With a JSONL file these are its prompts, with `output` or `outputs` as references; otherwise SENTENCES and the
    golden examples that travel with the template.
    """
    tokenizer, template = loaded.tokenizer, loaded.template
    if not file:
        texts = [template.render_source(*it) if template else " ".join(it).strip() for it in SENTENCES]
        golden = stored_golden(tokenizer) if TOKENIZER_KEY in tokenizer.init_kwargs else []
        ids = [sum(entry["input_ids"], []) for entry in golden if not isinstance(entry["input_ids"], str)]
        ids += [encoding.ids() for encoding in split_sources(tokenizer, texts)]
        return [ProofRow(row[:max_source_tokens], []) for row in ids], "built-in sentences", own_languages(tokenizer)
    if template is None:
        raise UserError("rows are prompts, and the tokenizer has no template to render them. Give --template.")
    prompter = Prompter(tokenizer, template, max_source_tokens)
    rows, prompts = render_prompts(read_prompts(file), prompter)
    for number, row in enumerate(rows, start=1):
        if row.error:
            raise UserError(f"{file} row {number}: {row.error}. Correct it, or remove it.")
    languages = [of_row for _, of_row in prompts.values()]
    if len(set(languages)) > 1:
        raise UserError(f"{file} has rows of several languages, and one direction is compared. Give rows of one.")
    ids, _ = prompter.encode([text for text, _ in prompts.values()], languages)
    found = []
    for number, of_row in zip(prompts, ids, strict=True):
        given = rows[number].fields.get("output", rows[number].fields.get("outputs", []))
        references = [given] if isinstance(given, str) else given
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise UserError(f"{file} row {number + 1}: output must be a text, or outputs a list of texts.")
        found.append(ProofRow(of_row, references))
    return found, f"{counted(len(found), 'row')} of {Path(file).name}", languages[0]


def greedy_rules(loaded: LoadedModel, tokens: int, batch_size: int, languages: Languages | None = None) -> GreedyRules:
    """Prefix and end tokens as generation uses them for this model; `tokens` are cut to its positions."""
    model, config = loaded.model, loaded.model.generation_config
    start, *prefix = given_tokens(loaded, languages)
    if start != loaded.decoder_start_token_id:
        raise UserError(
            f"the decoder of {model.config.model_type} starts with the language code of each row, an export with one. "
            f"Set decoder_start_token_id in its generation_config.json to that of one language ({start} here)."
        )
    if not prefix and config.forced_bos_token_id is not None:
        prefix = [config.forced_bos_token_id]
    end = target_side(loaded.tokenizer).eos_token_id if config.eos_token_id is None else config.eos_token_id
    limit = position_limit(model)
    tokens = tokens if limit is None else max(1, min(tokens, limit - len(prefix)))
    return GreedyRules(prefix, end if isinstance(end, list) else [end], tokens, batch_size)


def compare_export(
    loaded: LoadedModel, exported: ExportedModel, examples: Sequence[ProofRow], rules: GreedyRules
) -> ExportComparison:
    sources = [example.source_ids for example in examples]
    ours, torch_speed = _timed(lambda batch: torch_greedy(loaded, batch, rules), sources, rules)
    theirs, exported_speed = _timed(
        lambda batch: [written.ids for written in exported.write_greedily(batch, rules)], sources, rules
    )
    places, faults = [], []  # of the first differences, and those in words that are no tie
    for row, (source, ids, other) in enumerate(zip(sources, ours, theirs, strict=True), start=1):
        unlike = (place for place, pair in enumerate(zip_longest(ids, other)) if pair[0] != pair[1])
        places.append(place := next(unlike, None))
        if place is None:
            continue
        fault = f"one of them ends there, torch with {len(ids)} tokens, the export with {len(other)}"
        if place < min(len(ids), len(other)):
            logits = _torch_logits(loaded, source, ids[: place + 1], rules)[-1]
            gap = (logits[ids[place]] - logits[other[place]]).item()
            if abs(gap) <= TOLERANCE * max(1.0, logits.abs().max().item()):
                continue
            fault = (
                f"torch writes token {ids[place]}, whose logit is {gap:.3g} above that of {other[place]}, the export's"
            )
        faults.append(f"row {row} parts at token {place + 1}: {fault}")
    difference, largest = _logit_difference(loaded, exported, sources[:ROWS_WITH_LOGITS], rules)
    texts, exported_texts = (
        [text_of(loaded.tokenizer, [token for token in ids if token not in rules.ends]) for ids in side]
        for side in (ours, theirs)
    )
    figures, signatures = score_texts(TEXT_METRICS, exported_texts, [[text] for text in texts])
    references = [example.references for example in examples]
    torch_figures, exported_figures = (
        score_texts(TEXT_METRICS, side, references)[0] if all(references) else {} for side in (texts, exported_texts)
    )
    return ExportComparison(
        rows=len(sources),
        same_rows=places.count(None),
        tied_rows=len(sources) - places.count(None) - len(faults),
        tokens=sum(map(len, ours)),
        same_tokens=sum(len(ids) if place is None else place for ids, place in zip(ours, places, strict=True)),
        max_logit_difference=difference,
        largest_logit=largest,
        rows_with_logits=min(len(sources), ROWS_WITH_LOGITS),
        torch_tokens_per_second=torch_speed,
        exported_tokens_per_second=exported_speed,
        texts=figures,
        torch_figures=torch_figures,
        exported_figures=exported_figures,
        signatures=signatures,
        first_difference=faults[0] if faults else "",
    )


def _timed(
    write: Callable[[list], list[list[int]]], sources: Sequence[Sequence[int]], rules: GreedyRules
) -> tuple[list[list[int]], float]:
    """What is written for each source, and tokens per second. The first batch runs once before, untimed."""
    lengths = [len(source) for source in sources]
    write([sources[row] for row in batches_by_length(lengths, rules.batch_size)[0]])
    began = time.perf_counter()
    written = map_by_length(lambda rows: write([sources[row] for row in rows]), lengths, rules.batch_size)
    return written, sum(map(len, written)) / (time.perf_counter() - began)


@torch.no_grad()
def torch_greedy(loaded: LoadedModel, sources: Sequence[Sequence[int]], rules: GreedyRules) -> list[list[int]]:
    model = loaded.model
    inputs = pad_sources(sources, loaded.pad_token_id)
    inputs["decoder_input_ids"] = torch.tensor([[loaded.decoder_start_token_id, *rules.prefix]] * len(sources))
    own = model.generation_config  # `generate` fills gaps in its settings from it, so it is replaced meanwhile
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=rules.tokens,
        eos_token_id=rules.ends,
        pad_token_id=loaded.pad_token_id,
        decoder_start_token_id=loaded.decoder_start_token_id,
    )
    try:
        sequences = model.generate(**{name: ids.to(model.device) for name, ids in inputs.items()}).tolist()
    finally:
        model.generation_config = own
    return [up_to_end(ids[1 + len(rules.prefix) :], rules.ends)[0] for ids in sequences]


@torch.no_grad()
def _torch_logits(loaded: LoadedModel, source: Sequence[int], ids: Sequence[int], rules: GreedyRules) -> torch.Tensor:
    """(T, V): the logits for each of `ids`, given the ids before it."""
    before = [loaded.decoder_start_token_id, *rules.prefix, *ids[:-1]]
    outputs = loaded.model(
        input_ids=torch.tensor([source], device=loaded.device),
        decoder_input_ids=torch.tensor([before], device=loaded.device),
    )
    return outputs.logits[0, len(rules.prefix) :].float().cpu()


def _logit_difference(
    loaded: LoadedModel, exported: ExportedModel, sources: Sequence[Sequence[int]], rules: GreedyRules
) -> tuple[float, float]:
    """The largest difference between logits at any step, and the largest logit."""
    difference = largest = 0.0
    for source in sources:
        ((ids, theirs),) = exported.write_greedily([source], rules, keep_logits=True)
        ours = _torch_logits(loaded, source, ids, rules)
        off = (ours - theirs.float()).abs().max().item()
        difference = off if not off <= difference else difference  # NaN stays
        largest = max(largest, ours.abs().max().item())
    return difference, largest
