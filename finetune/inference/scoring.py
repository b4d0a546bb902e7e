"""Outputs by their log-probability: scores of outputs, the likeliest of given texts, and MBR over samples.

    chosen_outputs(loaded, [[12, 7, 1]], seed=0, batch_size=4, max_new_tokens=64, scores=True)
    choice_outputs(loaded, [[12, 7, 1]], ["yes", "no"], batch_size=4)
    mbr_outputs(loaded, [[12, 7, 1]], samples=16, seed=0, batch_size=4, max_new_tokens=64)

A log-probability is that of the tokens as written, given the source and the decoder's forced tokens, from one pass
with teacher forcing. Beams, sampling and penalties do not change it.

The likeliest output is often poor. Minimum Bayes risk (MBR) draws samples and takes the one that is most similar to
all of them by chrF, which has the highest expected score if the samples are what the reference might be (Eikema and
Aziz 2020, arXiv 2005.10283). Samples are drawn at temperature 1 without very unlikely tokens (epsilon sampling,
Freitag et al. 2023, arXiv 2305.09860). 16 samples take about as long as 16 beams.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sacrebleu
import torch

from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.inference.generation import generate_outputs, in_eval_mode
from diptych.finetune.inference.output_confidence import unread_of
from diptych.finetune.inference.outputs import GenerationBar, Output, map_by_length
from diptych.finetune.inference.target_tokens import given_tokens, target_ids
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loss import Seq2SeqObjective

EPSILON_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "epsilon_cutoff": 0.02}


def chosen_outputs(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    *,
    seed: int,
    mbr_samples: int = 0,
    choices: Sequence[str] = (),
    scores: bool = False,
    unread: bool = False,
    **settings: Any,
) -> list[Output]:
    """The outputs of `mbr_outputs` or `choice_outputs` if these are asked for, else of `generate_outputs`; with their
    log-probabilities for `scores`, and with what they did not read for `unread`."""
    if choices:
        settings.pop("max_new_tokens", None)
        outputs = choice_outputs(loaded, source_ids, choices, **settings)
        return outputs if scores else [output._replace(log_probability=None) for output in outputs]
    if mbr_samples:
        outputs = mbr_outputs(loaded, source_ids, samples=mbr_samples, seed=seed, **settings)
    else:
        outputs = generate_outputs(loaded, source_ids, **settings)
    if not scores:
        return outputs
    given = settings.get("given") or [given_tokens(loaded)] * len(source_ids)
    found = output_log_probabilities(loaded, source_ids, given, outputs, settings["batch_size"])
    outputs = [output.scored(nats) for output, nats in zip(outputs, found, strict=True)]
    if not unread:
        return outputs
    each = len(outputs) // max(1, len(source_ids))
    asked = [pair for pair in zip(source_ids, given, strict=True) for _ in range(each)]
    return [
        output._replace(unread=unread_of(loaded, *pair, output)) for output, pair in zip(outputs, asked, strict=True)
    ]


def output_log_probabilities(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    given: Sequence[Sequence[int]],
    outputs: Sequence[Output],
    batch_size: int,
) -> list[list[float]]:
    """The log-probability of each token of each output. Sources have equally many outputs; `given` is per source."""
    each = len(outputs) // max(1, len(source_ids))
    sources = [ids for ids in source_ids for _ in range(each)]
    starts = [ids for ids in given for _ in range(each)]
    targets = [(start[0], [*start[1:], *output.ids]) for start, output in zip(starts, outputs, strict=True)]
    forced = len(starts[0]) - 1 if starts else 0
    return log_probabilities(loaded, sources, targets, forced, batch_size)


@torch.no_grad()
def log_probabilities(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    targets: Sequence[tuple[int, Sequence[int]]],
    forced: int,
    batch_size: int,
) -> list[list[float]]:
    """Nats of each token of each target, given its source. A target is the decoder's start token and its labels, of
    which the first `forced` are left out of the result."""
    objective = Seq2SeqObjective(loaded.model)
    lengths = [len(ids) + len(labels) for ids, (_, labels) in zip(source_ids, targets, strict=True)]

    def score(rows: list[int]) -> list[list[float]]:
        kept = [row for row in rows if len(targets[row][1]) > forced]  # some models write nothing
        examples = [
            {"input_ids": source_ids[row], "labels": targets[row][1], "decoder_start": targets[row][0]} for row in kept
        ]
        batch = pad_batch(examples, loaded.pad_token_id, loaded.decoder_start_token_id)
        nats = objective.token_losses({name: tensor.to(loaded.device) for name, tensor in batch.items()})
        found = dict(zip(kept, (-nats).tolist(), strict=False))
        return [found.get(row, [])[forced : len(targets[row][1])] for row in rows]

    with in_eval_mode(loaded.model):
        return map_by_length(score, lengths, batch_size)


def choice_outputs(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    choices: Sequence[str],
    *,
    batch_size: int,
    given: Sequence[Sequence[int]] | None = None,
    num_return_sequences: int = 1,
    bar: GenerationBar | None = None,
) -> list[Output]:
    """The `num_return_sequences` likeliest choices of each source, the likeliest first. Every choice is scored, which
    costs a pass each; a search token by token could miss the best one."""
    template = loaded.template
    texts = [template.render_target(choice) if template else choice for choice in choices]
    own = given_tokens(loaded)
    forced = len(own) - 1
    endings = [labels[forced:] for _, labels in target_ids(loaded, texts)]
    found = []
    for source, (start, *prefix) in zip(source_ids, given or [own] * len(source_ids), strict=True):
        targets = [(start, [*prefix, *ids]) for ids in endings]
        nats = log_probabilities(loaded, [source] * len(choices), targets, forced, batch_size)
        scores = [math.fsum(of_choice) for of_choice in nats]
        best = sorted(range(len(choices)), key=lambda place: -scores[place])[:num_return_sequences]
        chosen = [Output(choices[it], True, tuple(endings[it])).scored(nats[it]) for it in best]
        found += chosen
        if bar is not None:
            bar.advance(1, chosen)
    return found


def mbr_outputs(
    loaded: LoadedModel, source_ids: Sequence[Sequence[int]], *, samples: int, seed: int, **settings: Any
) -> list[Output]:
    """The best of `samples` outputs for each source; `settings` are those of `generate_outputs`.

    The same seed, sources and batch size give the same outputs. torch's own random state is left as it was.
    """
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        sampling = EPSILON_SAMPLING | settings | {"num_return_sequences": samples}
        drawn = generate_outputs(loaded, source_ids, **sampling)
    groups = [drawn[first : first + samples] for first in range(0, len(drawn), samples)]
    return [group[most_expected([output.text for output in group])] for group in groups]


def most_expected(texts: Sequence[str]) -> int:
    """The place of the text with the highest mean chrF against all of them; the first one of equals."""
    votes = Counter(texts)
    if len(votes) == 1:
        return 0
    chrf = sacrebleu.CHRF()
    utility = {
        text: sum(count * chrf.sentence_score(text, [other]).score for other, count in votes.items()) for text in votes
    }
    return max(range(len(texts)), key=lambda place: utility[texts[place]])
