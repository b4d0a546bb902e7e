"""One pass over a source and a target in which everything is kept: who looked at whom, and what each layer made of it.

    seen = recompute(model, torch.tensor([[12, 7, 1]]), torch.tensor([[0, 31, 40]]))
    seen.cross[-1][0]        (T, S): the last layer's first head, a row for each target token, adding up to 1
    rollout(seen.encoder)    (S, S): through all layers (arXiv 2005.00928)

Kernels such as sdpa and flex never have the weights of attention in memory; here they are computed anew, by the eager
code of the same model, whatever it runs on otherwise. Any AutoModelForSeq2SeqLM. One row; S source tokens, T target
tokens, H heads, D width, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.inference.generation import eager_attention, in_eval_mode

LOCAL = ("led", "longt5", "pegasus_x")
"""Families whose encoder's tokens look at those nearby: their weights are bands and blocks."""


class Attentions(NamedTuple):
    """Lists go over layers, from the first on. With a merged hinge a target token's one softmax goes over both texts:
    its rows of `decoder` and of `cross` add up to 1 together."""

    encoder: list[torch.Tensor]
    """(H, S, S) each, float32. No layers where the encoder's attention is local (LOCAL)."""
    decoder: list[torch.Tensor]
    """(H, T, T)."""
    cross: list[torch.Tensor]
    """(H, T, S)."""
    encoder_states: torch.Tensor
    """(S, D), what the encoder made of the source."""
    decoder_states: list[torch.Tensor]
    """(T, D): what goes into the first layer, then what each layer gives; the last has been through the final norm."""
    logits: torch.Tensor
    """(T, V), float32."""


@torch.no_grad()
def recompute(model: PreTrainedModel, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> Attentions:
    """input_ids (1, S) and decoder_input_ids (1, T), both without padding, on any device → `Attentions` on the CPU.

    UserError for a model whose weights of attention are no map of tokens to tokens.
    """
    with in_eval_mode(model), eager_attention(model):
        outputs = model(
            input_ids=input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            decoder_input_ids=decoder_input_ids.to(model.device),
            decoder_attention_mask=torch.ones_like(decoder_input_ids, device=model.device),  # also the start token
            output_attentions=True,
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        )
    kind, source, target = model.config.model_type, input_ids.shape[1], decoder_input_ids.shape[1]
    return Attentions(
        [] if kind in LOCAL else _maps(outputs.encoder_attentions, (source, source), kind),
        _maps(outputs.decoder_attentions, (target, target), kind),
        _maps(outputs.cross_attentions, (target, source), kind),
        outputs.encoder_last_hidden_state[0].cpu(),
        [states[0].cpu() for states in outputs.decoder_hidden_states],
        outputs.logits[0].float().cpu(),
    )


def _maps(layers: Sequence[torch.Tensor], shape: tuple[int, int], kind: str) -> list[torch.Tensor]:
    for weights in layers:
        if not isinstance(weights, torch.Tensor) or weights.shape[2:] != shape:
            raise UserError(
                f"the weights of attention that a {kind} gives are no map of tokens to tokens, so they cannot be "
                f"shown. `diptych generate` writes with it as with any other."
            )
    return [weights[0].float().cpu() for weights in layers]


def mean_weights(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """(H, Q, K) each → (Q, K), the mean over heads and layers."""
    return torch.stack([weights.mean(0) for weights in layers]).mean(0)


def rollout(layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """How much of each input token reaches each output token through all layers, if half of what a layer gives is what
    it was given (the residual stream): Abnar and Zuidema, arXiv 2005.00928. (H, L, L) each → (L, L), rows add up to
    1."""
    identity = torch.eye(layers[0].shape[-1])
    through = identity
    for weights in layers:
        mean = weights.mean(0)
        through = (0.5 * mean / mean.sum(-1, keepdim=True).clamp(min=1e-9) + 0.5 * identity) @ through
    return through / through.sum(-1, keepdim=True)
