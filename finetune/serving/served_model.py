"""A checkpoint as `diptych serve` and `diptych demo` ask it: loaded, with its limits, prompts in and token ids out."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.rows.terms import read_terms
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import languages_note
from diptych.data_prep.text_to_ids.two_vocabularies import source_side
from diptych.finetune.commands import cli
from diptych.finetune.generating.documents import Documents
from diptych.finetune.inference.constraints import FitsGrammar
from diptych.finetune.inference.engine import TorchEngine, weights_sha256
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS, end_tokens, generation_config
from diptych.finetune.inference.output_confidence import Calibration, read_calibration
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import pick_device
from diptych.finetune.serving.memory_budget import (
    MOST_TOKENS,
    MOST_UNMEASURED,
    SHARE,
    UNMEASURED,
    MemoryBudget,
    measured_budget,
)
from diptych.finetune.serving.request_batches import Decoding
from diptych.finetune.serving.serve_settings import ServeSettings, ServingSettings


class Encoded(NamedTuple):
    source_ids: list[int]
    """Cut to as many as may be read."""
    tokens: int
    """Before the cut."""
    given: Sequence[int]
    """The decoder's first tokens."""


class ServedModel(NamedTuple):
    loaded: Any
    """A LoadedModel, or an exporting.ctranslate2_engine.CTranslate2Engine."""
    prompter: Prompter
    most_tokens: int
    """The cap on new tokens of any answer."""
    budget: MemoryBudget
    longest_token: int
    """Its characters."""
    documents: Documents | None = None
    """What cuts prompts, and writes terms into them, if it was asked for."""
    calibration: Calibration | None = None
    """How the probability that an answer is right is computed, if it was stored with the model."""

    @property
    def is_torch(self) -> bool:
        return isinstance(self.loaded, LoadedModel)

    def check(self, source_tokens: int, decoding: Decoding, given: int = 1) -> None:
        """UserError if a prompt with this decoding takes too much memory, or asks for what the engine or the tokenizer
        has not. `given` counts the decoder's first tokens."""
        if decoding.grammar and not self.is_torch:
            raise UserError(
                "answers of a given form need --engine torch, and this is ctranslate2. Leave the form out."
            )
        if decoding.grammar:
            FitsGrammar(self.loaded, decoding.grammar, given, end_tokens(generation_config(self.loaded, {})[0]))
        if decoding.scores and not self.is_torch:
            raise UserError("log-probabilities need --engine torch, and this is ctranslate2. Leave them out.")
        self.budget.check(source_tokens, decoding)

    def encode(self, prompt: Prompt) -> Encoded:
        """UserError if the template has no place for something, the tokenizer does not know a language, or the prompt
        has more characters than the longest tokens make up: tokenizing megabytes takes seconds."""
        text, languages = self.prompter.render(prompt)
        characters, most = len(" ".join(text.split())), self.prompter.max_source_tokens * self.longest_token
        if characters > most:
            raise UserError(
                f"the prompt has {characters} characters, and at most {most} are read: those of"
                f" {self.prompter.max_source_tokens} tokens. Send a shorter one."
            )
        (encoding,) = split_sources(self.prompter.tokenizer, [text], [languages])
        source_ids = encoding.ids(self.prompter.max_source_tokens)
        return Encoded(source_ids, len(encoding.ids()), given_tokens(self.loaded, languages))


def with_documents(served: ServedModel, settings: ServeSettings) -> ServedModel:
    """With --long, --terms and --placeholders of the settings. UserError for terms that contradict each other."""
    if settings.long == "cut" and not settings.terms and not settings.placeholders:
        return served
    terms = read_terms(settings.terms) if settings.terms else None
    documents = Documents(served.prompter, served.loaded, settings.long, terms, settings.placeholders)
    return served._replace(documents=documents)


def load_served(
    settings: ServingSettings, names: Sequence[str], max_source_tokens: int | None = None
) -> list[ServedModel]:
    """The checkpoints of these names or folders. Prints a note if a tokenizer knows other languages than the settings
    name, or if memory limits prompts."""
    load_engine, device = cli.imported(cli.ENGINES[settings.engine]), pick_device(settings.device)
    engines = [load_engine(name, settings.dtype, device, settings.template) for name in names]
    share = SHARE if len(names) < 3 else 1 / (len(names) + 1)
    return [_served(settings, *named, share, max_source_tokens) for named in zip(names, engines, strict=True)]


def _served(
    settings: ServingSettings, name: str, engine: TorchEngine, share: float, max_source_tokens: int | None
) -> ServedModel:
    is_torch = settings.engine == "torch"
    loaded = engine.loaded if is_torch else engine
    languages = Languages(settings.source_language, settings.target_language)
    if note := languages_note(loaded.tokenizer, languages):
        print(f"({note})", file=sys.stderr)
    limit, source_limit = engine.max_target_tokens, engine.max_source_tokens
    for field, tokens, positions in (
        ("max_new_tokens", settings.max_new_tokens, limit),
        ("max_source_tokens", max_source_tokens, source_limit),
    ):
        if tokens and positions and tokens > positions:
            raise UserError(f"{field} is {tokens}, but {name} was built for {positions} positions. Lower it.")
    most_tokens = settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, limit or DEFAULT_NEW_TOKENS)
    if is_torch:
        budget, most = _memory(loaded, share, Decoding(most_tokens), max_source_tokens, source_limit)
    else:
        budget, most = UNMEASURED, max_source_tokens or source_limit or MOST_UNMEASURED
    prompter = Prompter(loaded.tokenizer, loaded.template, most, languages)
    longest_token = max(map(len, source_side(loaded.tokenizer).get_vocab()))
    calibration = read_calibration(name, lambda: weights_sha256(loaded.model)) if is_torch else None
    return ServedModel(loaded, prompter, most_tokens, budget, longest_token, calibration=calibration)


def _memory(
    loaded: LoadedModel, share: float, longest: Decoding, given: int | None, source_limit: int | None
) -> tuple[MemoryBudget, int]:
    """What a batch may take, and the longest prompt that may be read."""
    budget = measured_budget(loaded, share)
    most = given or min(budget.most_source_tokens(longest), source_limit or MOST_TOKENS)
    part = "a third" if share == SHARE else f"{share:.0%}"
    needed, part = budget.cost(most, longest), f"{budget.bytes / 1e9:.1f} GB, {part} of the free memory"
    if needed > budget.bytes:
        print(
            f"warning: a prompt of {most:,} tokens can take {needed / 1e9:.1f} GB, more than {part}", file=sys.stderr
        )
        budget = budget._replace(bytes=needed)
    elif most != (given or source_limit):
        print(f"(prompts of up to {most:,} tokens: a longer one could take more than {part})", file=sys.stderr)
    return budget, most
