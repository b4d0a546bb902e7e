"""Files into one repository on the Hub: in one commit, which is then read back.

    push(HfApi(token=token), "me/translate", {"config.json": Path("final/config.json"), "README.md": b"..."})
    -> Pushed(commit="5f0c...", is_new=True, removed=[], others=[".gitattributes"])

huggingface_hub uploads the large files first, where nobody sees them, and repeats requests that fail for a moment. The
commit is one request, on top of the commit that was looked at before (`parent_commit`). So the repository has the old
files or the new ones, wherever it breaks off. Running the command again is safe: it first compares what is there.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from httpx2 import Client, HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.sha import git_hash

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.finetune.commands.exit_codes import HubError

ADVICE = {
    401: "Log in with a token that may write: hf auth login",
    403: "Use a token that may write there (hf auth login), or another owner in --to.",
    404: "Check the owner in --to, and that your token may see the repository.",
}
"""What to do, by the status that the Hub answers with."""


SECONDS_WITHOUT_AN_ANSWER = 60.0
"""Then a request has failed. huggingface_hub repeats most of them, up to five times."""


class Pushed(NamedTuple):
    commit: str
    is_new: bool
    """False if the repository already had all of the files; then nothing was sent."""
    removed: list[str]
    """Files of an earlier push that this commit deleted."""
    others: list[str]
    """Other files in the repository, which were left alone."""


def push(
    api: HfApi,
    repo: str,
    files: Mapping[str, Path | bytes],
    *,
    is_public: bool = False,
    is_ours: Callable[[str], bool] = lambda name: False,
) -> Pushed:
    """Makes the repository if there is none, and one commit unless it has all of `files` already.

    The same commit deletes files for which `is_ours` is true and that are not in `files`: those of an earlier push.

    Raises:
        UserError: the repository exists and is public but should be private, or the other way round.
        HubError: the Hub refuses, cannot be reached, or keeps something else than was sent.
    """
    set_client_factory(_client)
    try:
        return _push(api, repo, files, is_public, is_ours)
    except (HTTPError, RuntimeError, ConnectionError) as error:
        raise hub_error(repo, error) from error


def _client() -> Client:
    """huggingface_hub's own, which waits without end for a Hub that does not answer: most calls give no timeout."""
    client = default_client_factory()
    limits = dict.fromkeys(("connect", "read", "write", "pool"), SECONDS_WITHOUT_AN_ANSWER)
    client.event_hooks["request"].append(lambda request: request.extensions.update(timeout=limits))
    return client


def _push(
    api: HfApi, repo: str, files: Mapping[str, Path | bytes], is_public: bool, is_ours: Callable[[str], bool]
) -> Pushed:
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_repo(repo, private=not is_public, exist_ok=True)
    info = api.model_info(repo)
    _check_visibility(repo, info.private, is_public)
    there = _files_in(api, repo, info.sha)
    changed, obsolete = _differences(additions, there, is_ours)
    if not changed and not obsolete:
        return Pushed(info.sha, False, [], [name for name in there if name not in files])
    deletions = [CommitOperationDelete(name, is_folder=False) for name in obsolete]
    try:
        commit = api.create_commit(
            repo, [*additions, *deletions], commit_message="Publish with Diptych", parent_commit=info.sha
        ).oid
    except HfHubHTTPError as error:
        if error.response.status_code != 412:
            raise
        # The repository has a newer commit: our own, if only its answer was lost and the request was repeated.
        commit = api.model_info(repo).sha
        if any(_differences(additions, _files_in(api, repo, commit), is_ours)):
            raise HubError(
                f"{repo} was changed by somebody else while it was published: {commit[:8]} came after "
                f"{info.sha[:8]}. Nothing of it was overwritten. Look at it, then run the same command again."
            ) from error
    there = _files_in(api, repo, commit)
    changed, left = _differences(additions, there, is_ours)
    if changed or left:
        raise HubError(
            f"{repo} was written, but {(changed + left)[0]} reads back different from what was sent, in commit "
            f"{commit}. Do not use that commit; run the same command again."
        )
    return Pushed(commit, True, obsolete, [name for name in there if name not in files])


def remote_hashes(api: HfApi, repo: str) -> dict[str, str]:
    """{name: SHA-256} of the large files in a repository. HubError if it cannot be read."""
    set_client_factory(_client)
    try:
        return {name: file.lfs.sha256 for name, file in _files_in(api, repo).items() if file.lfs is not None}
    except HTTPError as error:
        raise hub_error(repo, error) from error


def _check_visibility(repo: str, is_private: bool | None, is_public: bool) -> None:
    if bool(is_private) == is_public:
        found, asked = ("private", "--public was given") if is_private else ("public", "--public was not given")
        raise UserError(
            f"{repo} exists and is {found}, but {asked}. {'Leave out' if is_private else 'Add'} --public, or "
            f"change the repository's visibility in its settings."
        )


def _files_in(api: HfApi, repo: str, revision: str | None = None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _differences(
    additions: Sequence[CommitOperationAdd], there: Mapping[str, RepoFile], is_ours: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Files that are missing there or differ, and files of ours that should not be there."""
    changed = [it.path_in_repo for it in additions if not _is_same(it, there.get(it.path_in_repo))]
    wanted = {it.path_in_repo for it in additions}
    return changed, [name for name in there if is_ours(name) and name not in wanted]


def _is_same(addition: CommitOperationAdd, there: RepoFile | None) -> bool:
    """The Hub knows large files by their SHA-256, and small ones by git's hash of a blob."""
    if there is None or there.size != addition.upload_info.size:
        return False
    if there.lfs is not None:
        return there.lfs.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return there.blob_id == git_hash(file.read())


def hub_error(repo: str, error: Exception) -> HubError:
    """What failed and what to do, without the request's query, which may hold a signature."""
    behind = error.__cause__
    if type(error) is RuntimeError and isinstance(behind, Exception):  # which only names the file of an upload
        error = behind
    if not isinstance(error, HfHubHTTPError):
        return HubError(f"{repo}: {excerpt(error).rstrip('.') or type(error).__name__}. Run the same command again.")
    response, status = error.response, error.response.status_code
    request = f"{response.request.method} {response.request.url.host}{response.request.url.path}"
    reason = excerpt(" ".join((error.server_message or response.reason_phrase).split())).rstrip(".")
    return HubError(
        f"{repo}: {request} was answered by {status} {reason}. {ADVICE.get(status, 'Run the same command again.')}"
    )
