"""What training must know about a model family: one entry for each `model_type` in the table at the end.

    family_of(model)  ->  Family(lora_targets=("q", "k", …), positions=…, logits=…)       or None: not in the table

A batch goes through the model's own encoder and decoder. Packed rows need two things more: masks that keep examples
apart (packed_attention.py), and positions that restart in each example. T5 has only distances, which restart by
themselves; Diptych and the T5Gemmas take `position_ids`; BART and the like look positions up in a table, and a hook on
the table picks the rows. A Diptych with merged cross-attention makes its masks itself.

A model that is not in the table trains too: padded, with full logits, and with LoRA on every linear layer. The entries
were read in the model files of transformers 5.23; the tests compare them with what the models compute.

B rows, S source tokens, T target tokens, D width, V vocabulary, N target tokens picked from B × T.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import sliding_window_bidirectional_mask_function

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.decoder_start import STARTS, named_start
from diptych.finetune.model.packed_attention import VARLEN, Windows, site_masks

Batch = dict[str, torch.Tensor]
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
    """Name of the norm after the decoder's last layer, if there is one."""
    attentions: tuple[str, ...] = ("eager", "sdpa", "flex_attention", VARLEN)
    """Implementations of attention that can keep packed examples apart."""
    gpu_varlen: bool = True
    """Whether the flash kernel computes this family's attention: it knows no position bias."""
    overflows_in_fp16: bool = False
    """Whether activations of its checkpoints exceed the range of fp16."""
    windows: Windows = None
    """The window of the encoder's sliding layers, where masks are given by layer type."""
    no_text_part: tuple[str, ...] = ()
    """Names of modules that text never reaches, such as T5Gemma 2's vision tower: frozen, without adapters, saved."""

    def states(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        """A batch without its labels -> what the head reads, (B, T, D)."""
        encoder, decoder = model.get_encoder(), model.get_decoder()
        if "segment_ids" in batch:
            masks = site_masks(model, batch, self.windows)
            encoder_positions = self.positions(encoder, batch["position_ids"])
            decoder_positions = self.positions(decoder, batch["decoder_position_ids"])
        else:
            masks = batch["attention_mask"], None, batch["attention_mask"]
            encoder_positions = decoder_positions = nullcontext({})
        with encoder_positions as arguments:
            source = encoder(input_ids=batch["input_ids"], attention_mask=masks[0], **arguments).last_hidden_state
        with decoder_positions as arguments:
            target = decoder(
                input_ids=batch["decoder_input_ids"],
                attention_mask=masks[1],
                encoder_hidden_states=source,
                encoder_attention_mask=masks[2],
                use_cache=False,
                **arguments,
            ).last_hidden_state
        return target * self.scale(model)


@dataclass(frozen=True)
class OwnMasks(Family):
    """The model takes segment ids and makes its masks itself: they span both sides, or look a little ahead."""

    def states(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return model.model(**batch, use_cache=False).last_hidden_state


def family_of(model: PreTrainedModel | PeftModel) -> Family | None:
    config = model.config
    if config.model_type == "diptych":
        is_plain = config.decoder.cross_attention == "separate" and config.encoder.lookahead is None
        return FAMILIES["diptych" if is_plain else "diptych_merged"]
    return FAMILIES.get(config.model_type)


def without_adapter(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model. The adapter is inside its layers, so calling it still trains the adapter."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_start_token(model: PreTrainedModel) -> int:
    """The first decoder input, by the rule of decoder_start.py, as in `diptych prepare`. UserError for none."""
    named = named_start(model.config, model.generation_config)
    if named is not None:
        return named[0]
    raise UserError(
        f"neither config.json nor generation_config.json of this {model.config.model_type} names a "
        f"decoder_start_token_id or a {STARTS.get(model.config.model_type, 'bos_token_id')}, so it cannot begin to "
        f"write. Set one there."
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
    (T5, rotary positions), or one that grows (M2M100)."""

    def of(panel: nn.Module) -> int | None:
        for name, table in panel.named_modules():
            if name.rpartition(".")[2] in POSITION_TABLES and isinstance(table, nn.Embedding):
                unused = table.padding_idx + 1 if table.padding_idx is not None else getattr(table, "offset", 0)
                return table.num_embeddings - unused
        return None

    source, target = of(model.get_encoder()), of(model.get_decoder())
    if model.config.model_type == "prophetnet":  # its predicting streams are one position ahead
        target -= 1
    return source, target


def text_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without those that text never reaches."""
    family = family_of(model)
    unread = set(family.no_text_part if family else ())
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


def _with_softcap(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    cap = model.get_decoder().config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _uneven_window(size: int) -> Callable:
    """T5Gemma 2's: itself and (size - 1) // 2 tokens before it, and size // 2 behind it."""
    return lambda batch_idx, head_idx, q_idx, kv_idx: (
        (q_idx - kv_idx < (size + 1) // 2) & (kv_idx - q_idx < size // 2 + 1)
    )


T5_LAYERS = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
BART_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

t5 = partial(Family, T5_LAYERS, final_norm="final_layer_norm", gpu_varlen=False, overflows_in_fp16=True)
bart = partial(
    Family,
    BART_LAYERS,
    _in_table,
    logits=lambda model, logits: logits + model.final_logits_bias,
    final_norm="layer_norm",
)
t5gemma = partial(Family, LLAMA_LAYERS, _as_argument, logits=_with_softcap, overflows_in_fp16=True)

FAMILIES = {
    "diptych": Family(LLAMA_LAYERS, _as_argument),
    "diptych_merged": OwnMasks(LLAMA_LAYERS, attentions=("sdpa", "flex_attention", "eager")),
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
        attentions=("sdpa", "eager"),
        windows=_uneven_window,
        no_text_part=("vision_tower", "multi_modal_projector"),
    ),
}
