"""`diptych serve` with several models, and with CTranslate2: real processes, asked by OpenAI's own client."""

import contextlib
import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from conftest import EIGHT_ROWS, TO_KOREAN, learn_by_heart, tiny_bart
from listening import listening

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.commands import cli
from diptych.finetune.serving.serve_settings import ServeSettings

LONG = "He is my friend, and a good one."


@contextlib.contextmanager
def serving(command, log):
    with listening(["serve", *map(str, command)], log) as started:
        started.client = openai.OpenAI(base_url=f"{started.url}/v1", api_key="none", max_retries=0)
        yield started


def ask(served, model: str, text: str, instruction: str = TO_KOREAN, **settings):
    return served.client.completions.create(model=model, prompt=instruction, extra_body={"input": text}, **settings)


def streamed(chunks, answers: int = 1) -> list[str]:
    texts = [""] * answers
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    return texts


@pytest.fixture(scope="module")
def bart_checkpoint(tmp_path_factory, tiny_tokenizer, eight_prepared_rows):
    model, folder = tiny_bart(len(tiny_tokenizer)), tmp_path_factory.mktemp("second") / "bart"
    learn_by_heart(model, eight_prepared_rows)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fast(exported_t5, tmp_path_factory):
    limits = ("--engine", "ctranslate2", "--batch_wait_ms", 20, "--max_new_tokens", 64)
    with serving(
        [exported_t5, *limits, "--models.again", exported_t5], tmp_path_factory.mktemp("fast") / "log"
    ) as started:
        yield started


def test_models_are_asked_by_their_names(t5_checkpoint, bart_checkpoint, tmp_path):
    with serving([t5_checkpoint, "--models.second", bart_checkpoint], tmp_path / "log") as served:
        names = [model.id for model in served.client.models.list()]
        assert names == ["t5", "second"] and served.client.models.retrieve("second").id == "second"
        health = json.loads(urllib.request.urlopen(f"{served.url}/health").read())
        assert health == {"status": "ok", "model": "t5", "models": names}
        # Both have learned the same rows; a text that they have not learned tells them apart.
        for instruction, text, output in EIGHT_ROWS:
            assert {ask(served, name, text, instruction).choices[0].text for name in names} == {output}
        first, second = (ask(served, name, "So.", "Say.", max_tokens=12) for name in names)
        assert first.choices[0].text != second.choices[0].text and (first.model, second.model) == (*names,)
        with ThreadPoolExecutor(16) as clients:
            rows = [(name, row) for name in names for row in EIGHT_ROWS]
            answers = list(clients.map(lambda it: ask(served, it[0], it[1][1], it[1][0]).choices[0].text, rows))
        assert answers == [row[2] for _, row in rows]

        def sample(name: str) -> list[str]:
            asked = {"temperature": 2.0, "seed": 5, "n": 2, "max_tokens": 24}
            return [choice.text for choice in ask(served, name, LONG, **asked).choices]

        alone = {name: sample(name) for name in names}
        with ThreadPoolExecutor(8) as clients:  # models do not take random numbers from each other
            assert list(clients.map(sample, names * 8)) == [alone[name] for name in names * 8]
        metrics = urllib.request.urlopen(f"{served.url}/metrics").read().decode()
        assert all(f'diptych_batch_rows_sum{{model="{name}"}} 26.0' in metrics for name in names)
        with pytest.raises(openai.NotFoundError, match="there are 't5', 'second'"):
            ask(served, "third", "Go.")
        request = urllib.request.Request(f"{served.url}/v1/completions", b'{"prompt": "Go."}')
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        error = json.loads(refused.value.read())["error"]
        assert (refused.value.code, error["param"]) == (400, "model") and "'t5', 'second'" in error["message"]


def test_two_models_of_one_name_and_what_is_no_model_are_refused(t5_checkpoint, tmp_path, capsys):
    with pytest.raises(UserError, match="two models are named 't5': x/t5 and y"):
        ServeSettings("x/t5", models={"t5": "y"})
    assert cli.run("serve", [str(t5_checkpoint), "--port", "0", "--models.none", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert cli.run("serve", [str(t5_checkpoint), "--port", "0", "--engine", "ctranslate2"]) == 2
    assert "a checkpoint, and no export to CTranslate2" in capsys.readouterr().err


def test_ctranslate2_answers_many_clients_as_the_checkpoint_does(fast):
    def one(number: int) -> str:
        instruction, text, _ = EIGHT_ROWS[number % 8]
        name, most = ("t5", "again")[number % 2], (64, 40)[number % 3 > 1]
        if number % 3:
            return ask(fast, name, text, instruction, max_tokens=most).choices[0].text
        return streamed(ask(fast, name, text, instruction, stream=True))[0]

    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(one, range(48)))
    assert answers == [EIGHT_ROWS[number % 8][2] for number in range(48)]
    metrics = urllib.request.urlopen(f"{fast.url}/metrics").read().decode()
    batches = float(metrics.split('diptych_batch_rows_count{model="t5"} ')[1].split()[0])
    assert batches < 24  # and 24 prompts


def test_ctranslate2_ends_a_text_where_it_is_told_to(fast):
    whole = ask(fast, "t5", LONG)
    short = ask(fast, "t5", LONG, max_tokens=3)
    assert whole.choices[0].finish_reason == "stop" and short.choices[0].finish_reason == "length"
    assert whole.choices[0].text.startswith(short.choices[0].text) and short.usage.completion_tokens == 3
    text = whole.choices[0].text
    stop = text[4:7]  # cuts through tokens
    for stream in (False, True):
        found = ask(fast, "t5", LONG, stop=[stop, "never"], stream=stream)
        assert (streamed(found)[0] if stream else found.choices[0].text) == text[: text.index(stop)]
    chunks = [chunk.choices[0].text for chunk in ask(fast, "t5", LONG, stream=True)]
    assert "".join(chunks) == text and len([piece for piece in chunks if piece]) > 3


def test_beams_and_seeded_samples_of_ctranslate2(fast):
    beams = fast.client.completions.create(
        model="t5", prompt=TO_KOREAN, n=2, max_tokens=12, extra_body={"input": "Yes.", "num_beams": 4}
    )
    texts = [choice.text for choice in beams.choices]
    assert texts[0] == "네." and len(set(texts)) == 2
    settings = {"temperature": 2.0, "n": 3, "max_tokens": 12}
    first, again, other = ([it.text for it in ask(fast, "t5", LONG, seed=s, **settings).choices] for s in (3, 3, 4))
    assert first == again != other and len(set(first)) > 1
    assert streamed(ask(fast, "t5", LONG, seed=3, stream=True, **settings), 3) == first
    free, more = ([it.text for it in ask(fast, "t5", LONG, **settings).choices] for _ in range(2))
    assert len({*free, *more}) > 3


def test_what_ctranslate2_has_not_is_refused_before_generation(fast):
    with pytest.raises(openai.BadRequestError, match="log-probabilities need --engine torch"):
        ask(fast, "t5", "Go.", logprobs=0)
    with pytest.raises(openai.BadRequestError, match="has \\d+ tokens, and 2048 are read"):
        ask(fast, "t5", "Go. " * 2000)
