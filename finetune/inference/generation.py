"""Source token ids in, outputs out: batched generation with a transformers model.

    generate_outputs(loaded, [[12, 7, 1], [8, 1]], batch_size=16, max_new_tokens=64)
    -> [Output("가.", finished=True, …), Output("네.", finished=True, …)]

B rows of a batch, S source tokens, P prompt tokens of the decoder, T tokens so far, V vocabulary. Outputs are in the
order of the sources. The decoder's forced tokens (start token, language code, template prefix) are called `given`; the
model goes on from them. A stop string of the template ends a row and is not part of its text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.text_to_ids.templates import BARE_TEMPLATE, TEMPLATES, Template
from diptych.finetune.batches.padded_rows import pad_sources
from diptych.finetune.inference.constraints import FitsGrammar
from diptych.finetune.inference.fast_decode import OneNumberPerRow, can_decode_fast, fast_decode, read_fast
from diptych.finetune.inference.generation_config import end_tokens, generation_config, search_settings_ignored
from diptych.finetune.inference.outputs import GenerationBar, Output, map_by_length
from diptych.finetune.inference.target_tokens import given_tokens, text_of
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.modeling.modeling_diptych import CACHE_NAME

TOKENS_BEFORE_STOP = 16
"""Stop strings are searched in the last tokens only: these, and as many as the longest stop string has bytes."""


def generate_outputs(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    given: Sequence[Sequence[int]] | None = None,
    bar: GenerationBar | None = None,
    **generation_kwargs: Any,
) -> list[Output]:
    """Outputs in the order of `source_ids`; with `num_return_sequences=n`, n in a row for each source.

    `given` has the forced decoder tokens of each source (`targets.given_tokens`), all of one length; they count as new
    tokens. By default they are those of the tokenizer's own languages. `generation_kwargs` go to `model.generate`. The
    model runs in eval mode and is put back into its mode afterwards.
    """
    check_source_ids(source_ids)

    def generate(rows: list[int]) -> list[list[Output]]:
        batch, batch_given = [source_ids[row] for row in rows], [given[row] for row in rows] if given else None
        outputs = generate_batch(loaded, batch, max_new_tokens, generation_kwargs, batch_given)
        if bar is not None:
            bar.advance(len(rows), outputs)
        each = len(outputs) // len(rows)
        return [outputs[place : place + each] for place in range(0, len(outputs), each)]

    with in_eval_mode(loaded.model):
        found = map_by_length(generate, [len(ids) for ids in source_ids], batch_size)
    return [output for of_row in found for output in of_row]


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model computes attention step by step, and afterwards as before."""
    config = model.config
    before = {part: getattr(config, part)._attn_implementation for part in config.sub_configs if getattr(config, part)}
    before[""] = config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def own_cache(model: PreTrainedModel) -> dict[str, Any]:
    """An argument for `model.generate` where the cache that it would make does not fit: for a T5 or a Switch
    Transformer, it makes one of as many layers as the encoder has, and fails if the decoder has more (transformers
    5.24)."""
    layers = getattr(model.config, "num_decoder_layers", None)
    if layers is None or layers == model.config.num_hidden_layers:
        return {}
    return {CACHE_NAME: EncoderDecoderCache(DynamicCache(), DynamicCache())}


def check_source_ids(source_ids: Sequence[Sequence[int]]) -> None:
    for row, ids in enumerate(source_ids):
        if not len(ids):
            raise UserError(f"source_ids[{row}] is empty; the encoder needs a token to read. Encode it with its eos.")


def generate_batch(
    loaded: LoadedModel,
    source_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    generation_kwargs: dict[str, Any],
    given: Sequence[Sequence[int]] | None = None,
) -> list[Output]:
    """The outputs of one batch in its order; `given` as in `generate_outputs`."""
    given = given or [given_tokens(loaded)] * len(source_ids)
    inputs = pad_sources(source_ids, loaded.pad_token_id)
    template, generation_kwargs = with_stop_strings(loaded.template, generation_kwargs)
    generation_kwargs, prompts = _with_given(loaded.decoder_start_token_id, generation_kwargs, given)
    if prompts is not None:
        inputs["decoder_input_ids"] = prompts
        max_new_tokens = max(1, max_new_tokens - prompts.shape[1] + 1)
    criteria = StoppingCriteriaList(generation_kwargs.get("stopping_criteria", ()))
    if template and template.stop:
        criteria.append(StopStrings(loaded.tokenizer, template))
    settings = generation_kwargs | {"stopping_criteria": criteria, "max_new_tokens": max_new_tokens}
    fits, penalty = settings.pop("grammar", None), settings.pop("diversity", 0)
    if fits is not None or penalty:
        start, ends = len(given[0]), end_tokens(generation_config(loaded, {})[0])
        if fits is not None and not isinstance(fits, FitsGrammar):
            fits = FitsGrammar(loaded, fits, start, ends)
        diverse = DiverseAnswers(settings["num_return_sequences"], penalty, start, ends) if penalty else None
        processors = [*settings.get("logits_processor", ()), fits, diverse]
        settings["logits_processor"] = LogitsProcessorList(filter(None, processors))
    inputs = {name: ids.to(loaded.device) for name, ids in inputs.items()}
    config, sequences = _generate(loaded, inputs, settings)
    most, start = config.max_new_tokens, len(given[0])
    outputs = [output_of(loaded.tokenizer, template, config, sequence[start:], most) for sequence in sequences]
    if fits is None:
        return outputs
    return [output._replace(finished=fits.finished(output.ids, output.finished)) for output in outputs]


def output_of(
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    config: GenerationConfig,
    ids: list[int],
    most: int,
) -> Output:
    """The output of a row's tokens after the given ones, of which there were to be at most `most`."""
    ids, finished = up_to_end(ids, end_tokens(config))
    if finished and config.forced_eos_token_id is not None and len(ids) == most:
        ids, finished = ids[:-1], False  # the limit forced this eos (BART's generation configs ask for it)
    text, is_stopped = cut_at_stop(text_of(tokenizer, ids[: len(ids) - finished]), template)
    while is_stopped and ids and ids[-1] == config.pad_token_id:  # rows that end before others are padded
        ids = ids[:-1]
    return Output(text, finished or is_stopped, tuple(ids))


def _generate(
    loaded: LoadedModel, inputs: dict[str, torch.Tensor], settings: dict[str, Any]
) -> tuple[GenerationConfig, list[list[int]]]:
    """`model.generate`, or `fast_decode` where that does the same; its errors become UserErrors."""
    model = loaded.model
    try:
        config, others = generation_config(loaded, settings)
        if config.use_cache is not False:
            others |= own_cache(model)
        if can_decode_fast(model, config, others):
            others |= {"custom_generate": fast_decode, "writes_to": others.pop("streamer", None)}
            others |= {"encoder_outputs": read_fast(model, inputs["input_ids"], inputs["attention_mask"])}
        is_drawn = config.do_sample and model.device.type == "cpu"
        with search_settings_ignored(model), OneNumberPerRow() if is_drawn else nullcontext():
            return config, model.generate(**inputs, generation_config=config, **others).tolist()
    except UserError:
        raise
    except ValueError as error:  # transformers refuses some settings only here
        raise UserError(f"transformers' generate refuses this: {excerpt(error)}") from error
    except torch.OutOfMemoryError as error:
        rows = len(inputs["input_ids"])
        raise UserError(f"{rows} rows do not fit into memory together. Lower batch_size.") from error


def up_to_end(ids: list[int], ends: list[int | None]) -> tuple[list[int], bool]:
    """`[31, 40, 1, 0, 0]` with end token 1 -> `[31, 40, 1], True`; without an end token all of it and False."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1], True
    return ids, False


def cut_at_stop(text: str, template: Template | None) -> tuple[str, bool]:
    """The text up to the template's first stop string, and whether there was one."""
    cut = template.cut_at_stop(text) if template else text
    return cut, cut != text


def _with_given(
    start: int, generation_kwargs: dict[str, Any], given: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The settings and the decoder's prompts (B, P) that make `generate` begin with the `given` tokens.

    The model's own `start` token alone needs neither. With beams, a single token after the start is forced by a logits
    processor instead of being part of the prompt: transformers scores beams by their length without the prompt and
    counts `forced_bos_token_id` as generated, and our beams must give the same tokens.
    """
    if len(given[0]) > 1 and generation_kwargs.get("forced_bos_token_id") is not None:
        raise UserError(
            "forced_bos_token_id forces the first token, and so does a language code or the template's decoder prefix."
            " Remove it; --target_language sets the language."
        )
    if {ids[0] for ids in given} == {start} and len(given[0]) == 1:
        return {"decoder_start_token_id": start} | generation_kwargs, None
    if len(given[0]) == 2 and generation_kwargs.get("num_beams", 1) > 1:
        forced = FirstTokens([ids[1] for ids in given for _ in range(generation_kwargs["num_beams"])])
        generation_kwargs = generation_kwargs | {"logits_processor": LogitsProcessorList([forced])}
        given = [ids[:1] for ids in given]
    # transformers puts a start token before the prompts unless the first prompt begins with it
    return generation_kwargs | {"decoder_start_token_id": given[0][0]}, torch.tensor(given)


class FirstTokens(LogitsProcessor):
    """Forces the first token of each row: `forced_bos_token_id` with a token per row, (B,)."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 1:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens.to(scores.device)[:, None], 0.0)


class DiverseAnswers(LogitsProcessor):
    """Diverse beam search in groups of one beam (Vijayakumar et al. 2016, arXiv 1610.02424), which transformers 5 has
    not: each of a source's `answers` rows takes the likeliest token, after `penalty` nats for each earlier row of the
    source that takes it at this place. All other tokens become impossible, so that sampling, which can have several
    answers of a source, has nothing to draw."""

    def __init__(self, answers: int, penalty: float, start: int, ends: Sequence[int | None]):
        self.answers, self.penalty, self.start = answers, penalty, start
        self.ends = torch.tensor([token for token in ends if token is not None])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        is_open = ~torch.isin(input_ids[:, self.start :], self.ends.to(input_ids.device)).any(1)
        logits, is_open = scores.view(-1, self.answers, scores.shape[1]), is_open.view(-1, self.answers, 1)
        taken, chosen = torch.zeros_like(logits[:, 0]), torch.full_like(logits, -torch.inf)
        for row in range(self.answers):
            token = (logits[:, row] - self.penalty * taken).argmax(1, keepdim=True)
            chosen[:, row].scatter_(1, token, 0.0)
            taken.scatter_add_(1, token, is_open[:, row].to(taken.dtype))
        return chosen.view_as(scores)


class StopStrings(StoppingCriteria):
    """Ends each row (B, T) whose text contains a stop string of the template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        self.tokenizer, self.template = tokenizer, template
        self.tokens = TOKENS_BEFORE_STOP + max(len(stop.encode()) for stop in template.stop)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = [self._has_stop(ids[-self.tokens :]) and self._has_stop(ids) for ids in input_ids.tolist()]
        return torch.tensor(ends, device=input_ids.device)

    def _has_stop(self, ids: list[int]) -> bool:
        text = text_of(self.tokenizer, ids)
        return any(stop in text for stop in self.template.stop)


def with_stop_strings(template: Template | None, settings: dict[str, Any]) -> tuple[Template | None, dict[str, Any]]:
    """Moves transformers' `stop_strings` from the settings to the template, so that they are cut from the text."""
    stop = settings.get("stop_strings")
    if not stop:
        return template, settings
    template = template or TEMPLATES[BARE_TEMPLATE]
    stops = (*template.stop, *([stop] if isinstance(stop, str) else stop))
    return replace(template, stop=stops), {name: value for name, value in settings.items() if name != "stop_strings"}
