"""The doctor on small real checkpoints: the Trainer's known fault is found where it is, each kind of broken checkpoint
is told by its own line, and a sound Diptych is all green."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.text_to_ids.encode import TEXT_TOKENS_KEY
from diptych.data_prep.text_to_ids.templates import TOKENIZER_KEY, Template, attach_template
from diptych.finetune.commands import cli
from diptych.finetune.inspecting import doctor, doctor_checks
from diptych.finetune.inspecting.doctor import DoctorSettings, admit
from diptych.finetune.inspecting.doctor_checks import CHECKS, CheckResult, examine
from diptych.finetune.inspecting.doctor_rows import built_in_rows, eight_of, rows_from
from diptych.finetune.inspecting.doctor_steps import (
    ExaminedRows,
    LossAndGradients,
    agree,
    compare,
    compare_ranks,
    trainer_step,
)
from diptych.finetune.model.adapters import add_adapter, save_adapter
from diptych.finetune.model.families import decoder_start_token

TRAINER = "HF Trainer: 8 = 1"


@pytest.fixture
def checkpoint(tmp_path, checkpoint_of, tiny_tokenizer):
    """`checkpoint("t5")`: a folder of its own with weights and tokenizer, to be broken."""

    def copy(family: str) -> Path:
        folder = shutil.copytree(checkpoint_of(family), tmp_path / family)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return copy


@pytest.fixture
def examined(tmp_path):
    """`examined(folder, "packed = separate")`: the finding of one check."""

    def find(folder: Path, name: str, data: Path | str = "") -> CheckResult:
        work = tmp_path / "work"
        work.mkdir(exist_ok=True)
        with doctor.quiet():
            return examine(name, admit(DoctorSettings(str(folder), data=str(data)), work))

    return find


def edit_json(file: Path, **changes) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# The command


@pytest.mark.slow
def test_of_a_t5_all_is_green_but_transformers_trainer(checkpoint, tmp_path, monkeypatch, capsys):
    folder, work = checkpoint("t5"), tmp_path / "temporary"
    work.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work))
    capsys.readouterr()  # the fixture's own progress bars
    assert cli.run("doctor", ["--json", str(folder)]) == 0  # notes do not count
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    # multiprocessing keeps a socket there until this process ends
    left = [path.name for path in work.iterdir() if not path.name.startswith("pymp-")]
    assert shown.err == "" and not left  # no logs, no bars, no files
    assert [report[it] for it in ("green", "red", "note", "not_applicable")] == [18, 0, 2, 0]
    checks = {check["name"]: check for check in report["checks"]}
    assert list(checks) == list(CHECKS)
    assert [name for name, check in checks.items() if check["status"] == "note"] == [
        TRAINER,
        "HF Trainer: 2 ranks = 1",
    ]
    measured = checks[TRAINER]["measured"]
    assert 7.5 < measured["loss_ratio"] < 8.5 and measured["cosine"] < 0.9
    assert "compute_loss_func" in checks[TRAINER]["remedy"]
    assert 1.9 < checks["HF Trainer: 2 ranks = 1"]["measured"]["loss_ratio"] < 2.1
    for name in ("8 micro-batches = 1 batch", "2 ranks = 1 rank", "packed = separate"):
        assert checks[name]["measured"]["loss"] > 1 and checks[name]["remedy"] == ""


@pytest.mark.slow
def test_a_diptych_is_all_green_in_a_table_of_100_columns(checkpoint, training_folder, capsys):
    folder = checkpoint("diptych")
    capsys.readouterr()  # the fixture's own progress bars
    assert cli.run("doctor", [str(folder), "--data", str(training_folder)]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 100 and shown.err == "" and "\033" not in shown.out
    marked = [line for line in lines if line[:1] in "✓✗!–" and line]
    assert [line.split("  ")[0][2:] for line in marked] == list(CHECKS)
    assert all(line.startswith("✓") for line in marked)
    assert lines[-1].startswith("20 green, 0 red, 0 notes, 0 do not apply, in ")
    assert "split train, on cpu" in " ".join(lines[:3])


def test_weights_that_are_not_finite_stop_what_would_be_computed_with_them(checkpoint, capsys):
    folder = checkpoint("t5")
    edit_weights(folder, lambda weights: weights["shared.weight"][5].fill_(torch.nan))
    assert cli.run("doctor", [str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    (red,) = [check for check in report["checks"] if check["status"] == "red"]
    assert red["name"] == "finite weights" and red["message"] == "shared.weight holds NaN or infinity"
    assert report["not_applicable"] == 10
    assert all("not finite" in c["message"] for c in report["checks"] if c["status"] == "not_applicable")


def test_pickles_are_red_and_not_read(checkpoint, capsys):
    folder = checkpoint("t5")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    edit_json(folder / "config.json", dtype="float16")
    assert cli.run("doctor", [str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "✗ safetensors                 0 safetensors, 1 pickled files" in shown
    assert "    A pickle can run code, and is not read." in shown
    assert "✗ dtype                       saved as float16" in shown
    assert "– finite weights              the weights were not read" in shown
    assert "2 green, 2 red, 0 notes, 16 do not apply" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_without_a_start_token_nothing_is_trained(checkpoint, capsys):
    folder = checkpoint("t5")
    edit_json(folder / "config.json", decoder_start_token_id=None, bos_token_id=None)
    edit_json(folder / "generation_config.json", decoder_start_token_id=..., bos_token_id=...)
    assert cli.run("doctor", [str(folder)]) == 1
    shown = capsys.readouterr().out
    assert "✗ decoder start token         there is none, so the model cannot begin to write" in shown
    assert "– 2 ranks = 1 rank            not measured: there is no decoder start token" in shown
    assert " 1 red, " in shown


MISTAKES = {
    ("{folder}/nothing",): "there is no folder",
    ("{folder}",): "so it is not a checkpoint",
    ("{model}", "--data", "{folder}/none.jsonl"): "none.jsonl: there is no such file",
    ("{model}", "--data", "{folder}"): "is no prepared dataset",
    ("{model}", "--data", "{folder}/rows.csv"): "has no rows",
    ("{model}", "--data", "{folder}/rows.jsonl"): "rows.jsonl:2: a row is an object with the texts",
    ("{model}", "--data", "{folder}/silent.jsonl"): "silent.jsonl: the output is empty in each of 2 rows, the first",
    ("{model}", "--data", "{folder}/cut.json"): "cut.json:1: broken JSON: Expecting ',' delimiter, line 2, column 3. ",
    ("{model}", "--device", "gpu"): "device 'gpu' cannot be used",
    ("{model}", "--device", "meta"): "device 'meta' cannot be used: it holds no values. ",
    ("{model}", "--jsn"): "Did you mean --json?",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items())
def test_mistakes_end_with_code_2_and_one_message(checkpoint, tmp_path, arguments, message, capsys):
    (tmp_path / "rows.csv").write_text("instruction,output\n")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Add.", "output": "2"}\n{"instruction": "Add."}\n')
    (tmp_path / "silent.jsonl").write_text('{"instruction": "Add.", "output": " "}\n' * 2)
    (tmp_path / "cut.json").write_text('[{"output": "2"\n  "input": ""}]')
    model = checkpoint("t5")
    capsys.readouterr()
    assert cli.run("doctor", [word.format(folder=tmp_path, model=model) for word in arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.startswith("diptych doctor: ") and shown.out == ""


@pytest.fixture
def prepared(training_folder, tmp_path):
    """`prepared(change)`: a copy of the prepared rows, changed one by one."""

    def make(change=dict) -> Path:
        rows = list(map(change, datasets.load_from_disk(training_folder)["train"]))
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "prepared")
        return tmp_path / "prepared"

    return make


def test_rows_of_another_tokenizer_are_refused_though_their_ids_would_fit(checkpoint, prepared, capsys):
    model, data = checkpoint("t5"), prepared()
    own = json.loads((model / "tokenizer.json").read_text())
    vocabulary = own["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    shutil.copytree(model, data / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (data / "tokenizer" / "tokenizer.json").write_text(json.dumps(own))
    assert cli.run("doctor", [str(model), "--data", str(data)]) == 2
    assert f"{data} was prepared with another tokenizer (368 tokens) than that of {model}" in capsys.readouterr().err


@pytest.mark.parametrize("token", [-7, 999])
def test_ids_that_no_table_has_are_one_red_line_and_computed_with_nowhere(token, checkpoint, prepared, examined):
    data = prepared(lambda row: row | {"labels": [token, *row["labels"]]} if len(row["labels"]) > 3 else row)
    assert examined(checkpoint("t5"), "token ids in range", data).message.startswith("train row ")
    assert examined(Path(f"{data}/../t5"), "8 micro-batches = 1 batch", data).status == "green"


def test_a_check_that_fails_is_a_red_line_and_no_crash(monkeypatch, examined, checkpoint):
    def fail(patient):
        raise KeyError("decoder_layers\nand more")

    monkeypatch.setitem(doctor_checks.CHECKS, "dtype", fail)
    finding = examined(checkpoint("t5"), "dtype")
    assert finding.status == "red" and finding.message.startswith("failed: ") and "\n" not in finding.message


# The Trainer


@pytest.mark.parametrize("family", ["bart", "m2m_100"])
def test_the_trainers_logged_loss_is_eight_times_too_large(family, checkpoint, examined):
    finding = examined(checkpoint(family), TRAINER)
    assert finding.status == "note" and doctor.MARKS["note"] in doctor.format_table({TRAINER: finding})
    assert 7.5 < finding.measured["loss_ratio"] < 8.5 and finding.measured["cosine"] < 0.9


@pytest.mark.parametrize("family", ["t5", "bart", "m2m_100"])
def test_the_remedy_that_is_printed_works_and_the_other_mends_half(family, new_model, tiny_tokenizer, tmp_path):
    def summed(outputs, labels, num_items_in_batch):
        return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    model = new_model(family)
    rows = eight_of(built_in_rows(tiny_tokenizer).looked_at, 64)
    arguments = (model, ExaminedRows(rows, 0, decoder_start_token(model)))

    def both(**remedy) -> dict[str, float]:
        with doctor.quiet():
            return compare(*(trainer_step(*arguments, count, tmp_path, **remedy) for count in (1, 8)))

    assert agree(both(compute_loss_func=summed))
    model.accepts_loss_kwargs = False  # what the Trainer reads its model_accepts_loss_kwargs from
    figures = both()
    assert 0.8 < figures["loss_ratio"] < 1.2 and figures["cosine"] < 0.9


# What can be wrong


def test_a_padding_token_that_is_eos_or_none_at_all(checkpoint, examined):
    folder = checkpoint("t5")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    finding = examined(folder, "padding is not eos")
    assert (finding.status, finding.message) == ("red", "pad 1, eos 1")
    assert "leaves out every eos" in finding.remedy
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert examined(folder, "padding is not eos").message == "the tokenizer has no padding token"


def test_a_tokenizer_that_outgrew_the_embeddings(checkpoint, examined):
    folder = checkpoint("bart")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_tokens(["Yes.", "Lima"])
    tokenizer.init_kwargs[TEXT_TOKENS_KEY] = ["Yes.", "Lima"]  # or no text would spell them
    tokenizer.save_pretrained(folder)
    finding = examined(folder, "tokenizer fits embeddings")
    assert (finding.status, finding.measured) == ("red", {"tokens": rows + 2, "embedding_rows": rows})
    finding = examined(folder, "token ids in range")
    assert finding.status == "red" and finding.message == f"sentence 1: labels hold {rows}, ids end at {rows - 1}"
    assert examined(folder, "8 micro-batches = 1 batch").status == "green"  # with the rows that it can read


def test_a_start_token_that_training_and_generation_disagree_about(checkpoint, examined):
    folder = checkpoint("t5")
    edit_json(folder / "generation_config.json", decoder_start_token_id=2)
    finding = examined(folder, "decoder start token")
    assert (finding.status, finding.message) == ("red", "0 in config.json, but generation starts with 2")
    edit_json(folder / "generation_config.json", decoder_start_token_id=5000)
    with pytest.raises(UserError, match="decoder_start_token_id is '5000' in .*generation_config.json.* must be"):
        examined(folder, "decoder start token")


def test_labels_that_begin_with_the_start_token(checkpoint, examined, tmp_path):
    folder = checkpoint("t5gemma")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bos = {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}, "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}}
    file = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    file["post_processor"] |= {"single": single, "special_tokens": bos}
    (folder / "tokenizer.json").write_text(json.dumps(file))
    assert tokenizer.bos_token_id == 2
    finding = examined(folder, "labels do not repeat it")
    assert finding.status == "red" and finding.measured == {"rows": 8, "repeated": 8}
    assert examined(folder, TRAINER).status == "green"


class ReadsPadding(BartForConditionalGeneration):
    def forward(self, input_ids=None, attention_mask=None, **inputs):
        return super().forward(input_ids, **inputs)


class FromZero(BartLearnedPositionalEmbedding):
    def forward(self, input_ids, past_key_values_length=0, position_ids=None):
        return super().forward(input_ids)


class ForgetsCachedPositions(BartForConditionalGeneration):
    """Every token that it writes with a cache stands at position 0."""

    def __init__(self, config):
        super().__init__(config)
        self.model.decoder.embed_positions = FromZero(config.max_position_embeddings, config.d_model)


class SavesNoTies(BartConfig):
    def to_dict(self):
        return super().to_dict() | {"tie_word_embeddings": False}


class SavesNoScale(BartConfig):
    def to_dict(self):
        return super().to_dict() | {"scale_embedding": False}


@pytest.mark.parametrize(
    ("config_class", "model_class", "name", "message"),
    [
        (BartConfig, ReadsPadding, "batched = alone", r"largest difference of a row \d.*e[-+]0\d nats/token"),
        (BartConfig, ForgetsCachedPositions, "cached = uncached", r"16 tokens differ, logits differ by \d"),
        (SavesNoTies, BartForConditionalGeneration, "saved = loaded", r"failed: .* lacks \d weights .*lm_head.weight"),
        (SavesNoScale, BartForConditionalGeneration, "saved = loaded", r"logits differ by \d.*, ties kept"),
    ],
)
def test_a_model_with_one_fault_is_red_in_that_check_alone(
    config_class, model_class, name, message, checkpoint, examined
):
    folder, kind = checkpoint("bart"), f"{config_class.__name__}-{model_class.__name__}".lower()
    config = type("Config", (config_class,), {"model_type": kind})
    AutoConfig.register(kind, config, exist_ok=True)
    AutoModelForSeq2SeqLM.register(config, type("Model", (model_class,), {"config_class": config}), exist_ok=True)
    edit_json(folder / "config.json", model_type=kind, tie_word_embeddings=True, scale_embedding=True)
    found = {check: examined(folder, check) for check in ("batched = alone", "cached = uncached", "saved = loaded")}
    assert [check for check, finding in found.items() if finding.status == "red"] == [name], found
    assert re.search(message, found[name].message) and found[name].remedy


def test_half_precision_is_red_for_a_t5_only(checkpoint, examined):
    for family, status in (("t5", "red"), ("bart", "green")):
        folder = checkpoint(family)
        edit_json(folder / "config.json", dtype="float16")
        finding = examined(folder, "dtype")
        assert (finding.status, finding.message) == (status, "saved as float16")


def test_tables_that_the_config_ties_and_the_file_does_not(checkpoint, examined):
    def add_a_head(weights):
        weights["lm_head.weight"] = weights["model.shared.weight"].flip(0).contiguous()

    folder = checkpoint("bart")
    assert examined(folder, "tied weights").status == "green"
    edit_weights(folder, add_a_head)
    finding = examined(folder, "tied weights")
    assert finding.status == "red" and finding.measured["apart"] == ["lm_head.weight"]


def test_a_head_of_its_own_is_right_for_flan_t5_and_not_for_t5(checkpoint, examined):
    def add_a_head(weights):
        weights["lm_head.weight"] = weights["shared.weight"].flip(0).contiguous()

    folder = checkpoint("t5")
    edit_weights(folder, add_a_head)
    assert examined(folder, "tied weights").status == "red"
    edit_json(folder / "config.json", scale_decoder_outputs=False)
    assert examined(folder, "tied weights").status == "green"
    assert examined(folder, "saved = loaded").status == "green"


@pytest.mark.parametrize(
    ("family", "side", "status"), [("bart", "right", "green"), ("bart", "left", "red"), ("t5", "left", "green")]
)
def test_left_padding_is_red_where_it_matters_and_is_done(family, side, status, checkpoint, examined):
    folder = checkpoint(family)
    edit_json(folder / "tokenizer_config.json", padding_side=side)
    finding = examined(folder, "left = right padding")
    assert finding.status == status
    assert (abs(finding.measured["difference"]) > 0.01) == (family == "bart")


@pytest.mark.slow
def test_tables_that_are_never_trained_are_not_waited_for(checkpoint, examined):
    """Marian's sinusoids are frozen when they are made, and thawed when transformers loads them (5.23): DDP would wait
    for their gradients. Loaded by us they stay frozen."""
    folder = checkpoint("marian")
    assert examined(folder, "each weight has a gradient").status == "green"
    assert examined(folder, "2 ranks = 1 rank").status == "green"


@pytest.mark.slow
def test_two_ranks_are_compared_without_what_routers_add(checkpoint, examined):
    """It is a mean over a batch, not a sum over tokens."""
    assert examined(checkpoint("switch_transformers"), "2 ranks = 1 rank").status == "green"


def test_a_family_that_is_padded_is_not_packed(checkpoint, examined):
    finding = examined(checkpoint("longt5"), "packed = separate")
    assert finding.status == "not_applicable" and "longt5 is not packed: its encoder" in finding.message
    assert examined(checkpoint("t5gemma"), "packed = separate").status == "green"  # with eager attention


def test_without_a_tokenizer_ids_are_drawn(checkpoint_of, examined):
    folder = checkpoint_of("m2m_100")
    assert examined(folder, "padding is not eos").status == "not_applicable"
    assert examined(folder, "batched = alone").status == "green"


def test_an_adapter_is_examined_merged_and_trainable(new_model, checkpoint, tiny_tokenizer, tmp_path, examined):
    base = checkpoint("t5")
    model = add_adapter(new_model("t5"), str(base), rank=4, alpha=8)
    save_adapter(model, tmp_path / "adapter")
    tiny_tokenizer.save_pretrained(tmp_path / "adapter")
    assert examined(tmp_path / "adapter", "8 micro-batches = 1 batch").status == "green"
    assert examined(tmp_path / "adapter", "each weight has a gradient").measured["tensors"] > 40


# The template that travels


GOLDEN = "template renders as saved"


def test_a_template_that_gives_other_prompts_than_when_it_was_saved(checkpoint, examined):
    folder = checkpoint("t5")
    finding = examined(folder, GOLDEN)
    assert (finding.status, finding.message) == ("green", "'translate' gives 3 golden rows to the token")
    stored = json.loads((folder / "tokenizer_config.json").read_text())[TOKENIZER_KEY]
    edit_json(folder / "tokenizer_config.json", **{TOKENIZER_KEY: stored | {"source": "Q: " + stored["source"]}})
    finding = examined(folder, GOLDEN)
    assert finding.status == "red" and finding.remedy.endswith("and save the tokenizer.")
    assert re.match(r"the source text of example 1 was 'Translate .*' and is 'Q: Translate ", finding.message)

    broken = stored | {"source": "{{ instruction.split('=')[1] }}"}
    edit_json(folder / "tokenizer_config.json", **{TOKENIZER_KEY: broken})
    rows = folder.with_name("rows.json")  # the built-in ones have no = in them
    rows.write_text(json.dumps([{"instruction": f"a={n}", "output": "b"} for n in range(8)]))
    finding = examined(folder, GOLDEN, rows)
    assert finding.status == "red" and finding.message.startswith(
        "example 1 is no longer rendered: template translate"
    )


@pytest.mark.parametrize("golden", ["G", [7], [{"fields": 7}], None])
def test_golden_rows_that_are_damaged_are_told(golden, checkpoint, examined):
    folder = checkpoint("t5")
    stored = json.loads((folder / "tokenizer_config.json").read_text())[TOKENIZER_KEY]
    if golden is None:
        golden = [stored["golden"][0] | {"fields": {"instruction": 7}}]
    edit_json(folder / "tokenizer_config.json", **{TOKENIZER_KEY: stored | {"golden": golden}})
    finding = examined(folder, GOLDEN)
    assert finding.status == "red" and re.search("example 1 (is|are) damaged", finding.message)


def test_a_tokenizer_that_makes_other_tokens_of_a_golden_row(checkpoint, examined):
    folder = checkpoint("t5")
    backend = json.loads((folder / "tokenizer.json").read_text())
    backend["model"]["merges"] = backend["model"]["merges"][:10]
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    finding = examined(folder, GOLDEN)
    assert finding.status == "red" and finding.message.startswith("the source ids of example 1 was ")


def test_without_a_template_or_its_golden_rows_there_is_nothing_to_compare(checkpoint, new_model, tmp_path, examined):
    new_model("t5").save_pretrained(tmp_path / "bare")
    assert examined(tmp_path / "bare", GOLDEN).message == "the checkpoint has no tokenizer"
    folder = checkpoint("t5")
    stored = json.loads((folder / "tokenizer_config.json").read_text())[TOKENIZER_KEY]
    edit_json(folder / "tokenizer_config.json", **{TOKENIZER_KEY: {**stored, "golden": []}})
    assert examined(folder, GOLDEN) == CheckResult(
        "not_applicable", "template 'translate' was saved without golden rows"
    )
    edit_json(folder / "tokenizer_config.json", **{TOKENIZER_KEY: ...})
    assert examined(folder, GOLDEN) == CheckResult("not_applicable", "the tokenizer carries no template")


# What it measures with


def test_ratios_and_cosine_on_two_small_gradients():
    one = LossAndGradients(2.0, {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
    figures = compare(one, LossAndGradients(16.0, {"a": torch.tensor([8.0]), "b": torch.tensor([-6.0])}))
    assert figures == {"loss": 2.0, "other_loss": 16.0, "loss_ratio": 8.0, "gradient_ratio": 2.0, "cosine": 0.0}
    assert not agree(figures) and agree(compare(one, one))
    assert compare(one, LossAndGradients(2.0, {"a": torch.tensor([3.0])}))["cosine"] == pytest.approx(0.6)
    assert not agree(compare(one, LossAndGradients(2.0, {"a": torch.tensor([1.5]), "b": torch.tensor([2.0])})))
    assert not agree(compare(one, LossAndGradients(2.0, {})))


@pytest.mark.slow
def test_a_rank_that_fails_is_told_with_its_last_line(tmp_path):
    with pytest.raises(RuntimeError, match="rank [01] failed: .*the config of .*nowhere could not be read"):
        step = ExaminedRows([{"input_ids": [3, 1], "labels": [4, 1]}] * 8, 0, 0)
        compare_ranks("ours", tmp_path / "nowhere", step, tmp_path)


def test_rows_whose_output_is_empty_are_left_out_and_said(checkpoint, tmp_path, tiny_tokenizer):
    rows = [
        {"instruction": f"Say {n}.", "output": output} for n, output in enumerate(["1", "", "a\u2028b", None, "4"])
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for file in (tmp_path / "rows.json", tmp_path / "rows.jsonl"):
        found = rows_from(str(file), tiny_tokenizer)
        assert [row["origin"] for row in found.looked_at] == [f"{file}:{number}" for number in (1, 3, 5)]
        assert found.described == f"rows of {file} (2 without output left out, the first {file}:2)"
    patient = admit(DoctorSettings(str(checkpoint("diptych")), data=str(file)), tmp_path)
    assert f"(2 without output left out, the first {file}:2)" in doctor.describe(patient)


def test_raw_rows_are_encoded_as_preparation_does_it(tmp_path, tiny_tokenizer, eight_prepared_rows):
    rows = [{"instruction": r["instruction"], "input": r["input"], "output": r["target"]} for r in eight_prepared_rows]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = rows_from(str(tmp_path / "rows.json"), tiny_tokenizer).looked_at
    for column in ("input_ids", "labels"):
        assert [row[column] for row in found] == [row[column] for row in eight_prepared_rows]
    with pytest.raises(UserError, match="has no tokenizer to encode it"):
        rows_from(str(tmp_path / "rows.json"), None)


def test_rows_begin_with_the_decoder_prefix_of_the_tokenizers_template(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    attach_template(tokenizer, Template("mine", "{{ instruction }} {{ input }}", decoder_prefix=("<s>",)))
    plain, begun = (built_in_rows(either).looked_at for either in (tiny_tokenizer, tokenizer))
    assert [row["labels"] for row in begun] == [[tokenizer.bos_token_id, *row["labels"]] for row in plain]


def test_eight_rows_are_taken_from_the_shortest_to_the_longest_and_keep_their_end():
    rows = [{"input_ids": [5] * length + [1], "labels": [6] * length + [1]} for length in range(100, 0, -1)]
    eight = eight_of(rows, None)
    assert [len(row["labels"]) for row in eight] == [2, 16, 30, 32, 32, 32, 32, 32]
    assert all(row["labels"][-1] == 1 and row["input_ids"][-1] == 1 for row in eight)
    assert max(len(row["input_ids"]) for row in eight) == 64
    assert max(len(row["input_ids"]) for row in eight_of(rows, 20)) == 20
    assert len(eight_of(rows[:1], None)) == 8


def test_a_folder_for_evaluation_alone_is_examined_by_its_first_set(training_folder, tmp_path):
    rows = datasets.load_from_disk(training_folder)["train"]
    datasets.DatasetDict({"test/news": rows, "test/law": rows}).save_to_disk(tmp_path / "prepared")
    found = rows_from(str(tmp_path / "prepared"), None)
    assert found.described.endswith("split test/news") and found.looked_at[1]["origin"] == "test/news row 1"
