"""What training must know about a model family: one entry for each `model_type` in the table at the end.

    family_of(model)  ->  Family(lora_targets=("q", "k", …), positions=…, logits=…)       or None: not in the table
    family_of(model).states(model, batch)  ->  what the head reads, (B, T, D), and the routers' part of the loss

A batch goes through the model's own encoder and decoder. Packed rows need two things more: masks that keep examples
apart (packed_attention.py), and positions that restart in each example. T5 has only distances, which restart by
themselves; Diptych and the T5Gemmas take `position_ids`; BART and the like look positions up in a table, and a hook on
the table picks the rows. A Diptych with merged cross-attention makes its masks itself.

Families without `attentions` are not packed; unpacked_families.py says why. A model that is not in the table trains,
too: padded, with full logits, and with LoRA on every linear layer. The entries were read in the model files of
transformers 5.24; the tests compare them with what the models compute.

B rows, S source tokens, T target tokens, D width, V vocabulary, N target tokens picked from B × T.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_bidirectional_mask_function

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.decoder_start import STARTS, named_start
from diptych.finetune.model.packed_attention import VARLEN, Windows, site_masks

Batch = dict[str, torch.Tensor]
Routed = tuple[torch.Tensor, ...] | None
"""The logits of each router, by experts."""
GLOBAL_TOKENS, GLOBAL_LAYERS = "global_attention_tokens", {"query_global", "key_global", "value_global"}
"""Of a LED's encoder: see global_attention.py."""
SOURCE_ROWS = "source_rows"
"""In a padded batch in which several targets read one source: the row of input_ids of each row of labels."""
POSITION_TABLES = ("embed_positions", "position_embeddings", "wpe")
"""Their names in BART and the like, BERT and ProphetNet, and GPT-2."""


def _nothing(panel: nn.Module, positions: torch.Tensor) -> AbstractContextManager[dict]:
    """T5 has distances only."""
    return nullcontext({})


@dataclass(frozen=True)
class Family:
    lora_targets: tuple[str, ...]
    """Names of the linear layers that get a LoRA adapter: all of attention and of the feed-forward network."""
    positions: Callable[[nn.Module, torch.Tensor], AbstractContextManager[dict]] = _nothing
    """Encoder or decoder, and positions (B, L) -> a context in which it uses them, and which gives further arguments
    for it."""
    scale: Callable[[PreTrainedModel], float] = lambda model: 1.0
    """What the decoder's states are multiplied with before the head."""
    logits: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = lambda model, logits: logits
    """Model and the head's output (N, V) -> logits (N, V)."""
    final_norm: str | None = "norm"
    """Name of the norm after the decoder's last layer; None if there is none, "" if states between layers are other
    than what the head reads (ProphetNet's are of a stream that predicts nothing)."""
    head: Callable[[PreTrainedModel], nn.Module | None] = lambda model: model.lm_head
    """From states to logits; None if the decoder itself applies it, so that there are only full logits."""
    decoder: Callable[[PreTrainedModel], nn.Module] = lambda model: model.get_decoder()
    """The decoder without the head."""
    bridge: Callable[[PreTrainedModel, torch.Tensor], torch.Tensor] = lambda model, source: source
    """From the encoder's states to what the decoder reads."""
    router_loss: Callable[[PreTrainedModel, Batch, Routed, Routed], torch.Tensor] | None = None
    """The model, a batch, and the logits of all routers of the encoder and of the decoder -> what the model itself
    adds to its loss, a mean over the batch."""
    uses_all_weights: bool = True
    """Whether each step gives each weight a gradient; an expert may be left without a token."""
    attentions: tuple[str, ...] = ("eager", "sdpa", "flex_attention", VARLEN)
    """Implementations of attention that can keep packed examples apart; none in a family that is not packed."""
    gpu_varlen: bool = True
    """Whether the flash kernel computes this family's attention: it knows no position bias."""
    overflows_in_fp16: bool = False
    """Whether activations of its checkpoints exceed the range of fp16."""
    windows: Windows = None
    """The window of the encoder's sliding layers, where masks are given by layer type."""
    no_text_part: tuple[str, ...] = ()
    """Names of modules that text never reaches, such as T5Gemma 2's vision tower: frozen, without adapters, saved."""

    def states(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | float]:
        """A batch without its labels -> what the head reads, (B, T, D), and the routers' part of the loss."""
        encoder, decoder = model.get_encoder(), self.decoder(model)
        more = {"output_router_logits": True} if self.router_loss else {}
        if "segment_ids" in batch:
            masks = site_masks(model, batch, self.windows)
            encoder_positions = self.positions(encoder, batch["position_ids"])
            decoder_positions = self.positions(decoder, batch["decoder_position_ids"])
        else:
            masks = batch["attention_mask"], None, batch["attention_mask"]
            encoder_positions = decoder_positions = nullcontext({})
        with encoder_positions as arguments:
            source = encoder(input_ids=batch["input_ids"], attention_mask=masks[0], **more, **arguments)
        states, source_mask = source.last_hidden_state, masks[2]
        if SOURCE_ROWS in batch:
            states, source_mask = states[batch[SOURCE_ROWS]], source_mask[batch[SOURCE_ROWS]]
        with decoder_positions as arguments:
            target = decoder(
                input_ids=batch["decoder_input_ids"],
                attention_mask=masks[1],
                encoder_hidden_states=self.bridge(model, states),
                encoder_attention_mask=source_mask,
                use_cache=False,
                **more,
                **arguments,
            )
        states = target.last_hidden_state * self.scale(model)
        if self.router_loss is None:
            return states, 0.0
        return states, self.router_loss(model, batch, source.router_logits, target.router_logits)


@dataclass(frozen=True)
class OwnMasks(Family):
    """The model takes segment ids and makes its masks itself: they span both sides, look a little ahead, or slide."""

    def states(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, float]:
        return model.model(**with_shared_sources(model, batch), use_cache=False).last_hidden_state, 0.0


@dataclass(frozen=True)
class Streams(Family):
    """ProphetNet: each target is predicted by several streams, from ever fewer of the tokens before it."""

    def states(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, float]:
        """Of all streams, (B, T, streams, D)."""
        read = with_shared_sources(model, batch)
        states = model.prophetnet(**read, use_cache=False).last_hidden_state_ngram  # (B, streams × T, D)
        return states.unflatten(1, (model.config.ngram, -1)).transpose(1, 2), 0.0


@dataclass(frozen=True)
class UnlimitedExperts(Family):
    """NLLB-MoE: in training, an expert takes no more than `expert_capacity` tokens of a batch, for which the rows of a
    batch would compete, so that two ranks compute what one does not. (And in transformers 5.24 the limit of the last
    evaluation stays.) Here an expert takes all tokens that are routed to it, as in transformers' evaluation."""

    def states(self, model: PreTrainedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | float]:
        most = batch["input_ids"].numel() + batch["decoder_input_ids"].numel()
        for module in model.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = most
        return super().states(model, batch)


def family_of(model: PreTrainedModel | PeftModel) -> Family | None:
    config = model.config
    if config.model_type == "encoder-decoder":
        panels = {config.encoder.model_type, config.decoder.model_type}
        return FAMILIES["encoder-decoder"] if panels <= BERTS | {"gpt2"} else None
    if config.model_type == "diptych":
        panels = config.encoder, config.decoder
        if any(panel.attention_softcap is not None for panel in panels):
            return replace(FAMILIES["diptych_merged"], attentions=("eager", "flex_attention"))
        is_plain = config.decoder.cross_attention == "separate" and config.encoder.lookahead is None
        is_plain = is_plain and not any(panel.windowed_layers for panel in panels)
        return FAMILIES["diptych" if is_plain else "diptych_merged"]
    return FAMILIES.get(config.model_type)


def with_shared_sources(model: PreTrainedModel | PeftModel, batch: Batch) -> dict[str, Any]:
    """A batch with SOURCE_ROWS -> with the encoder's states for each target in place of input_ids; any other batch as
    it is."""
    if SOURCE_ROWS not in batch:
        return batch
    rows, mask = batch[SOURCE_ROWS], batch["attention_mask"]
    read = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=mask)
    read = type(read)(**{name: tensor[rows] for name, tensor in read.items()})
    rest = {name: tensor for name, tensor in batch.items() if name not in (SOURCE_ROWS, "input_ids")}
    return rest | {"encoder_outputs": read, "attention_mask": mask[rows]}


def with_own_sources(batch: Batch) -> Batch:
    """The same for a model that is called as a whole: each target gets a copy of its source, which is read again. (An
    FSMT that is given encoder_outputs in place of input_ids has no causal mask in transformers 5.24.)"""
    if SOURCE_ROWS not in batch:
        return batch
    rows, rest = batch[SOURCE_ROWS], {name: tensor for name, tensor in batch.items() if name != SOURCE_ROWS}
    return rest | {name: batch[name][rows] for name in ("input_ids", "attention_mask")}


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model. The adapter is inside its layers, so calling it still trains the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_start_token(model: PreTrainedModel) -> int:
    """The first decoder input, by the rule of decoder_start.py, as in `diptych prepare`. UserError for none."""
    named = named_start(model.config, model.generation_config)
    rows = embedding_rows(model)[1]
    if named is not None and named[0] >= rows:
        raise UserError(
            f"the decoder starts with token {named[0]} ({named[1]}) in config.json or generation_config.json, and this"
            f" {model.config.model_type} has {rows} embedding rows. Correct it there."
        )
    if named is not None:
        return named[0]
    raise UserError(
        f"neither config.json nor generation_config.json of this {model.config.model_type} names a "
        f"decoder_start_token_id or a {STARTS.get(model.config.model_type, 'bos_token_id')}, so it cannot begin to "
        f"write. Set one there, such as the id of the tokenizer's cls_token (BERT) or bos_token."
    )


def embedding_rows(model: PreTrainedModel) -> tuple[int, int]:
    """Of the encoder's table and of the head: how many ids there are in sources and targets."""
    return model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0]


def vocabulary_tables(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Input embeddings and head by name; a tied table once, under its first name."""
    tables = {id(table) for table in input_and_output_tables(model)}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in tables}


def input_and_output_tables(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Of the model, its encoder, its decoder, and its head, each (V, D); some of them may be the same tensor.

    (FSMT's encoder and decoder are plain modules, whose tables are the model's own.)
    """
    panels = (model, model.get_encoder(), model.get_decoder())
    inputs = [panel.get_input_embeddings().weight for panel in panels if isinstance(panel, PreTrainedModel)]
    return inputs + [model.get_output_embeddings().weight]


def table_positions(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """How many tokens the tables of positions are for, the encoder's and the decoder's; None where there is no table
    (T5, rotary positions), or one that grows (M2M100, FSMT)."""

    def of(panel: nn.Module) -> int | None:
        for name, table in panel.named_modules():
            is_fixed = isinstance(table, nn.Embedding) and not hasattr(table, "make_weight")
            if name.rpartition(".")[2] in POSITION_TABLES and is_fixed:
                unused = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
                return table.num_embeddings - unused
        return None

    source, target = of(model.get_encoder()), of(model.get_decoder())
    if model.config.model_type == "prophetnet":  # its predicting streams are one position ahead
        target -= 1
    return source, target


def unread_names(model: PreTrainedModel) -> set[str]:
    """Names of modules that text never reaches, which get no gradient: the family's, and those for global attention in
    a LED that has none."""
    family = family_of(model)
    unread = set(family.no_text_part if family else ())
    return unread | (GLOBAL_LAYERS if getattr(model.get_encoder(), GLOBAL_TOKENS, None) == 0 else set())


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without those that text never reaches."""
    unread = unread_names(model)
    return ((name, module) for name, module in model.named_modules() if unread.isdisjoint(name.split(".")))


def _as_argument(panel: nn.Module, positions: torch.Tensor) -> AbstractContextManager[dict]:
    return nullcontext({"position_ids": positions})


@contextmanager
def _in_table(panel: nn.Module, positions: torch.Tensor) -> Iterator[dict]:
    """BART, mBART, Marian, Pegasus: the table takes position_ids, but its panel gives it none."""
    table = panel.embed_positions

    def look_up(module, arguments, keywords):
        return arguments, keywords | {"position_ids": positions.flatten()}

    def in_rows(module, arguments, keywords, output):
        return output.view(*positions.shape, -1)

    hooks = [
        table.register_forward_pre_hook(look_up, with_kwargs=True),
        table.register_forward_hook(in_rows, with_kwargs=True),
    ]
    try:
        yield {}
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _in_sinusoids(panel: nn.Module, positions: torch.Tensor) -> Iterator[dict]:
    """M2M100 numbers the tokens that are not padding; here from 0 in each segment. Where a decoder starts with the
    padding token, that one has no position, and the first word has position 0."""

    def look_up(module, arguments, output):
        is_word = arguments[0] != module.padding_idx
        words = is_word.cumsum(dim=1)
        starts = torch.arange(positions.shape[1], device=positions.device) - positions
        before = (words - is_word.long()).gather(1, starts)
        rows = (words - before) * is_word + module.padding_idx
        return module.weights[rows]

    hook = panel.embed_positions.register_forward_hook(look_up)
    try:
        yield {}
    finally:
        hook.remove()


def _t5_scale(model: PreTrainedModel) -> float:
    """The first T5 shares its embedding with the head and scales for it; T5 v1.1, Flan-T5 and UMT5 do not."""
    config = model.config
    scales = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)  # UMT5's before transformers 5.24
    return model.model_dim**-0.5 if scales else 1.0


def _finished(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    return model.finished_logits(logits)


def _with_softcap(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    cap = model.get_decoder().config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _uneven_window(size: int) -> Callable:
    """T5Gemma 2's: itself and (size - 1) // 2 tokens before it, and size // 2 behind it."""
    return lambda batch_idx, head_idx, q_idx, kv_idx: (
        (q_idx - kv_idx < (size + 1) // 2) & (kv_idx - q_idx < size // 2 + 1)
    )


def _switch_router_loss(model: PreTrainedModel, batch: Batch, encoder: Routed, decoder: Routed) -> torch.Tensor:
    """As SwitchTransformersForConditionalGeneration.forward has it, which also counts padding."""
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    config, total = model.config, torch.zeros((), device=model.device)
    for routed, sparse_step in ((encoder, config.encoder_sparse_step), (decoder, config.decoder_sparse_step)):
        if routed and sparse_step > 1:
            logits = torch.cat(routed, dim=1)  # (B, layers × tokens, experts)
            balance = switch.load_balancing_loss_func(logits.softmax(dim=-1), logits.argmax(dim=-1))
            total = total + config.router_z_loss_coef * switch.router_z_loss_func(logits)
            total = total + config.router_aux_loss_coef * balance
    return total


def _nllb_moe_router_loss(model: PreTrainedModel, batch: Batch, encoder: Routed, decoder: Routed) -> torch.Tensor:
    """As NllbMoeForConditionalGeneration.forward has it, which has no z-loss."""
    from transformers.models.nllb_moe.modeling_nllb_moe import load_balancing_loss_func

    total = torch.zeros((), device=model.device)
    for routed, mask in ((encoder, batch["attention_mask"]), (decoder, None)):
        if routed:
            total = total + load_balancing_loss_func(routed, model.config.num_experts, top_k=2, attention_mask=mask)
    return model.config.router_aux_loss_coef * total


def _project(model: PreTrainedModel, source: torch.Tensor) -> torch.Tensor:
    """Two models of different widths have a projection between them."""
    return model.enc_to_dec_proj(source) if hasattr(model, "enc_to_dec_proj") else source


T5_LAYERS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
BART_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LONGFORMER_LAYERS = (*BART_LAYERS, "query", "key", "value", "output")
PROPHETNET_LAYERS = ("query_proj", "key_proj", "value_proj", "out_proj", "intermediate", "output")
BERTS = {"bert", "roberta", "xlm-roberta", "bert-generation"}
BERT_LAYERS = ("query", "key", "value", "output.dense", "intermediate.dense")
GPT2_LAYERS = ("c_attn", "q_attn", "c_proj", "c_fc")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

t5 = partial(Family, T5_LAYERS, final_norm="final_layer_norm", gpu_varlen=False, overflows_in_fp16=True)
bart = partial(
    Family,
    lora_targets=BART_LAYERS,
    positions=_in_table,
    logits=lambda model, logits: logits + model.final_logits_bias,
    final_norm="layer_norm",
)
t5gemma = partial(Family, LLAMA_LAYERS, _as_argument, logits=_with_softcap, overflows_in_fp16=True)

FAMILIES = {
    "diptych": Family(LLAMA_LAYERS, _as_argument, logits=_finished),
    "diptych_merged": OwnMasks(LLAMA_LAYERS, logits=_finished, attentions=("sdpa", "flex_attention", "eager")),
    "t5": t5(scale=_t5_scale),
    "mt5": t5(),
    "umt5": t5(scale=_t5_scale),
    "bart": bart(final_norm=None),
    "mbart": bart(),
    # Its table of sinusoids grows when a row is longer.
    "m2m_100": Family(BART_LAYERS, _in_sinusoids, final_norm="layer_norm"),
    "marian": bart(final_norm=None),
    "pegasus": bart(),
    "blenderbot": bart(),
    "blenderbot-small": bart(final_norm=None),
    "plbart": bart(final_norm=None),
    "mvp": bart(final_norm=None, attentions=("eager",)),
    # Its scores are capped, which the other implementations cannot do.
    "t5gemma": t5gemma(attentions=("eager", "flex_attention"), windows=sliding_window_bidirectional_mask_function),
    # One softmax goes over target and source, whose masks are joined: only dense ones can be.
    "t5gemma2": t5gemma(
        attentions=("sdpa", "eager"), windows=_uneven_window, no_text_part=("vision_tower", "multi_modal_projector")
    ),
    # Those that are not packed:
    "longt5": t5(scale=_t5_scale, attentions=()),
    "led": bart(final_norm=None, attentions=(), lora_targets=(*LONGFORMER_LAYERS, *sorted(GLOBAL_LAYERS))),
    "bigbird_pegasus": bart(final_norm="layernorm_embedding", attentions=(), lora_targets=LONGFORMER_LAYERS),
    "pegasus_x": Family(BART_LAYERS, final_norm="layer_norm", attentions=()),
    "prophetnet": Streams(PROPHETNET_LAYERS, final_norm="", attentions=()),
    "fsmt": Family(BART_LAYERS, final_norm="", attentions=(), head=lambda model: None),
    # Their routers get no adapter.
    "switch_transformers": t5(scale=_t5_scale, attentions=(), router_loss=_switch_router_loss, uses_all_weights=False),
    "nllb-moe": UnlimitedExperts(
        BART_LAYERS, final_norm="layer_norm", attentions=(), router_loss=_nllb_moe_router_loss, uses_all_weights=False
    ),
    "encoder-decoder": Family(
        (*BERT_LAYERS, *GPT2_LAYERS),
        final_norm="",
        attentions=(),
        head=lambda model: model.decoder.cls if hasattr(model.decoder, "cls") else model.decoder.lm_head,
        decoder=lambda model: model.decoder.base_model,
        bridge=_project,
        no_text_part=("pooler",),
    ),
}
