"""What `diptych inspect` can be told."""

from dataclasses import dataclass, field

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, OUTPUT
from diptych.finetune.commands.model_settings import PromptSettings, check_positive


@dataclass(frozen=True)
class InspectSettings(PromptSettings):
    """A page that shows what an encoder-decoder computes for one input, step by step."""

    instruction: str = field(default="", metadata={"instead_of": ("source",)})
    """The instruction, as for `diptych generate`; the template makes the source from it."""
    input: str = ""
    """The text to which the instruction applies; alone, for models that need no instruction, such as NLLB."""
    system: str = ""
    """A system prompt, for templates that use one."""
    source: str = field(default="", metadata={"instead_of": ("instruction", "input", "system", "template")})
    """The text for the encoder, without a template; instead of an instruction."""
    target: str = ""
    """The correct output. The page then shows the loss of each of its tokens, and where the model prefers another."""
    data: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction` (and `input`, `output` …): shows over all rows which source words get
    little attention from all outputs, and which output tokens attend to nothing in particular."""
    rows: int = 100
    """Number of rows of data to use, from the first."""
    out: str = field(default="inspect.html", metadata=OUTPUT)
    """The page to write; an older one is replaced."""
    max_new_tokens: int = 64
    """Maximum length of outputs in tokens."""

    def __post_init__(self):
        if self.instruction and self.source or not (self.instruction or self.input or self.source):
            given = "both were" if self.source else "neither was"
            raise UserError(
                f"--instruction (with --input), or --source is what the model is to read, but {given} given. Give one."
            )
        if self.source and (self.input or self.system or self.template):
            raise UserError("--source is read as it is: drop --input, --system and --template, or give --instruction.")
        check_positive(self, "rows", "max_new_tokens")
