"""A model with its tokenizer and everything that follows from the two: one value for all functions that need both.

    loaded = load_checkpoint("runs/translate/final")         loading.py: from a folder or a Hub id
    loaded = LoadedModel.of(model, tokenizer)                from what is at hand: in training, in tests
    loaded = dataclasses.replace(loaded, template=other)     the same model, asked with another template

`loaded.pad_token_id` and `loaded.decoder_start_token_id` are what `pad_batch` and `pack_examples` need.
"""

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diptych.data_prep.text_to_ids.languages import LanguageCodes, codes_of
from diptych.data_prep.text_to_ids.templates import Template, carried_template
from diptych.data_prep.text_to_ids.two_vocabularies import padding_id
from diptych.finetune.model.families import Family, decoder_start_token, family_of


@dataclass(frozen=True, eq=False)
class LoadedModel:
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: Template | None
    """How prompts are written: the template saved with the tokenizer; None where there is none."""
    family: Family | None
    """None for a model_type that families.py does not know: it is not packed."""
    decoder_start_token_id: int
    """The first decoder input, by the rule of data_prep/text_to_ids/decoder_start.py."""
    pad_token_id: int
    """What fills up rows. 0 where the tokenizer has no padding token. It is masked, so its value does not matter."""

    @classmethod
    def of(
        cls, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, template: Template | None = None
    ) -> "LoadedModel":
        """With `template` in place of the tokenizer's own, which is then not looked at.

        UserError where the model's configs name no decoder start token, or where the tokenizer's template no longer
        gives the texts and token ids that it gave when it was saved.
        """
        return cls(
            model,
            tokenizer,
            template=template or carried_template(tokenizer),
            family=family_of(model),
            decoder_start_token_id=decoder_start_token(model),
            pad_token_id=padding_id(tokenizer) or 0,
        )

    @property
    def language_codes(self) -> LanguageCodes:
        """The language codes that the tokenizer knows; none for most."""
        return codes_of(self.tokenizer)

    @property
    def device(self) -> torch.device:
        return self.model.device
