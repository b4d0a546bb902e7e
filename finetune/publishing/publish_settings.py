"""What `diptych publish` can be told."""

import re
from dataclasses import dataclass, field

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.path_settings import EXISTING

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]")


@dataclass(frozen=True)
class PublishSettings:
    """Publish the final model of a run on the Hub: in one commit, with a model card, read back."""

    run: str = field(metadata=EXISTING)
    """Run folder, as `diptych train` wrote it."""
    to: str = ""
    """Repository on the Hub, as owner/name. It is made if there is none."""
    public: bool = False
    """Let everybody see it; it is private unless given."""
    base: str = ""
    """For an adapter that was trained on a folder: the Hub id under which that base is published. Its weights there
    are compared with those in the folder."""
    license: str = ""
    """Licence for the card, as the Hub spells it (apache-2.0, cc-by-4.0 …); the card names none unless given."""
    language: str = ""
    """Languages for the card, separated by commas (en,ko); those that `diptych prepare` filtered by unless given."""
    pipeline: bool = False
    """Let code travel with it by which transformers' pipeline("text2text-generation") works, with
    trust_remote_code=True, where Diptych is not installed."""
    dry_run: bool = False
    """Print the files with their sizes, and the card; connect to nothing."""

    def __post_init__(self):
        if not self.to:
            raise UserError("to is not set. Name the repository on the Hub: --to owner/name")
        if not REPO.fullmatch(self.to):
            raise UserError(f"to is {self.to!r}; it has to be owner/name, as on the Hub: --to owner/name")
