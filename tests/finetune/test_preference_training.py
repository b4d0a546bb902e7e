"""Runs with preferences: padded, packed, on two ranks, resumed, with an adapter; and what is refused."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from safetensors.numpy import load_file, save_file
from test_train import STEADY, assert_close, assert_same_bits, figures, write_recipe

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.pipeline.prepare_settings import PrepareSettings
from diptych.data_prep.prepare import prepare
from diptych.finetune.commands import cli
from diptych.finetune.model.adapters import add_adapter
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.preferences.objective import switch_off_dropout
from diptych.finetune.preferences.reference import FILE
from diptych.finetune.run_files import checkpoints
from diptych.finetune.train import run_recipe
from diptych.finetune.training.loop import say_drift
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.run import Progress

WORDS = "Go. Run! Who? Wow! Help! Stop! Wait. Hello!".split()
ANSWERS = "가. 뛰어! 누구? 와! 도와! 멈춰! 기다려. 안녕!".split()
PAIRS = [
    {"prompt": f"Translate: {word}", "chosen": ANSWERS[place], "rejected": ANSWERS[place - 1] + "!"}
    for place, word in enumerate(WORDS)
]
PAIRS += [{"prompt": "Translate: Go.", "chosen": "가.", "rejected": "와!"}]  # a second pair of a source
MARKED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS[:8]
    for side in ("chosen", "rejected")
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_tokenizer):
    """`folder_of(PAIRS)`: what prepare makes of rows, packed, a fifth of them to validate."""
    place = tmp_path_factory.mktemp("preferences")
    tiny_tokenizer.save_pretrained(place / "tokenizer")
    made = {}

    def folder(rows, start: int = 0, **settings) -> str:
        key = (id(rows), start, *settings.items())
        if key not in made:
            data, made[key] = place / f"{len(made)}.jsonl", str(place / f"prepared-{len(made)}")
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
            settings = {"validation_fraction": 0.3, "test_fraction": 0.0, "decoder_start_token_id": start} | settings
            own = {"data": [str(data)], "tokenizer": str(place / "tokenizer"), "template": "plain"}
            prepare(PrepareSettings(**own, out=made[key], **settings))
        return made[key]

    return folder


@pytest.fixture
def recipe(short_run, folder_of):
    def make(family: str = "t5", rows=PAIRS, out: str = "run", **changes) -> TrainRecipe:
        settings = {"objective": "dpo", "batch_size": 2, "eval_every": 3, "logging_every": 1, **STEADY}
        return short_run(family, out=out, data=folder_of(rows), **(settings | changes))

    return make


CASES = {
    "dpo": {"objective": "dpo", "objective_settings": {"supervised_weight": 0.3}},
    "simpo": {"objective": "simpo"},
    "orpo": {"objective": "orpo"},
    "kto": {"objective": "kto", "rows": MARKED},
}


@pytest.mark.parametrize("case", CASES)
def test_packed_rows_train_as_padded_ones(case, recipe, folder_of):
    """All rows are in each step, so that the order does not matter."""
    changes = CASES[case] | {"max_steps": 4, "learning_rate": 5e-4}
    packed, padded = (recipe(out=str(it), packed=it, batch_size=99, **changes) for it in (True, False))
    run_recipe(packed)
    run_recipe(padded)
    assert_close(packed.out, padded.out)
    for one, other in zip(figures(packed.out, "train"), figures(padded.out, "train"), strict=True):
        for name in ("reward_chosen", "nats_rejected"):
            assert one[name] == pytest.approx(other[name], abs=1e-4), name
    losses = [entry["loss"] for entry in figures(packed.out, "train")]
    assert losses[-1] < losses[0] and figures(packed.out, "train")[-1]["accuracy"] >= 0.5
    first = figures(packed.out, "validation")[0]
    assert {"loss", "accuracy", "reward_chosen", "nats_chosen"} <= first.keys()


@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_micro_batches_are_one_batch(case, recipe):
    """At the learning rate of the other tests, eight steps make more of rounding than the bounds allow on a Zen 4."""
    changes = CASES[case] | {"packed": False, "learning_rate": 5e-4}
    whole = recipe(out="whole", batch_size=8, **changes)
    parts = recipe(out="parts", batch_size=1, gradient_accumulation_steps=8, **changes)
    run_recipe(whole)
    run_recipe(parts)
    assert_close(whole.out, parts.out)


@pytest.mark.parametrize("case, sharding", [pytest.param("dpo", "full", marks=pytest.mark.slow), ("kto", "none")])
def test_two_ranks_are_one_rank(case, sharding, recipe, nursery, tmp_path):
    """3 rows a rank, and fewer in the last step of an epoch."""
    alone = recipe(out="alone", packed=False, batch_size=6, **CASES[case])
    run_recipe(alone)
    shared = recipe(out="shared", packed=False, batch_size=3, sharding=sharding, **CASES[case])
    processes = nursery.train(["--config", str(write_recipe(shared))], tmp_path / "log", ranks=2)
    ended, said = [process.wait(200) for process in processes], (tmp_path / "log.0").read_text()
    assert ended == [0, 0], said
    assert_close(alone.out, shared.out)


RESUMED = {
    "dpo with an adapter": {"objective": "dpo", "method": "lora", "lora_dropout": 0.1},
    "kto": {"objective": "kto", "rows": MARKED},
    "grpo": {"objective": "grpo", "objective_settings": {"samples": 3, "kl_weight": 0.1, "reward": "chrf"}},
}


@pytest.fixture(scope="module")
def plain_folder(folder_of):
    return [{"instruction": pair["prompt"], "output": pair["chosen"]} for pair in PAIRS[:8]]


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_with_the_same_bits(case, recipe, plain_folder, tmp_path):
    changes = {"rows": plain_folder} if case == "grpo" else {}
    make = partial(recipe, max_steps=8, save_every=3, keep_last=9, **(RESUMED[case] | changes))
    whole, parted = (make(out=str(tmp_path / name)) for name in ("whole", "parted"))
    assert run_recipe(whole) == 0
    shutil.copytree(whole.out, parted.out)
    shutil.rmtree(Path(parted.out) / "final")
    for step in (6, 8):
        shutil.rmtree(checkpoints.checkpoint_path(Path(parted.out) / "checkpoints", step))
    if case == "kto":  # the log-probabilities can be computed anew, from the model that the run began with
        (Path(parted.out) / FILE).unlink()
    assert run_recipe(make(out=parted.out, resume=True)) == 0
    assert_same_bits(whole.out, parted.out)


def test_other_reference_log_probabilities_are_refused(recipe):
    settings = recipe(save_every=4)
    run_recipe(settings)
    file = Path(settings.out) / FILE
    values = load_file(file)
    save_file({name: of_split + 0.5 for name, of_split in values.items()}, file)
    shutil.rmtree(checkpoints.checkpoint_path(Path(settings.out) / "checkpoints", 8))
    with pytest.raises(UserError, match="log-probabilities by the reference"):
        run_recipe(recipe(save_every=4, resume=True))
    save_file({name: of_split[:-1] for name, of_split in values.items()}, file)
    with pytest.raises(UserError, match="of other rows than this run's"):
        run_recipe(recipe(save_every=4, resume=True))


def test_the_reference_of_an_adapter_is_its_base(recipe):
    """At the first step the adapter does nothing: all rewards are 0, and the loss is log 2."""
    for changes in ({"method": "lora"}, {"method": "full"}):
        settings = recipe(out=changes["method"], packed=False, batch_size=99, max_steps=1, **changes)
        run_recipe(settings)
        (entry,) = figures(settings.out, "train")
        assert entry["loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert entry["reward_chosen"] == pytest.approx(0, abs=1e-5)


def test_dropout_is_off_unless_it_is_asked_for(short_run, folder_of, new_model, tmp_path, tiny_tokenizer):
    """Log-probabilities are those of the reference at the first step; an adapter keeps its own dropout."""
    new_model("t5", dropout_rate=0.3).save_pretrained(tmp_path / "t5")
    common = {"objective": "dpo", "data": folder_of(PAIRS), "batch_size": 99, "max_steps": 1, "packed": False}
    losses = {}
    for name, settings in (("off", {}), ("on", {"dropout": True})):
        run = short_run(out=name, **common, objective_settings=settings, model=str(tmp_path / "t5"))
        run_recipe(run)
        (entry,) = figures(run.out, "train")
        losses[name] = entry["loss"]
        assert json.loads((Path(run.out) / "final" / "config.json").read_text())["dropout_rate"] == 0.3
    assert losses["off"] == pytest.approx(np.log(2), abs=1e-5) and losses["on"] != pytest.approx(np.log(2), abs=1e-3)
    model = add_adapter(new_model("bart", dropout=0.2, attention_dropout=0.1), "base", rank=4, alpha=8, dropout=0.5)
    switch_off_dropout(model)
    left = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p}
    floats = {value for it in model.modules() for name, value in vars(it).items() if name.endswith("dropout")}
    assert left == {0.5} and {it for it in floats if isinstance(it, float)} == {0.0}


def test_drift_is_compared_with_the_first_figures_of_the_same_split(capsys):
    run = SimpleNamespace(progress=Progress(step=5), total_steps=9, log=SimpleNamespace(say=print))
    calls = [
        ("train", {"entropy": 2.0, "nats_chosen": 1.0, "unfinished_share": 0.1}),
        ("validation/a", {"output_characters": 10.0, "unfinished_share": 0.9}),
        ("validation/b", {"output_characters": 90.0, "unfinished_share": 0.0}),  # longer than a's from the start
        ("train", {"entropy": 0.6, "nats_chosen": 2.9, "unfinished_share": 0.3}),
    ]
    for call in calls:
        say_drift(run, *call)
    assert not capsys.readouterr().out
    say_drift(run, "train", {"entropy": 0.4, "nats_chosen": 3.1, "unfinished_share": 0.4})
    said = capsys.readouterr().out
    assert said.count("warning: in train") == 3 and "2.00 to 0.40 nats" in said and "1.00 -> 3.10" in said
    say_drift(run, "validation/a", {"output_characters": 21.0})
    assert "in validation/a, outputs grew from 10 to 21 characters" in capsys.readouterr().out
    say_drift(run, "validation/a", {"output_characters": 40.0})  # not twice as long as when it was said
    assert not capsys.readouterr().out


def test_a_reference_of_another_origin_is_said(recipe, checkpoint_of, new_model, tiny_tokenizer, tmp_path, capsys):
    other = new_model("t5")
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    run_recipe(recipe(reference=str(tmp_path / "other"), max_steps=1))
    assert "so this model was hardly tuned from that reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, rows, said",
    [
        ({"objective": "kto"}, PAIRS, "kto, which trains on answers that are marked.*has pairs.*`label`"),
        ({"objective": "dpo"}, MARKED, "dpo, which trains on pairs.*has answers that are marked"),
        ({"objective": "supervised"}, PAIRS, "supervised, which trains on one answer.*--map output=chosen"),
        ({"objective": "mrt"}, PAIRS, "mrt, which trains on one answer to each source"),
    ],
)
def test_rows_of_another_kind_are_refused(changes, rows, said, recipe):
    with pytest.raises(UserError, match=said):
        run_recipe(recipe(rows=rows, **changes))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"objective_settings": {"bta": 1}}, "objective_settings.bta: dpo has no such setting. Did you mean beta"),
        ({"objective_settings": {"beta": 0}}, "beta is 0; it must be above 0"),
        ({"objective_settings": {"beta": "much"}}, "beta is 'much'; a number is due"),
        ({"objective_settings": {"loss": "ipso"}}, "loss is 'ipso'. Did you mean ipo"),
        ({"objective_settings": {"loss": "robust"}}, "robust, which needs label_smoothing"),
        (
            {"objective_settings": {"loss": "ipo", "label_smoothing": 0.1}},
            "no effect with loss ipo",
        ),
        ({"label_smoothing": 0.1}, "label_smoothing is for supervised training, and dpo has objective_settings"),
        ({"objective": "simpo", "reference": "x"}, "reference is given, but simpo compares with none"),
        ({"objective": "supervised", "objective_settings": {"beta": 1}}, "objective_settings is given, but objective"),
        ({"objective": "grpo", "objective_settings": {"samples": 1}}, "samples is 1; 2 or more"),
        ({"objective": "mrt", "objective_settings": {"reward": "chrff"}}, "chrff"),
        ({"objective": "mrt", "sharding": "full"}, "mrt samples on each rank: set sharding: none"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        TrainRecipe(**({"model": "m", "data": "d", "out": "o", "max_steps": 1, "objective": "dpo"} | changes))


@pytest.fixture
def own_metric(tmp_path, monkeypatch):
    """`own_metric("short", "return [-len(text) for text in predictions]")`"""

    def write(name: str, body: str) -> str:
        (tmp_path / f"{name}_metric.py").write_text(f"def {name}(predictions, references, sources):\n    {body}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, f"{name}_metric", raising=False)
        return f"{name}_metric:{name}"

    return write


@pytest.mark.parametrize("objective", ["mrt", "grpo"])
def test_what_is_sampled_gets_better_by_the_metric_it_is_told(objective, recipe, plain_folder, own_metric, capsys):
    """From random weights, the share of plain letters."""
    metric = own_metric(
        "plain", "return [100 * sum(map(str.isascii, text)) / max(len(text), 1) for text in predictions]"
    )
    settings = {"samples": 8, "reward": metric, "unfinished": "scored"}
    changes = {"objective": objective, "objective_settings": settings, "max_new_tokens": 4, "learning_rate": 2e-3}
    run = recipe(rows=plain_folder, batch_size=8, max_steps=20, eval_every=99, epsilon=1e-8, **changes)
    assert run_recipe(run) == 0
    rewards = [entry["reward"] for entry in figures(run.out, "train")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 10
    assert f"trains on padded rows: {objective} samples the answers of each step" in capsys.readouterr().out
    assert figures(run.out, "train")[0]["sampling_seconds"] > 0


@pytest.mark.parametrize(
    "body, said",
    [
        ("return float('nan')", "nan"),
        ("raise KeyError('x')", "KeyError"),
        ("return 'much'", "much"),
        ("return {'good': 1.0, 'bad': 2.0}", "Say which count, by weights"),
    ],
)
def test_a_metric_that_gives_no_number_is_refused_before_the_model_is_loaded(
    body, said, recipe, plain_folder, own_metric, capsys
):
    changes = {"objective": "grpo", "objective_settings": {"samples": 2, "reward": own_metric("broken", body)}}
    settings = recipe(rows=plain_folder, **changes)
    assert cli.run("train", ["--config", write_recipe(settings)]) == 2
    out, message = capsys.readouterr()
    assert "Traceback" not in message and "broken" in message and said in message
    assert "trains on padded rows" not in out


def test_evaluating_compares_the_answers_of_pairs_and_takes_only_liked_ones_as_references(
    recipe, folder_of, tmp_path, capsys
):
    run, report = recipe(max_steps=3), tmp_path / "report.json"
    assert run_recipe(run) == 0
    arguments = [f"{run.out}/final", "--split", "train", "--metrics", "chrf", "--out", str(report)]
    assert cli.run("evaluate", [*arguments, "--data", run.data]) == 0
    loaded, split = load_checkpoint(f"{run.out}/final"), load_from_disk(run.data)["train"]
    nats = [
        [
            loaded.model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row[name]])).loss.item()
            for name in ("labels", "other_labels")
        ]
        for row in split
    ]
    share = 100 * np.mean([chosen < rejected for chosen, rejected in nats])
    assert json.loads(report.read_text())["figures"]["chosen_likelier"] == pytest.approx(share)
    assert "of pairs: the chosen answer is more probable" in capsys.readouterr().out

    marked = folder_of(MARKED)
    liked = [row for row in load_from_disk(marked)["train"] if row["mark"] > 0]
    assert cli.run("evaluate", [*arguments[:-1], str(tmp_path / "marked.json"), "--data", marked]) == 0
    lines = (tmp_path / "marked.predictions.jsonl").read_text().splitlines()
    references = {text for line in lines for text in json.loads(line)["references"]}
    assert references == {row["target"] for row in liked}
    assert "that are not liked are no references: left out" in capsys.readouterr().err
