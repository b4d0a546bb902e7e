"""A template renders data verbatim, travels with the tokenizer, and says what is wrong with it and where."""

import json
import multiprocessing
import resource
import threading
import time

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.records import Origin, Record
from diptych.data_prep.text_to_ids.extend_tokenizer import add_new_tokens, learn_new_tokens
from diptych.data_prep.text_to_ids.rendered_text import Rendered
from diptych.data_prep.text_to_ids.templates import (
    TEMPLATES,
    TOKENIZER_KEY,
    Template,
    attach_template,
    carried_template,
    load_template,
    template_of,
)

HOSTILE = ["{{ 7*7 }}", "{{ instruction }}", "{% raw %}", "{# target #}", "</s>", "<b>&amp;</b>", "  spaces  ", "\n"]


@pytest.fixture
def frame(tmp_path):
    def write(text):
        path = tmp_path / "frame.jinja"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def test_shipped_templates_render_these_texts():
    assert TEMPLATES["translate"].render_source("Translate English to Korean:", "Go.") == (
        "Translate English to Korean: Go."
    )
    assert TEMPLATES["translate"].render_source("Say hello.") == "Say hello."
    assert TEMPLATES["plain"].render_source("Add.", "1 + 1") == "Add.\n\n1 + 1"
    assert TEMPLATES["plain"].render_source("Add.") == "Add."
    assert TEMPLATES["alpaca"].render_source("Add.", "1 + 1") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a"
        " response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n"
        "### Response:"
    )
    assert TEMPLATES["alpaca"].render_source("Add.").endswith("request.\n\n### Instruction:\nAdd.\n\n### Response:")
    assert TEMPLATES["chat"].render_source("Add.", "1 + 1", (("Hello!", "Hi."),), "Be brief.") == (
        "System: Be brief.\n\nUser: Hello!\n\nAssistant: Hi.\n\nUser: Add.\n\n1 + 1\n\nAssistant:"
    )
    assert TEMPLATES["chat"].render_source("Add.") == "User: Add.\n\nAssistant:"
    assert TEMPLATES["plain"].render_source("Add.", system="Be brief.") == "Be brief.\n\nAdd."


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("text", HOSTILE)
def test_data_is_inserted_and_never_interpreted(name, text):
    template = TEMPLATES[name]
    assert template.render_target(text) == text
    marked = template.render_source("INSTRUCTION", "INPUT")
    assert template.render_source(text, text) == marked.replace("INSTRUCTION", text).replace("INPUT", text)


def test_earlier_turns_are_rendered_where_there_is_a_place_for_them():
    source = TEMPLATES["plain"].render_source("And in Korean?", history=(("Say go.", "Go."),))
    assert source == "Say go.\n\nGo.\n\nAnd in Korean?"
    with pytest.raises(UserError, match="'translate' has no place for earlier turns"):
        TEMPLATES["translate"].render_source("Go.", history=(("a", "b"),))
    advice = "'alpaca' has no place for a system prompt. Conversations are prepared with --template chat"
    with pytest.raises(UserError, match=advice):
        TEMPLATES["alpaca"].render_source("Go.", system="Be brief.")


def test_a_record_is_rendered_with_all_that_it_holds():
    chat = {"history": (("Hello!", "Hi."),), "system": "Be brief."}
    record = Record(instruction="Add.", input="1 + 1", output="2", origin=Origin("a.jsonl", 1), **chat)
    template = TEMPLATES["chat"]
    assert template.render(record) == (template.render_source("Add.", "1 + 1", *chat.values()), "2")


def test_settings_stand_in_the_first_lines_of_a_file(frame):
    template = load_template(
        frame(
            '{# decoder_prefix: kor_Hang <x> #}\n{# stop: ### Instruction: #}\n{#- stop: "\\nUser:" -#}\n'
            "{# note: a comment #}{{ instruction }}\n{# target #}\n{{ output }}"
        )
    )
    assert template.decoder_prefix == ("kor_Hang", "<x>")
    assert template.stop == ("### Instruction:", "\nUser:")
    assert (template.render_source("Add."), template.render_target("2")) == ("Add.", "2")
    assert template.cut_at_stop("a\nUser: b ### Instruction: c") == "a"
    assert template.cut_at_stop("a user") == "a user"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{# stpo: x #}\n{{ instruction }}", "line 1: unknown setting 'stpo'. Did you mean 'stop'?"),
        ("{{ instruction }}\n{# stop: x #}", "line 2: 'stop' belongs into the first lines"),
        ("{# stop: x #}\n{# decoder_prefix: #}\n", "line 2: 'decoder_prefix' is empty"),
        ('{# stop: "\\q" #}\n{{ instruction }}', 'line 1: "\\q" is no JSON string'),
        ("{# stop: x #}\n{# stop: y #}\n\n{{ inptu }}", "line 4: unknown variable 'inptu'"),
        ("{# stop: x #}\na\n{{ instruction ", "line 3"),
        ("a\n{{ input | tojson }}", "line 2: No filter named 'tojson'. Here are capitalize, default,"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be compiled"),
        ("a" * 30_001, "30,000 are allowed"),
        ("a\U0010fffeb", "which are no characters"),
    ],
)
def test_a_mistake_in_settings_or_size_is_named_by_file_and_line(text, words, frame):
    with pytest.raises(UserError) as error:
        load_template(frame(text))
    assert words in str(error.value)
    assert "frame.jinja" in str(error.value)


def test_lines_are_counted_from_the_top_of_the_file_when_a_row_fails(frame):
    template = load_template(frame("{# stop: x #}\n{{ input[7] }}\n{# target #}\n\n{{ output[7] }}"))
    with pytest.raises(UserError, match="frame.jinja, line 2: "):
        template.render_source("a", "b")
    with pytest.raises(UserError, match="frame.jinja, line 5: "):
        template.render_target("b")


def test_a_rendered_text_reads_as_plain_text_and_knows_its_frame(frame):
    source = load_template(frame("Fill <x>: {{ input }}{{ '<y>' }}{% set z = '<z>' %}{{ z }}")).render_source(
        "", "<x>"
    )
    assert source == "Fill <x>: <x><y><z>"
    assert isinstance(source, Rendered)
    assert source.marked.split("\U0010fffe") == ["", "Fill <x>: ", "<x>", "<y>", "<z>"]


@pytest.mark.parametrize("field", ["instruction", "input", "system", "history", "output"])
@pytest.mark.parametrize("character", ["\U0010fffe", "\U0010ffff"])
def test_what_is_no_character_is_refused_in_every_field(field, character):
    fields = {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": (("e", "f"),)}
    fields[field] = (("e", f"x{character}"),) if field == "history" else f"x{character}"
    with pytest.raises(UserError, match="which are no characters"):
        TEMPLATES["plain"].render(Record(**fields, origin=Origin("a", 1)))


def test_a_file_is_the_source_and_may_hold_the_target(frame):
    template = load_template(frame("Task: {{ instruction }}\nText: {{ input }}\n{# target #}\nAnswer: {{ output }}\n"))
    assert template.render_source("Add.", "1 + 1") == "Task: Add.\nText: 1 + 1"
    assert template.render_target("2") == "Answer: 2"
    alone = load_template(frame("{{ instruction | upper }}\n"))
    assert (alone.render_source("add"), alone.render_target("2")) == ("ADD", "2")
    tight = load_template(frame("{{ instruction }}\n{#- target -#}\nA: {{ output }}"))
    assert (tight.render_source("add"), tight.render_target("2")) == ("add", "A: 2")
    windows = load_template(frame(b"\xef\xbb\xbf{{ instruction }}\r\n{# target #}\r\n{{ output }}\r\n"))
    assert (windows.render_source("add"), windows.render_target("2")) == ("add", "2")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a\n{{ instruction ", "line 2"),
        ("a\n{% if input %}b", "line 2"),
        ("a\nb\n{{ inptu }}", "line 3: unknown variable 'inptu'; here are instruction, input, history, system."),
        ("a\n{{ instrution }}", "Did you mean 'instruction'?"),
        ("a\n{# target #}\n{{ output }}\n{{ input }}", "line 4: unknown variable 'input'; here are output"),
        ("{{ instruction }}\n{# target #}\n\n{{ output ", "line 4"),
        (
            "{{ input }}\n{# target #}\n{{ output }}\n{#target#}\n",
            "line 4: a second {# target #}, after that in line 2",
        ),
        ("{{ input }}\n{{ instruction }} {# target #}", "line 2: {# target #} needs a line of its own"),
        ("Answer:\n{# target #}\n{{ output }}", "the source uses none of instruction, input, history, system"),
        (b"{{ instruction }}\xff", "invalid UTF-8 at byte offset 17"),
    ],
)
def test_a_mistake_in_a_file_is_named_by_file_and_line(text, words, frame):
    with pytest.raises(UserError) as error:
        load_template(frame(text))
    assert words in str(error.value)
    assert "frame.jinja" in str(error.value)


def test_jinja_s_own_names_are_no_unknown_variables(frame):
    template = load_template(frame("{% for i in range(2) %}{{ loop.index }}{% endfor %}{{ instruction }}"))
    assert template.render_source("x") == "12x"


def test_a_row_that_a_template_cannot_render_is_named_by_line(frame):
    template = load_template(frame("first\n{{ input.split('=')[1] }}"))
    assert template.render_source("", "a=b") == "first\nb"
    with pytest.raises(UserError, match=r"frame.jinja, line 2: .*Change the template or this row"):
        template.render_source("", "no sign of it")


@pytest.mark.parametrize(
    "text",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ instruction.__init__.__globals__ }}",
        "{{ history.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ input.format(instruction) }}",
        "{{ input.encode() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_a_stranger_s_template_is_held_in_the_sandbox(text):
    with pytest.raises(UserError):
        Template("stranger", text).render_source("a")


@pytest.mark.parametrize(
    "work",
    [
        "{% for i in range(9999) %}" + "{% if l == l %}{% endif %}" * 1000 + "{% endfor %}",
        "{{ range(99999)|reject('in', l)|list|length }}",
        "{% for i in range(9999) %}" + "{% set a = l[::-1] %}" * 1000 + "{% endfor %}",
        "{% for i in range(62000) %}" + "{% if 'ab' in text %}{% endif %}" * 99 + "{% endfor %}",
    ],
)
def test_a_template_pays_for_what_it_compares_tests_and_cuts(work):
    text = "{% set l = range(50000)|list %}{% set text = range(50000)|join %}" + work
    began = time.process_time()
    with pytest.raises(UserError, match="it makes more than|it takes more than"):
        Template("stranger", text).render_source("a")
    assert time.process_time() - began < 5


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="neither one of alpaca, plain, translate, chat nor .* Did you mean 'alpaca'"):
        load_template("alpcaa")


def test_the_template_travels_with_tokenizers_of_every_family(tokenizers_by_family, tmp_path):
    template = Template("my.jinja", "{{ instruction }}\n→ {{ input }}", "= {{ output }}")
    for name, tokenizer in tokenizers_by_family.items():
        tokenizer.save_pretrained(tmp_path / name)
        travelling = AutoTokenizer.from_pretrained(tmp_path / name)
        attach_template(travelling, template)
        for stop in ("first", "second"):
            travelling.save_pretrained(tmp_path / name / stop)
            travelling = AutoTokenizer.from_pretrained(tmp_path / name / stop)
        assert template_of(travelling) == template, name
        assert travelling("Go. 가.")["input_ids"] == tokenizer("Go. 가.")["input_ids"], name


def test_a_tokenizer_without_a_template_says_so(bpe_folder):
    with pytest.raises(UserError, match="carries no template.*one of alpaca, plain, translate, chat, or a Jinja file"):
        template_of(AutoTokenizer.from_pretrained(bpe_folder))


DOUBLED = "{% set a = a ~ a %}" * 60 + "{{ a }}"
BOMBS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops without turns": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops in filters": "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "recursive loop": "{% for t in input recursive %}{{ loop(input) }}{% endfor %}",
    "slow turns": (
        "{% set x = range(90000) | join %}{% for i in range(99999) %}{% set y = x[1:] == x[:-1] %}{% endfor %}"
    ),
    "range": "{% for i in range(1000000000) %}{% endfor %}",
    "text times number": "{{ 'a' * 10 }}",
    "power": "{{ 9 ** 9 }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "format": "{{ '%9999999999d' | format(1) }}",
    "center": "{{ range(99999) | map('center', 99999) | join }}",
    "replace": "{% set a = range(9999) | join %}{{ a | replace('', a) }}",
    "replace method": "{% set a = range(9999) | join %}{{ a.replace('', a) }}",
    "join": "{% set a = range(9999) | join %}{{ a | join(a) }}",
    "join method": "{{ input.join(range(9999)) }}",
    "ljust": "{{ input.ljust(1000000000) }}",
    "doubled by ~": "{% set a = 'a' %}" + DOUBLED,
    "doubled by +": "{% set a = input %}" + DOUBLED.replace("~", "+"),
    "doubled list": "{% set a = input.split() %}" + DOUBLED.replace("~", "+"),
    "doubled constant": "{{ 'aa'" + " | replace('a', 'aaaaaaaa')" * 20 + " }}",
    "list of itself": "{% set a = [[1], [2]] %}",
    "set block": "{% set a %}{% for i in range(99999) %}{{ input }}{% endfor %}{% endset %}",
    "output": "{% for i in range(99999) %}" + "a" * 999 + "{% endfor %}",
    "outputs": "{% for i in range(99999) %}{{ input }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_never_ends_or_fills_memory_is_stopped(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.thread_time()
    with pytest.raises(UserError, match="template bomb.*Change the template or this row"):
        Template("bomb", BOMBS[name]).render_source("a", "some input")
    assert time.thread_time() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def stopped(text):
    try:
        Template("bomb", text).render_source("a", "b")
    except UserError as error:
        return str(error)


def test_it_is_stopped_in_threads_and_in_worker_processes_too():
    bombs = [BOMBS["loops without turns"], BOMBS["doubled by ~"]]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        messages = pool.map(stopped, bombs)
    threads = [threading.Thread(target=lambda bomb=bomb: messages.append(stopped(bomb))) for bomb in bombs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(messages) == 4 and all("template bomb" in message for message in messages)


def test_the_budget_is_one_row_s_and_grows_with_it():
    lines = Template("lines", "{% for line in input.splitlines() %}{{ line | upper }}\n{% endfor %}")
    rows = "abc\n" * 100_000
    for _ in range(2):
        assert lines.render_source("", rows) == rows.upper()


def test_what_templates_are_made_of_works_within_the_limits():
    text = (
        "{% set two = input[:2] %}{% for a, b in history if a %}{{ loop.index }}{{ a ~ b }}"
        "{{ '' if loop.last else ',' }}{% else %}none{% endfor %} {{ two + '.' }} {{ loop is defined }}"
        " {{ history | map('first') | join(', ') }} {{ input.replace('n', 'm').split('p') | last | default('x') }}"
        " {{ history | length + 1 - 2 }} {{ instruction | title | trim }}"
        " {{ history[-1][0] if 'n' in input and not system else system }}"
    )
    source = Template("all", text).render_source("do it", "input", (("q", "r"), ("s", "t")))
    assert source == "1qr,2st in. False q, s ut 1 Do It s"


@pytest.fixture
def travelling(bpe_folder):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    attach_template(tokenizer, TEMPLATES["chat"])
    return tokenizer


def test_examples_travel_with_the_template_and_are_checked(travelling, tmp_path):
    travelling.save_pretrained(tmp_path)
    assert template_of(AutoTokenizer.from_pretrained(tmp_path)) == TEMPLATES["chat"]
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())[TOKENIZER_KEY]
    first, _, chat = stored["golden"]
    assert first["source"] == "User: Translate English to Korean:\n\nI am a student.\n\nAssistant:"
    assert first["labels"] == [[], travelling("나는 학생이다.", add_special_tokens=False)["input_ids"], [1]]
    assert chat["source"].startswith("System: Be brief.\n\nUser: Hello!")


def test_a_template_that_was_changed_is_noticed_with_what_differs(travelling):
    stored = travelling.init_kwargs[TOKENIZER_KEY]
    travelling.init_kwargs[TOKENIZER_KEY] = stored | {"source": stored["source"].replace("User:", "Human:")}
    with pytest.raises(UserError, match=r"source text of example 1 was 'User: Tr.*' and is 'Human: Tr.*--template"):
        template_of(travelling)
    assert "Human:" in template_of(travelling, check=False).source


def test_a_tokenizer_that_was_changed_is_noticed(travelling, tmp_path):
    travelling.save_pretrained(tmp_path)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    backend["model"]["merges"] = backend["model"]["merges"][:50]
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(UserError, match="the source ids of example 1 was"):
        template_of(AutoTokenizer.from_pretrained(tmp_path))


def test_folders_from_before_there_were_examples_load(travelling):
    stored = {"name": "mine", "source": "{{ instruction }}", "target": "{{ output }}"}
    travelling.init_kwargs[TOKENIZER_KEY] = stored
    assert template_of(travelling) == Template("mine", "{{ instruction }}")
    del travelling.init_kwargs[TOKENIZER_KEY]
    assert carried_template(travelling) is None


def test_another_language_is_no_change_of_the_template(tokenizers_by_family, tmp_path):
    tokenizers_by_family["nllb"].save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    attach_template(tokenizer, TEMPLATES["translate"])
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path, src_lang="fra_Latn", tgt_lang="deu_Latn")
    assert template_of(other) == TEMPLATES["translate"]


def test_a_template_for_rows_of_one_shape_travels_too(bpe_folder):
    template = Template("picky", "{{ instruction.split('=')[1] }}")
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    attach_template(tokenizer, template)
    assert template_of(tokenizer) == template


def test_a_template_travels_on_with_a_tokenizer_that_was_given_new_words(bpe_folder, pairs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(bpe_folder)
    attach_template(tokenizer, TEMPLATES["chat"])
    extended = add_new_tokens(
        tokenizer, learn_new_tokens(tokenizer, lambda: [korean for _, korean in pairs], tokens=100)
    )
    extended.save_pretrained(tmp_path)
    golden = [each.init_kwargs[TOKENIZER_KEY]["golden"][0] for each in (tokenizer, extended)]
    assert golden[0]["labels"] != golden[1]["labels"]  # with new words it is another text to the model
    assert template_of(AutoTokenizer.from_pretrained(tmp_path)) == TEMPLATES["chat"]
