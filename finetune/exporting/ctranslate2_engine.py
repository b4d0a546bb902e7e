"""An exported folder in; a translator that stands where `generate` has a model.

    translator, tokenizer = load_translator("exported")
    translator.outputs(tokenizer, [[12, 7, 1], [8, 1]], seed=0, batch_size=16, max_new_tokens=64)
    -> [Output("가.", True), Output("네.", True)]       in the order of the sources

Greedy search gives torch's tokens, up to ties and rounding: `diptych export` proved it. Beams are CTranslate2's own
search, which ends when as many outputs are finished as there are beams, and samples are its own draws, so these differ
from torch's; the same seed gives the same again. Settings of a generation config that it has no counterpart for are
refused by name. CTranslate2 seeds a generator once for each thread that it starts, so another seed starts the
translator anew: the second that a large model takes for it comes once for each chunk of a file.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.checkpoint_config import check_place
from diptych.data_prep.text_to_ids.templates import Template, carried_template
from diptych.finetune.exporting.export_ctranslate2 import import_ctranslate2
from diptych.finetune.inference.detokenize import text_of
from diptych.finetune.inference.generation import (
    GenerationBar,
    Output,
    check_source_ids,
    end_tokens,
    say_what_is_set_aside,
    settings_of_the_model,
    with_stop_strings,
)
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.model.loading import EXPORT_FILE, export_kind, load_generation_config, load_tokenizer
from diptych.finetune.run_files.checkpoints import read_json

VOCABULARIES = ("source_vocabulary.json", "target_vocabulary.json")
SHARED_VOCABULARY = "shared_vocabulary.json"
"""Where both are one."""
TOP_K = 50
"""What transformers' generate samples from where nobody says."""

# What a generation config may say: these are carried over …
CARRIED = frozenset(
    ("num_beams", "num_return_sequences", "do_sample", "temperature", "top_k", "top_p", "length_penalty", "min_length")
    + ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "forced_bos_token_id")
    + ("forced_eos_token_id", "eos_token_id", "min_new_tokens", "max_new_tokens")
)
# … and these change no token.
WITHOUT_EFFECT = frozenset(
    ("pad_token_id", "bos_token_id", "decoder_start_token_id", "max_length", "use_cache", "cache_implementation")
    + ("cache_config", "transformers_version", "output_attentions", "output_hidden_states", "output_scores")
    + ("output_logits", "return_dict_in_generate", "compile_config", "disable_compile", "prefill_chunk_size")
    + ("renormalize_logits", "early_stopping")
)


class Translator:
    """CTranslate2's translator of one folder, with what `generate` asks of a model."""

    config = None
    """Whose start token the generation config has."""

    def __init__(self, folder: Path, device: torch.device, compute_type: str = "default"):
        self.folder, self.device = folder, device
        self.facts: dict[str, Any] = read_json(folder / EXPORT_FILE)
        self.generation_config = load_generation_config(folder)
        self.vocabularies = [name for name in (SHARED_VOCABULARY, *VOCABULARIES) if (folder / name).is_file()]
        words = [json.loads((folder / name).read_text(encoding="utf-8")) for name in self.vocabularies]
        self.source_tokens: list[str] = words[0]
        self.tokens: list[str] = words[-1]
        self.ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        self.start: int = self.facts["decoder_start_token_id"]
        self.generation_config.decoder_start_token_id = self.start
        self.position_limit: int | None = self.facts["position_limit"]
        self._compute_type, self._seed = compute_type, None
        self._translator = self._started()

    def _started(self) -> Any:
        ctranslate2 = import_ctranslate2()
        try:
            return ctranslate2.Translator(
                str(self.folder),
                device=self.device.type,
                device_index=self.device.index or 0,
                compute_type=self._compute_type,
                intra_threads=torch.get_num_threads(),
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"CTranslate2 cannot run {self.folder} on {self.device}: {error}") from error

    @property
    def computed_in(self) -> str:
        """What it computes in here, which is float32 where the device has no bfloat16."""
        return self._translator.compute_type

    def identity(self) -> dict[str, Any]:
        """What decides its outputs, beside the request."""
        digest = hashlib.sha256()
        for name in ("model.bin", "config.json", *self.vocabularies):
            with (self.folder / name).open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
        version = import_ctranslate2().__version__
        return {"weights_sha256": digest.hexdigest(), "ctranslate2": version, "compute_type": self.computed_in}

    def check(self, generation: Mapping[str, Any]) -> None:
        """UserError where these settings, or the folder's own, ask for something that CTranslate2 has not."""
        self._config(dict(generation))

    def outputs(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source_ids: Sequence[Sequence[int]],
        *,
        seed: int,
        batch_size: int,
        max_new_tokens: int,
        template: Template | None = None,
        given: Sequence[Sequence[int]] | None = None,
        progress: bool | GenerationBar = False,
        streamer: TextStreamer | None = None,
        **generation: Any,
    ) -> list[Output]:
        """As `generate.generate_outputs`: in the order of `source_ids`, several in a row for each if so many are asked
        for; what is `given` is forced, and the template's stop strings end a text."""
        check_source_ids(source_ids)
        given = given or [given_tokens(self, tokenizer, template)] * len(source_ids)
        config = self._config(generation)
        template, _ = with_stop_strings(template, generation)
        options = self._options(config)
        if config.do_sample and seed != self._seed:
            import_ctranslate2().set_random_seed(seed)
            self._translator, self._seed = self._started(), seed
        prefixes, hidden, most = self._forced(given, config, max_new_tokens)
        options["max_decoding_length"] = max(most, 1)
        options["min_decoding_length"] = min(options["min_decoding_length"], options["max_decoding_length"])
        longest_first = sorted(range(len(source_ids)), key=lambda row: -len(source_ids[row]))
        found: list[list[Output]] = [[] for _ in source_ids]
        bar = progress if isinstance(progress, GenerationBar) else GenerationBar(len(source_ids), shown=progress)
        for start in range(0, len(longest_first), batch_size):
            rows, tokens = longest_first[start : start + batch_size], 0
            of_batch = [prefixes[row] for row in rows]
            for row, hypotheses in zip(
                rows, self._translate(tokenizer, template, source_ids, rows, of_batch, options, streamer), strict=True
            ):
                found[row] = [self._output(tokenizer, template, ids[hidden:most], config) for ids in hypotheses]
                tokens += sum(len(ids[hidden:most]) for ids in hypotheses)
            bar.advance(len(rows), tokens)
        if bar is not progress:
            bar.close()
        return [output for outputs in found for output in outputs]

    def greedy(
        self, sources: Sequence[Sequence[int]], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> list[list[int]]:
        """For each source the likeliest token, one after another: at most so many after start and `prefix`, up to and
        with one of `ends`. No rule of a generation config applies."""
        results = self._plain(sources, prefix, tokens, ends)
        return [[self.ids[token] for token in result.hypotheses[0]][len(prefix) :] for result in results]

    def greedy_with_logits(
        self, source_ids: Sequence[int], prefix: Sequence[int], tokens: int, ends: Sequence[int]
    ) -> tuple[list[int], torch.Tensor]:
        """The same for one source, and the logits (T, V) that each token was taken from."""
        (result,) = self._plain([source_ids], prefix, tokens, ends, return_logits_vocab=True)
        ids = [self.ids[token] for token in result.hypotheses[0]][len(prefix) :]
        return ids, torch.stack([torch.from_numpy(_array(step)) for step in result.logits[0][-len(ids) :]])

    def _plain(
        self,
        sources: Sequence[Sequence[int]],
        prefix: Sequence[int],
        tokens: int,
        ends: Sequence[int],
        **settings: Any,
    ) -> list[Any]:
        return self._translator.translate_batch(
            self._named_sources(sources),
            [self._named(prefix)] * len(sources),
            beam_size=1,
            min_decoding_length=0,
            max_decoding_length=len(prefix) + tokens,
            max_input_length=0,
            end_token=self._named(ends),
            return_end_token=True,
            **settings,
        )

    def _named_sources(self, sources: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[self.source_tokens[token_id] for token_id in ids] for ids in sources]

    def _named(self, ids: Sequence[int]) -> list[str]:
        return [self.tokens[token_id] for token_id in ids]

    def _config(self, generation: dict[str, Any]) -> GenerationConfig:
        """The folder's generation config with these settings, which are greedy unless they say otherwise."""
        if generation.get("mbr_samples"):
            raise UserError(
                "mbr_samples draws without very unlikely tokens (epsilon_cutoff), which CTranslate2 cannot. Drop it, "
                "or use --engine torch with the checkpoint."
            )
        say_what_is_set_aside(self.generation_config, str(self.folder))
        config = settings_of_the_model(self.generation_config)
        unknown = config.update(**with_stop_strings(None, generation)[1])
        known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
        asked = (config.to_diff_dict().keys() & known) - CARRIED - WITHOUT_EFFECT
        refused = sorted({*unknown, *asked})
        if config.early_stopping == "never":
            refused.append("early_stopping='never'")
        if config.do_sample and (config.num_beams or 1) > 1:
            refused.append("sampling within beams")
        if refused:
            raise UserError(
                f"CTranslate2 has no {', '.join(refused)}. Take it out of the settings, or of "
                f"{self.folder}/generation_config.json; or use --engine torch with the checkpoint."
            )
        return config

    def _options(self, config: GenerationConfig) -> dict[str, Any]:
        """In the words of `translate_batch`."""
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        banned = [*(config.bad_words_ids or []), *([token] for token in config.suppress_tokens or [])]
        options = {
            "beam_size": config.num_beams or 1,
            "num_hypotheses": config.num_return_sequences or 1,
            "length_penalty": 1.0 if config.length_penalty is None else config.length_penalty,
            "repetition_penalty": config.repetition_penalty or 1.0,
            "no_repeat_ngram_size": config.no_repeat_ngram_size or 0,
            "suppress_sequences": [self._named(ids) for ids in banned] or None,
            "end_token": self._named([token for token in ends if token is not None]) or None,
            "min_decoding_length": max((config.min_length or 0) - 1, config.min_new_tokens or 0, 0),
            "max_input_length": 0,
            "return_end_token": True,
        }
        if config.do_sample:
            temperature, top_p = config.temperature or 1.0, config.top_p or 1.0
            options |= {"sampling_temperature": temperature, "sampling_topp": top_p}
            options["sampling_topk"] = TOP_K if config.top_k is None else config.top_k
        return options

    def _forced(
        self, given: Sequence[Sequence[int]], config: GenerationConfig, max_new_tokens: int
    ) -> tuple[list[list[int]], int, int]:
        """For each source the ids that stand after the start, whatever the model would write; how many of them are no
        part of the text; and how many tokens may stand there in all."""
        for start, *_ in given:
            if start != self.start:
                raise UserError(
                    f"this export begins to write with {self.tokens[self.start]}, and {self.tokens[start]} is asked "
                    f"for. Use --engine torch with the checkpoint."
                )
        prefixes = [list(ids[1:]) for ids in given]
        hidden = len(prefixes[0]) if prefixes else 0
        most = max(max_new_tokens, hidden + 1) if hidden else max_new_tokens
        if not hidden and config.forced_bos_token_id is not None:
            prefixes = [[config.forced_bos_token_id]] * len(given)
        if config.forced_eos_token_id is not None:
            most -= 1  # where torch writes the end at the cap, whatever the model would have written
        return prefixes, hidden, most

    def _translate(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        source_ids: Sequence[Sequence[int]],
        rows: Sequence[int],
        prefixes: list[list[int]],
        options: dict[str, Any],
        streamer: TextStreamer | None,
    ) -> list[list[list[int]]]:
        """For each of `rows` its outputs as ids, prefix and end included."""
        is_single = options["beam_size"] == options["num_hypotheses"] == 1
        written: list[list[int]] = [[] for _ in rows]

        def after_each(step: Any) -> bool:
            """Shows the token; whether its row holds a stop string."""
            written[step.batch_id].append(step.token_id)
            if streamer and step.step >= len(prefixes[0]):
                streamer.put(torch.tensor([step.token_id]))
            stop = template.stop if template else ()
            text = text_of(tokenizer, written[step.batch_id]) if stop else ""
            return any(words in text for words in stop)

        if streamer:
            streamer.put(torch.tensor([self.start]))  # which it takes for the prompt
        results = self._translator.translate_batch(
            self._named_sources([source_ids[row] for row in rows]),
            [self._named(prefix) for prefix in prefixes],
            callback=after_each if is_single and (streamer or (template and template.stop)) else None,
            **options,
        )
        if streamer:
            streamer.end()
        return [[[self.ids[token] for token in tokens] for tokens in result.hypotheses] for result in results]

    def _output(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        ids: list[int],
        config: GenerationConfig,
    ) -> Output:
        """Of `ids` without what was forced, end included."""
        finished = bool(ids) and ids[-1] in end_tokens(config)
        text = text_of(tokenizer, ids[: len(ids) - finished])
        if template and (cut := template.cut_at_stop(text)) != text:
            text, finished = cut, True
        return Output(text, finished, tuple(ids))


def _array(step: Any) -> Any:
    """CTranslate2's StorageView (V,) as numpy, on the CPU and in float32."""
    import numpy as np

    ctranslate2 = import_ctranslate2()
    if step.device != "cpu":
        step = step.to_device(ctranslate2.Device.cpu)
    if step.dtype != ctranslate2.DataType.float32:
        step = step.to(ctranslate2.DataType.float32)
    return np.array(step)


def load_translator(
    path: str | Path,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    check_template: bool = True,
) -> tuple[Translator, PreTrainedTokenizerBase]:
    """The translator of an exported folder and the tokenizer saved with it. UserError for any other folder.

    `dtype` is what it computes in: "auto" is as it was exported, where the device can.
    """
    import_ctranslate2()
    name, device = os.path.expanduser(path), torch.device(device)
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
    if check_template:
        carried_template(tokenizer)
    return Translator(Path(name), device, "default" if dtype == "auto" else dtype), tokenizer
