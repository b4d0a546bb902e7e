"""What happens inside an encoder-decoder on one input: a model and token ids in, numbers in dicts and lists out.

    passage = read_and_write(model, [12, 7, 1], [0, 31, 40, 1])
    steps(model, tokenizer, passage)[0]     {"given": "<pad>", "chosen": "나", "probability": 0.98, "rank": 1, …}
    unread(passage, tokenizer)              {"source": [[3, 5]], "target": [2]}: places that nobody looked at, or that
                                            looked at nothing

S source tokens, T steps, H heads, D width, V vocabulary. Probabilities are the model's own, before any sampling or
penalty; entropies are in nats.
"""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.report.text_shown import token_chips, token_text
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.model.attention_weights import Attentions, mean_weights, recompute, rollout
from diptych.finetune.model.families import Family, family_of

TOP = 10
"""Tokens that are shown of each step's distribution."""
NEIGHBOURS = 5
MOST_CELLS = 3_000_000
"""Of all maps of attention together; beyond, only some layers are shown."""
LITTLE = 0.5
"""A source token is unread where no layer at any step gives it half of what it had if attention were even."""
NOTHING = 0.1
"""A target token looks at nothing where in each layer its attention to words of the source is less than this …"""
EVEN = 0.8
"""… or as if spread evenly over more than this part of them."""
FEWEST_WORDS = 4
"""Of so few, even attention says nothing."""


class Passage(NamedTuple):
    source_ids: list[int]
    decoder_ids: list[int]
    """The start token and what comes after it. Step t reads the first t + 1 of them; the next is what was chosen."""
    given: int
    """How many of them the model was given: the start token, a decoder prefix; all, if a target was."""
    seen: Attentions
    """Of the source and of all `decoder_ids` but the last."""


def read_and_write(
    model: PreTrainedModel, source_ids: Sequence[int], decoder_ids: Sequence[int], given: int = 1
) -> Passage:
    seen = recompute(model, torch.tensor([source_ids]), torch.tensor([decoder_ids[:-1]]))
    return Passage(list(source_ids), list(decoder_ids), given, seen)


def chips(side: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[dict[str, Any]]:
    """`token_chips` of one side's ids, whose text can be shown as it is."""
    return [chip | {"text": token_text(chip["text"]) or "∅"} for chip in token_chips(side, ids)]


def steps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passage: Passage) -> list[dict[str, Any]]:
    """For each step what the decoder read, what was chosen, and the distribution that it was chosen from."""
    side, logs = target_side(tokenizer), passage.seen.logits.log_softmax(-1)
    entropies = -(logs.exp() * logs).nan_to_num().sum(-1)
    tops = logs.topk(min(TOP, logs.shape[-1]), dim=-1)
    shown = chips(side, passage.decoder_ids)
    found = []
    for place, chosen in enumerate(passage.decoder_ids[1:]):
        log = logs[place, chosen]
        top = chips(side, tops.indices[place].tolist())
        for chip, its_log in zip(top, tops.values[place].tolist(), strict=True):
            chip |= {"probability": _rounded(torch.tensor(its_log).exp()), "logit": 0.0}
            chip["logit"] = _rounded(passage.seen.logits[place, chip["id"]])
        found.append(
            {
                "reads": shown[place]["text"],
                "chosen": shown[place + 1],
                "is_given": place + 1 < passage.given,
                "probability": _rounded(log.exp()),
                "loss": _rounded(-log),
                "rank": _rank(logs[place], chosen),
                "entropy": _rounded(entropies[place]),
                "top": top,
            }
        )
    return found


def lens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passage: Passage
) -> list[list[dict[str, Any]]] | None:
    """What the decoder would say after each of its layers (nostalgebraist's logit lens, 2020), layer by layer and step
    by step; None for a family whose final norm is not known."""
    family = family_of(model)
    if family is None:
        return None
    chosen = passage.decoder_ids[1:]
    found = []
    for depth, states in enumerate(passage.seen.decoder_states):
        is_last = depth == len(passage.seen.decoder_states) - 1
        logs = passage.seen.logits if is_last else _logits(model, family, states)
        probabilities = logs.softmax(-1)
        best, said = probabilities.max(-1)
        shown = chips(target_side(tokenizer), said.tolist())
        found.append(
            [
                {"text": chip["text"], "probability": _rounded(top), "rank": _rank(row, token)}
                for chip, top, row, token in zip(shown, best, logs, chosen, strict=True)
            ]
        )
    return found


@torch.no_grad()
def _logits(model: PreTrainedModel, family: Family, states: torch.Tensor) -> torch.Tensor:
    """(T, D) between two layers → (T, V), as if no layer came after."""
    states = states.to(model.device)
    if family.final_norm is not None:
        states = model.get_decoder().get_submodule(family.final_norm)(states)
    logits = model.get_output_embeddings()(states * family.scale(model))
    return family.logits(model, logits).float().cpu()


def _rank(scores: torch.Tensor, token: int) -> int:
    """1 is the likeliest."""
    return int((scores > scores[token]).sum()) + 1


def attention_maps(passage: Passage, most_cells: int = MOST_CELLS) -> dict[str, dict[str, Any]]:
    """For the page: each kind's weights at some layers, one byte each, of the root of the weight, so that small ones
    can be told apart: `data` is base64 of (layers, H, Q, K). `rollout` is there where both texts are one."""
    kinds = {"encoder": passage.seen.encoder, "decoder": passage.seen.decoder, "cross": passage.seen.cross}
    kinds = {kind: layers for kind, layers in kinds.items() if layers}
    cells = sum(weights.numel() for layers in kinds.values() for weights in layers)
    share = min(1.0, most_cells / cells)
    found = {}
    for kind, layers in kinds.items():
        shown = _evenly(len(layers), max(1, int(len(layers) * share)))
        mean = mean_weights(layers)
        found[kind] = {
            "layers": shown,
            "all_layers": len(layers),
            "heads": layers[0].shape[0],
            "shape": list(mean.shape),
            "data": _as_bytes(torch.stack([layers[layer] for layer in shown])),
            "mean": _as_bytes(mean),
        }
        if kind != "cross":
            found[kind]["rollout"] = _as_bytes(rollout(layers))
    return found


def _evenly(count: int, kept: int) -> list[int]:
    """Of `count` layers so many, the first and the last among them."""
    if kept == 1:
        return [count - 1]
    return sorted({round(place * (count - 1) / (kept - 1)) for place in range(kept)})


def _as_bytes(weights: torch.Tensor) -> str:
    levels = (weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode("ascii")


def unread(passage: Passage, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Where something may have been left out or made up: runs of source words that no step looked at, [first, last],
    and steps whose token looked at no word of the source, in any layer, by the mean over its heads.
    `words` and `steps` say of how many. Control tokens are neither."""
    weights = torch.stack([heads.mean(0) for heads in passage.seen.cross])  # (layers, T, S)
    words = _words(source_side(tokenizer), passage.source_ids)
    written = [
        place for place in _words(target_side(tokenizer), passage.decoder_ids[1:]) if place + 1 >= passage.given
    ]
    if not words or not written:
        return {"source": [], "target": [], "words": len(words), "steps": len(written)}
    most = weights[:, written].amax((0, 1))
    left = [place for place in words if most[place] < LITTLE / len(passage.source_ids)]
    on_words = weights[:, :, words]
    spread = on_words / on_words.sum(-1, keepdim=True).clamp(min=1e-9)
    entropy = -(spread * spread.clamp(min=1e-9).log()).sum(-1)
    is_even = (entropy.exp() > EVEN * len(words)) & (len(words) >= FEWEST_WORDS)
    looks_at_nothing = ((on_words.sum(-1) < NOTHING) | is_even).all(0)
    return {
        "source": _runs(left),
        "target": [place for place in written if looks_at_nothing[place]],
        "words": len(words),
        "steps": len(written),
    }


def _words(side: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    return [place for place, chip in enumerate(token_chips(side, ids)) if not chip["special"]]


def _runs(places: Sequence[int]) -> list[list[int]]:
    """[3, 4, 5, 9] → [[3, 5], [9, 9]]."""
    found: list[list[int]] = []
    for place in places:
        if found and found[-1][1] == place - 1:
            found[-1][1] = place
        else:
            found.append([place, place])
    return found


@torch.no_grad()
def embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[dict[str, Any]]:
    """For each token of a source its vector's first numbers and length, and the tokens whose vectors point most the
    same way."""
    side = source_side(tokenizer)
    table = model.get_input_embeddings().weight[: len(side)].float()
    directions = F.normalize(table, dim=-1)
    found = []
    for token in ids:
        if token >= len(table):  # a model may have more rows than its tokenizer has tokens
            found.append({"vector": [], "norm": None, "neighbours": []})
            continue
        similar = directions @ directions[token]
        similar[token] = -2.0
        best = similar.topk(min(NEIGHBOURS, len(table) - 1))
        near = chips(side, best.indices.tolist())
        for chip, cosine in zip(near, best.values, strict=True):
            chip["cosine"] = _rounded(cosine)
        vector = [_rounded(value) for value in table[token, :8]]
        found.append({"vector": vector, "norm": _rounded(table[token].norm()), "neighbours": near})
    return found


@torch.no_grad()
def word_map(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> dict[str, Any] | None:
    """Chosen words on a plane: their vectors (of several tokens the mean) on the two directions in which they differ
    most (principal components), and how much of their differences these two show. None for fewer than three."""
    table = model.get_input_embeddings().weight.float().cpu()
    pieces = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words}
    pieces = {word: ids for word, ids in pieces.items() if ids and max(ids) < len(table)}
    if len(pieces) < 3:
        return None
    vectors = torch.stack([table[ids].mean(0) for ids in pieces.values()])
    centred = vectors - vectors.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * axes[:2].sum(-1, keepdim=True).sign()  # which way an axis points is chance
    places = centred @ axes.T
    places = places / places.abs().max().clamp(min=1e-9)
    shown = float((sizes[:2] ** 2).sum() / (sizes**2).sum().clamp(min=1e-9))
    points = [
        {"word": word, "tokens": len(ids), "x": _rounded(x), "y": _rounded(y)}
        for (word, ids), (x, y) in zip(pieces.items(), places, strict=True)
    ]
    return {"points": points, "shown": _rounded(torch.tensor(shown))}


def _rounded(value: torch.Tensor) -> float:
    """Six digits: more would be half of the page."""
    return float(f"{float(value):.6g}")
