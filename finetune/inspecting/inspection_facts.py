"""What happens inside an encoder-decoder on one input: a model and token ids in, numbers in dicts and lists out.

    passage = read_and_write(loaded, [12, 7, 1], [0, 31, 40, 1])
    steps(loaded, passage)[0]     {"reads": "<pad>", "chosen": {"text": "나", …}, "probability": 0.98, "rank": 1, …}
    unread(loaded, passage)       {"source": [[3, 5]], "target": [2], …}: source tokens that got no attention, and
                                  target tokens that gave none to words of the source

S source tokens, T steps, H heads, D width, V vocabulary. Probabilities are the model's own, before any sampling or
penalty; entropies are in nats.
"""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from diptych.data_prep.report.visible_text import token_chips, token_text
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.inference.attention_weights import Attentions, mean_weights, recompute, rollout
from diptych.finetune.model.loaded_model import LoadedModel

TOP = 10
"""Tokens that are shown of each step's distribution."""
NEIGHBOURS = 5
MOST_CELLS = 3_000_000
"""Of all maps of attention together; beyond, only some layers are shown."""
LITTLE = 0.5
"""A source token is unread if no layer at any step gives it half of what it would get from even attention."""
NOTHING = 0.1
"""A target token looks at nothing if in each layer its attention to words of the source is below this …"""
EVEN = 0.8
"""… or is spread evenly over more than this part of them."""
FEWEST_WORDS = 4
"""With fewer words, even attention means nothing."""


class Passage(NamedTuple):
    source_ids: list[int]
    decoder_ids: list[int]
    """The start token and what comes after it. Step t reads the first t + 1 of them; the next is what was chosen."""
    given: int
    """How many of them the model did not choose: the start token and a decoder prefix, or all of a given target."""
    seen: Attentions
    """Of the source and of all `decoder_ids` but the last."""


def read_and_write(
    loaded: LoadedModel, source_ids: Sequence[int], decoder_ids: Sequence[int], given: int = 1
) -> Passage:
    seen = recompute(loaded.model, torch.tensor([source_ids]), torch.tensor([decoder_ids[:-1]]))
    return Passage(list(source_ids), list(decoder_ids), given, seen)


def chips(side: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[dict[str, Any]]:
    """`token_chips` of one side's ids, whose text can be shown as it is."""
    return [chip | {"text": token_text(chip["text"]) or "∅"} for chip in token_chips(side, ids)]


def steps(loaded: LoadedModel, passage: Passage) -> list[dict[str, Any]]:
    """For each step what the decoder read, what was chosen, and the distribution that it was chosen from."""
    side, logits = target_side(loaded.tokenizer), passage.seen.logits
    logs = logits.log_softmax(-1)
    entropies = -(logs.exp() * logs).nan_to_num().sum(-1)
    tops = logs.topk(min(TOP, logs.shape[-1]), dim=-1)
    shown = chips(side, passage.decoder_ids)
    found = []
    for place, chosen in enumerate(passage.decoder_ids[1:]):
        log = logs[place, chosen]
        top = [
            chip | {"probability": _rounded(its_log.exp()), "logit": _rounded(logits[place, chip["id"]])}
            for chip, its_log in zip(chips(side, tops.indices[place].tolist()), tops.values[place], strict=True)
        ]
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


def lens(loaded: LoadedModel, passage: Passage) -> list[list[dict[str, Any]]] | None:
    """The likeliest token after each decoder layer (nostalgebraist's logit lens, 2020), layer by layer and step by
    step; None for a family whose final norm is not known."""
    if loaded.family is None or loaded.family.final_norm == "":
        return None
    *between, _ = passage.seen.decoder_states
    found = []
    for logits in (*(layer_logits(loaded, states) for states in between), passage.seen.logits):
        best, tokens = logits.softmax(-1).max(-1)
        shown = chips(target_side(loaded.tokenizer), tokens.tolist())
        found.append(
            [
                {"text": chip["text"], "probability": _rounded(probability), "rank": _rank(row, chosen)}
                for chip, probability, row, chosen in zip(shown, best, logits, passage.decoder_ids[1:], strict=True)
            ]
        )
    return found


@torch.no_grad()
def layer_logits(loaded: LoadedModel, states: torch.Tensor) -> torch.Tensor:
    """(T, D) between two layers → (T, V), as if no layer came after."""
    model, family = loaded.model, loaded.family
    states = states.to(model.device)
    if family.final_norm is not None:
        states = model.get_decoder().get_submodule(family.final_norm)(states)
    logits = model.get_output_embeddings()(states * family.scale(model))
    return family.logits(model, logits).float().cpu()


def _rank(scores: torch.Tensor, token: int) -> int:
    """1 is the likeliest."""
    return int((scores > scores[token]).sum()) + 1


def attention_maps(passage: Passage, most_cells: int = MOST_CELLS) -> dict[str, dict[str, Any]]:
    """For the page: each kind's weights at some layers, as base64 of (layers, H, Q, K) bytes. A byte holds the square
    root of the weight, so that small ones can be told apart. Self-attention has a `rollout`, too."""
    kinds = {"encoder": passage.seen.encoder, "decoder": passage.seen.decoder, "cross": passage.seen.cross}
    kinds = {kind: layers for kind, layers in kinds.items() if layers}
    cells = sum(weights.numel() for layers in kinds.values() for weights in layers)
    share = min(1.0, most_cells / cells)
    found = {}
    for kind, layers in kinds.items():
        last, kept = len(layers) - 1, max(1, int(len(layers) * share))
        # the first and the last layer are among them; one alone is the last
        shown = sorted({round(place * last / (kept - 1)) for place in range(kept)}) if kept > 1 else [last]
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


def _as_bytes(weights: torch.Tensor) -> str:
    levels = (weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode("ascii")


def unread(loaded: LoadedModel, passage: Passage) -> dict[str, Any]:
    """What may have been left out or made up: runs of source words that no step attended to, as [first, last], and
    steps whose token attended to no word of the source, in any layer, by the mean over its heads. `words` and `steps`
    count all of either kind. Control tokens are neither."""
    weights = torch.stack([heads.mean(0) for heads in passage.seen.cross])  # (layers, T, S)
    words = _words(source_side(loaded.tokenizer), passage.source_ids)
    chosen = _words(target_side(loaded.tokenizer), passage.decoder_ids[1:])
    written = [place for place in chosen if place + 1 >= passage.given]
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
def embeddings(loaded: LoadedModel, ids: Sequence[int]) -> list[dict[str, Any]]:
    """For each source token its vector's first numbers and length, and the tokens with the largest cosine to it."""
    side = source_side(loaded.tokenizer)
    table = loaded.model.get_input_embeddings().weight[: len(side)].float()
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


def _rounded(value: torch.Tensor) -> float:
    """Six digits: more would double the page."""
    return float(f"{float(value):.6g}")
