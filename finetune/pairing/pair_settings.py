"""What `diptych pair` can be told."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from diptych.data_prep.command_line.arguments import parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING, OUTPUT


@dataclass(frozen=True)
class PairSettings:
    """Make an encoder-decoder of a decoder-only LLM (Llama, Mistral, Qwen2, Qwen3, SmolLM3 and their kin), or of two
    with one tokenizer."""

    encoder: str = field(metadata=CHECKPOINT)
    """Folder or Hub id of the LLM that the encoder is made of, and the decoder, too, unless there is a second one."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the encoder-decoder."""
    decoder: str | None = field(default=None, metadata=CHECKPOINT)
    """The LLM that the decoder is made of; it may also be given as a second name."""
    cross_attention: Literal["merged", "separate"] = "merged"
    """How the decoder reads. merged: in the softmax of its self-attention, source and target as one text: nothing that
    the LLM knows is lost, no weight is new. separate: by a sub-layer of its own, for panels of any depth and width; it
    has to be trained before the model is worth anything."""
    encoder_attention: Literal["bidirectional", "causal"] = "bidirectional"
    """What an encoder's token sees. causal is the LLM as it was, to the digit; bidirectional sees the whole source,
    which costs little at once and pays after some training."""
    cross_attention_init: Literal["copied", "fresh", "zeroed"] = "copied"
    """What separate cross-attention begins with: the decoder's self-attention (where shapes agree), random weights, or
    the former with a zero output, so that the decoder at first writes as if there were no source."""
    decoder_layers: int | None = None
    """Keep so many of the decoder's layers, evenly spaced. Faster; the report says how much worse it is at first."""
    encoder_layer_map: list[int] | None = None
    """For the merged hinge and LLMs of unequal depth: after how many encoder layers each decoder layer reads."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the weights are saved in; auto: as the decoder's donor."""
    text: str | None = field(default=None, metadata=EXISTING)
    """A UTF-8 file for the proof: its first tokens are halved into source and target. By default a few sentences."""
    proof: bool = True
    """Load donor and result in fp32, one after the other, and compare what they compute. It takes 4 bytes a weight of
    memory; without it, nothing but a shard of weights is ever loaded."""
    seed: int = 0
    """Of fresh weights."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the encoder-decoder: --out …")
        if self.cross_attention == "merged" and self.cross_attention_init != "copied":
            raise UserError(
                "the merged hinge has no cross-attention to begin with anything. Drop cross_attention_init, or take"
                " --cross_attention separate."
            )
        if self.cross_attention == "separate" and self.encoder_layer_map:
            raise UserError(
                "encoder_layer_map belongs to the merged hinge. Drop it, or take --cross_attention merged."
            )


def parse_pair(argv: Sequence[str]) -> PairSettings:
    """The second LLM may be given as a second name, without --decoder."""
    argv = list(argv)
    if len(argv) > 1 and not any(word.startswith("-") for word in argv[:2]):
        argv = [argv[0], "--decoder", *argv[1:]]
    return parse(
        PairSettings, "diptych pair", argv, "diptych pair ENCODER [DECODER] --out FOLDER [--SETTING VALUE ...]"
    )
