"""Whatever a request meets, the repository has the old files or the new ones, and running the command again is enough.

The real client of huggingface_hub against hub_server.py: each request of a push fails, once and for good. A push that
changes files makes ten requests (REQUESTS)."""

import os
import signal
import ssl
import subprocess
import sys

import hub_server
import pytest
from huggingface_hub import HfApi, constants
from huggingface_hub.utils import _http

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands.exit_codes import HubError
from diptych.finetune.exporting import hub_push
from diptych.finetune.exporting.hub_push import push, remote_hashes

REPO = "me/translate"
CARD = b"---\nlibrary_name: transformers\n---\n\n# translate\n"
OLD = {"config.json": b'{"old": 1}', "README.md": CARD, "model.safetensors": b"old weights" * 50, "vocab.json": b"{}"}
NEW = {"config.json": b'{"new": 1}', "README.md": CARD + b"New.\n", "model.safetensors": b"new weights" * 70}

REQUESTS = ["create", "look", "list", "card", "preupload", "batch", "upload", "uploaded", "commit", "read back"]
"""Of a push that changes something, in this order."""


def is_ours(name: str) -> bool:
    return name in OLD


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # hub_server.py knows plain uploads alone
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between the tries of huggingface_hub
    # A new client reads all certificates (80 ms), and this Hub has no TLS.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *places, **named: None)
    with hub_server.HubServer() as hub:
        yield hub


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.url, token=hub_server.TOKEN)


@pytest.fixture
def old(hub, api):
    """The Hub with the old files, and nothing counted yet."""
    push(api, REPO, OLD, is_ours=is_ours)
    hub.requests.clear()
    return hub


def published(hub) -> dict[str, bytes]:
    return {name: content for name, content in hub.repos[REPO].files.items() if name != ".gitattributes"}


def test_a_push_is_one_commit_of_just_these_files_in_a_private_repository(hub, api, tmp_path):
    (tmp_path / "weights").write_bytes(NEW["model.safetensors"])
    pushed = push(api, REPO, NEW | {"model.safetensors": tmp_path / "weights"})
    repo = hub.repos[REPO]
    assert repo.private and published(hub) == NEW
    assert len(repo.commits) == 2 and pushed == (repo.commits[1].oid, True, [], [".gitattributes"])
    assert len(hub.requests) == len(REQUESTS)


def test_the_same_files_again_make_no_commit_and_send_no_file(old, api):
    head = old.repos[REPO].commits[-1].oid
    assert push(api, REPO, OLD, is_ours=is_ours) == (head, False, [], [".gitattributes"])
    assert len(old.repos[REPO].commits) == 2 and len(old.requests) == 3
    assert {request.method for request in old.requests[1:]} == {"GET"}


def test_files_of_an_earlier_push_go_in_the_same_commit_and_others_stay(old, api):
    repo = old.repos[REPO]
    repo.add(repo.files | {"picture.png": b"not ours"})
    pushed = push(api, REPO, NEW, is_ours=is_ours)
    assert pushed.removed == ["vocab.json"] and set(pushed.others) == {".gitattributes", "picture.png"}
    assert published(old) == NEW | {"picture.png": b"not ours"} and len(repo.commits) == 4


@pytest.mark.parametrize("how", ["503", "lost"])
@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=REQUESTS)
def test_a_request_that_fails_once_makes_no_second_commit(old, api, number, how):
    """`lost`: the request was carried out, and its answer did not arrive, so that a commit could be made twice."""
    old.fail(at=number, how=how, times=1)
    try:
        push(api, REPO, NEW, is_ours=is_ours)
    except HubError as error:  # huggingface_hub does not repeat each of them
        assert "un the same command again" in str(error)
        push(api, REPO, NEW, is_ours=is_ours)
    assert old.has_failed.is_set()
    assert published(old) == NEW and len(old.repos[REPO].commits) == 3


@pytest.mark.parametrize("how", ["500", "drop", "lost"])
@pytest.mark.parametrize("number", range(len(REQUESTS)), ids=REQUESTS)
def test_where_the_hub_goes_away_it_keeps_the_old_or_the_new_and_a_rerun_ends_it(old, api, number, how):
    old.fail(at=number, how=how)
    with pytest.raises(HubError, match="un the same command again") as error:
        push(api, REPO, NEW, is_ours=is_ours)
    assert hub_server.TOKEN not in str(error.value) and "do-not-show" not in str(error.value)
    was_committed = number > REQUESTS.index("commit") or (how == "lost" and number == REQUESTS.index("commit"))
    assert published(old) == (NEW if was_committed else OLD)
    assert len(old.repos[REPO].commits) == 2 + was_committed
    old.heal()
    pushed = push(api, REPO, NEW, is_ours=is_ours)
    assert published(old) == NEW and len(old.repos[REPO].commits) == 3
    assert pushed.is_new == (not was_committed)


@pytest.mark.parametrize("request_name", ["create", "look", "list", "preupload", "commit"])
def test_a_hub_that_does_not_answer_is_not_waited_for_without_end(old, api, request_name, monkeypatch):
    monkeypatch.setattr(hub_push, "SECONDS_WITHOUT_AN_ANSWER", 0.2)
    old.fail(at=REQUESTS.index(request_name), how="hang")
    with pytest.raises(HubError, match="timed out.*un the same command again"):
        push(api, REPO, NEW, is_ours=is_ours)
    assert published(old) == OLD
    old.heal()


KILLED = """
import sys
from huggingface_hub import HfApi
from diptych.finetune.exporting import hub_push
from diptych.finetune.exporting.hub_push import push
url, token, repo, files = sys.argv[1:]
push(HfApi(endpoint=url, token=token), repo, {name: text.encode() for name, text in eval(files).items()})
"""


@pytest.mark.parametrize("number", [REQUESTS.index("upload"), REQUESTS.index("commit")], ids=["upload", "commit"])
def test_a_push_that_is_killed_leaves_the_old_files_whole(old, api, number):
    old.fail(at=number, how="hang")
    files = repr({name: content.decode() for name, content in NEW.items()})
    environment = os.environ | {"HF_HUB_DISABLE_XET": "1"}
    child = subprocess.Popen([sys.executable, "-c", KILLED, old.url, hub_server.TOKEN, REPO, files], env=environment)
    assert old.has_failed.wait(120), "the push never came so far"
    child.send_signal(signal.SIGKILL)
    assert child.wait(60) == -signal.SIGKILL
    assert published(old) == OLD
    old.heal()
    assert push(api, REPO, NEW, is_ours=is_ours).is_new and published(old) == NEW


def test_a_refusal_is_not_tried_again_and_says_what_to_do(old):
    stranger = HfApi(endpoint=old.url, token="hf_another")
    with pytest.raises(HubError, match="401.*hf auth login") as error:
        push(stranger, REPO, NEW)
    assert "hf_another" not in str(error.value) and published(old) == OLD
    assert len(old.requests) <= 2


def test_what_reads_back_otherwise_is_told(old, api):
    old.corrupts = True
    with pytest.raises(HubError, match="README.md reads back different"):
        push(api, REPO, NEW)


def test_another_ones_commit_in_between_is_not_overwritten(old, api, monkeypatch):
    """It comes while ours is being made, and the Hub refuses ours (412)."""
    repo, others = old.repos[REPO], OLD | {"config.json": b'{"somebody": "else"}'}
    create_commit = api.create_commit

    def overtaken(*arguments, **settings):
        repo.add(others)
        return create_commit(*arguments, **settings)

    monkeypatch.setattr(api, "create_commit", overtaken)
    with pytest.raises(HubError, match="changed by somebody else"):
        push(api, REPO, NEW, is_ours=is_ours)
    assert repo.files == others


@pytest.mark.parametrize("is_public", [True, False], ids=["public", "private"])
def test_an_existing_repository_is_seen_by_whom_the_command_says(hub, api, is_public):
    push(api, REPO, OLD, is_public=is_public)
    assert hub.repos[REPO].private is not is_public
    with pytest.raises(UserError, match="--public"):
        push(api, REPO, NEW, is_public=not is_public)
    assert published(hub) == OLD


def test_hashes_of_weights_are_read_without_reading_the_weights(old, api):
    assert remote_hashes(api, REPO) == {
        "model.safetensors": hub_server.oid("model.safetensors", OLD["model.safetensors"])
    }
    assert not [request for request in old.requests if "resolve" in request.path]
