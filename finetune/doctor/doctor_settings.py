"""What `diptych doctor` can be told."""

from dataclasses import dataclass, field

from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING


@dataclass(frozen=True)
class DoctorSettings:
    """Whether a checkpoint's training is right, and what to do where it is not."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    data: str = field(default="", metadata=EXISTING)
    """Rows to examine it with: a prepared folder, or a .json or .jsonl file; built-in sentences unless given."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""
    json: bool = False
    """Print JSON instead of the table."""
