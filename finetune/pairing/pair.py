"""One or two decoder-only LLMs in; an encoder-decoder out, and a report that says where every weight is from.

    diptych pair my-llm --out paired                                    both panels are made of one LLM
    diptych pair my-large-llm my-small-llm --out paired --cross_attention separate

    paired/  a Diptych as save_pretrained writes it: weights, config, code, tokenizer with a template of two sides
             pair.json      the report: each tensor's origin, the weights of both panels, the proof
             manifest.json  size and XXH3-128 of each file

Weights are read and written tensor by tensor, so that memory holds a shard of them. Then the proof loads donor and
result, one after the other. The folder is written under another name, proven, flushed and renamed: it is complete, or
not there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.model.donor_llm import Donor, open_donor, tokenizers_differ
from diptych.finetune.model.merge import new_folder
from diptych.finetune.pairing import pair_report, paired_weights
from diptych.finetune.pairing.donor_template import DonorPrompt, donor_prompt
from diptych.finetune.pairing.pair_report import Pair
from diptych.finetune.pairing.pair_settings import PairSettings
from diptych.finetune.run_files.atomic_folders import write_folder
from diptych.modeling import DiptychForConditionalGeneration

REPORT = "pair.json"


def pair(settings: PairSettings) -> dict[str, Any]:
    """Writes the folder, and returns its report.

    Raises:
        UserError: these LLMs make no pair.
        StorageError: disk or memory have no room.
    """
    transformers.utils.logging.disable_progress_bar()  # pair has one of its own
    out = new_folder(settings.out)
    encoder = open_donor(settings.encoder)
    decoder = open_donor(settings.decoder) if settings.decoder else encoder
    if decoder is not encoder:
        _check_tokenizers(encoder, decoder)
    ends = _generation_config(decoder).eos_token_id
    ends = decoder.config.eos_token_id if ends is None else ends
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    prompt = donor_prompt(decoder.tokenizer, decoder.name, ends, decoder.config.pad_token_id)
    it = _plan(settings, encoder, decoder, prompt, ends)
    if settings.proof:
        pair_report.check_memory(it.origins)
    report = pair_report.describe(it, prompt.notes)
    print(pair_report.as_text(report), flush=True)

    def write(folder: Path) -> None:
        _write(folder, it, prompt)
        if settings.proof:
            report["proof"] = pair_report.prove(folder, it, prompt.tokenizer)
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")

    write_folder(out, write, sum(report["weights"]["bytes"].values()))
    return report


def _plan(settings: PairSettings, encoder: Donor, decoder: Donor, prompt: DonorPrompt, ends: Sequence[int]) -> Pair:
    """The config of the result, and the origin of each of its weights."""
    eos_token_ids = list(dict.fromkeys([prompt.tokenizer.eos_token_id, *ends]))  # generation stops at any of them
    try:
        kept = None
        if settings.decoder_layers is not None:
            kept = paired_weights.evenly_spaced(decoder.config.num_hidden_layers, settings.decoder_layers)
        config = paired_weights.paired_config(
            encoder.config,
            decoder.config,
            settings.cross_attention,
            kept,
            settings.encoder_layer_map,
            lookahead=0 if settings.encoder_attention == "causal" else None,
            one_donor=decoder is encoder,
            pad_token_id=prompt.tokenizer.pad_token_id,
            bos_token_id=prompt.tokenizer.bos_token_id,
            eos_token_id=eos_token_ids[0] if len(eos_token_ids) == 1 else eos_token_ids,
            decoder_start_token_id=prompt.decoder_start_token_id,
        )
        origins = paired_weights.weight_origins(
            config, encoder.weights, decoder.weights, kept, settings.cross_attention_init
        )
    except (ValueError, StrictDataclassError) as error:
        last_line = str(error).strip().splitlines()[-1].strip()  # behind what a validator puts before it
        raise UserError(last_line.removeprefix("ValueError: ")) from error
    own_dtype = decoder.config.dtype or torch.float32
    config.dtype = own_dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    config.architectures = ["DiptychForConditionalGeneration"]
    return Pair(settings, encoder, decoder, config, origins, kept)


def _check_tokenizers(encoder: Donor, decoder: Donor) -> None:
    if difference := tokenizers_differ(encoder.tokenizer.get_vocab(), decoder.tokenizer.get_vocab()):
        raise UserError(
            f"{encoder.name} and {decoder.name} have different tokenizers ({difference}). One model reads and writes"
            f" one vocabulary: take two LLMs of one family, or one for both panels."
        )


def _generation_config(donor: Donor) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(donor.name)
    except OSError:  # there is no generation_config.json
        return GenerationConfig.from_model_config(donor.config)


def _write(folder: Path, it: Pair, prompt: DonorPrompt) -> None:
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(it.config)
    with tqdm(total=len(it.origins), unit="tensor", desc="writing", file=sys.stderr) as bar:
        paired_weights.write_weights(
            it.origins, folder, it.config.dtype, it.settings.seed, on_tensor=lambda origin: bar.update()
        )
    it.config.save_pretrained(folder)
    custom_object_save(model, folder, config=it.config)  # the code, for where Diptych is not installed
    generation = _generation_config(it.decoder)
    for name in pair_report.SPECIAL_TOKENS:
        setattr(generation, name, getattr(it.config, name))
    generation.save_pretrained(folder)
    prompt.tokenizer.save_pretrained(folder)


def run(settings: PairSettings) -> int:
    report = pair(settings)
    if settings.proof:
        print(pair_report.proof_as_text(report["proof"]))
    print(f"{settings.out} is an encoder-decoder; every tensor's origin is in {settings.out}/{REPORT}.")
    print(f"Next: diptych prepare --tokenizer {settings.out} …, diptych train --model {settings.out} …")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("pair", argv)


if __name__ == "__main__":
    raise SystemExit(main())
