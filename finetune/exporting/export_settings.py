"""The settings of `diptych export`."""

from dataclasses import dataclass, field
from typing import Literal

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING, OUTPUT, TEMPLATE
from diptych.finetune.commands.model_settings import check_positive

PRECISIONS = {
    "ctranslate2": ("float32", "bfloat16", "float16", "int8", "int8_float32", "int8_bfloat16", "int8_float16"),
    "onnx": ("float32",),
}
"""Types that weights can be stored in."""


@dataclass(frozen=True)
class ExportSettings:
    """Export a checkpoint to another engine, and compare its outputs."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id. An adapter is merged."""
    to: Literal["ctranslate2", "onnx"] = "ctranslate2"
    """The inference engine."""
    out: str = field(default="", metadata=OUTPUT)
    """New folder for the export."""
    precision: str = "float32"
    """Data type of the stored weights. ctranslate2: float32, bfloat16, float16, int8 (with int8_float32,
    int8_bfloat16, int8_float16: the type of what is not quantized). onnx: float32."""
    rows: str = field(default="", metadata=EXISTING)
    """JSONL file of prompts for the comparison, as `generate` takes them; `output` or `outputs` are references.
    Default: the examples in the template, and built-in sentences."""
    template: str = field(default="", metadata=TEMPLATE)
    """Name or file of a prompt template. Default: the one in the tokenizer. It is saved in the export."""
    max_new_tokens: int = 64
    """Maximum length of outputs in the comparison."""
    batch_size: int = 8
    """Rows per batch in the comparison."""
    device: str = "cpu"
    """Device for the comparison: cpu, or cuda."""

    def __post_init__(self):
        if not self.out:
            raise UserError("out is not set. Name a new folder for the export: --out …")
        check_positive(self, "max_new_tokens", "batch_size")
        if self.precision not in PRECISIONS[self.to]:
            raise UserError(
                f"precision is {self.precision!r}; for {self.to} there is {', '.join(PRECISIONS[self.to])}."
            )
