"""Whatever a request meets, the repository has the old files or the new ones, and once more is enough.

The real client of huggingface_hub against hub_server.py: every request of a push fails once, in every way, and from
every request on the Hub is away. A push that changes files makes ten requests (REQUESTS)."""

import signal
import subprocess
import sys

import hub_server
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import get_session

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exits import HubError
from diptych.finetune.publishing.hub_push import Patience, push, remote_hashes

REPO = "me/translate"
CARD = b"---\nlibrary_name: transformers\n---\n\n# translate\n"
OLD = {"config.json": b'{"old": 1}', "README.md": CARD, "model.safetensors": b"old weights" * 50, "vocab.json": b"{}"}
NEW = {"config.json": b'{"new": 1}', "README.md": CARD + b"New.\n", "model.safetensors": b"new weights" * 70}
QUICK = Patience(tries=2, timeout=20.0, first_wait=0.0)
IMPATIENT = Patience(tries=2, timeout=0.4, first_wait=0.0)

REQUESTS = ["create", "look", "list", "card", "preupload", "batch", "upload", "uploaded", "commit", "read back"]
"""Of a push that changes something, in this order."""


def is_ours(name: str) -> bool:
    return name in OLD


@pytest.fixture
def hub():
    with hub_server.HubServer() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub_server.TOKEN)


@pytest.fixture
def old(hub, api):
    """The Hub with the old files, and nothing counted yet."""
    push(api, REPO, OLD, is_ours=is_ours, patience=QUICK)
    hub.requests.clear()
    return hub


def published(hub) -> dict[str, bytes]:
    return {name: content for name, content in hub.repos[REPO].files.items() if name != ".gitattributes"}


def test_a_push_is_one_commit_of_just_these_files_in_a_private_repository(hub, api, tmp_path):
    (tmp_path / "weights").write_bytes(NEW["model.safetensors"])
    pushed = push(api, REPO, NEW | {"model.safetensors": tmp_path / "weights"}, patience=QUICK)
    repo = hub.repos[REPO]
    assert repo.private and published(hub) == NEW
    assert len(repo.commits) == 2 and pushed == (repo.commits[1].oid, True, [], [".gitattributes"])
    assert len(hub.requests) == len(REQUESTS)


def test_the_same_files_again_make_no_commit_and_send_no_file(old, api):
    head = old.repos[REPO].commits[-1].oid
    assert push(api, REPO, OLD, is_ours=is_ours, patience=QUICK) == (head, False, [], [".gitattributes"])
    assert len(old.repos[REPO].commits) == 2 and len(old.requests) == 3
    assert {request.method for request in old.requests[1:]} == {"GET"}


def test_files_of_an_earlier_push_go_in_the_same_commit_and_others_stay(old, api):
    repo = old.repos[REPO]
    repo.add(repo.files | {"picture.png": b"not ours"})
    pushed = push(api, REPO, NEW, is_ours=is_ours, patience=QUICK)
    assert pushed.removed == ["vocab.json"] and set(pushed.others) == {".gitattributes", "picture.png"}
    assert published(old) == NEW | {"picture.png": b"not ours"} and len(repo.commits) == 4


def test_a_request_that_fails_once_is_made_again_and_still_one_commit(old, api):
    """`lost` is the failure in which a commit could be made twice."""
    for how in ("429", "lost", "drip"):
        for number in range(len(REQUESTS)):
            repo = old.repos[REPO]
            repo.add(OLD | {".gitattributes": b""})
            commits = len(repo.commits)
            old.uploads.pop(hub_server.oid("model.safetensors", NEW["model.safetensors"]), None)
            old.fail(at=number, how=how, times=1)
            patience = Patience(timeout=0.4 if how == "drip" else 20.0, first_wait=0.0)
            pushed = push(api, REPO, NEW, is_ours=is_ours, patience=patience)
            place = f"{how} at {REQUESTS[number]}"
            assert old.has_failed.is_set(), place
            assert pushed.is_new and published(old) == NEW and len(repo.commits) == commits + 1, place
            old.heal()


@pytest.mark.parametrize("how", ["500", "drop", "lost", "hang"])
@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=REQUESTS)
def test_where_the_hub_goes_away_it_keeps_the_old_or_the_new_and_a_rerun_ends_it(old, api, number, how):
    old.fail(at=number, how=how)
    with pytest.raises(HubError, match="Run the same command again|run the same command again"):
        push(api, REPO, NEW, is_ours=is_ours, patience=IMPATIENT if how == "hang" else QUICK)
    was_committed = number > REQUESTS.index("commit") or (how == "lost" and number == REQUESTS.index("commit"))
    assert published(old) == (NEW if was_committed else OLD)
    assert len(old.repos[REPO].commits) == 2 + was_committed
    old.heal()
    pushed = push(api, REPO, NEW, is_ours=is_ours, patience=QUICK)
    assert published(old) == NEW and len(old.repos[REPO].commits) == 3
    assert pushed.is_new == (not was_committed)


KILLED = """
import sys
from huggingface_hub import HfApi
from diptych.finetune.publishing.hub_push import push
url, token, repo, files = sys.argv[1:]
push(HfApi(endpoint=url, token=token), repo, {name: text.encode() for name, text in eval(files).items()})
"""


@pytest.mark.parametrize("number", [REQUESTS.index("upload"), REQUESTS.index("commit")], ids=["upload", "commit"])
def test_a_push_that_is_killed_leaves_the_old_files_whole(old, api, number):
    old.fail(at=number, how="hang")
    files = repr({name: content.decode() for name, content in NEW.items()})
    child = subprocess.Popen([sys.executable, "-c", KILLED, old.url, hub_server.TOKEN, REPO, files])
    assert old.has_failed.wait(120), "the push never came so far"
    child.send_signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert published(old) == OLD
    old.heal()
    assert push(api, REPO, NEW, is_ours=is_ours, patience=QUICK).is_new and published(old) == NEW


def test_at_most_five_tries_each_said_with_its_reason(old, api, capfd):
    old.fail(at=0, how="503")
    old.retry_after = ""
    with pytest.raises(HubError, match="answered by 503, 5 times"):
        push(api, REPO, NEW, patience=Patience(first_wait=0.0))
    assert len(old.requests) == 5
    said = capfd.readouterr().err
    assert [f"try {number} of 5" in said for number in range(2, 7)] == [True] * 4 + [False]
    assert "POST 127.0.0.1/api/repos/create was answered by 503" in said


def test_retry_after_is_waited_for(old, api, capfd):
    old.retry_after = "1"
    old.fail(at=2, how="429", times=1)
    push(api, REPO, NEW, patience=Patience(first_wait=0.0))
    assert old.requests[3].at - old.requests[2].at >= 1.0
    assert "answered by 429; try 2 of 5 in 1 s" in capfd.readouterr().err


def test_a_wait_that_is_too_long_is_said_and_not_waited_for(old, api):
    old.retry_after = "86400"
    old.fail(at=0, how="429")
    with pytest.raises(HubError, match="asks to wait 86400 s"):
        push(api, REPO, NEW, patience=Patience())
    assert len(old.requests) == 1


def test_no_signature_and_no_token_is_ever_shown(old, api, capfd):
    for number in range(len(REQUESTS)):
        old.fail(at=number, how="500")
        with pytest.raises(HubError) as error:
            push(api, REPO, NEW | {"model.safetensors": b"weights %d" % number}, patience=QUICK)
        old.heal()
        said = "".join(capfd.readouterr()) + str(error.value)
        assert "500" in said and hub_server.TOKEN not in said and "do-not-show" not in said


def test_a_refusal_is_not_tried_again_and_says_what_to_do(old):
    stranger = HfApi(endpoint=old.url, token="hf_another")
    with pytest.raises(HubError, match="401.*hf auth login") as error:
        push(stranger, REPO, NEW, patience=QUICK)
    assert "hf_another" not in str(error.value) and published(old) == OLD
    assert len(old.requests) <= 2


def test_what_reads_back_otherwise_is_told(old, api):
    old.corrupts = True
    with pytest.raises(HubError, match="README.md reads back otherwise"):
        push(api, REPO, NEW, patience=QUICK)


def test_another_ones_commit_in_between_is_not_overwritten(old, api):
    """It comes while ours is being made: the Hub refuses ours (412), and the next try finds another head."""
    repo, others = old.repos[REPO], OLD | {"config.json": b'{"somebody": "else"}'}
    commit = hub_server._Handler.commit
    calls = []

    def overtaken(handler, body, **found):
        if not calls:
            calls.append(1)
            repo.add(others)
        return commit(handler, body, **found)

    routes = [(*route[:3], overtaken if route[3] is commit else route[3]) for route in hub_server.ROUTES]
    before, hub_server.ROUTES[:] = list(hub_server.ROUTES), routes
    try:
        with pytest.raises(HubError, match="changed by somebody else"):
            push(api, REPO, NEW, is_ours=is_ours, patience=QUICK)
    finally:
        hub_server.ROUTES[:] = before
    assert repo.files == others


@pytest.mark.parametrize("is_public", [True, False], ids=["public", "private"])
def test_an_existing_repository_is_seen_by_whom_the_command_says(hub, api, is_public):
    push(api, REPO, OLD, is_public=is_public, patience=QUICK)
    assert hub.repos[REPO].private is not is_public
    with pytest.raises(UserError, match="--public"):
        push(api, REPO, NEW, is_public=not is_public, patience=QUICK)
    assert published(hub) == OLD


def test_hashes_of_weights_are_read_without_reading_the_weights(old, api):
    assert remote_hashes(api, REPO, QUICK) == {
        "model.safetensors": hub_server.oid("model.safetensors", OLD["model.safetensors"])
    }
    assert not [request for request in old.requests if "resolve" in request.path]


def test_afterwards_the_client_is_the_one_that_it_was(old, api):
    push(api, REPO, OLD, is_ours=is_ours, patience=QUICK)
    assert type(get_session()).__module__.startswith("httpx2") and not constants.HF_HUB_DISABLE_XET
