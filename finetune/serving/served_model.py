"""A checkpoint as `diptych serve` and `diptych demo` ask it: loaded, with its limits, prompts in and token ids out."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import languages_note
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.serving.serve_settings import DemoSettings, ServeSettings


class Encoded(NamedTuple):
    source_ids: list[int]
    is_cut: bool
    """To as many tokens as the model reads."""
    given: Sequence[int]
    """The decoder's first tokens."""


class ServedModel(NamedTuple):
    loaded: LoadedModel
    prompter: Prompter
    most_tokens: int
    """The cap on new tokens of any answer."""

    def encode(self, prompt: Prompt) -> Encoded:
        """UserError if the template has no place for something, or the tokenizer does not know a language."""
        text, languages = self.prompter.render(prompt)
        (source_ids,), (is_cut,) = self.prompter.encode([text], [languages])
        return Encoded(source_ids, is_cut, given_tokens(self.loaded, languages))


def load_served(
    settings: ServeSettings | DemoSettings, name: str, max_source_tokens: int | None = None
) -> ServedModel:
    """Prints a note if the tokenizer knows other languages than the settings name."""
    loaded = load_checkpoint(name, settings.dtype, pick_device(settings.device), template=settings.template)
    loaded = replace(loaded, template=template_for(settings.template, loaded.tokenizer))
    languages = Languages(settings.source_language, settings.target_language)
    if note := languages_note(loaded.tokenizer, languages):
        print(f"({note})", file=sys.stderr)
    max_source_tokens = max_source_tokens or position_limit(loaded.model, of_source=True)
    prompter = Prompter(loaded.tokenizer, loaded.template, max_source_tokens, languages)
    limit = position_limit(loaded.model) or DEFAULT_NEW_TOKENS
    return ServedModel(loaded, prompter, settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, limit))
