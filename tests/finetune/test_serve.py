"""`diptych serve`: real processes on real sockets, asked by OpenAI's own client."""

import contextlib
import json
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from conftest import EIGHT_ROWS, TO_KOREAN, tiny_t5
from listening import listening
from starlette.testclient import TestClient

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.templates import attach_template, load_template, template_of
from diptych.finetune.commands import cli
from diptych.finetune.inference.generation import generate_outputs
from diptych.finetune.inference.prompts import Prompter
from diptych.finetune.inference.scoring import chosen_outputs
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.serving.completion_service import Hosted, Service, build_app
from diptych.finetune.serving.memory_budget import measured_budget
from diptych.finetune.serving.request_batches import Answer, Decoding, Ended, Engine, Failed, Job, Piece, QueueFull
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.served_model import ServedModel
from diptych.finetune.serving.web_address import listen, need_secret

SECRET = "the-token-of-this-test"


@contextlib.contextmanager
def server(checkpoint, log, *arguments: str, **environment: str):
    """A process of `diptych serve` on a free port, and a client of it, until the block ends."""
    with listening(["serve", str(checkpoint), *arguments], log, **environment) as started:
        started.client = openai.OpenAI(base_url=f"{started.url}/v1", api_key=SECRET, max_retries=0)
        yield started


@pytest.fixture(scope="module")
def served(t5_checkpoint, tmp_path_factory):
    with server(t5_checkpoint, tmp_path_factory.mktemp("served") / "log", "--batch_wait_ms", "20") as started:
        yield started


@pytest.fixture(scope="module")
def endless(tmp_path_factory, tiny_tokenizer):
    """A server whose model never ends by itself, one prompt at a time, two that wait."""
    folder = tmp_path_factory.mktemp("endless")
    model = tiny_t5(len(tiny_tokenizer))
    no_text = [
        id for id in range(len(tiny_tokenizer)) if id < 3 or "\N{REPLACEMENT CHARACTER}" in tiny_tokenizer.decode(id)
    ]
    model.generation_config.suppress_tokens = no_text
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    limits = ("--batch_size", "1", "--queue", "2", "--max_new_tokens", "100000", "--timeout", "4")
    with server(folder / "model", folder / "log", *limits) as started:
        yield started


def ask(served, text: str, instruction: str = TO_KOREAN, **settings):
    return served.client.completions.create(
        model="t5", prompt=instruction, extra_body={"input": text} if text else {}, **settings
    )


def metric(served, name: str) -> float:
    text = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
    names = (f"{name} ", f"{name}{{")  # with its labels, or for all of them together
    lines = [line for line in text.splitlines() if line.startswith(names)]
    return sum(float(line.split()[-1]) for line in lines)


def until(condition) -> None:
    """Waits for what must come. Two minutes are for a test that would hang, not for a slow machine."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


def post(url: str, data: bytes, **headers: str) -> tuple[int, dict, dict]:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} | headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.loads(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), dict(error.headers)


@pytest.fixture(scope="module")
def alone(t5_checkpoint):
    """What `diptych generate` makes of each of the eight rows."""
    loaded = load_checkpoint(t5_checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = template_of(tokenizer)
    sources = [tokenizer(template.render_source(instruction, text)).input_ids for instruction, text, _ in EIGHT_ROWS]
    return [
        generate_outputs(LoadedModel.of(model, tokenizer, template), [ids], batch_size=1, max_new_tokens=256)[0].text
        for ids in sources
    ]


def test_answers_are_those_of_generate_streamed_or_whole(served, alone):
    assert alone == [output for _, _, output in EIGHT_ROWS]
    for (instruction, text, _), expected in zip(EIGHT_ROWS, alone, strict=True):
        whole = ask(served, text, instruction)
        assert whole.choices[0].text == expected and whole.choices[0].finish_reason == "stop"
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        chunks = list(ask(served, text, instruction, stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
        assert "".join(pieces) == expected and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
        assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert len([piece for piece in pieces if piece]) >= 1


def test_chat_is_asked_with_its_earlier_turns(served, alone):
    instruction, text, _ = EIGHT_ROWS[1]
    messages = [{"role": "user", "content": [{"type": "text", "text": f"{instruction} {text}"}]}]
    whole = served.client.chat.completions.create(model="t5", messages=messages)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", alone[1])
    streamed = served.client.chat.completions.create(model="t5", messages=messages, stream=True)
    deltas = [chunk.choices[0].delta for chunk in streamed]
    assert "".join(delta.content for delta in deltas) == alone[1]
    assert [delta.role for delta in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    with pytest.raises(openai.BadRequestError, match="has no place for earlier turns"):
        turns = [{"role": "assistant", "content": "x"}, messages[0]]
        served.client.chat.completions.create(model="t5", messages=[messages[0], *turns])


def test_fifty_clients_at_once_get_what_each_gets_alone(served, alone):
    before = metric(served, "diptych_batch_rows_count"), metric(served, "diptych_batch_rows_sum")

    def one(number: int) -> str:
        instruction, text, _ = EIGHT_ROWS[number % 8]
        if number % 3:
            return ask(served, text, instruction).choices[0].text
        return "".join(chunk.choices[0].text for chunk in ask(served, text, instruction, stream=True))

    with ThreadPoolExecutor(50) as clients:
        answers = list(clients.map(one, range(50)))
    assert answers == [alone[number % 8] for number in range(50)]
    batches = metric(served, "diptych_batch_rows_count") - before[0]
    assert metric(served, "diptych_batch_rows_sum") - before[1] == 50 and batches < 50
    assert metric(served, "diptych_queue_depth") == metric(served, "diptych_running_rows") == 0


def test_several_prompts_and_what_stops_them(served, alone):
    prompts = [f"{instruction} {text}" for instruction, text, _ in EIGHT_ROWS[:4]]
    found = served.client.completions.create(model="t5", prompt=prompts)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == alone[:4]
    short = ask(served, EIGHT_ROWS[3][1], max_tokens=2)
    assert short.choices[0].finish_reason == "length" and alone[3].startswith(short.choices[0].text)
    assert short.usage.completion_tokens == 2
    stop = alone[3][4:7]  # cuts through tokens
    for stream in (False, True):
        found = ask(served, EIGHT_ROWS[3][1], stop=[stop, "never"], stream=stream)
        text = "".join(chunk.choices[0].text for chunk in found) if stream else found.choices[0].text
        assert text == alone[3][: alone[3].index(stop)]


def test_log_probabilities_are_those_of_generate(served, t5_checkpoint):
    """Of the tokens that were written: `logprobs` 0 of a completion, and true of a chat."""
    instruction, text, _ = EIGHT_ROWS[2]
    loaded = load_checkpoint(t5_checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = template_of(tokenizer)
    ids = tokenizer(template.render_source(instruction, text)).input_ids
    settings = {"seed": 0, "batch_size": 1, "max_new_tokens": 64, "scores": True}
    (expected,) = chosen_outputs(LoadedModel.of(model, tokenizer), [ids], **settings)
    choice = ask(served, text, instruction, logprobs=0).choices[0]
    found = choice.logprobs
    assert sum(found.token_logprobs) == pytest.approx(expected.log_probability, abs=1e-5)
    assert "".join(found.tokens) == choice.text and len(found.tokens) == len(expected.ids)
    assert all(
        choice.text[offset:].startswith(token) for offset, token in zip(found.text_offset, found.tokens, strict=True)
    )
    messages = [{"role": "user", "content": f"{instruction} {text}"}]
    of_chat = served.client.chat.completions.create(model="t5", messages=messages, logprobs=True, top_logprobs=0)
    parts = of_chat.choices[0].logprobs.content
    assert [(part.token, part.logprob) for part in parts] == [*zip(found.tokens, found.token_logprobs, strict=True)]
    with pytest.raises(openai.BadRequestError, match="without 'stream'"):
        ask(served, text, instruction, logprobs=0, stream=True)


def test_samples_are_those_of_their_seed(served, t5_checkpoint):
    settings = {"temperature": 2.0, "seed": 3, "max_tokens": 12}
    first, second = (ask(served, "Yes.", n=3, **settings) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices] and len(set(texts)) > 1
    loaded = load_checkpoint(t5_checkpoint)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = template_of(tokenizer)
    ids = tokenizer(template.render_source(TO_KOREAN, "Yes.")).input_ids
    torch.manual_seed(3)
    sampling = {"do_sample": True, "temperature": 2.0, "top_p": 1.0, "num_return_sequences": 3}
    sampling |= {"batch_size": 1, "max_new_tokens": 12}
    assert [output.text for output in generate_outputs(LoadedModel.of(model, tokenizer), [ids], **sampling)] == texts
    streamed = {0: "", 1: "", 2: ""}
    for chunk in ask(served, "Yes.", n=3, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts


def test_beams_and_the_best_of_them_are_those_of_generate(served, t5_checkpoint):
    loaded = load_checkpoint(t5_checkpoint)
    template = template_of(loaded.tokenizer)
    ids = loaded.tokenizer(template.render_source(TO_KOREAN, "Yes.")).input_ids
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 2.0}
    settings = {"batch_size": 1, "max_new_tokens": 12, "seed": 0, "scores": True} | beams
    expected = chosen_outputs(loaded, [ids], **settings)
    texts = [output.text for output in expected]
    assert len(set(texts)) == 3

    def asked(**fields):
        prompts = {"input": "Yes.", "length_penalty": 2.0} | fields
        return served.client.completions.create(
            model="t5", prompt=[TO_KOREAN] * 2, n=3, max_tokens=12, logprobs=0, extra_body=prompts
        )

    for fields in ({"num_beams": 4}, {"use_beam_search": True, "best_of": 4}):
        choices = asked(**fields).choices
        assert [choice.text for choice in choices] == texts * 2
        for choice, output in zip(choices, expected * 2, strict=True):
            assert sum(choice.logprobs.token_logprobs) == pytest.approx(output.log_probability, abs=1e-4)
    streamed = {0: "", 1: "", 2: ""}
    body = {"input": "Yes.", "length_penalty": 2.0, "num_beams": 4}
    chunks = served.client.completions.create(
        model="t5", prompt=TO_KOREAN, n=3, max_tokens=12, stream=True, extra_body=body
    )
    for chunk in chunks:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert list(streamed.values()) == texts


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({"prompt": "Go.", "model": "gpt"}, 404, "model"),
        ({}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [1, 2]}, 400, "prompt"),
        ({"prompt": " "}, 400, "prompt"),
        ({"prompt": "Go. " * 3, "system": "Be kind."}, 400, "prompt"),
        ({"prompt": "Go.", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "Go.", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "Go.", "temperature": 3}, 400, "temperature"),
        ({"prompt": "Go.", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "Go.", "n": 2}, 400, "n"),
        ({"prompt": "Go.", "n": 3, "num_beams": 2}, 400, "n"),
        ({"prompt": "Go.", "num_beams": 17}, 400, "num_beams"),
        ({"prompt": "Go.", "num_beams": 2, "temperature": 1}, 400, "temperature"),
        ({"prompt": "Go.", "use_beam_search": True}, 400, "use_beam_search"),
        ({"prompt": "Go.", "best_of": 2}, 400, "best_of"),
        ({"prompt": "Go.", "length_penalty": 2}, 400, "length_penalty"),
        ({"prompt": "Go.", "repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"prompt": "Go.", "stop": ["", "x"]}, 400, "stop"),
        ({"prompt": "Go.", "stop": "\ud800"}, 400, None),
        ({"prompt": "\ud800", "stream": True}, 400, None),
        ({"prompt": "Go.", "tools": [{}]}, 400, "tools"),
        ({"prompt": "Go.", "presence_penalty": False}, 400, "presence_penalty"),
        ({"prompt": "Go.", "source_language": False}, 400, "source_language"),
        ({"prompt": "Go.", "source_language": "x"}, 400, "prompt"),
        ({"prompt": "Go.", "temprature": 1}, 400, "temprature"),
        ({"promt": "Go."}, 400, "promt"),
        ({"messages": ["Go."]}, 400, "messages[0]"),
    ],
)
def test_what_cannot_be_done_names_the_field(served, body, status, param):
    path = "chat/completions" if "messages" in body else "completions"
    found, answer, _ = post(f"{served.url}/v1/{path}", json.dumps(body).encode())
    assert (found, answer["error"]["param"]) == (status, param), answer
    assert answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"


def test_what_is_no_request_is_refused(served):
    completions = f"{served.url}/v1/completions"
    assert post(completions, b"{")[0] == 400
    assert post(completions, b"[1]")[0] == 400
    assert post(completions, b"[" * 100_000)[0] == 400
    assert post(completions, json.dumps({"prompt": "x" * 4_000_001}).encode())[0] == 413
    assert post(f"{served.url}/v1/nothing", b"{}")[0] == 404
    assert post(f"{served.url}/health", b"{}")[0] == 405


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "evil.example:x"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example", "Content-Type": "text/plain"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Host": "LocalHost:80", "Origin": "http://127.0.0.1:3000", "Sec-Fetch-Site": "same-site"}, 200),
        ({"Host": "[::1]:8000", "Sec-Fetch-Site": "none"}, 200),
    ],
)
def test_without_a_token_only_this_machine_and_no_page_of_another_site_asks(served, headers, status):
    found, answer, _ = post(f"{served.url}/v1/completions", b'{"prompt": "Go.", "max_tokens": 1}', **headers)
    assert found == status and (status == 200 or "DIPTYCH_TOKEN" in answer["error"]["message"])
    assert post(f"{served.url}/health", None, **headers)[0] == status


def test_models_and_health(served):
    assert [model.id for model in served.client.models.list()] == ["t5"]
    assert served.client.models.retrieve("t5").id == "t5"
    with pytest.raises(openai.NotFoundError, match="this is 't5'"):
        served.client.models.retrieve("gpt")
    assert json.loads(urllib.request.urlopen(f"{served.url}/health").read()) == {"status": "ok", "model": "t5"}


def test_no_text_of_a_request_is_in_the_log(served):
    ask(served, "a text that nobody should keep")
    assert "nobody" not in served.log.read_text() and "Traceback" not in served.log.read_text()


def hold(endless) -> threading.Thread:
    """A client that asks, and waits as long as it takes."""

    def wait():
        with contextlib.suppress(openai.APIStatusError):
            endless.client.completions.create(model="model", prompt="Go.")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_full_queue_a_timeout_and_clients_that_hang_up(endless):
    waiting = [hold(endless)]
    until(lambda: metric(endless, "diptych_running_rows") == 1)
    waiting += [hold(endless), hold(endless)]
    until(lambda: metric(endless, "diptych_queue_depth") == 2)
    status, answer, headers = post(f"{endless.url}/v1/completions", b'{"prompt": "Go."}')
    assert status == 503 and answer["error"]["type"] == "overloaded" and headers["Retry-After".lower()] == "1"
    status, answer, _ = post(f"{endless.url}/v1/completions", b'{"prompt": ["Go.", "Go.", "Go."]}')
    assert status == 400 and "has 3 prompts, but only 2 can wait" in answer["error"]["message"]
    for thread in waiting:
        thread.join()  # each is given up after four seconds
    assert metric(endless, 'diptych_requests_total{path="/v1/completions",status="504"}') == 3
    until(lambda: metric(endless, "diptych_running_rows") == 0)  # their rows were ended, too

    dropped = metric(endless, "diptych_dropped_total")
    stream = endless.client.completions.create(model="model", prompt="Go.", stream=True)
    next(iter(stream))
    assert metric(endless, "diptych_running_rows") == 1
    stream.close()
    until(lambda: metric(endless, "diptych_running_rows") == 0)
    with socket.create_connection(("127.0.0.1", endless.port)) as rude:
        body = b'{"prompt": "Go."}'
        rude.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        until(lambda: metric(endless, "diptych_running_rows") == 1)
    until(lambda: metric(endless, "diptych_running_rows") == 0)
    until(lambda: metric(endless, "diptych_dropped_total") == dropped + 2)

    events = list(endless.client.completions.create(model="model", prompt="Go.", max_tokens=3, stream=True))
    assert events[-1].choices[0].finish_reason == "length"  # it still works
    with pytest.raises(openai.APIError, match="no answer within 4 seconds"):
        list(endless.client.completions.create(model="model", prompt="Go.", stream=True))


@pytest.mark.slow
def test_sigterm_lets_end_what_was_begun(t5_checkpoint, tmp_path, alone):
    with server(t5_checkpoint, tmp_path / "log", "--batch_wait_ms", "1500") as started:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(ask(started, EIGHT_ROWS[0][1]).choices[0].text))
        thread.start()
        until(lambda: metric(started, "diptych_queue_depth") == 1)
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait() == 0
        thread.join()
        assert answers == [alone[0]]
        assert "Traceback" not in started.log.read_text()


def test_beyond_the_loopback_a_token_is_needed(t5_checkpoint, tmp_path, capsys):
    assert (
        cli.run("serve", [str(t5_checkpoint), "--host", "0.0.0.0"]) == 2 and "DIPTYCH_TOKEN" in capsys.readouterr().err
    )
    with pytest.raises(UserError, match="DIPTYCH_TOKEN begins or ends with blanks"):
        need_secret("127.0.0.1", " secret", "DIPTYCH_TOKEN")
    with server(t5_checkpoint, tmp_path / "log", "--host", "0.0.0.0", DIPTYCH_TOKEN=SECRET) as started:
        assert ask(started, EIGHT_ROWS[0][1]).choices[0].text == "가."
        stranger = openai.OpenAI(base_url=f"{started.url}/v1", api_key="another", max_retries=0)
        for call in (lambda: stranger.models.list(), lambda: stranger.completions.create(model="t5", prompt="Go.")):
            with pytest.raises(openai.AuthenticationError):
                call()
        tried = {SECRET: 401, f"Basic {SECRET}": 401, "Bearer \xe9": 401, f"bearer  {SECRET}": 200}
        for given, status in tried.items():
            assert post(f"{started.url}/v1/completions", b'{"prompt": "Go."}', Authorization=given)[0] == status
        _, _, headers = post(f"{started.url}/v1/completions", b'{"prompt": "Go."}')
        assert headers["www-authenticate"] == "Bearer"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{started.url}/metrics")
        assert urllib.request.urlopen(f"{started.url}/health").status == 200
        assert SECRET not in started.log.read_text()


def test_an_answer_does_not_wait_for_the_clients_acknowledgement():
    """The kernel would keep its body for 40 ms."""
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as own,
    ):
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_port_that_is_taken_and_a_missing_extra_are_explained(t5_checkpoint, served, monkeypatch, capsys):
    assert cli.run("serve", [str(t5_checkpoint), "--port", str(served.port)]) == 2
    assert "cannot be listened at" in capsys.readouterr().err
    for name in ("completion_service", "guarded_server"):
        monkeypatch.delitem(sys.modules, f"diptych.finetune.serving.{name}")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.run("serve", [str(t5_checkpoint)]) == 2
    assert "pip install 'diptych[serve]'" in capsys.readouterr().err


@pytest.fixture
def engine(learned_t5, tiny_tokenizer):
    started = Engine(LoadedModel.of(learned_t5, tiny_tokenizer), batch_size=4, queue_size=3, batch_wait_ms=300)
    yield started
    started.close()


def test_those_that_decode_alike_share_a_batch(engine, tiny_tokenizer):
    sizes, events = [], []
    engine.on_batch = sizes.append
    ids = tiny_tokenizer(template_of(tiny_tokenizer).render_source(TO_KOREAN, "I am a student.")).input_ids
    same, shorter, other = Decoding(8), Decoding(1), Decoding(8, repetition_penalty=2.0)
    dropped = Job(ids, same, events.append, is_dropped=True)
    jobs = [Job(ids, decoding, events.append) for decoding in (same, other, shorter)]
    engine.submit([dropped, *jobs])
    with pytest.raises(QueueFull):
        engine.submit([Job(ids, same, events.append)])
    until(lambda: len(events) == 3)
    assert sizes == [2, 1] and all(isinstance(event, Ended) for event in events)
    (short,), (long,) = events[0].answers, events[1].answers  # an answer does not wait for a longer one
    assert isinstance(short, Answer) and short.ids == long.ids[:1] and len(long.ids) > 1 and not short.finished


def test_a_batch_that_breaks_says_so_and_the_next_one_goes_on(engine, tiny_tokenizer, caplog):
    events = []
    ids = tiny_tokenizer("Go.").input_ids
    engine.submit([Job([10**9], Decoding(8), events.append)])
    until(lambda: events)
    assert isinstance(events[0], Failed)
    assert "IndexError while answering: please report it." in caplog.text
    engine.submit([Job(ids, Decoding(8), events.append)])
    until(lambda: len(events) == 2)
    assert isinstance(events[1], Ended)


def test_a_failure_of_our_own_is_counted_as_one(engine, tiny_tokenizer, monkeypatch, caplog):
    """Not as a client that has gone; and what broke is not written down."""
    settings = ServeSettings(model="t5")
    prompter = Prompter(tiny_tokenizer, engine.loaded.template, 512)
    served = ServedModel(engine.loaded, prompter, 8, measured_budget(engine.loaded), 20)
    service = Service(settings, [Hosted("t5", served, engine)])
    client = TestClient(build_app(service), base_url="http://localhost")

    words = "words of a client"

    def breaks(*arguments):
        raise RuntimeError(words)

    monkeypatch.setattr("diptych.finetune.serving.request_batches.generate_batch", breaks)
    whole = client.post("/v1/completions", json={"prompt": "Go."})
    streamed = client.post("/v1/completions", json={"prompt": "Go.", "stream": True})
    monkeypatch.setattr(service, "encode", breaks)
    unread = client.post("/v1/completions", json={"prompt": "Go."})
    assert (whole.status_code, streamed.status_code, unread.status_code) == (500, 200, 500)
    assert all("server failed: RuntimeError" in answer.text for answer in (whole, streamed, unread))
    counted = client.get("/metrics").text
    assert 'diptych_requests_total{path="/v1/completions",status="500"} 3.0' in counted
    assert "diptych_dropped_total 0.0" in counted
    assert "RuntimeError" in caplog.text and words not in caplog.text


def test_text_that_may_begin_a_stop_string_waits(tiny_tokenizer, learned_t5, tmp_path):
    """The third row's answer is 나는 학생이다. With 학생이 아 as stop string, 학생이 has to wait for what follows."""
    file = tmp_path / "stop.jinja"
    file.write_text('{# stop: "학생이 아" #}\n{{ instruction }} {{ input }}\n{# target #}\n{{ output }}')
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = type(tiny_tokenizer).from_pretrained(tmp_path)
    attach_template(tokenizer, load_template(str(file)))
    started = Engine(LoadedModel.of(learned_t5, tokenizer), batch_size=1, queue_size=1, batch_wait_ms=0)
    events = []
    ids = tiny_tokenizer(template_of(tiny_tokenizer).render_source(TO_KOREAN, "I am a student.")).input_ids
    started.submit([Job(ids, Decoding(64), events.append, wants_pieces=True)])
    until(lambda: events and isinstance(events[-1], Ended))
    started.close()
    pieces = [event.text for event in events if isinstance(event, Piece)]
    so_far = ["".join(pieces[: count + 1]) for count in range(len(pieces))]
    assert so_far[-1] == events[-1].answers[0].text == "나는 학생이다."
    assert not any(text.endswith(("학", "학생", "학생이")) for text in so_far)
