"""What `diptych generate` computes with: a transformers model here, CTranslate2 in exporting/ctranslate2_engine.py.

    engine = load_engine("runs/full/final", "auto", torch.device("cpu"), template="")
    engine.generate([EncodedPrompt([12, 7, 1], [0])], settings, seed=0)   [Output("가.", finished=True, …)]

cli.py has the table of engines: it names the `load_engine` function of each.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, TextStreamer

from diptych.finetune.inference.generate_settings import GenerateSettings, asked_form
from diptych.finetune.inference.output_confidence import (
    OF_ANOTHER_FORM,
    Calibration,
    check_abstaining,
    read_calibration,
)
from diptych.finetune.inference.outputs import GenerationBar, Output
from diptych.finetune.inference.prompts import template_for
from diptych.finetune.inference.scoring import chosen_outputs
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint, position_limit


class EncodedPrompt(NamedTuple):
    source_ids: list[int]
    given: list[int]
    """Tokens that the decoder starts with (`targets.given_tokens`)."""


class TorchEngine:
    """The torch model. Other engines have the same attributes and methods."""

    can_stream = True
    """Whether `generate` takes a `streamer`, which gets the tokens of a single prompt as they are written."""

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded
        self.calibration: Calibration | None = None
        self.tokenizer, self.template, self.device = loaded.tokenizer, loaded.template, loaded.device
        self.decoder_start_token_id = loaded.decoder_start_token_id
        self.generation_config = loaded.model.generation_config
        self.max_source_tokens = position_limit(loaded.model, of_source=True)  # None if there is no limit
        self.max_target_tokens = position_limit(loaded.model)

    def check(self, settings: GenerateSettings) -> None:
        """UserError for settings that this engine does not have; here transformers checks most of them. Reads how the
        confidence of outputs is computed, if they ask for it."""
        if settings.trusts:
            stored = read_calibration(settings.model, lambda: weights_sha256(self.loaded.model))
            self.calibration = stored.of_form(asked_form(settings).get("grammar")) if stored else None
            check_abstaining(settings.abstain_below, self.calibration, settings.model)
            if stored and not self.calibration:
                print(f"warning: {OF_ANOTHER_FORM}", file=sys.stderr)

    def generate(
        self,
        prompts: Sequence[EncodedPrompt],
        settings: GenerateSettings,
        seed: int,
        bar: GenerationBar | None = None,
        streamer: TextStreamer | None = None,
    ) -> list[Output]:
        """`settings.num_return_sequences` outputs for each prompt, in their order."""
        watching = {} if streamer is None else {"streamer": streamer}
        return chosen_outputs(
            self.loaded,
            [prompt.source_ids for prompt in prompts],
            given=[prompt.given for prompt in prompts],
            seed=seed,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            bar=bar,
            **settings.generation_kwargs(),
            **watching,
        )

    def identity(self) -> dict[str, Any]:
        """Hashes and versions that decide its outputs, apart from prompts and settings."""
        return {"weights_sha256": weights_sha256(self.loaded.model), "torch": torch.__version__}


def load_engine(name: str, dtype: str, device: torch.device, template: str) -> TorchEngine:
    """`template` is the name or file of a template that replaces the tokenizer's own, or ""."""
    loaded = load_checkpoint(name, dtype, device, template)
    return TorchEngine(replace(loaded, template=loaded.template or template_for("", loaded.tokenizer)))


def weights_sha256(model: PreTrainedModel) -> str:
    """A hash of names, types and bytes in memory: the same wherever the checkpoint lies and however it is split."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
