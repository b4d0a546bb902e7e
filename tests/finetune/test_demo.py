"""`diptych demo`: the page of a real process, driven in a real browser."""

import json
import signal
import sys
import urllib.error
import urllib.request

import pytest
from conftest import EIGHT_ROWS, TO_KOREAN, tiny_t5
from listening import listening

from diptych.finetune.commands.cli import main as diptych

HOSTILE = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>${window.ran = true}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, tiny_tokenizer, t5_checkpoint):
    """One that has learned the eight rows, and one that writes without end."""
    folder = tmp_path_factory.mktemp("demo")
    model = tiny_t5(len(tiny_tokenizer))
    no_text = [id for id in range(400) if id < 3 or "\N{REPLACEMENT CHARACTER}" in tiny_tokenizer.decode(id)]
    model.generation_config.suppress_tokens = no_text
    model.save_pretrained(folder / "endless")
    tiny_tokenizer.save_pretrained(folder / "endless")
    rows = [{"instruction": TO_KOREAN, "input": text} for _, text, _ in EIGHT_ROWS[:3]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return t5_checkpoint, folder / "endless", folder / "rows.jsonl"


@pytest.fixture(scope="module")
def shown(checkpoints, tmp_path_factory):
    learned, endless, rows = checkpoints
    command = ["demo", str(learned), "--beside", str(endless), "--examples", str(rows), "--max_new_tokens", "20000"]
    with listening(command, tmp_path_factory.mktemp("shown") / "log") as started:
        yield started


@pytest.fixture
def page(browser, shown):
    with browser.new_context(viewport={"width": 1200, "height": 900}) as window:
        opened = window.new_page()
        opened.set_default_timeout(120_000)  # for what would hang; a busy machine takes its time
        opened.requests, opened.errors = [], []
        opened.on("request", lambda request: opened.requests.append(request.url))
        opened.on("pageerror", lambda error: opened.errors.append(str(error)))
        opened.goto(shown.url)
        opened.wait_for_selector("#instruction textarea")
        yield opened
        assert not opened.errors and opened.evaluate("window.ran") is None
        outside = [url for url in opened.requests if not url.startswith((shown.url, "data:", "blob:"))]
        assert not outside


def ask(page, instruction: str, text: str = "") -> None:
    page.fill("#instruction textarea", instruction)
    page.fill("#input textarea", text)
    page.click("#go")


def wait_for_note(page, place: int, text: str) -> None:
    page.wait_for_function(f"text => document.querySelector('#note-{place}').innerText.includes(text)", arg=text)


def wait_until_it_rests(page) -> None:
    """A press of Stop has come through: the answer has not grown in a second."""
    lengths = [-2, -1]
    while lengths[-1] != lengths[-2]:
        page.wait_for_timeout(1000)
        lengths.append(len(page.input_value("#answer-1 textarea")))
        assert len(lengths) < 60


def set_slider(page, label: str, value: str) -> None:
    """Until it stays: Gradio gives a box that was just shown its first value somewhat later."""
    if not page.locator(f'input[aria-label*="{label}"]').first.is_visible():
        page.click("#settings button")
    box = page.locator(f'input[type=number][aria-label*="{label}"]').first
    for _ in range(20):
        box.fill(value)
        box.press("Tab")
        page.wait_for_timeout(500)
        if box.input_value() == value:
            return
    raise AssertionError(f"{label} does not stay at {value}")


def test_the_answer_is_that_of_generate_beside_another_model(page, checkpoints, capsys):
    learned, endless, _ = checkpoints
    set_slider(page, "Longest answer", "24")
    for instruction, text, output in (EIGHT_ROWS[0], EIGHT_ROWS[3]):
        ask(page, instruction, text)
        page.wait_for_function("value => document.querySelector('#answer-0 textarea').value === value", arg=output)
        wait_for_note(page, 1, "24 tokens, and stopped there")
        command = ["generate", str(endless), "--instruction", instruction, "--input", text, "--max_new_tokens", "24"]
        assert diptych(command) == 0
        assert page.input_value("#answer-1 textarea").strip() == capsys.readouterr().out.strip()
        cells = page.locator("#looks-0 tbody tr").count(), page.locator("#looks-0 thead th").count()
        note = page.inner_text("#note-0")
        assert f"{cells[0]} tokens" in note and cells[1] > 5
        assert page.locator("#looks-0 tbody td").count() == cells[0] * cells[1]


def test_settings_matter_and_say_so(page):
    set_slider(page, "Longest answer", "3")
    ask(page, TO_KOREAN, EIGHT_ROWS[3][1])
    wait_for_note(page, 0, "3 tokens, and stopped there")
    first = page.input_value("#answer-0 textarea")
    assert first and EIGHT_ROWS[3][2].startswith(first)
    set_slider(page, "Longest answer", "40")
    set_slider(page, "Beams", "3")
    ask(page, TO_KOREAN, EIGHT_ROWS[3][1])
    page.wait_for_function(
        "value => document.querySelector('#answer-0 textarea').value === value", arg=EIGHT_ROWS[3][2]
    )
    set_slider(page, "Temperature", "2")
    ask(page, TO_KOREAN, EIGHT_ROWS[3][1])
    page.wait_for_function(
        "value => ![value, ''].includes(document.querySelector('#answer-0 textarea').value)", arg=EIGHT_ROWS[3][2]
    )


def test_it_streams_and_stops(page, shown):
    set_slider(page, "Longest answer", "20000")
    ask(page, TO_KOREAN, "Go.")
    length = "() => document.querySelector('#answer-1 textarea').value.length"
    page.wait_for_function(f"({length})() > 20")
    page.wait_for_function("before => document.querySelector('#answer-1 textarea').value.length > before", arg=60)
    page.click("#stop")
    wait_until_it_rests(page)
    ask(page, TO_KOREAN, "Yes.")  # its row has ended, so that this one's turn comes
    page.wait_for_function("document.querySelector('#answer-0 textarea').value === '네.'")
    page.click("#stop")


def test_examples_fill_the_boxes(page):
    page.click("text=I am a student.")
    page.wait_for_function("document.querySelector('#input textarea').value === 'I am a student.'")
    assert page.input_value("#instruction textarea") == TO_KOREAN


def test_texts_stay_texts(page):
    set_slider(page, "Longest answer", "4")
    ask(page, HOSTILE)
    page.wait_for_selector("#looks-0 table")
    assert HOSTILE.replace(" ", "␣") in "".join(page.locator("#looks-0 thead th").all_inner_texts())
    ask(page, " ")
    wait_for_note(page, 0, "Write an instruction first.")


def test_it_fits_a_phone(browser, shown):
    with browser.new_context(viewport={"width": 400, "height": 800}, color_scheme="dark") as window:
        page = window.new_page()
        page.set_default_timeout(120_000)
        page.goto(shown.url)
        page.wait_for_selector("#instruction textarea")
        ask(page, TO_KOREAN, "Yes.")
        page.wait_for_function("document.querySelector('#answer-0 textarea').value === '네.'")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.click("#stop")


def test_no_files_no_strangers(shown):
    for body, status in (b'{"data":[],"fn_index":99999,"session_hash":"h"}', 500), (b" " * 5_000_000, 413):
        place = f"{shown.url}/gradio_api/queue/join"
        request = urllib.request.Request(place, body, {"Content-Type": "application/json"})
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            urllib.request.urlopen(request)
    log = shown.log.read_text()
    assert "a request to the page failed: KeyError 99999" in log and "Traceback" not in log
    for path in ("gradio_api/upload", "upload", "gradio_api/proxy=http://example.org/"):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{shown.url}/{path}", b"x")
    strange = urllib.request.Request(shown.url, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(strange)
    answer = urllib.request.urlopen(shown.url)
    assert "default-src 'self'" in answer.headers["content-security-policy"]


@pytest.mark.slow
def test_beyond_the_loopback_a_password_is_needed(t5_checkpoint, tmp_path, capsys):
    command = ["demo", str(t5_checkpoint), "--host", "0.0.0.0"]
    assert diptych(command) == 2 and "DIPTYCH_PASSWORD" in capsys.readouterr().err
    with listening(command, tmp_path / "log", DIPTYCH_PASSWORD="open sesame") as started:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{started.url}/config")
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait() == 0 and "Traceback" not in started.log.read_text()


def test_a_missing_extra_is_explained(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert diptych(["demo", "."]) == 2 and "pip install 'diptych[gradio]'" in capsys.readouterr().err


def test_an_export_to_ctranslate2_answers_without_a_map(browser, exported_t5, tmp_path):
    with (
        listening(["demo", str(exported_t5), "--engine", "ctranslate2"], tmp_path / "log") as shown,
        browser.new_context() as window,
    ):
        page = window.new_page()
        page.set_default_timeout(120_000)
        page.goto(shown.url)
        page.wait_for_selector("#instruction textarea")
        instruction, text, output = EIGHT_ROWS[3]
        ask(page, instruction, text)
        page.wait_for_function("value => document.querySelector('#answer-0 textarea').value === value", arg=output)
        wait_for_note(page, 0, "tokens")
        assert "no map of attention" in page.inner_text("#looks-0")
