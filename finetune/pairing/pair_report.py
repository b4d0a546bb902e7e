"""What `diptych pair` says of its result: where each tensor is from, what a token costs, and the proof.

    weights   encoder 440,467,456   decoder 596,049,920   of them shared 155,582,464   fresh 0
    cost      read a token 0.88 GFLOP (donor 0.88), write one 1.19 (donor 1.19)
    proof     merged, causal: logits differ by at most 2.1e-05 on 128 source and 128 target tokens

A cost is the multiplications and additions of the weight matrices that a token passes, twice their elements; what
attention to other tokens costs comes on top, in donor and result alike.
"""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import StorageError
from diptych.finetune.pairing.paired_weights import WeightOrigin, sliding_window, tied_names
from diptych.modeling import DiptychConfig

TOLERANCE = 1e-4
"""Of logits in fp32 that are 10 or less; of larger ones in proportion, as rounding goes."""
PROOF_TOKENS = 256
PROOF_TEXT = """A diptych is a picture on two panels that are joined by a hinge. Closed, the panels protect each
other; open, they are read together, the left one first. Painters used the form for journeys: a saint on one side,
the donor who paid for it on the other, small and kneeling. The hinge had to be strong, since the panels were of oak,
and light enough to be carried. 두 폭의 그림은 경첩으로 이어져 있다. 왼쪽을 먼저 읽고, 오른쪽을 나중에 읽는다.
What the left panel shows, the right one answers: 3 windows there, 3 mirrors here; a closed gate, an open hand. Someone
who sees only one of them sees a good picture. Someone who sees both understands why it was painted, and for whom, and
what the painter thought that the two had to say to each other after the panels were shut again for the night."""


def describe(
    settings,
    encoder,
    decoder,
    config: DiptychConfig,
    origins: Sequence[WeightOrigin],
    kept: Sequence[int] | None,
    notes,
) -> dict[str, Any]:
    """All but the proof, before anything is written."""
    notes = [*notes, *_notes(encoder, decoder, config, kept)]
    return {
        "donors": {"encoder": encoder.name, "decoder": decoder.name},
        "cross_attention": config.decoder.cross_attention,
        "encoder_attention": settings.encoder_attention,
        "layers": {
            "encoder": config.encoder.num_hidden_layers,
            "decoder": config.decoder.num_hidden_layers,
            "decoder_kept": None if kept is None else list(kept),
            "encoder_layer_map": config.decoder.encoder_layer_map,
        },
        "special_tokens": {
            name: getattr(config, name)
            for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
        },
        "weights": _weights(config, origins),
        "cost": _cost(config, origins, decoder.config),
        "notes": notes,
        "tensors": [_tensor(origin) for origin in origins]
        + [{"name": name, "kind": "tied", "to": to} for name, to in tied_names(config).items()],
    }


def _tensor(origin: WeightOrigin) -> dict[str, Any]:
    described = {"name": origin.name, "kind": origin.kind, "shape": list(origin.shape), "from": origin.donor_name}
    return described | ({"donor": origin.panel} if origin.donor_name else {})


def _notes(encoder, decoder, config: DiptychConfig, kept) -> list[str]:
    notes = []
    for donor in dict.fromkeys((encoder, decoder)):
        if window := sliding_window(donor.config):
            notes.append(f"{donor.name} attends to the last {window:,} tokens: matched up to there, not beyond.")
    depth = encoder.config.num_hidden_layers
    if config.encoder.num_hidden_layers < depth:
        first, last = config.encoder.num_hidden_layers, depth - 1
        which = f"layer {first}" if first == last else f"layers {first} to {last}"
        notes.append(f"The encoder has no {which} and no final norm: no decoder layer would read them.")
    if kept is not None:
        notes.append(
            f"The decoder keeps {len(kept)} of {decoder.config.num_hidden_layers} layers."
            " The loss on the proof's text, below, says what that costs before any training."
        )
    return notes


def _weights(config: DiptychConfig, origins: Sequence[WeightOrigin]) -> dict[str, Any]:
    sizes: Counter[str] = Counter()
    for origin in origins:
        sizes[origin.panel] += math.prod(origin.shape)
    itemsize = config.dtype.itemsize
    return {
        "count": dict(sizes),
        "bytes": {panel: size * itemsize for panel, size in sizes.items()},
        "tensors": dict(Counter(origin.kind for origin in origins)) | {"tied": len(tied_names(config))},
        "fresh": [origin.name for origin in origins if origin.kind == "fresh"],
        "reshaped": [origin.name for origin in origins if origin.kind == "reshaped"],
    }


def _cost(config: DiptychConfig, origins: Sequence[WeightOrigin], donor) -> dict[str, dict[str, float]]:
    """FLOP a token, and bytes of keys and values a source token, of the result and of its decoder's donor."""
    per_source = per_target = donor_layers = 0
    for origin in origins:
        size = math.prod(origin.shape)
        if len(origin.shape) < 2 or "embed_tokens" in origin.name or origin.name == "lm_head.weight":
            continue
        is_hinge = (".self_attn." if config.decoder.cross_attention == "merged" else ".cross_attn.") in origin.name
        is_key_or_value = is_hinge and (".k_proj." in origin.name or ".v_proj." in origin.name)
        if origin.panel == "encoder":
            per_source += size
        else:
            per_source += size if is_key_or_value else 0
            is_separate_key = is_key_or_value and config.decoder.cross_attention == "separate"
            per_target += 0 if is_separate_key else size
            donor_layers += 0 if ".cross_attn." in origin.name else size
    donor_layers *= donor.num_hidden_layers / config.decoder.num_hidden_layers
    head = config.vocab_size * config.decoder.hidden_size
    keys = 2 * config.decoder.num_key_value_heads * config.decoder.head_dim * config.dtype.itemsize
    return {
        "read_a_token_flop": {"paired": 2.0 * per_source, "donor": 2.0 * donor_layers},
        "write_a_token_flop": {"paired": 2.0 * (per_target + head), "donor": 2.0 * (donor_layers + head)},
        "cached_bytes_a_source_token": {
            "paired": float(keys * config.decoder.num_hidden_layers),
            "donor": float(keys * donor.num_hidden_layers),
        },
    }


def as_text(report: dict[str, Any]) -> str:
    """What a person reads before the weights are written."""
    weights, cost, layers = report["weights"], report["cost"], report["layers"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in weights["tensors"].items() if count)
    lines = [
        f"donors    encoder {report['donors']['encoder']}, decoder {report['donors']['decoder']}",
        f"hinge     {report['cross_attention']}, encoder {report['encoder_attention']}",
        f"layers    {layers['encoder']} that read, {layers['decoder']} that write",
        f"tensors   {kinds}",
        f"weights   encoder {weights['count']['encoder']:,}, decoder {weights['count'].get('decoder', 0):,}"
        + (" (tied tables count as the encoder's)" if weights["tensors"]["tied"] else ""),
    ]
    for name, what in (("read_a_token_flop", "reading"), ("write_a_token_flop", "writing")):
        paired, donor = cost[name]["paired"], cost[name]["donor"]
        lines.append(f"cost      {what} a token {paired / 1e9:,.3f} GFLOP, {paired / donor:.2f} of the donor's")
    cached = cost["cached_bytes_a_source_token"]
    share = cached["paired"] / cached["donor"]
    lines.append(f"          keys and values {cached['paired']:,.0f} bytes a source token, {share:.2f} of the donor's")
    fresh = weights["fresh"]
    if fresh:
        shown = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
        lines.append(f"fresh     {shown}: to be trained before use")
    lines += [f"note      {note}" for note in report["notes"]]
    return "\n".join(lines)


def check_memory(origins: Sequence[WeightOrigin]) -> None:
    """StorageError where the proof would not fit."""
    needed = 4 * sum(math.prod(origin.shape) for origin in origins)
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > free:
        raise StorageError(
            f"the proof takes {needed:,} bytes of memory, and {free:,} are left. Pair on a larger machine, or without"
            f" it: --proof false"
        )


@torch.no_grad()
def prove(folder: Path, settings, encoder, decoder, config: DiptychConfig, tokenizer) -> dict[str, Any]:
    """Donor and result on the same tokens, in fp32, one after the other in memory.

    UserError where what must agree does not: then the folder is not kept.
    """
    source, target = _halves(settings, tokenizer)
    llm = _load(AutoModelForCausalLM, decoder.name, config.dtype)
    continued = llm(torch.cat((source, target), dim=1)).logits[:, source.shape[1] :]
    alone = llm(target).logits
    if encoder is not decoder:
        del llm
        llm = _load(AutoModelForCausalLM, encoder.name, config.dtype)
    depth = config.encoder.num_hidden_layers
    read = llm(source, output_hidden_states=True).hidden_states[depth]  # the last of all is normed
    norm = llm.get_decoder().norm if depth == encoder.config.num_hidden_layers else torch.nn.Identity()
    del llm

    model = _load(AutoModelForSeq2SeqLM, str(folder), config.dtype)
    inputs = {"input_ids": source, "decoder_input_ids": target}
    losses = {"donor": _loss(continued, target), "paired": _loss(model(**inputs).logits, target)}
    model.config.encoder.lookahead = 0
    causal = model(**inputs).logits
    losses["paired, causal encoder"] = _loss(causal, target)
    states = model.get_encoder()(source).last_hidden_state
    if config.encoder.cross_attention == "merged":  # whose encoder has no norm of its own
        states = norm(states)
    proof: dict[str, Any] = {
        "tokens": {"source": source.shape[1], "target": target.shape[1]},
        "loss": losses,
        "encoder_state_difference": _largest(states - read),
        "logit_difference": _largest(causal - continued),
        "largest_logit": _largest(continued),
    }
    _demand("encoder_state_difference", proof, _largest(read))
    is_whole = encoder is decoder and settings.decoder_layers is None and settings.encoder_layer_map is None
    if config.encoder.cross_attention == "merged" and is_whole:
        proof["is_lossless"] = True
        _demand("logit_difference", proof, proof["largest_logit"])
    if config.encoder.cross_attention == "separate" and settings.decoder_layers is None:
        for layer in model.get_decoder().layers:
            for parameter in layer.cross_attn.o_proj.parameters():
                parameter.zero_()
        proof["unread_source_logit_difference"] = _largest(model(**inputs).logits - alone)
        _demand("unread_source_logit_difference", proof, _largest(alone))
    return proof


def _halves(settings, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    text = PROOF_TEXT
    if settings.text:
        try:
            text = Path(settings.text).expanduser().read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{settings.text}: invalid UTF-8 at byte {error.start}. Save it as UTF-8.") from None
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:PROOF_TOKENS]
    if len(ids) < 4:
        raise UserError(
            f"{settings.text or 'the text'} has {len(ids)} tokens; a proof needs 4 or more. Give more text."
        )
    half = len(ids) // 2
    return torch.tensor([ids[:half]]), torch.tensor([ids[half:]])


def _load(auto_class: type, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """In fp32, with what the weights are once they are rounded to `dtype`."""
    model = auto_class.from_pretrained(name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))
    return model.eval()


def _loss(logits: torch.Tensor, target: torch.Tensor) -> float:
    """Nats a token, of each target token but the first, given what went before it."""
    return F.cross_entropy(logits[0, :-1], target[0, 1:]).item()


def _largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def _demand(name: str, proof: dict[str, Any], size: float) -> None:
    if not proof[name] <= TOLERANCE * max(1.0, size / 10):
        raise UserError(
            f"the result is not what its donor is: {name.replace('_', ' ')} {proof[name]:.2e}, where at most"
            f" {TOLERANCE} is rounding. Nothing was written. Please report it, with the donor's config.json."
        )


def proof_as_text(proof: dict[str, Any]) -> str:
    tokens = f"on {proof['tokens']['source']} source and {proof['tokens']['target']} target tokens, fp32"
    states = proof["encoder_state_difference"]
    lines = [f"proof     causal encoder: states differ from the donor's by at most {states:.1e}"]
    if proof.get("is_lossless"):
        lines.append(f"          causal encoder: logits by at most {proof['logit_difference']:.1e} {tokens}")
    if "unread_source_logit_difference" in proof:
        difference = proof["unread_source_logit_difference"]
        lines.append(f"          cross-attention at zero: logits as the donor's without a source, to {difference:.1e}")
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in proof["loss"].items())
    lines.append(f"          loss {tokens}, nats/token: {losses}")
    return "\n".join(lines)
