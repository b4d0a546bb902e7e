"""What `diptych doctor` can be told."""

from dataclasses import dataclass, field

from diptych.data_prep.pipeline.path_settings import CHECKPOINT, EXISTING


@dataclass(frozen=True)
class DoctorSettings:
    """Check whether training a checkpoint is correct, with advice if it is not."""

    model: str = field(metadata=CHECKPOINT)
    """Checkpoint folder (after training: RUN/final), adapter folder, or Hub id."""
    data: str = field(default="", metadata=EXISTING)
    """Rows for the checks: a prepared folder, or a .json or .jsonl file. Default: built-in sentences."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, mps; `auto` takes an accelerator if there is one."""
    json: bool = False
    """Print JSON instead of the table."""
