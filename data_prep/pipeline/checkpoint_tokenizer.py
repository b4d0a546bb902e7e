"""The tokenizer of the checkpoint that will be fine-tuned, its template, and its languages.

    load_tokenizer_and_template(settings, "alpaca")  → the tokenizer (None where it is to be trained) and the template

No model code is run, and no code that comes with a checkpoint.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.rows.language_names import is_same_language
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.encode import vocabulary_sizes
from diptych.data_prep.text_to_ids.languages import check_spells_no_code, codes_of, set_languages
from diptych.data_prep.text_to_ids.templates import (
    BARE_TEMPLATE,
    TOKENIZER_KEY,
    Template,
    attach_template,
    load_template,
    template_of,
)
from diptych.data_prep.text_to_ids.tokenizer_files import open_tokenizer


def load_tokenizer_and_template(
    settings: PrepareSettings, default: str, say: Callable[[str], Any] = print
) -> tuple[PreTrainedTokenizerBase | None, Template]:
    """The tokenizer is None where it has to be trained, which needs the train split first. `default` names the
    template that is used where neither the settings nor the tokenizer have one."""
    if settings.tokenizer is None:
        return None, load_template(settings.template or default)
    tokenizer = open_tokenizer(settings.tokenizer)
    for token in ("eos_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            value = "tokenizer.sep_token" if token == "eos_token" and tokenizer.sep_token else "'…'"
            raise UserError(
                f"'{settings.tokenizer}' has no {token}. In Python, set tokenizer.{token} = {value}, write "
                f"tokenizer.save_pretrained('FOLDER'), and prepare with --tokenizer FOLDER."
            )
    check_decoder_start(settings, tokenizer)
    if settings.template is None and TOKENIZER_KEY in tokenizer.init_kwargs:
        template = template_of(tokenizer)
    else:
        is_multilingual = default == "alpaca" and codes_of(tokenizer).tokens
        template = load_template(settings.template or (BARE_TEMPLATE if is_multilingual else default))
    _set_languages(settings, tokenizer, say)
    attach_template(tokenizer, template)
    return tokenizer, template


def _set_languages(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], Any]) -> None:
    """Sets the languages of the settings in the tokenizer: they count for rows and prompts that name none."""
    codes = codes_of(tokenizer)
    for option in ("forward", "backward"):
        check_spells_no_code(codes, getattr(settings, option) or "", f"--{option}")
    given = Languages(settings.source_language or "", settings.target_language or "")
    if is_same_language(*given):
        raise UserError(
            f"source_language and target_language are one language, {given.source} and {given.target}. If the data is"
            " in one language indeed, say so in its rows, as columns source_language and target_language."
        )
    if any(given) and not codes.tokens:
        if not all(given):
            raise UserError("source_language and target_language belong together. Give both, or neither.")
        said = codes.instruction("", given)
        words = f"rows without an instruction begin '{said}', and the others" if said else "rows"
        say(f"Note       '{settings.tokenizer}' has no language codes: {words} keep the languages as columns alone")
    languages = codes.checked(given)
    for name, code in zip(given, languages, strict=True):
        if name != code:
            say(f"Note       language {name} is {code} for '{settings.tokenizer}'")
    if codes.is_around_texts:
        set_languages(tokenizer, languages)


def check_decoder_start(settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    start, last = settings.decoder_start_token_id, vocabulary_sizes(tokenizer)[1] - 1
    if start is not None and start > last:
        name = f"'{settings.tokenizer}'" if settings.tokenizer else "the tokenizer trained here"
        raise UserError(
            f"decoder_start_token_id is {start}, but the token ids of {name} end at {last}. Give one up to there, or"
            " none: then it is what the checkpoint's config says, or else the padding token."
        )
