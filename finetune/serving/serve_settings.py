"""What `diptych serve` and `diptych demo` can be told."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diptych.data_prep.command_line.arguments import check_numbers
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING
from diptych.finetune.commands.model_settings import PromptSettings, check_positive


@dataclass(frozen=True)
class ServingSettings(PromptSettings):
    """A checkpoint that is asked by others."""

    engine: Literal["torch", "ctranslate2"] = "torch"
    """Library that computes: torch, or CTranslate2, which is faster on CPUs; then checkpoints are the folders that
    `diptych export` wrote."""


@dataclass(frozen=True)
class DemoSettings(ServingSettings):
    """A page on which to try a checkpoint, or two of them side by side."""

    beside: str = field(default="", metadata=CHECKPOINT)
    """A second checkpoint, whose answer is shown beside."""
    host: str = "127.0.0.1"
    """Address to listen at. For any address but loopback, set a token in the environment variable DIPTYCH_TOKEN."""
    port: int = 7860
    """0 uses a free port, which is printed."""
    examples: str = field(default="", metadata=EXISTING)
    """JSONL file of rows with `instruction` and `input`, the first ones are examples on the page."""
    max_new_tokens: int | None = None
    """Maximum length of outputs in tokens. Default: 256, or the model's own limit if that is lower."""

    def __post_init__(self):
        check_positive(self, "max_new_tokens")
        check_port(self.port)


@dataclass(frozen=True)
class ServeSettings(ServingSettings):
    """Serve checkpoints with OpenAI's HTTP API: completions, chat and translations, with or without streaming."""

    host: str = "127.0.0.1"
    """Address to listen at. For any but loopback, set a token in the environment variable DIPTYCH_TOKEN."""
    port: int = 8000
    """0 uses a free port, which is printed."""
    name: str = ""
    """Name of the model for clients. Default: the name of the folder."""
    models: dict[str, str] = field(default_factory=dict)
    """Further checkpoints that this process serves, by their names for clients: `--models.ko runs/ko/final`."""
    batch_size: int = 32
    """Maximum number of prompts per batch."""
    batch_wait_ms: float = 5.0
    """Milliseconds that the first prompt of a batch waits for others."""
    queue: int = 256
    """Maximum number of prompts that wait for a model. Further requests get a 503; a single request with more prompts
    gets a 400."""
    timeout: float = 120.0
    """Maximum seconds for a request, with waiting; then it gets a 504."""
    long: Literal["cut", "split"] = "cut"
    """split: translations are generated sentence by sentence, and other prompts over the limit in pieces, as by
    `diptych generate`. The language is that of the request, or of --source_language."""
    terms: str = field(default="", metadata=EXISTING)
    """Terms to use, as by `diptych generate --terms`. An answer says which it misses (terms_missed)."""
    placeholders: bool = False
    """Replace URLs, tags and numbers by placeholders, as by `diptych generate`. An answer says which were lost
    (placeholders_lost)."""
    max_source_tokens: int | None = None
    """Longer prompts get a 400, unless --long splits them. Default: the model's own limit, or what a third of the free
    memory allows."""
    max_new_tokens: int | None = None
    """No output gets longer than this many tokens; 256, or the model's own limit if that is lower, unless given."""

    def __post_init__(self):
        check_positive(self, "batch_size", "queue", "max_source_tokens", "max_new_tokens")
        check_port(self.port)
        check_numbers(self, {"above 0 (seconds)": (lambda value: value > 0, "timeout")})
        if self.model_name in self.models:
            raise UserError(
                f"two models are named {self.model_name!r}: {self.model} and {self.models[self.model_name]}. Give the "
                f"first one another --name, or the second one another --models.NAME."
            )

    @property
    def model_name(self) -> str:
        return self.name or Path(self.model.rstrip("/")).name

    @property
    def named_models(self) -> dict[str, str]:
        """All of them, the first one first."""
        return {self.model_name: self.model} | self.models


def check_port(port: int) -> None:
    if not 0 <= port <= 65535:
        raise UserError(f"port is {port}; it is a number from 0 to 65535.")
