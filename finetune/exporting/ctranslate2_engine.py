"""`--engine ctranslate2` of `generate`, `evaluate`, `serve` and `demo`: runs a folder of an export. It has
the methods of the engine in inference/engine.py, and `write` and `row_nats` for single batches.

    engine = load_engine("exported", "auto", torch.device("cpu"))
    engine.generate([EncodedPrompt([12, 7, 1], [0])], settings, seed=0)   [Output("가.", True, …)]

Greedy search gives the tokens of torch except for ties and rounding: `diptych export` proved it. Beam search and
sampling are CTranslate2's own and differ from torch's; the same seed draws the same samples again. Settings that
CTranslate2 does not have are refused by name. CTranslate2 seeds its generators only when a translator starts, so each
new seed restarts the translator: about a second per chunk of a file for a large model.
"""

import copy
import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.checkpoint_config import check_place, read_generation_config
from diptych.data_prep.text_to_ids.templates import Template, carried_template
from diptych.finetune.exporting.export_proof import GreedyRules, Written
from diptych.finetune.inference.engine import EncodedPrompt
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.generation import check_source_ids, cut_at_stop, with_stop_strings
from diptych.finetune.inference.generation_config import end_tokens, warn_of_ignored
from diptych.finetune.inference.outputs import GenerationBar, Output, map_by_length
from diptych.finetune.inference.prompts import template_for
from diptych.finetune.inference.target_tokens import text_of
from diptych.finetune.model.loading import EXPORT_FILE, export_kind, load_tokenizer
from diptych.finetune.model.untrusted_files import model_settings
from diptych.finetune.run_files.atomic_folders import read_json

INSTALL = "CTranslate2 is not installed. Install it: pip install 'diptych[ctranslate2]'"
VOCABULARIES = ("shared_vocabulary.json", "source_vocabulary.json", "target_vocabulary.json")
"""A folder has the first one, or the other two."""
SEEDED = threading.Lock()
"""Held while samples are drawn: all translators of a process share the seed."""
DEFAULT_TOP_K = 50
"""The default of transformers' generate."""
# Fields of a generation config that CTranslate2 has too …
EXPRESSED = frozenset(
    ("num_beams", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p", "length_penalty", "min_length")
    + ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "forced_bos_token_id")
    + ("forced_eos_token_id", "eos_token_id", "min_new_tokens", "max_new_tokens")
)
# … and fields that change no token.
WITHOUT_EFFECT = frozenset(
    ("pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "use_cache", "cache_implementation")
    + ("cache_config", "transformers_version", "output_attentions", "output_hidden_states", "output_scores")
    + ("output_logits", "return_dict_in_generate", "compile_config", "disable_compile", "prefill_chunk_size")
    + ("renormalize_logits", "early_stopping")
)


def import_ctranslate2() -> Any:
    """The package, which is optional; UserError with the install line if it is missing."""
    try:
        import ctranslate2
    except ImportError as error:
        raise UserError(INSTALL) from error
    return ctranslate2


class CTranslate2Engine:
    can_stream = False

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        device: torch.device,
        compute_type: str = "default",
    ):
        self.folder, self.tokenizer, self.template, self.device = folder, tokenizer, template, device
        facts = read_json(folder / EXPORT_FILE)
        self.decoder_start_token_id: int = facts["decoder_start_token_id"]
        self.max_source_tokens = self.max_target_tokens = facts["position_limit"]
        self.generation_config = read_generation_config(folder) or GenerationConfig()
        self.vocabularies = [folder / name for name in VOCABULARIES if (folder / name).is_file()]
        tokens = [json.loads(file.read_text(encoding="utf-8")) for file in self.vocabularies]
        self.source_tokens: list[str] = tokens[0]
        self.tokens: list[str] = tokens[-1]
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self._compute_type, self._seed = compute_type, -1  # no seed yet; None: a random one
        self._translator = self._started()

    def _started(self) -> Any:
        try:
            return import_ctranslate2().Translator(
                str(self.folder),
                device=self.device.type,
                device_index=self.device.index or 0,
                compute_type=self._compute_type,
                intra_threads=torch.get_num_threads(),
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"CTranslate2 cannot run {self.folder} on {self.device}: {excerpt(error)}") from error

    @property
    def computed_in(self) -> str:
        """The type it computes in on this device: float32 where the device has no bfloat16."""
        return self._translator.compute_type

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in (self.folder / "model.bin", self.folder / "config.json", *self.vocabularies):
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
        version = import_ctranslate2().__version__
        return {"weights_sha256": digest.hexdigest(), "ctranslate2": version, "compute_type": self.computed_in}

    def check(self, settings: GenerateSettings) -> None:
        if settings.mbr_samples:
            raise UserError(
                "mbr_samples draws without very unlikely tokens (epsilon_cutoff), which CTranslate2 does not have. "
                "Remove it, or use --engine torch with the checkpoint."
            )
        self.config_for(settings.generation_kwargs())

    def generate(
        self, prompts: Sequence[EncodedPrompt], settings: GenerateSettings, seed: int, bar: GenerationBar | None = None
    ) -> list[Output]:
        check_source_ids([prompt.source_ids for prompt in prompts])
        self.check(settings)
        config = self.config_for(settings.generation_kwargs())
        template, _ = with_stop_strings(self.template, settings.generation)
        if config.do_sample and seed != self._seed:
            self._reseed(seed)

        def generate(rows: list[int]) -> list[list[Output]]:
            outputs = self._generate_batch([prompts[row] for row in rows], template, config, settings.max_new_tokens)
            if bar is not None:
                bar.advance(len(rows), list(chain.from_iterable(outputs)))
            return outputs

        found = map_by_length(generate, [len(prompt.source_ids) for prompt in prompts], settings.batch_size)
        return list(chain.from_iterable(found))

    def write(
        self,
        prompts: Sequence[EncodedPrompt],
        template: Template | None,
        settings: dict[str, Any],
        most: int,
        seed: int | None,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> list[Output]:
        """The outputs of one batch with up to `most` new tokens. `settings` are arguments of `generate`. `on_token` is
        for one output per prompt without beams: it gets each row's place and next token, and returns True to end the
        row. It must not refer to the engine (see `stop_callback`). Without a seed no draw is repeated."""
        config = self.config_for(settings)
        with SEEDED if config.do_sample else nullcontext():
            if config.do_sample and (seed is not None or self._seed is not None):
                self._reseed(secrets.randbits(31) if seed is None else seed)
                self._seed = seed
            outputs = self._generate_batch(prompts, template, config, most, on_token)
        return list(chain.from_iterable(outputs))

    def with_template(self, template: Template | None) -> "CTranslate2Engine":
        """The same engine, asked with another template."""
        other = copy.copy(self)
        other.template = template
        return other

    def row_nats(self, rows: Mapping[str, Sequence[Any]]) -> list[float]:
        """The loss of each row of a batch of prepared columns, in nats, summed over its labels. UserError for labels
        that CTranslate2 cannot score: those that do not end with the end token, or are not all learned."""
        for labels, start in zip_longest(rows["labels"], rows.get("decoder_start", ())):
            if IGNORE_INDEX in labels or start not in (None, self.decoder_start_token_id):
                raise UserError(
                    "a row has labels that are not learned, or a start token of its own, which CTranslate2 cannot "
                    "score. Use --engine torch with the checkpoint."
                )
        scored = self._translator.score_batch(
            self._named_sources(rows["input_ids"]),
            [self._named(labels[:-1]) for labels in rows["labels"]],
            max_input_length=0,
        )
        for labels, result in zip(rows["labels"], scored, strict=True):
            if result.tokens[-1] != self.tokens[labels[-1]]:
                raise UserError(
                    f"a row's labels end with {self.tokens[labels[-1]]}, and CTranslate2 scores a text with "
                    f"{result.tokens[-1]} at its end. Use --engine torch with the checkpoint."
                )
        return [-sum(result.log_probs) for result in scored]

    def _reseed(self, seed: int) -> None:
        import_ctranslate2().set_random_seed(seed % 2**32)
        self._translator, self._seed = self._started(), seed

    def config_for(self, settings: dict[str, Any]) -> GenerationConfig:
        """The folder's generation config updated by arguments of `generate`; UserError for what CTranslate2 does not
        have."""
        warn_of_ignored(self.generation_config, str(self.folder))
        config = model_settings(self.generation_config)
        unknown = config.update(**with_stop_strings(None, settings)[1])
        known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
        refused = sorted({*unknown, *(config.to_diff_dict().keys() & known) - EXPRESSED - WITHOUT_EFFECT})
        if config.early_stopping == "never":
            refused.append("early_stopping='never'")
        if config.do_sample and (config.num_beams or 1) > 1:
            refused.append("sampling within beams")
        if refused:
            raise UserError(
                f"CTranslate2 has no {', '.join(refused)}. Remove it from the settings, or from "
                f"{self.folder}/generation_config.json; or use --engine torch with the checkpoint."
            )
        return config

    def _generate_batch(
        self,
        prompts: Sequence[EncodedPrompt],
        template: Template | None,
        config: GenerationConfig,
        most: int,
        on_token: Callable[[int, int], bool] | None = None,
    ) -> list[list[Output]]:
        for prompt in prompts:
            if prompt.given[0] != self.decoder_start_token_id:
                raise UserError(
                    f"the decoder of this export starts with {self.tokens[self.decoder_start_token_id]}, but "
                    f"{self.tokens[prompt.given[0]]} is asked for. Use --engine torch with the checkpoint."
                )
        prefixes = [prompt.given[1:] for prompt in prompts]
        hidden = len(prefixes[0])  # prefix tokens are not part of the text, but count as new tokens
        most = max(most, hidden + 1) if hidden else most
        if not hidden and config.forced_bos_token_id is not None:
            prefixes = [[config.forced_bos_token_id]] * len(prompts)
        if config.forced_eos_token_id is not None:
            most -= 1  # torch writes the end token in the last place, whatever the model would have written
        options = self._options(config, max(most, 1))
        if on_token is not None:
            options["callback"] = lambda step: step.step >= hidden and on_token(step.batch_id, step.token_id)
        elif template and template.stop and options["beam_size"] == options["num_hypotheses"] == 1:
            options["callback"] = stop_callback(self.tokenizer, template, len(prompts))
        results = self._translator.translate_batch(
            self._named_sources([prompt.source_ids for prompt in prompts]), list(map(self._named, prefixes)), **options
        )
        return [
            [self._output([self.ids[token] for token in tokens][hidden:most], template, config) for tokens in texts]
            for texts in (result.hypotheses for result in results)
        ]

    def _options(self, config: GenerationConfig, most: int) -> dict[str, Any]:
        """The config as arguments of `translate_batch`, with `most` new tokens."""
        banned = [*(config.bad_words_ids or []), *([token] for token in config.suppress_tokens or [])]
        options = {
            "beam_size": config.num_beams or 1,
            "num_hypotheses": config.num_return_sequences or 1,
            "length_penalty": 1.0 if config.length_penalty is None else config.length_penalty,
            "repetition_penalty": config.repetition_penalty or 1.0,
            "no_repeat_ngram_size": config.no_repeat_ngram_size or 0,
            "suppress_sequences": list(map(self._named, banned)) or None,
            "end_token": self._named([token for token in end_tokens(config) if token is not None]) or None,
            "max_decoding_length": most,
            "min_decoding_length": min(most, max((config.min_length or 0) - 1, config.min_new_tokens or 0, 0)),
            "max_input_length": 0,
            "return_end_token": True,
        }
        if config.do_sample:
            options["sampling_temperature"] = config.temperature or 1.0
            options["sampling_topp"] = config.top_p or 1.0
            options["sampling_topk"] = DEFAULT_TOP_K if config.top_k is None else config.top_k
        return options

    def _output(self, ids: list[int], template: Template | None, config: GenerationConfig) -> Output:
        finished = bool(ids) and ids[-1] in end_tokens(config)
        text, is_stopped = cut_at_stop(text_of(self.tokenizer, ids[: len(ids) - finished]), template)
        return Output(text, finished or is_stopped, tuple(ids))

    def write_greedily(
        self, sources: Sequence[Sequence[int]], rules: GreedyRules, keep_logits: bool = False
    ) -> list[Written]:
        """As export_proof.ExportedModel."""
        results = self._translator.translate_batch(
            self._named_sources(sources),
            [self._named(rules.prefix)] * len(sources),
            beam_size=1,
            min_decoding_length=0,
            max_decoding_length=len(rules.prefix) + rules.tokens,
            max_input_length=0,
            end_token=self._named(rules.ends),
            return_end_token=True,
            return_logits_vocab=keep_logits,
        )
        ids = [[self.ids[token] for token in result.hypotheses[0]][len(rules.prefix) :] for result in results]
        if not keep_logits:
            return [Written(of_row) for of_row in ids]
        return [
            Written(of_row, torch.stack([_logits(step) for step in result.logits[0][-len(of_row) :]]))
            for of_row, result in zip(ids, results, strict=True)
        ]

    def _named_sources(self, sources: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.source_tokens[token_id] for token_id in ids] for ids in sources]

    def _named(self, ids: Sequence[int]) -> list[str]:
        return [self.tokens[token_id] for token_id in ids]


def stop_callback(tokenizer: PreTrainedTokenizerBase, template: Template, rows: int) -> Callable[[Any], bool]:
    """CTranslate2 calls it for each token. It returns True if the token's row now has a stop string.

    It must not refer to the engine: a thread of the translator releases it, and if that ended the translator from its
    own thread, the process would abort.
    """
    written: list[list[int]] = [[] for _ in range(rows)]

    def has_stop(step: Any) -> bool:
        written[step.batch_id].append(step.token_id)
        return cut_at_stop(text_of(tokenizer, written[step.batch_id]), template)[1]

    return has_stop


def _logits(step: Any) -> torch.Tensor:
    """CTranslate2's StorageView as a tensor (V,) on the CPU, in float32."""
    ctranslate2 = import_ctranslate2()
    if step.device != "cpu":
        step = step.to_device(ctranslate2.Device.cpu)
    if step.dtype != ctranslate2.DataType.float32:
        step = step.to(ctranslate2.DataType.float32)
    return torch.from_numpy(np.array(step))


def load_engine(name: str, dtype: str, device: torch.device, template: str = "") -> CTranslate2Engine:
    """The engine of an exported folder; UserError for any other folder. `dtype` is the type to compute in; "auto" is
    the type of the export, where the device has it."""
    import_ctranslate2()
    name = os.path.expanduser(name)
    check_place(name)
    kind = export_kind(name)
    if kind != "ctranslate2":
        found = f"an export to {kind}" if kind else "a checkpoint, and no export to CTranslate2"
        raise UserError(
            f"{name} is {found}. Make one: diptych export MODEL --to ctranslate2 --out …, and name that folder; or "
            f"generate with the checkpoint itself: --engine torch."
        )
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"CTranslate2 runs on cpu and cuda, not on {device.type}. Give --device cpu.")
    tokenizer = load_tokenizer(name)
    if not template:
        carried_template(tokenizer)  # checks it
    return CTranslate2Engine(
        Path(name), tokenizer, template_for(template, tokenizer), device, "default" if dtype == "auto" else dtype
    )
