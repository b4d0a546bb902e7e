"""A model in memory; three ONNX files out, by torch's own exporter, for any family in families.py; and greedy decoding
with them, by which ONNX Runtime's outputs are compared.

    folder/  encoder_model.onnx, decoder_model.onnx, decoder_with_past_model.onnx

    encoder            input_ids (B, S), attention_mask (B, S)                     -> last_hidden_state (B, S, D)
    decoder            input_ids (B, T), encoder_attention_mask (B, S), encoder_hidden_states (B, S, D)
                       -> logits (B, T, V), and of each of M layers the keys and values (B, K, T, E) of its own tokens
                          and (B, K, S, E) of the source: present.0.decoder.key, present.0.decoder.value,
                          present.0.encoder.key, present.0.encoder.value, present.1.decoder.key …
    decoder_with_past  input_ids (B, 1), encoder_attention_mask (B, S), past_key_values.0.decoder.key …
                       -> logits (B, 1, V), present.0.decoder.key, present.0.decoder.value, present.1.decoder.key …

Names and roles are those of Optimum's ONNX exports, which other runtimes know. `decoder` reads the start token and the
prefix, `decoder_with_past` one further token per call. With merged cross-attention, encoder_hidden_states are the
inputs of all decoder layers, (B, M, S, D).

Inputs and outputs are plain tensors; transformers' cache classes are built inside the graphs. (transformers.exporters
in 5.23 exports encoder-decoders too, but its graphs take cache classes as inputs and leave out the encoder.)
Weights over 1.5 GB stand in a file beside each graph.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.padded_rows import pad_sources
from diptych.finetune.exporting.export_proof import GreedyRules, Written
from diptych.finetune.inference.generation import eager_attention
from diptych.finetune.model.families import FAMILIES, family_of
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import position_limit
from diptych.modeling.modeling_diptych import CACHE_NAME

INSTALL = "ONNX export needs onnx, onnxscript and onnxruntime. Install them: pip install 'diptych[onnx]'"
MOST_IN_ONE_FILE = 1.5 * 2**30
"""Bytes of weights. A protobuf file holds 2 GB at most."""
ENCODER, DECODER, WITH_PAST = "encoder_model", "decoder_model", "decoder_with_past_model"
SIZES = {"rows": 3, "source": 7, "target": 5, "past": 4}
"""Of the example inputs. All differ, so that torch does not take two dimensions for the same one."""


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
        """`past` has four tensors per layer: key and value of the target so far, key and value of the source."""
        own, cross = DynamicCache(), DynamicCache()
        for layer, first in enumerate(range(0, len(past), 4)):
            own.update(past[first], past[first + 1], layer)
            cross.update(past[first + 2], past[first + 3], layer)
        # Only its shape is read, because the cache has the source's keys and values.
        rows, source = encoder_attention_mask.shape
        states = past[0].new_zeros(rows, *(source if size is None else size for size in self.state_sizes))
        cache = EncoderDecoderCache(own, cross)
        logits = self._logits(input_ids, encoder_attention_mask, states, cache)
        return (logits, *(state for layer in own.layers for state in (layer.keys, layer.values)))


def is_merged(model: PreTrainedModel) -> bool:
    return model.config.model_type == "diptych" and model.config.decoder.cross_attention == "merged"


def state_sizes(model: PreTrainedModel) -> tuple[int | None, ...]:
    """The sizes of encoder_hidden_states without the rows; None for the source's length."""
    config = model.get_encoder().config
    width = getattr(config, "text_config", config).hidden_size
    return (model.config.decoder.num_hidden_layers, None, width) if is_merged(model) else (None, width)


@contextmanager
def masks_without_vmap() -> Iterator[None]:
    """transformers makes masks with a rule (merged cross-attention, lookahead) by torch.vmap, which is not exportable.
    Rules of rows that are not packed are plain comparisons, so broadcasting gives the same masks."""
    kinds = {kind: ALL_MASK_ATTENTION_FUNCTIONS[kind] for kind in ("sdpa", "eager")}

    def broadcast(make: Callable, *arguments: Any, **settings: Any) -> Any:
        return make(*arguments, **(settings | {"use_vmap": False}))

    try:
        for kind, make in kinds.items():
            ALL_MASK_ATTENTION_FUNCTIONS[kind] = partial(broadcast, make)
        yield
    finally:
        for kind in kinds:  # deleting ours makes transformers' own visible again
            del ALL_MASK_ATTENTION_FUNCTIONS[kind]


class ExportedGraph(NamedTuple):
    name: str
    program: torch.export.ExportedProgram
    inputs: list[str]
    outputs: list[str]


@torch.no_grad()
def exported_graphs(model: PreTrainedModel) -> Iterator[ExportedGraph]:
    """The three graphs one after another, so that each can be written before the next is made."""
    encoder, decoder, with_past = (graph(model).eval() for graph in (EncoderGraph, DecoderGraph, DecoderWithPastGraph))
    rows, source = SIZES["rows"], SIZES["source"]
    # clone(), because a program's guards ask for the tensor that an example is a view of
    ids = (torch.arange(rows * source, device=model.device) % 20 + 3).view(rows, source).clone()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    states = encoder(ids, mask)[0].clone()
    present = [state.clone() for state in decoder(ids[:, : SIZES["past"]], mask, states)[1:]]
    kinds = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    names = [f"{layer}.{kind}" for layer in range(len(present) // 4) for kind in kinds]
    varies = torch.export.Dim.DYNAMIC
    both, state = {0: varies, 1: varies}, {0: varies, len(state_sizes(model)) - 1: varies}

    def exported(name: str, graph: nn.Module, examples: tuple, shapes: tuple, *inputs_and_outputs: list):
        with masks_without_vmap():
            program = torch.export.export(graph, examples, dynamic_shapes=shapes, strict=False)
        return ExportedGraph(name, program, *inputs_and_outputs)

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


class GraphDecoder:
    """Greedy decoding with the three graphs. `run(name, inputs by name)` computes one of them."""

    computed_in = "float32"

    def __init__(self, run: Callable[[str, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]], start: int):
        self.run, self.start = run, start

    def write_greedily(
        self, sources: Sequence[Sequence[int]], rules: GreedyRules, keep_logits: bool = False
    ) -> list[Written]:
        """As export_proof.ExportedModel."""
        inputs = pad_sources(sources, 0)
        mask = {"encoder_attention_mask": inputs["attention_mask"]}
        states = self.run(ENCODER, inputs)["last_hidden_state"]
        ids = torch.tensor([[self.start, *rules.prefix]] * len(sources))
        outputs = self.run(DECODER, {"input_ids": ids, "encoder_hidden_states": states} | mask)
        written: list[tuple[list[int], list[torch.Tensor]]] = [([], []) for _ in sources]
        past: dict[str, torch.Tensor] = {}
        for step in range(1, rules.tokens + 1):
            last = outputs["logits"][:, -1]
            chosen = last.argmax(dim=-1)
            for (row, logits), token, row_logits in zip(written, chosen.tolist(), last, strict=True):
                if not row or row[-1] not in rules.ends:
                    row.append(token)
                    logits += [row_logits] * keep_logits
            if step == rules.tokens or all(row[-1] in rules.ends for row, _ in written):
                break  # the model may have no position for one more step
            past |= {name.replace("present", "past_key_values", 1): state for name, state in outputs.items()}
            del past["logits"]
            outputs = self.run(WITH_PAST, {"input_ids": chosen[:, None]} | mask | past)
        return [Written(row, torch.stack(logits) if keep_logits else None) for row, logits in written]


def check(model: PreTrainedModel) -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(INSTALL) from error
    family = family_of(model)
    if not (family and family.attentions):  # those without have masks that the graphs do not make
        known = sorted(name for name, entry in FAMILIES.items() if entry.attentions and name != "diptych_merged")
        raise UserError(f"onnx export knows {', '.join(known)}, but not the masks of a {model.config.model_type}.")


token_limit = position_limit


def write(loaded: LoadedModel, folder: Path, precision: str) -> None:
    model = loaded.model
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    # Eager attention, because the exporter cannot tell the memory layout of T5's sdpa output.
    with warnings.catch_warnings(), eager_attention(model):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
        for graph in exported_graphs(model):
            try:
                program = torch.onnx.export(
                    graph.program, dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
                )
            except torch.onnx.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise UserError(
                    f"torch's ONNX exporter cannot export the {graph.name} of this {model.config.model_type}: "
                    f"{reason}."
                ) from error
            program.save(folder / f"{graph.name}.onnx", external_data=size > MOST_IN_ONE_FILE)


def open_export(folder: Path, loaded: LoadedModel) -> GraphDecoder:
    import onnxruntime  # optional

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]
    if loaded.device.type != "cpu":
        providers.insert(0, "CUDAExecutionProvider")
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=providers)
        for name in (ENCODER, DECODER, WITH_PAST)
    }

    def run(name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = sessions[name]
        wanted = {put.name: inputs[put.name].cpu().numpy() for put in session.get_inputs()}
        outputs = session.run(None, wanted)
        return {put.name: torch.from_numpy(value) for put, value in zip(session.get_outputs(), outputs, strict=True)}

    return GraphDecoder(run, loaded.decoder_start_token_id)
