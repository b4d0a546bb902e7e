"""What `diptych publish` can be told."""

import re
from dataclasses import dataclass, field

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING, NAMES

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")


@dataclass(frozen=True)
class PublishSettings:
    """Publish the final model of a run on the Hub: in one commit, with a model card, read back."""

    run: str = field(metadata=EXISTING)
    """Run folder that `diptych train` wrote."""
    to: str = ""
    """Repository on the Hub, as owner/name. It is created if it does not exist."""
    public: bool = False
    """Make the repository public. Default: private."""
    base: str = ""
    """For an adapter that was trained on a local folder: the Hub id of the same base model. Its weights are compared
    with those in the folder."""
    license: str = ""
    """Licence for the card, with the Hub's name (apache-2.0, cc-by-4.0 …). Default: none."""
    language: str = field(default="", metadata=NAMES)
    """Languages for the card, separated by commas (en,ko). Default: those that `diptych prepare` filtered by."""
    pipeline: bool = False
    """Also publish code for transformers' pipeline("text2text-generation"), which works where Diptych is not
    installed, with trust_remote_code=True."""
    dry_run: bool = False
    """Print the files with their sizes, and the card; make no connection."""

    def __post_init__(self):
        if not self.to:
            raise UserError("to is not set. Name the repository on the Hub: --to owner/name")
        if not REPO.fullmatch(self.to):
            raise UserError(f"to is {self.to!r}; it has to be owner/name, as on the Hub: --to owner/name")
