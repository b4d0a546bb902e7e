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

import codecs
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import custom_object_save

from diptych.data_prep.command_line.errors import UserError, counted, excerpt, library_errors
from diptych.data_prep.text_to_ids.checkpoint_config import read_generation_config
from diptych.finetune.commands.exit_codes import StorageError
from diptych.finetune.inference.generation_config import end_tokens
from diptych.finetune.model.donor_llm import Donor, check_weights, open_donor, tokenizers_differ
from diptych.finetune.model.loading import check_embedding_rows, without_load_report
from diptych.finetune.model.merge import new_folder
from diptych.finetune.model.untrusted_files import check_token_settings, savable
from diptych.finetune.pairing import paired_weights
from diptych.finetune.pairing.donor_template import DonorPrompt, donor_prompt
from diptych.finetune.pairing.pair_settings import PairSettings
from diptych.finetune.pairing.paired_weights import WeightOrigin, tied_names
from diptych.finetune.run_files.atomic_folders import write_folder
from diptych.modeling import DiptychConfig, DiptychForConditionalGeneration

REPORT = "pair.json"
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
TOLERANCE = 1e-4
"""Of logits in fp32 that are 10 or less; of larger ones in proportion, as rounding goes."""
PROOF_TOKENS, PROOF_BYTES = 256, 2**17
PROOF_TEXT = """A diptych is a picture on two panels that are joined by a hinge. Closed, the panels protect each
other; open, they are read together, the left one first. Painters used the form for journeys: a saint on one side,
the donor who paid for it on the other, small and kneeling. The hinge had to be strong, since the panels were of oak,
and light enough to be carried. 두 폭의 그림은 경첩으로 이어져 있다. 왼쪽을 먼저 읽고, 오른쪽을 나중에 읽는다.
What the left panel shows, the right one answers: 3 windows there, 3 mirrors here; a closed gate, an open hand. Someone
who sees only one of them sees a good picture. Someone who sees both understands why it was painted, and for whom, and
what the painter thought that the two had to say to each other after the panels were shut again for the night."""


class Pair(NamedTuple):
    """What is made of which LLMs."""

    settings: PairSettings
    encoder: Donor
    decoder: Donor
    """The same object as `encoder` if one LLM is both."""
    config: DiptychConfig
    generation: GenerationConfig
    origins: Sequence[WeightOrigin]
    kept: Sequence[int] | None
    """The decoder's layers, if not all are kept."""

    @property
    def is_merged(self) -> bool:
        return self.config.decoder.cross_attention == "merged"


def pair(settings: PairSettings) -> dict[str, Any]:
    """Writes the folder, and returns its report. UserError: these LLMs make no pair; StorageError: disk or memory have
    no room."""
    transformers.utils.logging.disable_progress_bar()  # pair has one of its own
    out = new_folder(settings.out)
    encoder = open_donor(settings.encoder)
    decoder = open_donor(settings.decoder) if settings.decoder else encoder
    unused = []
    for donor in dict.fromkeys((encoder, decoder)):
        if fault := paired_weights.kind_fault(donor.config):
            raise UserError(f"{donor.name}: {fault}")
        if others := [name for name in check_weights(donor) if not name.endswith("rotary_emb.inv_freq")]:
            what = f"{counted(len(others), 'tensor')} of no layer that its config has: {excerpt(', '.join(others))}"
            unused.append(f"Not used of {donor.name}: {what}")
    # One model reads and writes one vocabulary.
    if difference := tokenizers_differ(encoder.tokenizer.get_vocab(), decoder.tokenizer.get_vocab()):
        raise UserError(
            f"{encoder.name} and {decoder.name} have different tokenizers ({difference}). Take two LLMs of one family,"
            f" or one for both panels."
        )
    ends = end_tokens(_generation_config(decoder))
    if wrong := [end for end in ends if type(end) not in (int, NoneType)]:
        raise UserError(
            f"eos_token_id in {decoder.name}'s generation_config.json has {excerpt(wrong[0], 40)!r}, and a token is a"
            f" whole number. Correct it."
        )
    # Configs may say -1, or name a token beyond the vocabulary.
    ends = [end for end in ends if end is not None and 0 <= end < len(decoder.tokenizer)]
    prompt = donor_prompt(decoder.tokenizer, decoder.name, ends, decoder.config.pad_token_id)
    check_embedding_rows(decoder.model, prompt.tokenizer, decoder.name)
    it = _plan(settings, encoder, decoder, prompt, ends)
    needed = 4 * sum(math.prod(origin.shape) for origin in it.origins)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if settings.proof and needed > free:
        raise StorageError(
            f"the proof takes {needed:,} bytes of memory, and {free:,} are left. Pair on a larger machine, or without"
            f" it: --proof false"
        )
    report = describe(it, [*unused, *prompt.notes])
    print(as_text(report), flush=True)

    def write(folder: Path) -> None:
        _write(folder, it, prompt)
        if settings.proof:
            report["proof"] = prove(folder, it, prompt.tokenizer)
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
    generation = _generation_config(decoder)
    for name in SPECIAL_TOKENS:
        setattr(generation, name, getattr(config, name))
    check_token_settings(generation, config.vocab_size, decoder.name)
    return Pair(settings, encoder, decoder, config, savable(generation), origins, kept)


def _generation_config(donor: Donor) -> GenerationConfig:
    """With end tokens, if the LLM's configs name any."""
    found = read_generation_config(donor.name) or GenerationConfig.from_model_config(donor.config)
    if found.eos_token_id is None:
        found.eos_token_id = donor.config.eos_token_id
    return found


def _write(folder: Path, it: Pair, prompt: DonorPrompt) -> None:
    with torch.device("meta"):
        model = DiptychForConditionalGeneration(it.config)
    paired_weights.write_weights(it.origins, folder, it.config.dtype, it.settings.seed)
    it.config.save_pretrained(folder)
    custom_object_save(model, folder, config=it.config)  # the code, for where Diptych is not installed
    it.generation.save_pretrained(folder)
    prompt.tokenizer.save_pretrained(folder)


def run(settings: PairSettings) -> int:
    report = pair(settings)
    if settings.proof:
        print(proof_as_text(report["proof"]))
    print(f"{settings.out} is an encoder-decoder; every tensor's origin is in {settings.out}/{REPORT}.")
    print(f"Next: diptych prepare --tokenizer {settings.out} …, diptych train --model {settings.out} …")
    return 0


def describe(it: Pair, notes: Sequence[str]) -> dict[str, Any]:
    """All but the proof, before anything is written."""
    config = it.config
    tied = [{"name": name, "kind": "tied", "to": to} for name, to in tied_names(config).items()]
    return {
        "donors": {"encoder": it.encoder.name, "decoder": it.decoder.name},
        "cross_attention": config.decoder.cross_attention,
        "encoder_attention": it.settings.encoder_attention,
        "layers": {
            "encoder": config.encoder.num_hidden_layers,
            "decoder": config.decoder.num_hidden_layers,
            "decoder_kept": None if it.kept is None else list(it.kept),
            "encoder_layer_map": config.decoder.encoder_layer_map,
        },
        "special_tokens": {name: getattr(config, name) for name in SPECIAL_TOKENS},
        "weights": _weights(it, len(tied)),
        "notes": [*notes, *_notes(it)],
        "tensors": [
            {"name": origin.name, "kind": origin.kind, "shape": list(origin.shape), "from": origin.donor_name}
            | ({"donor": origin.panel} if origin.donor_name else {})
            | ({"rows": [origin.rows.start, origin.rows.stop]} if origin.rows != slice(None) else {})
            for origin in it.origins
        ]
        + tied,
    }


def _notes(it: Pair) -> list[str]:
    notes = []
    panel = it.config.encoder
    if panel.windowed_layers and panel.lookahead is None:
        notes.append(
            f"In {len(panel.windowed_layers)} layers of the encoder a token attends to {panel.attention_window - 1:,}"
            f" tokens before it, as in the LLM, and to as many behind it."
        )
    rope = it.config.decoder.rope_parameters
    if rope["rope_type"] == "longrope":
        notes.append(
            f"Positions are longrope: matched while source and target together have at most"
            f" {rope['original_max_position_embeddings']:,} tokens, or the source alone has more."
        )
    layers, depth = it.config.encoder.num_hidden_layers, it.encoder.config.num_hidden_layers
    if layers < depth:
        which = f"layer {layers}" if layers == depth - 1 else f"layers {layers} to {depth - 1}"
        notes.append(f"The encoder has no {which} and no final norm: no decoder layer would read them.")
    if it.kept is not None:
        notes.append(
            f"The decoder keeps {len(it.kept)} of {it.decoder.config.num_hidden_layers} layers."
            " The loss on the proof's text, below, says what that costs before any training."
        )
    return notes


def _weights(it: Pair, tied: int) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for origin in it.origins:
        sizes[origin.panel] += math.prod(origin.shape)
    return {
        "count": dict(sizes),
        "bytes": {panel: size * it.config.dtype.itemsize for panel, size in sizes.items()},
        "tensors": dict(Counter(origin.kind for origin in it.origins)) | {"tied": tied},
        "fresh": [origin.name for origin in it.origins if origin.kind == "fresh"],
        "reshaped": [origin.name for origin in it.origins if origin.kind == "reshaped"],
    }


def as_text(report: dict[str, Any]) -> str:
    """What is printed before the weights are written."""
    weights, layers, fresh = report["weights"], report["layers"], report["weights"]["fresh"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in weights["tensors"].items() if count)
    lines = [
        f"LLMs      encoder {report['donors']['encoder']}, decoder {report['donors']['decoder']}",
        f"attention cross-attention {report['cross_attention']}, encoder {report['encoder_attention']}",
        f"layers    {layers['encoder']} that read, {layers['decoder']} that write",
        f"tensors   {kinds}",
        f"weights   encoder {weights['count']['encoder']:,}, decoder {weights['count'].get('decoder', 0):,}"
        + (" (tied tables count as the encoder's)" if weights["tensors"]["tied"] else ""),
    ]
    if fresh:
        shown = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
        lines.append(f"fresh     {shown}: to be trained before use")
    return "\n".join([*lines, *(f"note      {note}" for note in report["notes"])])


@torch.no_grad()
def prove(folder: Path, it: Pair, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Compares donor and result on the same tokens, in fp32; one of them is in memory at a time. UserError: what must
    agree differs; the folder is then not kept."""
    config, settings = it.config, it.settings
    source, target = _halves(settings.text, tokenizer)
    depth = config.encoder.num_hidden_layers
    with library_errors("the LLM itself cannot compute the proof", "Correct its config.json, or take another LLM."):
        llm = _load(AutoModelForCausalLM, it.decoder.name, config.dtype)
        continued = llm(torch.cat((source, target), dim=1)).logits[:, source.shape[1] :]
        alone = llm(target).logits
        if it.encoder is not it.decoder:
            del llm
            llm = _load(AutoModelForCausalLM, it.encoder.name, config.dtype)
        read = llm(source, output_hidden_states=True).hidden_states[depth]  # the last one of all is normed
    norm = llm.get_decoder().norm if depth == it.encoder.config.num_hidden_layers else torch.nn.Identity()
    del llm

    model = _load(AutoModelForSeq2SeqLM, str(folder), config.dtype)
    inputs = {"input_ids": source, "decoder_input_ids": target}
    losses = {"donor": _loss(continued, target), "paired": _loss(model(**inputs).logits, target)}
    model.config.encoder.lookahead = 0
    causal = model(**inputs).logits
    losses["paired, causal encoder"] = _loss(causal, target)
    states = model.get_encoder()(source).last_hidden_state
    if it.is_merged:  # then the encoder has no norm of its own
        states = norm(states)
    proof: dict[str, Any] = {
        "tokens": {"source": source.shape[1], "target": target.shape[1]},
        "loss": losses,
        "encoder_state_difference": _largest(states - read),
        "logit_difference": _largest(causal - continued),
        "largest_logit": _largest(continued),
    }
    _check("encoder_state_difference", proof, _largest(read))
    is_whole = it.encoder is it.decoder and it.kept is None and settings.encoder_layer_map is None
    if it.is_merged and is_whole:
        proof["is_lossless"] = True
        _check("logit_difference", proof, proof["largest_logit"])
    if not it.is_merged and it.kept is None:
        for layer in model.get_decoder().layers:
            for parameter in layer.cross_attn.o_proj.parameters():
                parameter.zero_()
        proof["unread_source_logit_difference"] = _largest(model(**inputs).logits - alone)
        _check("unread_source_logit_difference", proof, _largest(alone))
    return proof


def _halves(file: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """The first tokens of the text, (1, S) as source and (1, T) as target."""
    text = PROOF_TEXT
    if file:
        try:
            with Path(file).expanduser().open("rb") as stream:
                text = codecs.getincrementaldecoder("utf-8")().decode(stream.read(PROOF_BYTES))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: invalid UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:PROOF_TOKENS]
    if len(ids) < 4:
        raise UserError(f"{file or 'the text'} has {len(ids)} tokens; a proof needs 4 or more. Give more text.")
    half = len(ids) // 2
    return torch.tensor([ids[:half]]), torch.tensor([ids[half:]])


def _load(auto_class: type, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """In fp32, with weights that are rounded to `dtype`."""
    with without_load_report():
        model = auto_class.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model.eval()


def _loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Nats per token, over all target tokens but the first."""
    return F.cross_entropy(logits[0, :-1], target[0, 1:]).item()


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def _check(name: str, proof: dict[str, Any], size: float) -> None:
    if not proof[name] <= TOLERANCE * max(1.0, size / 10):
        raise UserError(
            f"the result does not compute what the LLM does: {name.replace('_', ' ')} {proof[name]:.2e}, where at most"
            f" {TOLERANCE} is rounding. Nothing was written. Please report it, with the LLM's config.json."
        )


def proof_as_text(proof: dict[str, Any]) -> str:
    tokens = f"on {proof['tokens']['source']} source and {proof['tokens']['target']} target tokens, fp32"
    states = proof["encoder_state_difference"]
    lines = [f"proof     causal encoder: states differ from the LLM's by at most {states:.1e}"]
    if proof.get("is_lossless"):
        lines.append(f"          causal encoder: logits by at most {proof['logit_difference']:.1e} {tokens}")
    if "unread_source_logit_difference" in proof:
        difference = proof["unread_source_logit_difference"]
        lines.append(f"          cross-attention at zero: logits as the LLM's without a source, to {difference:.1e}")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in proof["loss"].items())
    lines.append(f"          loss {tokens}, nats/token: {losses}")
    return "\n".join(lines)
