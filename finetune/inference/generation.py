"""Token ids in, text out: batched generation for training, evaluation and the command `diptych generate`.

    generate_outputs(model, tokenizer, [[12, 7, 1], [8, 1]], batch_size=16, max_new_tokens=64)
    -> [Output("가.", finished=True, …), Output("네.", finished=True, …)]

B rows of a batch, S source tokens, T new tokens. Rows are sorted by length, longest first, so that a batch holds
little padding and a batch that does not fit into memory fails at once; what comes back is in the order of the input.
Greedy unless told otherwise. Of a checkpoint's generation config, what belongs to the model is taken over
(OF_THE_MODEL: token ids, shortest lengths); beams, sampling, penalties and whatever else chooses among tokens is set
aside, which is said, so that the scores of two checkpoints can be compared.

`diptych generate MODEL` answers one prompt (--instruction, --input), a file (--in_file, --out_file: see
generate_file.py), or whoever types, when it is given neither. The prompt is rendered with the template that travels
with the tokenizer and encoded by data_prep's code, so that the model reads what it was trained on. The template's
decoder prefix is forced, as in a label: start, [kor_Hang], and what the model goes on with. Its stop strings end a row
as soon as they are written, and are not part of the text.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

from diptych.data_prep.command_line.errors import UserError, nearest
from diptych.data_prep.rows.language_names import languages_in
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import codes_of, languages_note, resolved
from diptych.data_prep.text_to_ids.templates import (
    BARE_TEMPLATE,
    TEMPLATES,
    TOKENIZER_KEY,
    Template,
    load_template,
    template_of,
)
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.commands import cli
from diptych.finetune.commands.exits import is_main_rank
from diptych.finetune.commands.ranks import join_ranks
from diptych.finetune.inference.detokenize import text_of
from diptych.finetune.inference.fast_decode import can_decode_fast, fast_decode, read_fast
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.families import decoder_start_token, without_adapter
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.model.speed import keep_memory

if TYPE_CHECKING:
    from diptych.finetune.exporting.ctranslate2_engine import Translator

DEFAULT_NEW_TOKENS = 256
LINES_SUFFIX = ".txt"
"""Of files in which each line is a text; all others are JSONL."""
OF_THE_MODEL = frozenset(
    ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    + ("forced_eos_token_id", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "min_length")
    + ("min_new_tokens",)
)
"""What is taken over of a checkpoint's generation config: which tokens begin and end an output, which are never
written, and how short it may be. Of what a later transformers adds, nothing is."""
NOT_HERE = frozenset(
    (
        "penalty_alpha",
        "dola_layers",
        "constraints",
        "force_words_ids",
        "num_beam_groups",
        "diversity_penalty",
    )  # by code
    + ("return_dict_in_generate", "is_assistant", "token_healing", "guidance_scale")  # of no encoder-decoder's text
)
"""Arguments of transformers' generate that need code from the Hub, or that give no text of an encoder-decoder."""
TOKENS_BEFORE_STOP = 16
"""Stop strings are looked for in the last tokens alone: as many as the longest one has bytes, and these."""


class Output(NamedTuple):
    text: str
    """What was generated, without special tokens, up to the template's stop string."""
    finished: bool
    """Whether the model ended it, with its end token or a stop string, and not the cap on new tokens."""
    ids: tuple[int, ...] = ()
    """The tokens that the model wrote, its end token included."""
    log_probability: float | None = None
    """Of these tokens, given the source and what was forced, in nats; None unless asked for (reranking.py)."""


class GenerationBar(tqdm):
    """A progress bar over rows that also says how many new tokens come each second."""

    def __init__(self, rows: int, done: int = 0, shown: bool = True):
        # In a log file, where each refresh is a line, once every 30 seconds.
        every = 0.2 if sys.stderr.isatty() else 30.0
        super().__init__(desc="generate", total=rows, initial=done, unit="rows", disable=not shown, mininterval=every)
        self.tokens = self.under_way = 0

    def advance(self, rows: int, tokens: int) -> None:
        self.tokens, self.under_way = self.tokens + tokens, 0
        self._say_rate()
        self.update(rows)

    def tick(self, tokens: int) -> None:
        """So many more are written of a batch that is under way, which may take minutes."""
        self.under_way += tokens
        if time.time() - self.last_print_t >= self.mininterval:
            self._say_rate()
            self.last_print_t = time.time()
            self.refresh()

    def _say_rate(self) -> None:
        seconds = self.format_dict["elapsed"] if not self.disable else 0
        rate = f"{(self.tokens + self.under_way) / max(seconds, 1e-9):,.0f} tokens/s"
        self.set_postfix_str(f"{rate}, {self.under_way:,} tokens under way" if self.under_way else rate, refresh=False)

    def catch_up(self, rows: int) -> None:
        """To what all ranks have done; this one counted its own."""
        self.update(rows - self.n)


def generate_outputs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    template: Template | None = None,
    given: Sequence[Sequence[int]] | None = None,
    progress: bool | GenerationBar = False,
    **generation_kwargs: Any,
) -> list[Output]:
    """Outputs in the order of `source_ids`; with `num_return_sequences=n`, n in a row for each source.

    `given` is for each source what the decoder is given first (`targets.given_tokens`), all equally long: the start,
    and a language code or the template's decoder prefix, which count among the new tokens. Where it is left out,
    languages are the tokenizer's own. The template's stop strings end a row.
    `generation_kwargs` go to `model.generate` (num_beams, do_sample, streamer …). The model may be in training mode;
    it is put back into it.
    """
    check_source_ids(source_ids)
    longest_first = sorted(range(len(source_ids)), key=lambda row: -len(source_ids[row]))
    outputs: list[list[Output]] = [[] for _ in source_ids]
    bar = progress if isinstance(progress, GenerationBar) else GenerationBar(len(source_ids), shown=progress)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(longest_first), batch_size):
            rows = longest_first[start : start + batch_size]
            batch = [source_ids[row] for row in rows]
            settings = generation_kwargs
            if not bar.disable:
                ticks = [*settings.get("stopping_criteria", ()), Ticks(bar, len(rows))]
                settings |= {"stopping_criteria": ticks}
            of_batch = [given[row] for row in rows] if given else None
            found, tokens = generate_batch(model, tokenizer, batch, max_new_tokens, template, settings, of_batch)
            each = len(found) // len(rows)
            for position, row in enumerate(rows):
                outputs[row] = found[position * each : (position + 1) * each]
            bar.advance(len(rows), tokens)
    finally:
        model.train(was_training)
        if bar is not progress:
            bar.close()
    return [output for row_outputs in outputs for output in row_outputs]


def check_source_ids(source_ids: Sequence[Sequence[int]]) -> None:
    for row, ids in enumerate(source_ids):
        if not len(ids):
            raise UserError(f"source_ids[{row}] is empty; the encoder needs a token to read. Encode it with its eos.")


def pad_sources(source_ids: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`[[5, 6, 1], [7, 1]]` -> input_ids `[[5, 6, 1], [7, 1, 0]]`, attention_mask `[[1, 1, 1], [1, 1, 0]]`, (B, S).

    Always on the right, whatever the tokenizer's padding_side: BART's positions are counted from the row's start.
    """
    width = max(len(ids) for ids in source_ids)
    padded = [[*ids, *[pad_token_id] * (width - len(ids))] for ids in source_ids]
    mask = [[1] * len(ids) + [0] * (width - len(ids)) for ids in source_ids]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    template: Template | None,
    generation_kwargs: dict[str, Any],
    given: Sequence[Sequence[int]] | None = None,
) -> tuple[list[Output], int]:
    """The outputs of one batch in its order, and how many new tokens they have together. `given` is as for
    `generate_outputs`."""
    given = given or [given_tokens(model, tokenizer, template)] * len(source_ids)
    inputs = pad_sources(source_ids, tokenizer.pad_token_id or 0)
    template, generation_kwargs = with_stop_strings(template, generation_kwargs)
    generation_kwargs, prompts = _with_given(model, generation_kwargs, given)
    if prompts is not None:
        inputs["decoder_input_ids"] = prompts
        max_new_tokens = max(1, max_new_tokens - prompts.shape[1] + 1)
    criteria = StoppingCriteriaList(generation_kwargs.get("stopping_criteria", ()))
    if template and template.stop:
        criteria.append(StopStrings(tokenizer, template))
    generation_kwargs = generation_kwargs | {"stopping_criteria": criteria}
    inputs = {name: ids.to(model.device) for name, ids in inputs.items()}
    try:
        config, others = generation_config(model, tokenizer, generation_kwargs | {"max_new_tokens": max_new_tokens})
        if can_decode_fast(model, config, others):  # the same tokens, sooner
            others |= {"custom_generate": fast_decode, "writes_to": others.pop("streamer", None)}
            others |= {"encoder_outputs": read_fast(model, inputs["input_ids"], inputs["attention_mask"])}
        with search_settings_aside(model):
            sequences = model.generate(**inputs, generation_config=config, **others).tolist()
    except UserError:
        raise
    except ValueError as error:  # how transformers refuses settings, some of them only now
        raise UserError(f"transformers' generate refuses this: {error}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"{len(source_ids)} rows do not fit into memory together. Lower batch_size.") from error
    outputs, tokens = [], 0
    for sequence in sequences:
        ids, finished = new_tokens(sequence, len(given[0]), config)
        text = text_of(tokenizer, ids[: len(ids) - finished])
        if template and (cut := template.cut_at_stop(text)) != text:
            text, finished = cut, True
            while ids and ids[-1] == config.pad_token_id:  # which a row is given that ended before others
                ids = ids[:-1]
        outputs.append(Output(text, finished, tuple(ids)))
        tokens += len(ids)
    return outputs, tokens


def _with_given(
    model: PreTrainedModel, generation_kwargs: dict[str, Any], given: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The settings and the decoder's prompts (B, P) by which `generate` begins with what is given, (B, P) ids.

    Where it is the start token alone, there is no need of either. Beams are scored by their length without the prompt,
    and transformers' `forced_bos_token_id` counts a language code as written; so that beams give the same tokens here,
    one token after the start is forced and not given.
    """
    if len(given[0]) > 1 and generation_kwargs.get("forced_bos_token_id") is not None:
        raise UserError(
            "forced_bos_token_id says what is written first, and so does a language code or the template's decoder"
            " prefix. Drop it; --target_language names the language."
        )
    start = decoder_start_token(model)
    if {ids[0] for ids in given} == {start} and len(given[0]) == 1:
        return {"decoder_start_token_id": start} | generation_kwargs, None
    if len(given[0]) == 2 and generation_kwargs.get("num_beams", 1) > 1:
        each = generation_kwargs["num_beams"]
        forced = FirstTokens([ids[1] for ids in given for _ in range(each)])
        generation_kwargs = generation_kwargs | {"logits_processor": LogitsProcessorList([forced])}
        given = [ids[:1] for ids in given]
    # transformers puts a start before the prompts, unless the first one of them begins with it
    return generation_kwargs | {"decoder_start_token_id": given[0][0]}, torch.tensor(given)


class FirstTokens(LogitsProcessor):
    """For each row (B) the token that it has to write first, as `forced_bos_token_id` has it for all of them."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > 1:
            return scores
        forced = torch.full_like(scores, -torch.inf)
        return forced.scatter(1, self.tokens.to(scores.device)[:, None], 0.0)


def new_tokens(sequence: list[int], given: int, config: GenerationConfig) -> tuple[list[int], bool]:
    """What the model added to the `given` first tokens, up to its end token, and whether it wrote one. (For BART the
    start is eos, so it must go before eos is looked for.)"""
    ids, finished = _cut_at_eos(sequence[given:], end_tokens(config))
    if finished and config.forced_eos_token_id is not None and len(ids) == config.max_new_tokens:
        return ids[:-1], False  # the cap wrote this eos, not the model (BART's generation configs ask for it)
    return ids, finished


class Ticks(StoppingCriteria):
    """Ends no row; tells a bar of each step of a batch."""

    def __init__(self, bar: GenerationBar, rows: int):
        self.bar, self.rows = bar, rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.bar.tick(self.rows)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class StopStrings(StoppingCriteria):
    """Ends each row (B, T) whose text holds one of the template's stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template):
        self.tokenizer, self.template = tokenizer, template
        self.tokens = TOKENS_BEFORE_STOP + max(len(stop.encode()) for stop in template.stop)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        ends = [self._holds_stop(ids[-self.tokens :]) and self._holds_stop(ids) for ids in input_ids.tolist()]
        return torch.tensor(ends, device=input_ids.device)

    def _holds_stop(self, ids: list[int]) -> bool:
        text = text_of(self.tokenizer, ids)
        return any(stop in text for stop in self.template.stop)


def with_stop_strings(template: Template | None, settings: dict[str, Any]) -> tuple[Template | None, dict[str, Any]]:
    """transformers' `stop_strings` as stops of the template, which are no part of the text; and the other settings."""
    stop = settings.get("stop_strings")
    if not stop:
        return template, settings
    template = template or TEMPLATES[BARE_TEMPLATE]
    stops = (*template.stop, *([stop] if isinstance(stop, str) else stop))
    return replace(template, stop=stops), {name: value for name, value in settings.items() if name != "stop_strings"}


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> tuple[GenerationConfig, dict[str, Any]]:
    """What the checkpoint's own says of the model, with these settings, and what of them is no part of a config (a
    streamer); with the tokenizer's pad and eos where the checkpoint names none."""
    _refuse_not_here(settings)
    config = settings_of_the_model(model.generation_config)
    others = config.update(**settings)
    if config.pad_token_id is None:
        config.pad_token_id = target_side(tokenizer).pad_token_id
    if config.eos_token_id is None:
        config.eos_token_id = target_side(tokenizer).eos_token_id
    return config, others


def settings_of_the_model(config: GenerationConfig) -> GenerationConfig:
    """Those that are taken over, and nothing else.

    Raises:
        UserError: one of them is neither a number nor a list of numbers.
    """
    kept = {name: value for name in sorted(OF_THE_MODEL) if (value := getattr(config, name, None)) is not None}
    for name, value in kept.items():
        if not _are_numbers(value):
            raise UserError(f"{name} is {value!r} in the checkpoint's generation_config.json. Numbers are due there.")
    return GenerationConfig(**kept)


def _are_numbers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(map(_are_numbers, value)))


def say_what_is_set_aside(config: GenerationConfig, name: str) -> None:
    usual = GenerationConfig._get_default_generation_params()
    aside = {
        setting: value
        for setting, value in config.to_diff_dict().items()
        if setting[0] != "_"
        and setting not in OF_THE_MODEL | {"transformers_version"}
        and value is not False
        and value != usual.get(setting)
    }
    if aside:
        shown = ", ".join(f"{setting} {json.dumps(value, default=str)}" for setting, value in aside.items())
        say_once(
            f"({name} comes with settings of how to search, which are set aside: {shown}. Search is greedy unless "
            f"options say otherwise.)"
        )


@contextmanager
def search_settings_aside(model: PreTrainedModel) -> Iterator[None]:
    """For calls of `model.generate`, which takes what its config leaves open from the model's own."""
    model = without_adapter(model)
    own = model.generation_config
    say_what_is_set_aside(own, model.name_or_path or "the checkpoint")
    model.generation_config = settings_of_the_model(own)
    try:
        yield
    finally:
        model.generation_config = own


@cache
def say_once(text: str) -> None:
    """On stderr, by the first rank, above a bar that may be there."""
    if is_main_rank():
        tqdm.write(text, file=sys.stderr)


def end_tokens(config: GenerationConfig) -> list[int | None]:
    """A config may name several tokens that end a row."""
    return config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]


def _cut_at_eos(ids: list[int], ends: list[int | None]) -> tuple[list[int], bool]:
    """`[31, 40, 1, 0, 0]` with eos 1 -> `[31, 40, 1], True`; without an eos, all of it and False."""
    for position, token in enumerate(ids):
        if token in ends:
            return ids[: position + 1], True
    return ids, False


def check_generation_names(generation: dict[str, Any]) -> None:
    """UserError for what transformers' generate does not know, and for what has a setting of its own here."""
    known = sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))
    own = {"num_beams", "num_return_sequences", "temperature", "do_sample", "max_new_tokens", "max_length"}
    for name in generation:
        if name in own:
            raise UserError(
                f"generation.{name} has a setting of its own. Use --max_new_tokens or --num_beams; `diptych generate` "
                f"also has --num_return_sequences and --temperature (above 0 it samples)."
            )
        if name not in known:
            near = nearest(name, known)
            raise UserError(
                f"generation.{name} is nothing that transformers' generate takes. "
                f"{f'Did you mean {near}?' if near else 'See GenerationConfig in its documentation.'}"
            )
    _refuse_not_here(generation)


def _refuse_not_here(settings: dict[str, Any]) -> None:
    if refused := sorted(NOT_HERE & settings.keys()):
        raise UserError(
            f"{', '.join(refused)} cannot be used here: it needs code from the Hub, which is never run, or is not for "
            f"the text of an encoder-decoder. Drop it."
        )


def template_for(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that is named, or that travels with the tokenizer. Where none does, a model with language codes has
    the one that adds nothing to a text."""
    if name:
        return load_template(name)
    if codes_of(tokenizer).tokens and TOKENIZER_KEY not in tokenizer.init_kwargs:
        return TEMPLATES[BARE_TEMPLATE]
    return template_of(tokenizer)


def resolve_limits(settings: GenerateSettings, model: "PreTrainedModel | Translator") -> GenerateSettings:
    """The settings with every limit filled in; UserError for one that is beyond the model's positions."""
    if isinstance(model, PreTrainedModel):
        limits = {"max_source_tokens": position_limit(model, of_source=True), "max_new_tokens": position_limit(model)}
    else:
        limits = dict.fromkeys(("max_source_tokens", "max_new_tokens"), model.position_limit)
    for name, limit in limits.items():
        tokens = getattr(settings, name)
        if limit is not None and tokens is not None and tokens > limit:
            raise UserError(f"{name} is {tokens}, but {settings.model} was built for {limit} positions. Lower it.")
    return replace(
        settings,
        max_source_tokens=settings.max_source_tokens or limits["max_source_tokens"],
        max_new_tokens=settings.max_new_tokens
        or min(DEFAULT_NEW_TOKENS, limits["max_new_tokens"] or DEFAULT_NEW_TOKENS),
    )


class Prompt(NamedTuple):
    """What a row asks."""

    instruction: str
    input: str = ""
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""
    languages: Languages = Languages()


class Prompter(NamedTuple):
    """What turns a prompt into token ids: one template, one tokenizer, one limit."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    max_source_tokens: int | None
    languages: Languages = Languages()
    """Of prompts that bring none."""

    def render(self, prompt: Prompt) -> tuple[str, Languages]:
        """The source text, and the languages as the tokenizer calls them.

        Raises:
            UserError: the template has no place for something, or the tokenizer does not know a language.
        """
        instruction, text, history, system, own = prompt
        languages = resolved(self.tokenizer, own.or_else(self.languages), self.template.decoder_prefix)
        instruction = codes_of(self.tokenizer).instruction(instruction, languages)
        return self.template.render_source(instruction, text, history, system), languages

    def encode(
        self, texts: list[str], languages: Sequence[Languages] | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """Rendered prompts -> their ids, and which of them were cut to max_source_tokens."""
        encodings = split_sources(self.tokenizer, texts, languages)
        ids = [encoding.ids(self.max_source_tokens) for encoding in encodings]
        cut = [encoding.ids() != kept for encoding, kept in zip(encodings, ids, strict=True)]
        return ids, cut


def answer(
    model: "PreTrainedModel | Translator", prompter: Prompter, settings: GenerateSettings, instruction: str, text: str
) -> None:
    """Print the output of one prompt: as it comes where there is one beam and no stop string, else when it is done."""
    from diptych.finetune.inference.reranking import chosen_outputs  # here, because it imports this file

    source, languages = prompter.render(Prompt(instruction, text, system=settings.system))
    source_ids, cut = prompter.encode([source], [languages])
    if cut[0]:
        print(f"(the prompt was cut to {len(source_ids[0])} tokens)", file=sys.stderr)
    generation = settings.generation_kwargs()
    is_single = settings.num_beams == settings.num_return_sequences == 1 and not settings.mbr_samples
    stops = prompter.template.stop or generation.get("stop_strings")
    streams = is_single and not (stops or settings.scores or settings.choices)
    if streams:
        side = target_side(prompter.tokenizer)
        generation["streamer"] = TextStreamer(side, skip_prompt=True, skip_special_tokens=True)
    outputs = chosen_outputs(
        model,
        prompter.tokenizer,
        source_ids,
        seed=settings.seed,
        batch_size=1,
        max_new_tokens=settings.max_new_tokens,
        template=prompter.template,
        given=[given_tokens(model, prompter.tokenizer, prompter.template, languages)],
        **generation,
    )
    if not streams:
        print("\n".join(map(_shown, outputs)), flush=True)
    if not all(output.finished for output in outputs):
        print(f"(stopped at --max_new_tokens {settings.max_new_tokens}, before its end)", file=sys.stderr)


def _shown(output: Output) -> str:
    if output.log_probability is None:
        return output.text
    tokens = max(1, len(output.ids))
    return f"{output.text}\t{output.log_probability:.4f} nats, {output.log_probability / tokens:.4f} a token"


def run_session(model: "PreTrainedModel | Translator", prompter: Prompter, settings: GenerateSettings) -> int:
    """Ask for an instruction and its input, answer, ask again, until the end of input (Ctrl-D) or Ctrl-C.

    An empty instruction repeats the last one, so that many inputs can follow one instruction. Where languages say what
    is to be done, only inputs are asked for. Ctrl-C during an answer stops that answer only. On a pipe nothing but the
    answers is printed.
    """
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  arrow keys and earlier lines at the prompt
    typed = sys.stdin.isatty()
    if typed:
        print(f"{settings.model} on {model.device}, template {prompter.template.name}. Ctrl-D leaves.")
    instruction = ""
    has_languages = any(settings.languages) or codes_of(prompter.tokenizer).is_around_texts
    try:
        while True:
            if has_languages:
                text = input("input> " if typed else "").strip()
            else:
                kept = f" [{instruction}]" if instruction else ""
                instruction = input(f"instruction{kept}> " if typed else "").strip() or instruction
                text = _ask_input("input (Enter for none)> " if typed else "") if instruction else ""
            if not instruction and not text:
                continue
            try:
                answer(model, prompter, settings, instruction, text)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if typed else "")
        return 0


def _ask_input(prompt: str) -> str:
    """The input, which may be left out where the input ends: the instruction before it is still answered."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def run(settings: GenerateSettings) -> int:
    check_generation_names(settings.generation)
    from diptych.finetune.inference.generate_file import (  # here, because it imports this file
        generate_file,
        read_prompts,
    )

    keep_memory()

    # The file first: its mistakes are found before a large model is loaded.
    asked = settings.instruction, settings.system, any(settings.languages)
    rows = read_prompts(settings.in_file, *asked) if settings.in_file else []
    accelerator = join_ranks()
    if accelerator and not settings.in_file:
        raise UserError("one process answers a prompt, but several were launched. Launch one, or give --in_file.")
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    if settings.engine == "ctranslate2":
        from diptych.finetune.exporting.ctranslate2_engine import load_translator  # here, because it imports this file

        model, tokenizer = load_translator(
            settings.model, settings.dtype, device, check_template=not settings.template
        )
        model.check(settings.generation_kwargs())
    else:
        loaded = load_checkpoint(settings.model, settings.dtype, device, template=settings.template)
        model, tokenizer = loaded.model, loaded.tokenizer
    settings = resolve_limits(settings, model)
    template = template_for(settings.template, tokenizer)
    prompter = Prompter(tokenizer, template, settings.max_source_tokens, settings.languages)
    if (note := languages_note(tokenizer, settings.languages)) and not any(
        any(languages_in(it.fields)) for it in rows
    ):
        print(f"({note})", file=sys.stderr)
    if settings.in_file:
        code = generate_file(model, prompter, settings, rows, accelerator)
        if accelerator:
            accelerator.end_training()
        return code
    torch.manual_seed(settings.seed)
    if settings.instruction or settings.input:
        answer(model, prompter, settings, settings.instruction, settings.input)
        return 0
    return run_session(model, prompter, settings)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("generate", argv)


if __name__ == "__main__":
    raise SystemExit(main())
