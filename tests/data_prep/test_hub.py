"""A name that stands for nothing is refused at once, by one request or none; what can be loaded is let through."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.checkpoint_config import check_place

CHECK = "import sys; from diptych.data_prep.text_to_ids.checkpoint_config import check_place; check_place(sys.argv[1])"


class Hub(BaseHTTPRequestHandler):
    """Answers every request for a model with one status; status 0 hangs up, as a broken network does."""

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self.server.asked.append(self.path)
        if self.server.status:
            self.send_response(self.server.status)
            if self.server.status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.status = [], 404
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def check(hub, tmp_path):
    """check("name") in a process of its own, which knows no Hub but this one: its last line, "" where all is well."""

    def run(name, **environment):
        where = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        where |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment}
        done = subprocess.run(
            [sys.executable, "-c", CHECK, name], env=os.environ | where, capture_output=True, text=True, timeout=120
        )
        return done.stderr.strip().splitlines()[-1] if done.returncode else ""

    return run


def test_a_hub_that_cannot_be_reached_is_asked_once(check, hub):
    hub.status = 0
    message = check("t5-smal")
    assert "UserError: there is no folder t5-smal" in message and "the Hub cannot be reached" in message
    assert "Name a checkpoint folder, or a Hub id" in message
    assert hub.asked == ["/api/models/t5-smal"]


def test_a_name_that_the_hub_does_not_have_is_said(check, hub):
    message = check("nobody/t5-smal")
    assert "the Hub has no repository of this name that you may read" in message and "hf auth login" in message
    assert hub.asked == ["/api/models/nobody/t5-smal"]


@pytest.mark.parametrize("status", [403, 429, 503])
def test_a_hub_in_trouble_is_left_to_the_loader_who_waits_for_it(check, hub, status):
    hub.status = status
    assert check("google-t5/t5-small") == ""
    assert hub.asked


def test_offline_nobody_is_asked(check, hub):
    message = check("t5-smal", HF_HUB_OFFLINE="1")
    assert "there is no folder t5-smal" in message and "HF_HUB_OFFLINE is set" in message
    assert hub.asked == []


@pytest.mark.parametrize("offline", ["0", "1"])
def test_what_was_downloaded_needs_no_hub(check, hub, tmp_path, offline):
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--google-t5--t5-small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    assert check("google-t5/t5-small", HF_HUB_OFFLINE=offline) == ""
    assert hub.asked == []


def test_paths_are_never_taken_for_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").touch()
    check_place("runs")
    check_place(str(tmp_path / "runs"))
    for name in ("./run", "~nobody-here/x", "/nowhere/at/all", "a/b/c", "runs/full"):
        with pytest.raises(UserError, match=f"there is no folder {name}. Name a checkpoint folder, or a Hub id"):
            check_place(name)
    with pytest.raises(UserError, match="file is a file; a checkpoint is a folder"):
        check_place("file")
    with pytest.raises(UserError, match="no Hub id looks so"):
        check_place("two words")
