"""Outputs weighed: how likely each is, which of given texts is likeliest, which sample is most like the others.

    chosen_outputs(model, tokenizer, [[12, 7, 1]], seed=0, batch_size=4, max_new_tokens=64, scores=True)
    choice_outputs(model, tokenizer, [[12, 7, 1]], ["yes", "no"], batch_size=4)      all choices are weighed: exact
    mbr_outputs(model, tokenizer, [[12, 7, 1]], samples=16, seed=0, batch_size=4, max_new_tokens=64)

A log-probability is of the tokens as they were written, given the source and what was forced on the decoder, from one
pass with teacher forcing: the model's own, whatever beams, samples or penalties found them.

The likeliest output is often a poor one. MBR takes the sample that is most like all others, by chrF: the one with the
highest expected utility if the samples are what the truth might be (Eikema and Aziz 2020, arXiv 2005.10283). Samples
are drawn at temperature 1 without tokens that are very unlikely (epsilon sampling, Freitag et al. 2023, arXiv
2305.09860). 16 samples cost about as much time as 16 beams.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sacrebleu
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.text_to_ids.templates import Template
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.exporting.ctranslate2_engine import Translator
from diptych.finetune.inference.generation import GenerationBar, Output, generate_outputs
from diptych.finetune.inference.targets import given_tokens, target_ids
from diptych.finetune.model.families import decoder_start_token
from diptych.finetune.model.loss import Seq2SeqObjective

EPSILON_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "epsilon_cutoff": 0.02}


def chosen_outputs(
    model: PreTrainedModel | Translator,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    *,
    seed: int,
    mbr_samples: int = 0,
    choices: Sequence[str] = (),
    scores: bool = False,
    **settings: Any,
) -> list[Output]:
    """Those of `mbr_outputs` or `choice_outputs` where these are asked for, else of `generate_outputs`, by either
    engine."""
    if isinstance(model, Translator):
        return model.outputs(tokenizer, source_ids, seed=seed, **settings)
    if choices:
        settings.pop("max_new_tokens", None)
        outputs = choice_outputs(model, tokenizer, source_ids, choices, **settings)
        return outputs if scores else [output._replace(log_probability=None) for output in outputs]
    if mbr_samples:
        outputs = mbr_outputs(model, tokenizer, source_ids, samples=mbr_samples, seed=seed, **settings)
    else:
        outputs = generate_outputs(model, tokenizer, source_ids, **settings)
    if not scores:
        return outputs
    given = settings.get("given") or [given_tokens(model, tokenizer, settings.get("template"))] * len(source_ids)
    found = output_log_probabilities(model, tokenizer, source_ids, given, outputs, settings["batch_size"])
    return [output._replace(log_probability=math.fsum(nats)) for output, nats in zip(outputs, found, strict=True)]


def output_log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    outputs: Sequence[Output],
    batch_size: int,
) -> list[list[float]]:
    """Of each token of each output; there are equally many outputs of each source, and `given` is for each source."""
    each = len(outputs) // max(1, len(source_ids))
    sources = [ids for ids in source_ids for _ in range(each)]
    starts = [ids for ids in given for _ in range(each)]
    targets = [(start[0], [*start[1:], *output.ids]) for start, output in zip(starts, outputs, strict=True)]
    forced = len(starts[0]) - 1 if starts else 0
    return log_probabilities(model, tokenizer, sources, targets, forced, batch_size)


@torch.no_grad()
def log_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    targets: Sequence[tuple[int, Sequence[int]]],
    forced: int,
    batch_size: int,
) -> list[list[float]]:
    """Of each token of each target (the decoder's start token, and what follows) given its source, in nats; the first
    `forced` of what follows are given, too, and left out."""
    objective = Seq2SeqObjective(model)
    was_training = model.training
    model.eval()
    longest_first = sorted(range(len(source_ids)), key=lambda row: -len(source_ids[row]) - len(targets[row][1]))
    found: list[list[float]] = [[] for _ in source_ids]
    try:
        for first in range(0, len(longest_first), batch_size):
            rows = [row for row in longest_first[first : first + batch_size] if len(targets[row][1]) > forced]
            given = [
                {"input_ids": source_ids[row], "labels": targets[row][1], "decoder_start": targets[row][0]}
                for row in rows
            ]
            batch = pad_batch(given, padding_id(tokenizer) or 0, decoder_start_token(model))
            nats = objective.token_losses({name: tensor.to(model.device) for name, tensor in batch.items()})
            for row, of_row in zip(rows, (-nats[:, forced:]).tolist(), strict=False):
                found[row] = of_row[: len(targets[row][1]) - forced]
    finally:
        model.train(was_training)
    return found


def choice_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    choices: Sequence[str],
    *,
    batch_size: int,
    template: Template | None = None,
    given: Sequence[Sequence[int]] | None = None,
    num_return_sequences: int = 1,
    progress: bool | GenerationBar = False,
) -> list[Output]:
    """For each source the likeliest of the choices, or so many, the likeliest first. All of them are weighed, so that
    none is missed, as a search token by token might; it costs a pass for each."""
    texts = [template.render_target(choice) if template else choice for choice in choices]
    own = given_tokens(model, tokenizer, template)
    endings = [ids[len(own) - 1 :] for _, ids in target_ids(model, tokenizer, texts, template)]
    forced = len(own) - 1
    found = []
    for source, (start, *prefix) in zip(source_ids, given or [own] * len(source_ids), strict=True):
        targets = [(start, [*prefix, *ids]) for ids in endings]
        found_here = log_probabilities(model, tokenizer, [source] * len(choices), targets, forced, batch_size)
        scores = [math.fsum(nats) for nats in found_here]
        best = sorted(range(len(choices)), key=lambda place: -scores[place])[:num_return_sequences]
        found += [Output(choices[it], True, tuple(endings[it]), scores[it]) for it in best]
        if isinstance(progress, GenerationBar):
            progress.advance(1, sum(map(len, endings)))
    return found


def mbr_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    *,
    samples: int,
    seed: int,
    **settings: Any,
) -> list[Output]:
    """One output for each source, the best of so many samples; `settings` are those of `generate_outputs`.

    The same seed, sources and batch size give the same outputs; torch's own random state is left as it was.
    """
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        drawn = generate_outputs(
            model, tokenizer, source_ids, **(EPSILON_SAMPLING | settings | {"num_return_sequences": samples})
        )
    groups = [drawn[first : first + samples] for first in range(0, len(drawn), samples)]
    return [group[most_expected([output.text for output in group])] for group in groups]


def most_expected(texts: Sequence[str]) -> int:
    """The place of the text with the highest mean chrF against all of them; the first of several equal ones."""
    votes = Counter(texts)
    if len(votes) == 1:
        return 0
    chrf = sacrebleu.CHRF()
    utility = {
        text: sum(count * chrf.sentence_score(text, [other]).score for other, count in votes.items()) for text in votes
    }
    return max(range(len(texts)), key=lambda place: utility[texts[place]])
