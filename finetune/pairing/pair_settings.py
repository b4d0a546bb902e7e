"""What `diptych pair` can be told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diptych.data_prep.command_line.arguments import parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING, OUTPUT


@dataclass(frozen=True)
class PairSettings:
    """Make an encoder-decoder of a decoder-only LLM (Llama, Mistral, Qwen, SmolLM, Gemma, OLMo 2 and 3, Granite, Phi-3
    and 4), or of two with one tokenizer."""

    encoder: str = field(metadata=CHECKPOINT)
    """Folder or Hub id of the LLM for the encoder, and for the decoder if no second LLM is given."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the encoder-decoder."""
    decoder: str | None = field(default=None, metadata=CHECKPOINT)
    """The LLM for the decoder; you can also give it as a second name."""
    cross_attention: Literal["merged", "separate"] = "merged"
    """merged: the decoder attends to source and target in one softmax; no weight is new, and the LLM's abilities are
    kept. separate: a new sub-layer, for two LLMs of any depth and width; the model is not usable before this is
    trained."""
    encoder_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """causal: exactly the states of the LLM. bidirectional: each token attends to the whole source; the loss is a
    little higher at first, and lower after some training."""
    cross_attention_init: Literal["copied", "fresh", "zeroed"] = "copied"
    """Initial weights of separate cross-attention: copied from the decoder's self-attention (where shapes agree),
    random (fresh), or copied with a zero output, so that the decoder at first ignores the source."""
    decoder_layers: int | None = None
    """Keep only so many decoder layers, evenly spaced. Faster; the report says how much worse it is at first."""
    encoder_layer_map: list[int] | None = None
    """For merged cross-attention and LLMs of different depth: the encoder depth that each decoder layer reads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the saved weights; auto: as in the LLM for the decoder."""
    text: str | None = field(default=None, metadata=EXISTING)
    """A UTF-8 file for the proof; its first tokens are divided into source and target. Default: a few sentences."""
    proof: bool = True
    """Load the LLM and the result in fp32, one after the other, and compare their outputs. This needs 4 bytes of
    memory per weight; without it, only one shard of weights is loaded at a time."""
    seed: int = 0
    """Seed of random weights."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the encoder-decoder: --out …")
        if self.cross_attention == "merged" and self.cross_attention_init != "copied":
            raise UserError(
                "merged cross-attention has no weights of its own. Drop cross_attention_init, or take"
                " --cross_attention separate."
            )
        if self.cross_attention == "separate" and self.encoder_layer_map:
            raise UserError(
                "encoder_layer_map needs merged cross-attention. Drop it, or take --cross_attention merged."
            )


def parse_pair(argv: Sequence[str]) -> PairSettings:
    """The second LLM may be given as a second name, without --decoder."""
    argv = list(argv)
    if len(argv) > 1 and not any(word.startswith("-") for word in argv[:2]):
        argv = [argv[0], "--decoder", *argv[1:]]
    return parse(
        PairSettings, "diptych pair", argv, "diptych pair ENCODER [DECODER] --out FOLDER [--SETTING VALUE ...]"
    )
