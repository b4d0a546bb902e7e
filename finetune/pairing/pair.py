"""One or two decoder-only LLMs in; an encoder-decoder out, and a report that says what became of every weight.

    diptych pair my-llm --out paired                                    both panels are made of one LLM
    diptych pair my-large-llm my-small-llm --out paired --cross_attention separate

    paired/  a Diptych as save_pretrained writes it: weights, config, code, tokenizer with a template of two sides
             pair.json      the report: each tensor's origin, weights and cost of both panels, the proof
             manifest.json  size and XXH3-128 of each file

Weights are read and written tensor by tensor, so that memory holds a shard of them; the proof then loads donor and
result, one after the other. The folder is written beside, proven, flushed and renamed: it is whole, or not there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.pairing.pair_settings import PairSettings

if TYPE_CHECKING:
    from diptych.finetune.model.donor_llm import Donor

REPORT = "pair.json"


def pair(settings: PairSettings) -> dict[str, Any]:
    """Writes the folder, and returns its report.

    UserError where these LLMs make no pair; StorageError where disk or memory have no room.
    """
    import torch  # seconds, that --help need not wait for
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from diptych.finetune.model.donor_llm import open_donor
    from diptych.finetune.model.merge import new_folder
    from diptych.finetune.pairing import pair_report, paired_weights
    from diptych.finetune.pairing.donor_template import donor_prompt
    from diptych.finetune.run_files.whole_folders import write_folder

    transformers.utils.logging.disable_progress_bar()  # one bar is enough
    out = new_folder(settings.out)
    encoder = open_donor(settings.encoder)
    decoder = open_donor(settings.decoder) if settings.decoder else encoder
    tokenizer = decoder.tokenizer
    if decoder is not encoder:
        _check_tokenizers(encoder, decoder)
    eos = _eos_ids(decoder)
    prompt = donor_prompt(tokenizer, decoder.name, eos, decoder.config.pad_token_id)
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
            eos_token_id=_ends(prompt.tokenizer.eos_token_id, eos),
            decoder_start_token_id=prompt.decoder_start_token_id,
        )
        origins = paired_weights.weight_origins(
            config, encoder.weights, decoder.weights, kept, settings.cross_attention_init
        )
    except (ValueError, StrictDataclassError) as error:
        raise UserError(_lines_of(error)) from error
    dtype = decoder.config.dtype or torch.float32
    dtype = dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    config.dtype, config.architectures = dtype, ["DiptychForConditionalGeneration"]

    if settings.proof:
        pair_report.check_memory(origins)
    report = pair_report.describe(settings, encoder, decoder, config, origins, kept, prompt.notes)
    print(pair_report.as_text(report), flush=True)

    def write(folder: Path) -> None:
        _write(folder, config, origins, dtype, settings.seed, decoder, prompt)
        if settings.proof:
            report["proof"] = pair_report.prove(folder, settings, encoder, decoder, config, prompt.tokenizer)
        (folder / REPORT).write_text(json.dumps(report, indent=2, ensure_ascii=False), encoding="utf-8")

    write_folder(out, write, sum(report["weights"]["bytes"].values()))
    return report


def _check_tokenizers(encoder: "Donor", decoder: "Donor") -> None:
    from diptych.finetune.model.donor_llm import tokenizers_differ

    if difference := tokenizers_differ(encoder.tokenizer.get_vocab(), decoder.tokenizer.get_vocab()):
        raise UserError(
            f"{encoder.name} and {decoder.name} have different tokenizers ({difference}). One model reads and writes"
            f" one vocabulary: take two LLMs of one family, or one for both panels."
        )


def _generation_config(donor: "Donor"):
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(donor.name)
    except OSError:  # none there
        return GenerationConfig.from_model_config(donor.config)


def _eos_ids(donor: "Donor") -> list[int]:
    eos = _generation_config(donor).eos_token_id
    eos = donor.config.eos_token_id if eos is None else eos
    return [eos] if isinstance(eos, int) else list(eos or [])


def _ends(eos: int, others: Sequence[int]) -> int | list[int]:
    """The end of a target first; generation stops at the donor's other ends, too."""
    ends = list(dict.fromkeys([eos, *others]))
    return ends[0] if len(ends) == 1 else ends


def _write(folder: Path, config, origins, dtype, seed: int, decoder: "Donor", prompt) -> None:
    import torch
    from tqdm import tqdm
    from transformers.dynamic_module_utils import custom_object_save

    from diptych.finetune.pairing.paired_weights import write_weights
    from diptych.modeling import DiptychForConditionalGeneration

    with torch.device("meta"):
        model = DiptychForConditionalGeneration(config)
    with tqdm(total=len(origins), unit="tensor", desc="writing", file=sys.stderr) as bar:
        write_weights(origins, folder, dtype, seed, on_tensor=lambda origin: bar.update())
    config.save_pretrained(folder)
    custom_object_save(model, folder, config=config)  # the code, for where Diptych is not installed
    generation = _generation_config(decoder)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        setattr(generation, name, getattr(config, name))
    generation.save_pretrained(folder)
    prompt.tokenizer.save_pretrained(folder)


def _lines_of(error: Exception) -> str:
    """The sentence behind a validator's error."""
    return str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")


def run(settings: PairSettings) -> int:
    from diptych.finetune.pairing.pair_report import proof_as_text

    report = pair(settings)
    if settings.proof:
        print(proof_as_text(report["proof"]))
    print(f"{settings.out} is an encoder-decoder; every tensor's origin is in {settings.out}/{REPORT}.")
    print(f"Next: diptych prepare --tokenizer {settings.out} …, diptych train --model {settings.out} …")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("pair", argv)


if __name__ == "__main__":
    raise SystemExit(main())
