"""Files into one repository on the Hub: in one commit, read back, or not at all.

    push(HfApi(token=token), "me/translate", {"config.json": Path("final/config.json"), "README.md": b"..."})
    -> Pushed(commit="5f0c...", is_new=True, removed=[], others=[".gitattributes"])

The weights are uploaded first, where nobody sees them; the commit that names them is one request, made on top of the
commit that was looked at before (`parent_commit`). So the repository has the old files or the new ones, wherever it
breaks off, and trying again starts by looking: a commit whose answer was lost is found, and not made twice.

huggingface_hub waits for an answer without end, some of its requests are made once and others six times. Here every
request has a deadline, and what fails for a while is tried five times at most, after as long as the Hub asks for.
"""

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import HubError

Files = Mapping[str, Path | bytes]
"""Names in the repository, and what is to be there: a file, or its content."""

Answer = TypeVar("Answer")

PASSING = (408, 429, 500, 502, 503, 504)
"""What the Hub answers when it may answer otherwise a little later."""

SLOWEST_BYTES_PER_SECOND = 50_000
"""An upload's deadline grows with its size as if the line were as slow as this."""


@dataclass(frozen=True)
class Patience:
    """How long is waited, and how often."""

    tries: int = 5
    timeout: float = 60.0
    """Seconds without a byte after which a request has failed; and all that it may take, beside its upload."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled for each one after that, unless the Hub says how long."""
    longest_wait: float = 300.0
    """Where the Hub asks for more, it is not waited for: this is how long its rate limits last."""


class Pushed(NamedTuple):
    commit: str
    is_new: bool
    """False where the repository had all of it already, and nothing was sent."""
    removed: list[str]
    """Files of an earlier push that this one has no more."""
    others: list[str]
    """What else lies in the repository, and was left alone."""


class Upload(NamedTuple):
    """One file as it has to be on the Hub. Hashed before anything is sent: what changes meanwhile is noticed."""

    content: Path | bytes
    size: int
    sha256: str

    def is_same(self, there: RepoFile) -> bool:
        """Large files are known by their SHA-256, small ones by git's hash of a blob."""
        if there.size != self.size:
            return False
        if there.lfs is not None:
            return there.lfs.sha256 == self.sha256
        content = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return there.blob_id == git_hash(content) and hashlib.sha256(content).hexdigest() == self.sha256


def prepare_upload(content: Path | bytes) -> Upload:
    if isinstance(content, bytes):
        return Upload(content, len(content), hashlib.sha256(content).hexdigest())
    with content.open("rb") as file:
        return Upload(content, content.stat().st_size, sha_fileobj(file).hex())


def push(
    api: HfApi,
    repo: str,
    files: Files,
    *,
    is_public: bool = False,
    is_ours: Callable[[str], bool] = lambda name: False,
    patience: Patience | None = None,
) -> Pushed:
    """Makes the repository if there is none, and one commit if it has not all of `files` already.

    Files there that are not in `files` are removed by the same commit where `is_ours` says that they are of an earlier
    push. HubError where the Hub refuses, or does not answer; UserError where the repository is public and should be
    private, or the other way round.
    """
    patience = patience or Patience()
    attempt = _Push(api, repo, {name: prepare_upload(content) for name, content in files.items()}, is_public, is_ours)
    with _patient_client(patience):
        return _with_tries(attempt.once, repo, patience)


def remote_hashes(api: HfApi, repo: str, patience: Patience | None = None) -> dict[str, str]:
    """{name: SHA-256} of the large files in a repository. HubError where it cannot be read."""
    patience = patience or Patience()
    with _patient_client(patience):
        files = _with_tries(lambda: _tree(api, repo, None), repo, patience)
    return {file.path: file.lfs.sha256 for file in files.values() if file.lfs is not None}


class _Push:
    """What is to be there; and what was there when it was first looked at, which later tries compare with."""

    def __init__(
        self, api: HfApi, repo: str, uploads: dict[str, Upload], is_public: bool, is_ours: Callable[[str], bool]
    ) -> None:
        self.api, self.repo, self.uploads, self.is_public, self.is_ours = api, repo, uploads, is_public, is_ours
        self.head: str | None = None
        self.removed: list[str] = []

    def once(self) -> Pushed:
        self.api.create_repo(self.repo, private=not self.is_public, exist_ok=True)
        info = self.api.model_info(self.repo)
        self._check_visibility(info.private)
        there = _tree(self.api, self.repo, info.sha)
        changed, obsolete = self._differences(there)
        if not changed and not obsolete:
            return self._done(info.sha, there, is_new=self.head not in (None, info.sha))
        if self.head not in (None, info.sha):
            raise HubError(
                f"{self.repo} was changed by somebody else while it was published: {info.sha[:8]} came after "
                f"{self.head[:8]}. Nothing of it was overwritten. Look at it, then run the same command again."
            )
        self.head, self.removed = info.sha, obsolete
        commit = self._commit(obsolete)
        there = _tree(self.api, self.repo, commit)
        changed, obsolete = self._differences(there)
        if changed or obsolete:
            raise HubError(
                f"{self.repo} was written, and {(changed + obsolete)[0]} reads back otherwise than it was sent, in "
                f"commit {commit}. Do not use that commit; run the same command again."
            )
        return self._done(commit, there, is_new=True)

    def _check_visibility(self, is_private: bool | None) -> None:
        if bool(is_private) == self.is_public:
            found, asked = ("private", "--public was given") if is_private else ("public", "--public was not given")
            raise UserError(
                f"{self.repo} exists and is {found}, but {asked}. {'Leave out' if is_private else 'Add'} --public, or "
                f"change the repository's visibility in its settings."
            )

    def _differences(self, there: Mapping[str, RepoFile]) -> tuple[list[str], list[str]]:
        """Files that are not there as they should be, and files that should not be there."""
        changed = [
            name for name, upload in self.uploads.items() if name not in there or not upload.is_same(there[name])
        ]
        return changed, [name for name in there if self.is_ours(name) and name not in self.uploads]

    def _commit(self, obsolete: list[str]) -> str:
        """All files and not only those that changed: what is the same, huggingface_hub leaves out by itself."""
        additions = [CommitOperationAdd(name, upload.content) for name, upload in self.uploads.items()]
        try:
            return self.api.create_commit(
                self.repo,
                [*additions, *(CommitOperationDelete(name, is_folder=False) for name in obsolete)],
                commit_message="Publish with Diptych",
                parent_commit=self.head,
            ).oid
        except HfHubHTTPError as error:
            if error.response.status_code == 412:  # the head is another one: perhaps our own, whose answer was lost
                raise _TryAgain("the repository has another commit by now") from error
            raise

    def _done(self, commit: str, there: Mapping[str, RepoFile], is_new: bool) -> Pushed:
        others = [name for name in there if name not in self.uploads]
        return Pushed(commit, is_new, self.removed if is_new else [], others)


def _tree(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


class _TryAgain(Exception):
    """What failed may go well a little later. No exception that huggingface_hub knows, whose own tries it ends."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


def _with_tries(once: Callable[[], Answer], repo: str, patience: Patience) -> Answer:
    wait = patience.first_wait
    for number in range(1, patience.tries + 1):
        try:
            return once()
        except UserError:
            raise
        except (_TryAgain, HfHubHTTPError, RuntimeError, ValueError) as error:
            cause = _cause(error)
        if not isinstance(cause, _TryAgain):
            raise HubError(f"{repo}: {_refusal(cause)}") from cause
        pause = wait if cause.wait is None else cause.wait
        if pause > patience.longest_wait:
            raise HubError(f"{repo}: {cause}, and asks to wait {pause:.0f} s. Run the same command again then.")
        if number < patience.tries:
            print(f"{cause}; try {number + 1} of {patience.tries} in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
            wait *= 2
    raise HubError(
        f"{repo}: {cause}, {patience.tries} times. The repository is as it was, or has all of the new files. Run the "
        f"same command again; what was uploaded is not sent twice."
    ) from cause


def _cause(error: Exception) -> Exception:
    """An upload's error comes wrapped in a RuntimeError that only names the file."""
    behind = error.__cause__
    return behind if type(error) is RuntimeError and isinstance(behind, Exception) else error


def _refusal(error: Exception) -> str:
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub's answer cannot be used: {_one_line(error)}. Run the same command again."
    status, said = error.response.status_code, error.server_message or error.response.reason_phrase
    advice = {
        401: "Log in with a token that may write: hf auth login",
        403: "Use a token that may write there (hf auth login), or another owner in --to.",
        404: "Check the owner in --to, and that your token may see the repository.",
    }
    refused = f"{_request_name(error.response.request)} was refused: {status} {_one_line(said)}"
    return f"{refused}. {advice.get(status, '')}".rstrip()


def _request_name(request: httpx2.Request) -> str:
    """Without what follows the `?`, which may sign the request."""
    return f"{request.method} {request.url.host}{request.url.path}"


def _one_line(said: object) -> str:
    return " ".join(str(said).split()).rstrip(".")[:300]


@contextmanager
def _patient_client(patience: Patience) -> Iterator[None]:
    """Every request of huggingface_hub through a client that keeps to `patience`. Xet is switched off for the time: it
    uploads by another client, in Rust, which has no deadline that could be set."""
    used_xet = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = True
    set_client_factory(lambda: _Client(patience))
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = used_xet
        set_client_factory(_plain_client)


def _plain_client() -> httpx2.Client:
    from huggingface_hub.utils._http import default_client_factory

    return default_client_factory()


class _Client(httpx2.Client):
    """Raises _TryAgain where a request fails in passing; proxies and certificates are those of httpx."""

    def __init__(self, patience: Patience) -> None:
        hooks = {"response": [self._limit_answer]}
        super().__init__(timeout=patience.timeout, follow_redirects=True, event_hooks=hooks)
        self.patience = patience

    def send(self, request: httpx2.Request, **settings) -> httpx2.Response:
        seconds = self.patience.timeout + int(request.headers.get("content-length", 0)) / SLOWEST_BYTES_PER_SECOND
        request.extensions["deadline"] = time.monotonic() + seconds
        # huggingface_hub gives many requests a timeout of None by itself, which would be waited for without end
        request.extensions["timeout"] = httpx2.Timeout(self.patience.timeout).as_dict()
        request.stream = _Limited(request.stream, request)
        name = _request_name(request)
        try:
            response = super().send(request, **settings)
        except httpx2.TimeoutException as error:
            raise _TryAgain(f"{name} was not answered in time") from error
        except httpx2.TransportError as error:
            raise _TryAgain(f"{name} failed: {_one_line(error) or type(error).__name__}") from error
        if response.status_code in PASSING:
            raise _TryAgain(f"{name} was answered by {response.status_code}", _asked_wait(response.headers))
        if response.status_code == 409 and "conflicting operation is in progress" in response.text:
            raise _TryAgain(f"{name}: another repository is just being made")  # create_repo would ask without end
        return response

    def _limit_answer(self, response: httpx2.Response) -> None:
        response.stream = _Limited(response.stream, response.request)


class _Limited(httpx2.SyncByteStream):
    """The same bytes until the request's deadline. A socket's own timeout is for each part alone."""

    def __init__(self, stream: httpx2.SyncByteStream, request: httpx2.Request) -> None:
        self.stream, self.request = stream, request

    def __iter__(self) -> Iterator[bytes]:
        for part in self.stream:
            if time.monotonic() > self.request.extensions["deadline"]:
                raise httpx2.ReadTimeout("the deadline has passed", request=self.request)
            yield part

    def close(self) -> None:
        self.stream.close()


def _asked_wait(headers: httpx2.Headers) -> float | None:
    """Seconds: of Retry-After, which is a number or a date, or of the Hub's `ratelimit: "api";r=0;t=55`."""
    said = headers.get("retry-after", "").strip()
    if said.isdigit():
        return float(said)
    try:
        return max(0.0, (parsedate_to_datetime(said) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError):  # there is none, or it is something else
        reset = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("ratelimit", ""))
        return float(reset[1]) if reset else None
