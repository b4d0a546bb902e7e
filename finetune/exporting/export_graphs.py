"""A model as three graphs over plain tensors, which export_onnx.py writes down; and the loop that runs them.

    encoder            input_ids (B, S), attention_mask (B, S)                     -> last_hidden_state (B, S, D)
    decoder            input_ids (B, T), encoder_attention_mask (B, S), encoder_hidden_states (B, S, D)
                       -> logits (B, T, V), and of each of M layers the keys and values (B, K, T, E) of its own tokens
                          and (B, K, S, E) of the source: present.0.decoder.key, present.0.decoder.value,
                          present.0.encoder.key, present.0.encoder.value, present.1.decoder.key …
    decoder_with_past  input_ids (B, 1), encoder_attention_mask (B, S), past_key_values.0.decoder.key …
                       -> logits (B, 1, V), present.0.decoder.key, present.0.decoder.value, present.1.decoder.key …

Names and roles are those of Optimum's ONNX exports, which other runtimes know. The first call of the decoder reads the
start token and the prefix; each further one a token. With a Diptych's merged hinge, encoder_hidden_states are what its
decoder's layers read, (B, M, S, D).

The graphs are called with plain tensors, so that transformers' cache classes are built inside and never seen outside.
(transformers.exporters, in 5.23, carries encoder-decoders too, but its graphs take those classes, and leave out the
encoder.)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from diptych.finetune.inference.generation import pad_sources
from diptych.finetune.model.families import family_of
from diptych.modeling.modeling_diptych import CACHE_NAME

ENCODER, DECODER, WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
# Of the examples that programs are made with; all different, so that no two are taken for one.
SIZES = {"rows": 3, "source": 7, "target": 5, "past": 4}


class EncoderGraph(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.encoder = model.get_encoder()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return (outputs.get("layer_inputs", outputs.last_hidden_state),)


class DecoderGraph(nn.Module):
    """The decoder and its head, without the encoder's weights."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()
        family = family_of(model)
        self.scale = family.scale(model)
        self.meant = lambda logits: family.logits(model, logits)
        self.is_merged = is_merged(model)
        self.state_sizes = state_sizes(model)

    def forward(
        self, input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits = self._logits(input_ids, encoder_attention_mask, encoder_hidden_states, cache)
        layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
        return (
            logits,
            *(state for own, cross in layers for state in (own.keys, own.values, cross.keys, cross.values)),
        )

    def _logits(self, input_ids, encoder_attention_mask, encoder_hidden_states, cache) -> torch.Tensor:
        more = {}
        if self.is_merged:
            source = torch.arange(encoder_hidden_states.shape[2], device=input_ids.device)
            more = {"encoder_position_ids": source.expand(input_ids.shape[0], -1)}
        states = self.decoder(
            input_ids=input_ids,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **{CACHE_NAME: cache},
            use_cache=True,
            return_dict=True,
            **more,
        ).last_hidden_state
        return self.meant(self.head(states * self.scale))


class DecoderWithPastGraph(DecoderGraph):
    def forward(
        self, input_ids: torch.Tensor, encoder_attention_mask: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """`past`: key and value of the layer's own tokens, key and value of the source, layer by layer."""
        own, cross = DynamicCache(), DynamicCache()
        for layer, first in enumerate(range(0, len(past), 4)):
            own.update(past[first], past[first + 1], layer)
            cross.update(past[first + 2], past[first + 3], layer)
        # Asked for its shape only: the source's keys and values are there.
        rows, source = encoder_attention_mask.shape
        states = past[0].new_zeros(rows, *(source if size is None else size for size in self.state_sizes))
        cache = EncoderDecoderCache(own, cross)
        logits = self._logits(input_ids, encoder_attention_mask, states, cache)
        return (logits, *(state for layer in own.layers for state in (layer.keys, layer.values)))


def is_merged(model: PreTrainedModel) -> bool:
    return model.config.model_type == "diptych" and model.config.decoder.cross_attention == "merged"


def state_sizes(model: PreTrainedModel) -> tuple[int | None, ...]:
    """Of encoder_hidden_states after the rows; None is the source's length."""
    config = model.get_encoder().config
    width = config.hidden_size
    return (model.config.decoder.num_hidden_layers, None, width) if is_merged(model) else (None, width)


@contextmanager
def masks_without_vmap() -> Iterator[None]:
    """Masks with a rule of their own (a merged hinge, lookahead) are made by torch.vmap, which no export can save. The
    rules are plain comparisons where rows are not packed, so that they broadcast."""
    kinds = {kind: ALL_MASK_ATTENTION_FUNCTIONS[kind] for kind in ("sdpa", "eager")}

    def broadcast(make: Callable, *arguments: Any, **settings: Any) -> Any:
        return make(*arguments, **(settings | {"use_vmap": False}))

    try:
        for kind, make in kinds.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = partial(broadcast, make)
        yield
    finally:
        for kind in kinds:  # what was set here stands before transformers' own, until it is deleted
            del ALL_MASK_ATTENTION_FUNCTIONS[kind]


class Exported(NamedTuple):
    name: str
    program: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


@torch.no_grad()
def exported_programs(model: PreTrainedModel) -> Iterator[Exported]:
    """One after another, so that one is written before the next is made."""
    encoder, decoder, with_past = (graph(model).eval() for graph in (EncoderGraph, DecoderGraph, DecoderWithPastGraph))
    rows, source = SIZES["rows"], SIZES["source"]
    # Copies and no views: the guards of a program ask for what its examples were views of.
    ids = (torch.arange(rows * source, device=model.device) % 20 + 3).view(rows, source).clone()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    states = encoder(ids, mask)[0].clone()
    present = [state.clone() for state in decoder(ids[:, : SIZES["past"]], mask, states)[1:]]
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    names = [f"{layer}.{kind}" for layer in range(len(present) // 4) for kind in kinds]
    varies = torch.export.Dim.DYNAMIC
    both, state = {0: varies, 1: varies}, {0: varies, len(state_sizes(model)) - 1: varies}

    def exported(name: str, graph: nn.Module, examples: tuple, shapes: tuple, inputs: list, outputs: list) -> Exported:
        with masks_without_vmap():
            program = torch.export.export(graph, examples, dynamic_shapes=shapes, strict=False)
        return Exported(name, program, inputs, outputs)

    yield exported(ENCODER, encoder, (ids, mask), (both, both), ["input_ids", "attention_mask"], ["last_hidden_state"])
    yield exported(
        DECODER,
        decoder,
        (ids[:, : SIZES["target"]].clone(), mask, states),
        (both, both, state),
        ["input_ids", "encoder_attention_mask", "encoder_hidden_states"],
        ["logits", *(f"present.{name}" for name in names)],
    )
    yield exported(
        WITH_PAST,
        with_past,
        (ids[:, :1].clone(), mask, present),
        ({0: varies}, both, [{0: varies, 2: varies}] * len(present)),
        ["input_ids", "encoder_attention_mask", *(f"past_key_values.{name}" for name in names)],
        ["logits", *(f"present.{name}" for name in names if ".decoder." in name)],
    )


class Graphs:
    """The three of them at work, as export_proof compares them. `run(name, inputs by their names)` computes one."""

    def __init__(
        self,
        run: Callable[[str, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]],
        start: int,
    ):
        self.run, self.start, self.computed_in = run, start, "float32"

    def greedy(
        self, sources: Sequence[Sequence[int]], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        return [ids for ids, _ in self._written(sources, prefix, tokens, ends, keep_logits=False)]

    def greedy_with_logits(
        self, source_ids: Sequence[int], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]:
        ((ids, logits),) = self._written([source_ids], prefix, tokens, ends, keep_logits=True)
        return ids, torch.stack(logits)

    def _written(
        self,
        sources: Sequence[Sequence[int]],
        prefix: Sequence[int],
        tokens: int,
        ends: Sequence[int],
        keep_logits: bool,
    ) -> list[tuple[list[int], list[torch.Tensor]]]:
        """For each source its tokens, end included, and the logits (V,) of each."""
        inputs = pad_sources(sources, 0)
        mask = {"encoder_attention_mask": inputs["attention_mask"]}
        states = self.run(ENCODER, inputs)["last_hidden_state"]
        written: list[tuple[list[int], list[torch.Tensor]]] = [([], []) for _ in sources]
        ids = torch.tensor([[self.start, *prefix]] * len(sources))
        outputs = self.run(DECODER, {"input_ids": ids, "encoder_hidden_states": states} | mask)
        past: dict[str, torch.Tensor] = {}
        for step in range(1, tokens + 1):
            last = outputs["logits"][:, -1]
            chosen = last.argmax(dim=-1)
            for (row, logits), token, row_logits in zip(written, chosen.tolist(), last, strict=True):
                if not row or row[-1] not in ends:
                    row.append(token)
                    logits += [row_logits] * keep_logits
            if step == tokens or all(row[-1] in ends for row, _ in written):
                break  # after the last token there may be no position left to compute
            past |= {name.replace("present", "past_key_values", 1): state for name, state in outputs.items()}
            del past["logits"]
            outputs = self.run(WITH_PAST, {"input_ids": chosen[:, None]} | mask | past)
        return written
