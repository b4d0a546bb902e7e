"""What `diptych inspect` can be told."""

from dataclasses import dataclass, field

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, OUTPUT
from diptych.finetune.commands.model_settings import PromptSettings, check_positive


@dataclass(frozen=True)
class InspectSettings(PromptSettings):
    """What an encoder-decoder makes of one input, step by step, on a page to look at."""

    instruction: str = field(default="", metadata={"instead_of": ("source",)})
    """The instruction, as `diptych generate` takes it: the template turns it into the source."""
    input: str = ""
    """The input that the instruction is about; without one, for models that need none, such as NLLB."""
    system: str = ""
    """A system prompt, for templates that have a place for one."""
    source: str = field(default="", metadata={"instead_of": ("instruction", "input", "system", "template")})
    """The source as the encoder is to read it, without any template, in place of an instruction."""
    target: str = ""
    """What the output should have been. The page then shows what each of its tokens costs, and where the model would
    go another way."""
    data: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction` (and `input`, `output` …): over all of them, which words of sources no
    output looked at, and which tokens of outputs looked at nothing."""
    rows: int = 100
    """Of data, so many rows from the first on."""
    out: str = field(default="inspect.html", metadata=OUTPUT)
    """The page to write; an older one is replaced."""
    max_new_tokens: int = 64
    """No output gets longer than this many tokens."""

    def __post_init__(self):
        if self.instruction and self.source or not (self.instruction or self.input or self.source):
            given = "both were" if self.source else "neither was"
            raise UserError(
                f"--instruction (with --input), or --source is what the model is to read, but {given} given. Give one."
            )
        if self.source and (self.input or self.system or self.template):
            raise UserError("--source is read as it is: drop --input, --system and --template, or give --instruction.")
        check_positive(self, "rows", "max_new_tokens")
