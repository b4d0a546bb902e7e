"""A checkpoint as `diptych serve` and `diptych demo` ask it: loaded, with its limits, prompts in and token ids out."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import split_sources
from diptych.data_prep.text_to_ids.languages import languages_note
from diptych.data_prep.text_to_ids.two_vocabularies import source_side
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.inference.target_tokens import given_tokens
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.serving.memory_budget import MOST_TOKENS, MemoryBudget, measured_budget
from diptych.finetune.serving.request_batches import Decoding
from diptych.finetune.serving.serve_settings import DemoSettings, ServeSettings


class Encoded(NamedTuple):
    source_ids: list[int]
    """Cut to as many as may be read."""
    tokens: int
    """Before the cut."""
    given: Sequence[int]
    """The decoder's first tokens."""


class ServedModel(NamedTuple):
    loaded: LoadedModel
    prompter: Prompter
    most_tokens: int
    """The cap on new tokens of any answer."""
    budget: MemoryBudget
    longest_token: int
    """Its characters."""

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


def load_served(
    settings: ServeSettings | DemoSettings, name: str, max_source_tokens: int | None = None
) -> ServedModel:
    """Prints a note if the tokenizer knows other languages than the settings name, or if memory limits prompts."""
    loaded = load_checkpoint(name, settings.dtype, pick_device(settings.device), template=settings.template)
    loaded = replace(loaded, template=template_for(settings.template, loaded.tokenizer))
    languages = Languages(settings.source_language, settings.target_language)
    if note := languages_note(loaded.tokenizer, languages):
        print(f"({note})", file=sys.stderr)
    limit, source_limit = position_limit(loaded.model), position_limit(loaded.model, of_source=True)
    most_tokens = settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, limit or DEFAULT_NEW_TOKENS)
    longest, budget = Decoding(most_tokens), measured_budget(loaded)
    most = max_source_tokens or min(budget.most_source_tokens(longest), source_limit or MOST_TOKENS)
    needed, third = budget.cost(most, longest), f"{budget.bytes / 1e9:.1f} GB, a third of the free memory"
    if needed > budget.bytes:
        print(
            f"warning: a prompt of {most:,} tokens can take {needed / 1e9:.1f} GB, more than {third}", file=sys.stderr
        )
        budget = budget._replace(bytes=needed)
    elif most != (max_source_tokens or source_limit):
        print(f"(prompts of up to {most:,} tokens: a longer one could take more than {third})", file=sys.stderr)
    prompter = Prompter(loaded.tokenizer, loaded.template, most, languages)
    longest_token = max(map(len, source_side(loaded.tokenizer).get_vocab()))
    return ServedModel(loaded, prompter, most_tokens, budget, longest_token)
