"""Command lines and recipes as people mistype them: what they are told, and what is taken as it was meant."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from diptych.data_prep.cleaning.filters import LengthFilter
from diptych.data_prep.cleaning.mixture import Mixture
from diptych.data_prep.command_line.arguments import from_values, help_text, parse
from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings


@dataclass(frozen=True)
class Settings:
    """Bake something."""

    data: list[str] = field(default_factory=list)
    """What goes in."""
    strict: bool = False
    """Whether to stop."""
    seed: int = 0
    fraction: float | None = None
    size: int | Literal["auto", "table"] = 8
    split_by: Literal["both", "source"] = "both"
    template: str | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    overrides: dict[str, Any] = field(default_factory=dict)
    resume: bool | str = False
    mixture: Mixture | None = None
    """How it is mixed."""
    lengths: LengthFilter | None = None


@dataclass(frozen=True)
class Positional:
    """Look at a model."""

    model: str
    json: bool = False


@dataclass(frozen=True)
class Layered:
    """Pick layers."""

    layers: list[int] | None = None


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """recipe("seed: 1") writes r.yaml into the working folder and parses with it, and with more words."""
    monkeypatch.chdir(tmp_path)

    def run(text, *words):
        (tmp_path / "r.yaml").write_text(text, encoding="utf-8")
        return parse(Settings, "bake", [*words, "--config", "r.yaml"])

    return run


def said(error) -> str:
    message = str(error.value)
    assert message.count("\n") < 6 and "class" not in message and "Subtypes" not in message
    return message


@pytest.mark.parametrize(
    "words, message",
    [
        (["--fraction", "abc"], "--fraction is 'abc'; it has to be a number."),
        (["--seed", "1.5"], "--seed is '1.5'; it has to be a whole number."),
        (["--fraction", ".nan"], "--fraction is '.nan'; it has to be a finite number."),
        (["--seed=null"], "--seed is 'null'; it has to be a whole number."),
        (["--sed", "1"], "there is no option --sed. Did you mean --seed? Choose from: --data, --strict, --seed,"),
        (["--see", "1"], "there is no option --see. Did you mean --seed?"),  # no guess at what was begun
        (["--size", "tabel"], "--size is 'tabel'; it can be a whole number, auto or table. Did you mean table?"),
        (["--split_by", "sorce"], "--split_by is 'sorce'; it can be both or source. Did you mean source?"),
        (["--strict=maybe"], "--strict is 'maybe'; it has to be true or false."),
        (["--betas", "[1]"], "--betas is '[1]'; it has to be a list of 2 values."),
        (["--mixture", "big"], "--mixture is 'big'; it has to be values by name, as in {temperature: …}."),
        (["--mixture", "{cap: x}"], "--mixture.cap is 'x'; it has to be a whole number."),
        (["--mixture.cp", "5"], "there is no option --mixture.cp. Did you mean --mixture.cap?"),
        (["--mixture.weights.a", "x"], "--mixture.weights.a is 'x'; it has to be a number."),
        (["--seed.x", "5"], "there is no option --seed.x. "),
        (["--lengths.unit", "miles"], "Lengths are counted in characters or words, not in 'miles'."),
        (["--seed"], "--seed has no value; it has to be a whole number."),
        (["--seed", "--strict"], "--seed has no value; it has to be a whole number."),
        (["--template", "-x"], "--template has no value; it has to be a text. A value that begins with a dash is"),
        (["stray", "--seed", "1"], "'stray' belongs to no option."),
        (["--strict", "yess"], "'yess' belongs to no option."),
        (["--config"], "--config has no value; it has to be a YAML file."),
    ],
)
def test_a_mistyped_word_is_told_with_what_is_expected(words, message):
    with pytest.raises(UserError) as error:
        parse(Settings, "bake", words)
    assert said(error).startswith(message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("fraction: abc", "r.yaml: fraction is 'abc'; it has to be a number."),
        ("seed:", "r.yaml: seed is empty; it has to be a whole number."),
        ("sede: 1", "r.yaml: there is no setting sede. Did you mean seed? Choose from: data, strict, seed,"),
        ("template: 12", "r.yaml: template is 12; it has to be a text. Put it in quotes."),
        ("data: [en, no]", "r.yaml: data, entry 2, is false; it has to be a text. Put it in quotes."),
        ("data: 3", "r.yaml: data is 3; it has to be a list."),
        ("mixture: {temprature: 2}", "r.yaml: there is no setting mixture.temprature. Did you mean temperature?"),
        ("mixture: {temperature: hot}", "r.yaml: mixture.temperature is 'hot'; it has to be a number."),
        ("mixture: {weights: [1]}", "r.yaml: mixture.weights is [1]; it has to be values by name, as in {name: …}."),
        ("mixture: {weights: {a.json: lots}}", "r.yaml: mixture.weights.a.json is 'lots'; it has to be a number."),
        ("mixture.cap: 0.5", "r.yaml: mixture.cap is 0.5; it has to be a whole number."),
        ("split_by: sorce", "r.yaml: split_by is 'sorce'; it can be both or source. Did you mean source?"),
        ("lengths: {minimum_source: 5, maximum_source: 3}", "minimum_source is 5, above maximum_source, 3"),
        ("- a", 'r.yaml holds ["a"]; settings are due, one a line'),
        ("seed: " + "[" * 10**5, "r.yaml: no YAML (it is nested deeper than 20 levels). Correct it there."),
        ("overrides: " + "[" * 10**5 + "]" * 10**5, "r.yaml: no YAML (it is nested deeper"),
        ('{"overrides": {"a": ' + "[" * 400 + "]" * 400 + "}}", "r.yaml: no YAML (it is nested deeper"),
        ("seed: 1\ndata: a\nseed: 2", "r.yaml, line 3, column 1: no YAML (seed is given twice). Correct it there."),
        ("overrides: {a: [{b: 1, b: 1}]}", "r.yaml, line 1, column 24: no YAML (b is given twice)"),
        ("seed: 012", "r.yaml, line 1, column 7: no YAML (012, with a leading 0 or a colon, is another number"),
        ("fraction: 12:30:45.5", "r.yaml, line 1, column 11: no YAML (12:30:45.5, with"),
        ("fraction: .inf", "r.yaml: fraction is Infinity; it has to be a finite number."),
        ("betas: [.nan, 0]", "r.yaml: betas, entry 1, is NaN; it has to be a finite number."),
        ("seed: 18446744073709551616", "seed is 18446744073709551616; it has to be a number from 0 to 4294967295."),
        ("seed: -1", "seed is -1; it has to be a number from 0"),
        ("seed: ''", "r.yaml: seed is ''; it has to be a whole number."),
        ("- " * 3000, "r.yaml: no YAML (it is nested deeper"),
        ("seed: 1\n" * 200_000, "r.yaml: no YAML (it has more than 1,000,000 characters)"),
        (
            "".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]\n" for n in range(1, 30)).replace("*k0", "1"),
            "r.yaml: no YAML (it has",
        ),
        ("seed: &a [*a]", "r.yaml: no YAML (ValueError: Circular reference detected)"),
        ("seed: " + "9" * 5000, "r.yaml: no YAML (ValueError: Exceeds the limit"),
        ("seed: !!timestamp x", "r.yaml: no YAML (AttributeError: "),
        ("overrides: {a: !!binary eA==}", "r.yaml: no YAML (TypeError: Object of type bytes"),
        ("seed: 1\n fraction: 2", "r.yaml, line 2, column 10: no YAML (mapping values are not allowed"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_file_setting_and_value(text, message, recipe):
    with pytest.raises(UserError) as error:
        recipe(text)
    assert said(error).startswith(message)


@pytest.mark.parametrize(
    "text", ["[" * 10**5, "[" * 10**5 + "]" * 10**5, "012", "{{" * 3000, "- " * 3000, "x: !!timestamp y", "9" * 5000]
)
def test_a_text_on_the_command_line_that_is_no_yaml_stays_a_text(text):
    started = time.process_time()
    assert parse(Settings, "bake", ["--template", text]).template == text
    assert time.process_time() - started < 5


def test_all_that_is_mistyped_is_told_at_once(recipe):
    with pytest.raises(UserError) as error:
        parse(Settings, "bake", ["--sed", "1", "--fraction", "abc", "--tempalte=a", "--seed", "2"])
    told = [" ".join(line.split()[:5]) for line in said(error).splitlines()]
    assert told == ["there is no option --sed.", "--fraction is 'abc'; it has", "there is no option --tempalte."]
    with pytest.raises(UserError) as error:
        recipe("sede: 1\nseed: 1\nfraction: abc")
    assert [line.split()[-1] for line in said(error).splitlines()[1:]] == ["number."]


def test_an_option_may_have_dashes_and_names_inside_values_keep_theirs():
    found = parse(Settings, "bake", ["--split-by=source", "--mixture.weights.a-b", "2"])
    assert (found.split_by, found.mixture.weights) == ("source", {"a-b": 2.0})
    with pytest.raises(UserError, match="^there is no option --spilt_by. Did you mean --split_by"):
        parse(Settings, "bake", ["--spilt-by", "source"])


def test_a_recipe_that_is_not_there_is_told_with_the_nearest(recipe, tmp_path):
    recipe("seed: 1")
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(UserError, match="^--config recpie.yml: there is no such file. Did you mean recipe.yaml?"):
        parse(Settings, "bake", ["--config", "recpie.yml"])
    with pytest.raises(UserError, match=r"^--config mine.yaml: there is no such file\.$"):
        parse(Settings, "bake", ["--config", "mine.yaml"])
    with pytest.raises(UserError, match=r"^--config \. cannot be read: Is a directory\.$"):
        parse(Settings, "bake", ["--config", "."])


def test_one_text_where_a_list_is_due_is_a_list_of_one(recipe):
    assert recipe("data: rows [1], {all}.json").data == ["rows [1], {all}.json"]
    assert recipe("data: [a, b]").data == ["a", "b"]


def test_a_list_of_entries_with_names_may_be_a_dict(tmp_path):
    sets = {"news": "a.jsonl", "web": ["b.jsonl", "c.jsonl"]}
    found = from_values(PrepareSettings, {"map": {"output": "answer", "input": 2}, "validation": sets})
    assert found.map == ["output=answer", "input=2"]
    assert found.validation == ["news=a.jsonl", "web=b.jsonl", "web=c.jsonl"]
    (tmp_path / "r.yaml").write_text("map: {output: answer}")
    assert parse(PrepareSettings, "prepare", ["--config", str(tmp_path / "r.yaml")]).map == ["output=answer"]


def test_the_command_line_goes_before_the_recipe_wherever_it_stands(recipe):
    text = "{seed: 3, data: [a], mixture: {cap: 5, weights: {a.json: 2}}, fraction: 1e-1}"
    found = recipe(text, "--seed", "4", "--mixture.temperature", "2")
    assert (found.seed, found.data, found.fraction) == (4, ["a"], 0.1)
    assert found.mixture == Mixture(temperature=2.0, cap=5, weights={"a.json": 2.0})
    assert recipe(text, "--data", "b", "c").data == ["b", "c"]
    assert recipe("") == Settings()


def test_words_are_taken_as_people_type_them():
    found = parse(Settings, "bake", ["--strict", "--data", "a", "b", "--seed", "7", "--data", "c", "--size=auto"])
    assert (found.data, found.strict, found.seed, found.size) == (["a", "b", "c"], True, 7, "auto")
    assert parse(Settings, "bake", ["--strict", "no"]).strict is False
    for words, resume in ([], True), (["--seed", "1"], True), (["no"], False), (["folder"], "folder"):
        assert parse(Settings, "bake", ["--resume", *words]).resume == resume
    assert parse(Settings, "bake", ["--overrides.rate", "0.1", "--betas", "[0.9, 0.95]"]).overrides == {"rate": 0.1}
    assert parse(Settings, "bake", ["--template=-x"]).template == "-x"
    assert parse(Settings, "bake", ["--template", "- x"]).template == "- x"
    assert parse(Positional, "look", ["--json", "here"]) == Positional("here", json=True)
    for text in ("null", "true", "12", "[1, 2]", "{a: 1}", "a: b", "1e3"):  # a text stays one
        assert parse(Positional, "look", [text]).model == text


def test_a_list_of_numbers_that_may_be_none_is_taken_as_words_and_as_a_list(tmp_path):
    (tmp_path / "r.yaml").write_text("layers: [0, 2]")
    for words in (["--layers", "0", "2"], ["--layers=[0, 2]"], ["--config", f"{tmp_path}/r.yaml"]):
        assert parse(Layered, "pick", words).layers == [0, 2]
    with pytest.raises(UserError, match="--layers, entry 2, is .x.; it has to be a whole number"):
        parse(Layered, "pick", ["--layers", "0", "x"])


def test_what_has_to_be_given_is_named(tmp_path):
    with pytest.raises(UserError, match="^no model is given: look MODEL …$"):
        parse(Positional, "look", ["--json"])
    with pytest.raises(UserError, match="^--model is given without its name: look MODEL …$"):
        parse(Positional, "look", ["--model", "here"])
    with pytest.raises(UserError, match="^'there' belongs to no option"):
        parse(Positional, "look", ["here", "there"])


def test_help_has_every_setting_with_those_inside_and_fits_the_screen(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shown = help_text(Settings, "bake", sections={"data": "what goes in", "seed": "chance"})
    assert shown.startswith(
        "usage: bake [--SETTING VALUE ...]\n\nBake something.\n\nwhat goes in:\n  --data TEXT ...\n"
    )
    assert "\n\nchance:\n  --seed NUMBER\n      (default: 0)\n" in shown
    assert "\n  --size NUMBER|auto|table\n" in shown and "\n  --mixture.cap NUMBER\n      " in shown
    assert max(map(len, shown.splitlines())) <= 80
    with pytest.raises(SystemExit) as ended:
        parse(Settings, "bake", ["--help"])
    assert ended.value.code == 0 and "Bake something." in capsys.readouterr().out


def test_all_settings_can_be_printed(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        recipe("seed: 7", "--print_config")
    assert ended.value.code == 0 and "seed: 7\n" in capsys.readouterr().out
