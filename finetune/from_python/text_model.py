"""`diptych.load`: a checkpoint that writes, weighs and embeds texts.

    model = load("runs/first/final")
    model.generate("Name the capital of France.")                             "Paris"
    model.generate(rows, num_beams=4)                                         ["Paris", …]
    model.score([{"instruction": …, "input": …, "output": "Paris"}])      [RowScore(log_probability=-0.3, tokens=3)]
    model.embed(["France", "Korea"]).shape                                    (2, 512)

What is asked is rendered with the template that travels with the checkpoint, as `diptych generate` does it.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from diptych.data_prep.command_line.arguments import from_values
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.conversations import Fault
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of
from diptych.finetune.batches.padded_rows import pad_sources
from diptych.finetune.generating.documents import documents_for
from diptych.finetune.generating.generate_command import resolve_limits
from diptych.finetune.inference.engine import TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.generation_config import check_generation_names
from diptych.finetune.inference.output_confidence import facts_of
from diptych.finetune.inference.outputs import map_by_length
from diptych.finetune.inference.prompts import Prompt, Prompter, prompt_of, template_for
from diptych.finetune.inference.scoring import log_probabilities
from diptych.finetune.inference.target_tokens import given_tokens, target_ids
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, pick_device
from diptych.keywords import keywords_in_messages, printed_to

OF_LOADING = ("model", "engine", "dtype", "device")
OF_FILES = ("in_file", "out_file", "overwrite", "input")

Rows = Sequence[str | Mapping[str, Any]]


class RowScore(NamedTuple):
    """How likely a row's output is, given its source."""

    log_probability: float
    """Summed over the output's tokens, its end token included, in nats."""
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per token, as training and evaluation count them."""
        return -self.log_probability / self.tokens


@dataclass(frozen=True, repr=False)
class TextModel:
    """An encoder-decoder with its tokenizer, in eval mode."""

    name: str
    """The folder or Hub id that it was loaded from."""
    loaded: LoadedModel

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.loaded.tokenizer

    @overload
    def generate(self, rows: str | Mapping[str, Any], **settings: Any) -> str: ...
    @overload
    def generate(self, rows: Rows, **settings: Any) -> list[str]: ...
    @keywords_in_messages()
    def generate(self, rows: str | Mapping[str, Any] | Rows, **settings: Any) -> Any:
        """What the model writes.

        Args:
            rows: one or several texts or rows. A row has `instruction` (and `input`, `history`, `system`) or
                `messages`. A text is an instruction; beside `instruction=` or languages it is the input.
            settings: those of `diptych generate` (GenerateSettings): max_new_tokens, num_beams, temperature,
                batch_size, choices, regex, mbr_samples, generation={"top_p": 0.9} …

        Returns:
            A text for one row, a list for several. Each is a list of texts with `num_return_sequences` above 1, and an
            Output (text, finished, ids, log_probability) with `scores=True`; with `confidence=True` a pair of Output
            and a dict of what `diptych generate --confidence` says of it.

        Raises:
            UserError: a setting is wrong, or a row is no prompt.
        """
        asked = self._settings(settings)
        check_generation_names(asked.generation)
        prompter = self._prompter(asked)
        prompts = _prompts(prompter, _list_of(rows), asked)
        engine = TorchEngine(replace(self.loaded, template=prompter.template))
        engine.check(asked)
        documents = documents_for(asked, prompter, engine)
        encoded = documents.encode(*zip(*prompts, strict=True)) if prompts else []
        for place, document in enumerate(encoded, start=1):
            if document.error:
                raise UserError(f"row {place}: {document.error}")
        set_seed(asked.seed)
        answers = documents.generate(encoded, asked, asked.seed)
        outputs = [output for answered in answers for output in answered.outputs]
        found: list[Any] = outputs if asked.scores else [output.text for output in outputs]
        if asked.trusts:
            found = [(output, facts_of(output, engine.calibration, asked.abstain_below)) for output in outputs]
        each = asked.num_return_sequences
        if each > 1:
            found = [found[first : first + each] for first in range(0, len(found), each)]
        return found[0] if isinstance(rows, str | Mapping) else found

    @keywords_in_messages()
    def score(self, rows: Mapping[str, Any] | Sequence[Mapping[str, Any]], **settings: Any) -> list[RowScore]:
        """How likely each row's `output` is: its log-probability given the source, by one pass with teacher forcing.

        Args:
            rows: rows with `output` beside what `generate` reads.
            settings: template, batch_size, source_language, target_language, max_source_tokens.

        Raises:
            UserError: a setting is wrong, a row is no prompt, or it has no output.
        """
        asked = self._settings(settings)
        prompter, rows = self._prompter(asked), _list_of(rows)
        for place, row in enumerate(rows, start=1):
            if not isinstance(row, Mapping) or not isinstance(row.get("output"), str):
                raise UserError(f"row {place} has no text `output`, whose likelihood is asked for.")
        source_ids, languages = _encoded(prompter, rows, asked)
        loaded = replace(self.loaded, template=prompter.template)
        targets = []
        for row, of_row in zip(rows, languages, strict=True):
            text = prompter.template.render_target(row["output"])
            targets += target_ids(loaded, [text], of_row)
        forced = len(given_tokens(loaded, languages[0])) - 1 if languages else 0
        nats = log_probabilities(loaded, source_ids, targets, forced, asked.batch_size)
        return [RowScore(math.fsum(of_row), len(of_row)) for of_row in nats]

    @torch.no_grad()
    @keywords_in_messages()
    def embed(self, rows: Rows, **settings: Any) -> np.ndarray:
        """The mean of the encoder's states over a text's tokens, padding left out.

        Args:
            rows: N texts or rows, as for `generate`, or one; `template="plain"` puts nothing around a text.
            settings: template, batch_size, source_language, max_source_tokens.

        Returns:
            float32, (N, width of the encoder), on the CPU.
        """
        asked = self._settings(settings)
        source_ids, _ = _encoded(self._prompter(asked), _list_of(rows), asked)
        encoder = self.model.get_encoder()

        def means_of(places: list[int]) -> np.ndarray:
            batch = pad_sources([source_ids[place] for place in places], self.loaded.pad_token_id)
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            states = encoder(**batch).last_hidden_state.float()  # (B, S, D)
            mask = batch["attention_mask"][:, :, None]
            return ((states * mask).sum(dim=1) / mask.sum(dim=1)).cpu().numpy()

        means = map_by_length(means_of, list(map(len, source_ids)), asked.batch_size)
        return np.stack(means) if means else np.zeros((0, encoder.config.hidden_size), np.float32)

    def __repr__(self) -> str:
        return f"TextModel({self.name!r}, {type(self.model).__name__}, {self.model.dtype}, {self.model.device})"

    def _settings(self, settings: Mapping[str, Any]) -> GenerateSettings:
        for name in settings:
            if name in OF_LOADING:
                raise UserError(f"{name} is a setting of `diptych.load`, not of what it returns.")
            if name in OF_FILES:
                raise UserError(f"{name} is of the command `diptych generate`; here rows go in and texts come out.")
        asked = from_values(GenerateSettings, {**settings, "model": self.name})
        return resolve_limits(asked, TorchEngine(self.loaded))

    def _prompter(self, asked: GenerateSettings) -> Prompter:
        template = template_for(asked.template, self.tokenizer)
        return Prompter(self.tokenizer, template, asked.max_source_tokens, asked.languages)


@keywords_in_messages()
def load(name: str | os.PathLike, dtype: str = "auto", device: str = "auto") -> TextModel:
    """A checkpoint, ready to write.

    Args:
        name: a checkpoint folder (after training: RUN/final), an adapter folder, whose base is found, or a Hub id.
        dtype: "auto" (as it was saved), "float32", "bfloat16" or "float16".
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes an accelerator if there is one.

    Raises:
        UserError: there is no encoder-decoder, or it lacks weights or a tokenizer.
    """
    with printed_to(None):
        return TextModel(os.fspath(name), load_checkpoint(name, dtype, pick_device(device)))


def _list_of(rows: Any) -> list[str | Mapping[str, Any]]:
    """One text or row, a list of them, a pandas frame or a `datasets.Dataset`, as a list."""
    if isinstance(rows, str | Mapping):
        return [rows]
    if hasattr(rows, "iloc"):  # a pandas frame, which would give its columns' names
        return rows.to_dict("records")
    found = list(rows) if isinstance(rows, Iterable) else [rows]
    for place, row in enumerate(found, start=1):
        if not isinstance(row, str | Mapping):
            raise UserError(
                f"row {place} is of type {type(row).__name__}; give texts, or dicts such as {{'instruction': …}}."
            )
    return found


def _encoded(prompter: Prompter, rows: Rows, asked: GenerateSettings) -> tuple[list[list[int]], list[Languages]]:
    """Of each row the token ids of its source, and its languages as the tokenizer calls them."""
    rendered = [of_row for _, of_row in _prompts(prompter, rows, asked)]
    languages = [of_row for _, of_row in rendered]
    source_ids, _ = prompter.encode([text for text, _ in rendered], languages)
    return source_ids, languages


def _prompts(prompter: Prompter, rows: Rows, asked: GenerateSettings) -> list[tuple[Prompt, tuple[str, Languages]]]:
    """Of each row the prompt, and what it is rendered to. A text is the input of an instruction or of languages,
    where these are given, and else an instruction."""
    text_is_input = asked.instruction or any(asked.languages) or codes_of(prompter.tokenizer).is_around_texts
    found = []
    for place, row in enumerate(rows, start=1):
        try:
            asks = {"instruction": asked.instruction, "input": row} if text_is_input else {"instruction": row}
            prompt = Prompt(**asks, system=asked.system) if isinstance(row, str) else prompt_of(dict(row))
            found.append((prompt, prompter.render(prompt)))
        except (UserError, Fault) as error:
            raise UserError(f"row {place}: {error}") from None
    return found
