"""A template renders data verbatim, travels with the tokenizer, and says what is wrong with it and where."""

import pytest
from transformers import AutoTokenizer

from diptych.data_prep.records import UserError
from diptych.data_prep.templates import TEMPLATES, Template, attach_template, load_template, template_of

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


def test_a_file_is_the_source_and_may_hold_the_target(frame):
    template = load_template(frame("Task: {{ instruction }}\nText: {{ input }}\n{# target #}\nAnswer: {{ output }}\n"))
    assert template.render_source("Add.", "1 + 1") == "Task: Add.\nText: 1 + 1"
    assert template.render_target("2") == "Answer: 2"
    alone = load_template(frame("{{ instruction | upper }}\n"))
    assert (alone.render_source("add"), alone.render_target("2")) == ("ADD", "2")
    windows = load_template(frame(b"\xef\xbb\xbf{{ instruction }}\r\n{# target #}\r\n{{ output }}\r\n"))
    assert (windows.render_source("add"), windows.render_target("2")) == ("add", "2")


@pytest.mark.parametrize(
    "text, words",
    [
        ("a\n{{ instruction ", "line 2"),
        ("a\n{% if input %}b", "line 2"),
        (
            "a\nb\n{{ inptu }}",
            "line 3: unknown variable 'inptu'; here are instruction, input, history.",
        ),
        ("a\n{{ instrution }}", "Did you mean 'instruction'?"),
        (
            "a\n{# target #}\n{{ output }}\n{{ input }}",
            "line 4: unknown variable 'input'; here are output",
        ),
        ("{{ instruction }}\n{# target #}\n\n{{ output ", "line 4"),
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
    ],
)
def test_a_stranger_s_template_is_held_in_the_sandbox(text):
    with pytest.raises(UserError):
        Template("stranger", text).render_source("a")


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UserError, match="neither one of alpaca, plain, translate nor .* Did you mean 'alpaca'"):
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
    with pytest.raises(UserError, match="carries no template.*one of alpaca, plain, translate, or a Jinja file"):
        template_of(AutoTokenizer.from_pretrained(bpe_folder))
