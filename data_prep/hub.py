"""Whether a checkpoint's name stands for something: a folder here, what was downloaded before, or a Hub repository.

    check_place("google-t5/t5-small")    → nothing, if it is cached or the Hub has it
    check_place("t5-smal")               → UserError: there is no folder t5-smal, and …

Asked before anything is loaded, because `from_pretrained` on a name that is not cached takes no first "no" from the
network: huggingface_hub waits 1, 2, 4, 8 and 8 s in between (`http_backoff`), once for each file that it looks for, so
that a misspelt name took 47 s without a network. Here it is one request, which online comes on top of the others.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionResolutionError,
)

from diptych.data_prep.records import UserError

ADVICE = "Name a checkpoint folder, or a Hub id such as google-t5/t5-small"


def check_place(name: str) -> None:
    """UserError where `name` is neither a folder nor a Hub repository that is cached or can be reached."""
    place = Path(name)
    if place.is_dir():
        return
    if place.exists():
        raise UserError(f"{name} is a file; a checkpoint is a folder. Name the folder it lies in.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and place.parent.is_dir()):
        # what is left, a name or owner/name whose owner is no folder here, may be a Hub id
        raise UserError(f"there is no folder {name}. {ADVICE}.")
    if not _is_cached(name):
        _ask_hub(name)


def _is_cached(name: str) -> bool:
    """Whether files of it were downloaded before; no connection is made."""
    try:
        HfApi().resolve_revision(name, local_files_only=True)
    except RevisionResolutionError:
        return False
    except HFValidationError as error:
        raise UserError(f"there is no folder {name}, and no Hub id looks so: {error} {ADVICE}.") from None
    return True


def _ask_hub(name: str) -> None:
    """One request. What else may be wrong with an answer (not allowed, too many, down for the moment) is left to
    whoever loads, who waits and asks again."""
    if is_offline_mode():
        raise UserError(
            f"there is no folder {name}, nothing was downloaded under this name, and the Hub is not asked, because"
            f" HF_HUB_OFFLINE is set. Check the spelling. {ADVICE}; to download it, unset HF_HUB_OFFLINE."
        )
    try:
        HfApi().resolve_revision(name)
    except GatedRepoError:
        return
    except RepositoryNotFoundError:
        raise UserError(
            f"there is no folder {name}, and the Hub has no repository of this name that you may read. Check the"
            f" spelling. {ADVICE}; a private one needs `hf auth login`."
        ) from None
    except HfHubHTTPError:
        return
    except RevisionResolutionError as error:
        if isinstance(error.__cause__, HfHubHTTPError):
            return
        raise UserError(
            f"there is no folder {name}, nothing was downloaded under this name, and the Hub cannot be reached"
            f" ({error.__cause__}). Check the spelling and the network. {ADVICE}, which the Hub must be reachable for."
        ) from error
