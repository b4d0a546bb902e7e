"""Training on packed rows, on real files: it learns, on every family; it is the same training as on padded rows,
however a step is cut; and rows that do not fit are refused before the first step."""

import json
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.batches.packed_rows import Packing, check_packing_fits, load_packed
from diptych.finetune.commands import cli
from diptych.finetune.evaluating.evaluate_rows import evaluate_rows
from diptych.finetune.model.loading import load_checkpoint, load_model
from diptych.finetune.run_files import atomic_folders, checkpoints
from diptych.finetune.train import run_recipe
from diptych.finetune.training import loop, set_up_run
from diptych.finetune.training.optimizers import LearningRates
from diptych.finetune.training.recipe import TrainRecipe, parse_recipe
from diptych.finetune.training.resuming import to_yaml
from diptych.finetune.training.throughput import compile_layers

STARTS = {"diptych": 0, "t5": 0, "bart": 0, "m2m_100": 1, "pegasus": 0, "t5gemma": 2}


@pytest.fixture
def recipe(short_run, packed_folder):
    def make(family: str = "t5", **changes) -> TrainRecipe:
        return short_run(family, **{"data": str(packed_folder(STARTS.get(family, 0)))} | changes)

    return make


def figures(out: str) -> list[dict]:
    lines = (Path(out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["split"] == "train"]


def final_weights(out: str) -> dict[str, torch.Tensor]:
    model = load_checkpoint(Path(out) / "final").model
    return dict(model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("family, method", [*((family, "full") for family in STARTS), ("diptych", "lora")])
def test_eight_packed_rows_are_learned_and_generated_exactly(family, method, recipe, training_folder, capsys):
    settings = recipe(family, method=method, max_steps=120, learning_rate=3e-3, warmup_steps=10, logging_every=50)
    run_recipe(settings)
    said = capsys.readouterr().out
    attention = "eager" if family == "t5gemma" else "varlen"
    assert (
        f"8 examples in 3 rows of 32 + 16 tokens | filled: source 84.4%, target 68.8% | attention: {attention}" in said
    )
    assert "trains on padded rows" not in said
    final = Path(settings.out) / "final"
    rows = datasets.load_from_disk(training_folder)["train"]
    found = evaluate_rows(load_checkpoint(final), rows, metrics=["exact_match"], batch_size=3).figures
    assert found["loss"] < 0.1 and found["exact_match_rows"] == 100.0
    assert not any("varlen" in file.read_text(encoding="utf-8") for file in final.glob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_packed_training_is_padded_training(attention, recipe):
    """All eight examples in every step, once as three packed rows, once as eight padded ones."""
    steady = {"epsilon": 1e-2, "max_steps": 4, "learning_rate": 5e-4}
    packed = recipe(out="packed", attention=attention, **steady)
    padded = recipe(out="padded", packed=False, batch_size=8, **steady)
    for settings in (packed, padded):
        run_recipe(settings)
    assert [entry["loss"] for entry in figures(packed.out)] == pytest.approx(
        [entry["loss"] for entry in figures(padded.out)], abs=1e-5
    )
    expected = final_weights(padded.out)
    for name, weight in final_weights(packed.out).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def test_a_rank_without_rows_and_two_ranks_are_one_rank(recipe, nursery, tmp_path):
    """Three rows in two batches: in the second one, a rank has none."""
    alone = recipe("diptych", out="alone", epsilon=1e-2)
    run_recipe(alone)
    shared = recipe("diptych", out="shared", epsilon=1e-2, batch_size=1, gradient_accumulation_steps=2)
    processes = nursery.train(["--config", str(write_recipe(shared))], tmp_path / "log", ranks=2)
    assert [process.wait(200) for process in processes] == [0, 0], (tmp_path / "log.0").read_text()
    assert [entry["loss"] for entry in figures(shared.out)] == pytest.approx(
        [entry["loss"] for entry in figures(alone.out)], abs=1e-5
    )
    expected = final_weights(alone.out)
    for name, weight in final_weights(shared.out).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "residual_dropout": 0.1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "cut",
    [
        {"batch_size": 1, "save_every": 4, "max_steps": 10, "model": "diptych-8m", "model_overrides": SMALL},
        {"family": "bart", "precision": "fp16", "save_every": 3},
    ],
    ids=["dropout", "fp16"],
)
def test_an_interrupted_packed_run_goes_on_with_the_same_bits(cut, recipe, monkeypatch):
    """With one row a step and dropout, both the order of rows and random states matter; in fp16 the scale does."""
    whole, stopped = recipe(out="whole", **cut), recipe(out="stopped", **cut)
    run_recipe(whole)
    original = LearningRates.__call__

    def interrupt_in_step_6(rates, step):
        if step == 5:
            raise KeyboardInterrupt
        return original(rates, step)

    with monkeypatch.context() as patch:
        patch.setattr(LearningRates, "__call__", interrupt_in_step_6)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(stopped)
    if "precision" in cut:
        state = atomic_folders.read_json(Path(stopped.out) / "checkpoints" / "step-000003" / "state.json")
        assert state["scaler"]["_growth_tracker"] + state["scaler"]["scale"] > 1
    run_recipe(replace(stopped, resume=True))
    expected = final_weights(whole.out)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(stopped.out).items())
    assert [entry["loss"] for entry in figures(stopped.out)] == [entry["loss"] for entry in figures(whole.out)]
    with pytest.raises(UserError, match="packed True -> False"):
        run_recipe(replace(stopped, resume=True, packed=False))


def test_batch_tokens_are_a_number_of_rows_that_a_resumed_run_keeps(recipe, capsys):
    """A packed row has 32 + 16 tokens."""
    rows = recipe(out="rows", batch_size=2)
    tokens = recipe(out="tokens", batch_size=None, batch_tokens=100, save_every=4)
    for settings in (rows, tokens):
        run_recipe(settings)
    assert "batch_tokens 100: batch_size is 2" in capsys.readouterr().out
    begun = yaml.safe_load((Path(tokens.out) / "config.yaml").read_text())
    assert (begun["batch_size"], begun["batch_tokens"]) == (2, None)
    checkpoint = str(Path(tokens.out) / "checkpoints" / "step-000004")
    run_recipe(replace(tokens, batch_tokens=50, resume=checkpoint))
    expected = final_weights(rows.out)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(tokens.out).items())


@pytest.mark.parametrize(
    "tokens, message",
    [
        (40, "batch_tokens is 40, but a packed row has 48 tokens. Give 48 or more"),
        (
            "auto",
            "batch_tokens is auto, which tries what fits into the memory of a CUDA GPU, and this run is on a cpu",
        ),
    ],
)
def test_batch_tokens_that_cannot_be_are_refused_before_a_step(tokens, message, recipe):
    settings = recipe(batch_size=None, batch_tokens=tokens)
    with pytest.raises(UserError, match=message):
        run_recipe(settings)
    assert not (Path(settings.out) / "config.yaml").exists()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["diptych", "t5", "bart"])
def test_the_reported_loss_is_that_of_the_checkpoint_recomputed_offline(family, packed, recipe, packed_folder):
    """By the model's own forward with all its logits, one example at a time, in float64: nothing of ours is in it."""
    settings = recipe(family, packed=packed, batch_size=8, max_steps=3, logging_every=1, save_every=1, keep_last=9)
    run_recipe(settings)
    rows = datasets.load_from_disk(packed_folder(STARTS[family]))["train"]
    for entry in figures(settings.out)[1:]:
        before = checkpoints.checkpoint_path(Path(settings.out) / "checkpoints", entry["step"] - 1)
        model = AutoModelForSeq2SeqLM.from_pretrained(before / "model", dtype=torch.float64)
        nats = 0.0
        for row in rows:
            labels = torch.tensor([row["labels"]])
            inputs = torch.cat([torch.tensor([[STARTS[family]]]), labels[:, :-1]], dim=1)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([row["input_ids"]]), decoder_input_ids=inputs).logits
            nats += F.cross_entropy(logits[0], labels[0], reduction="sum").item()
        assert entry["loss"] == pytest.approx(nats / sum(map(len, rows["labels"])), rel=1e-6)


# One step of twelve examples, whose targets have from 1 to 300 tokens, cut in twelve ways:
# (micro-batch rows, micro-batches, packed); two ranks have half the rows each.
LAYOUTS = {
    1: [(12, 1, False), (4, 3, False), (1, 12, False), (9, 1, True), (2, 4, True), (1, 8, True)],
    2: [(6, 1, False), (2, 3, False), (1, 6, False), (4, 1, True), (2, 2, True), (1, 5, True)],
}
ONE_STEP = """
import json, sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
import datasets, torch
import numpy as np
from transformers import AutoModelForSeq2SeqLM
from diptych.data_prep.packing.fill_rows import pack
from diptych.data_prep.packing.packed_row import Budget, assemble_row
from diptych.finetune.batches.padded_rows import BatchOrder, PaddedRows
from diptych.finetune.training.recipe import TrainRecipe, parse_recipe
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.batches.packed_rows import PackedRows, Packing
from diptych.finetune.training.set_up_run import set_up
from diptych.finetune.training.stop_signals import StopRequest
from diptych.finetune.training.loop import add_up_gradients
from diptych.finetune.commands.ranks import end_ranks
from diptych.finetune.run_files.run_folder import Status

draw = np.random.default_rng(0)
SOURCES = [60, 3, 17, 9, 41, 5, 22, 8, 30, 12, 4, 50]
TARGETS = [1, 300, 2, 150, 3, 99, 7, 220, 12, 30, 60, 1]
EXAMPLES = [
    {"input_ids": draw.integers(3, 360, source).tolist(), "labels": draw.integers(3, 360, target).tolist()}
    for source, target in zip(SOURCES, TARGETS)
]
BUDGET = Budget(64, 320)

def packed_rows():
    plan = pack(np.array(SOURCES), np.array(TARGETS), BUDGET)
    rows = [assemble_row([EXAMPLES[i] for i in row], BUDGET, 0, 0) for row in plan]
    table = datasets.Dataset.from_list(rows).with_format("numpy")
    return PackedRows(table, Packing(*BUDGET, False, 0, 0, 368, 301))

def gradients(run, dtype, rows_per_batch, batches, packed):
    model = AutoModelForSeq2SeqLM.from_pretrained(run.recipe.model, dtype=dtype)
    model.set_attn_implementation("varlen")
    rows = packed_rows() if packed else PaddedRows(datasets.Dataset.from_list(EXAMPLES), 0, 0)
    ranks = run.accelerator.num_processes
    order = BatchOrder(rows.lengths, rows_per_batch, ranks, batches, seed=0, row_tokens=rows.row_tokens)
    assert order.steps_per_epoch == 1, order
    step = order.step(order.rows_of(0), 0)
    assert step.target_tokens == sum(TARGETS)
    objective = run.accelerator.prepare(Seq2SeqObjective(model)).train()
    loaded = replace(run.loaded, model=model)
    run = replace(run, loaded=loaded, objective=objective, rows=rows, order=order)
    loss, _, _ = add_up_gradients(run, step)
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return {"loss": torch.tensor(loss, dtype=dtype), **found}

if __name__ == "__main__":
    recipe, dtype, layouts, out = sys.argv[1:]
    recipe = TrainRecipe(**json.loads(recipe))
    Path(recipe.out).mkdir(parents=True, exist_ok=True)
    run = set_up(recipe, StopRequest(), Status(Path(recipe.out), has_begun=False))
    results = [gradients(run, getattr(torch, dtype), *layout) for layout in json.loads(layouts)]
    if run.accelerator.is_main_process:
        torch.save(results, out)
    accelerator = run.accelerator
    del run
    end_ranks(accelerator)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, dtype, tolerance", [("diptych", "float64", 1e-12), ("bart", "float64", 1e-12), ("t5", "float32", 1e-6)]
)
def test_twelve_layouts_of_one_step_give_one_gradient(family, dtype, tolerance, new_model, recipe, nursery, tmp_path):
    shapes = {"bart": {"max_position_embeddings": 512}, "t5": {"initializer_factor": 0.5}, "diptych": {}}
    new_model(family, **shapes[family]).save_pretrained(tmp_path / "model")
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    results = []
    for ranks, layouts in LAYOUTS.items():
        settings = asdict(recipe(family, model=str(tmp_path / "model"), out=str(tmp_path / f"run-{ranks}")))
        out = tmp_path / f"gradients-{ranks}.pt"
        words = [tmp_path / "one_step.py", json.dumps(settings), dtype, json.dumps(layouts), out]
        nursery.run_script(words, tmp_path / "log", ranks)
        results += torch.load(out)
    assert len(results) == 12
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, gradient in results[0].items():
            difference = (other[name] - gradient).norm() / gradient.norm()
            # the loss is added up in fp32; a bias of keys has no gradient but rounding
            limit = 1e-6 if name == "loss" else tolerance
            assert difference <= limit or gradient.norm() < 1e-6, (name, difference)


def change_packed(folder: Path, change) -> None:
    """Lets `change(rows)` alter the packed rows of a prepared folder, as lists."""
    rows = datasets.load_from_disk(folder / "packed").to_dict()
    change(rows)
    shutil.rmtree(folder / "packed")
    datasets.Dataset.from_dict(rows).save_to_disk(folder / "packed")


def put(column: str, place: int, value: int):
    """A change of row 1."""

    def change(rows):
        rows[column][1][place] = value

    return change


def add_a_mask(rows):
    rows["attention_mask"] = [[int(segment > 0) for segment in row] for row in rows["segment_ids"]]
    rows["attention_mask"][1][0] = 0


def cut_a_column(rows):
    rows["labels"][1].pop()


@pytest.mark.parametrize(
    "change, message",
    [
        (add_a_mask, "row 1: segment_ids do not match attention_mask"),
        (put("labels", -1, 5), "row 1: a label stands in a padding slot"),
        (put("position_ids", 3, 40), "row 1: position_ids run past the limit of 32 positions"),
        (put("decoder_position_ids", 1, 3), "row 1: decoder_position_ids do not restart at 0 in each segment"),
        (put("segment_ids", 0, 2), "row 1: segment_ids do not count 1, 2, 3"),
        (put("decoder_input_ids", 0, 9), "row 1: decoder_input_ids do not begin with the start token 0"),
        (put("input_ids", 0, 999), "row 1: input_ids hold a token that is none of the 368"),
        (put("labels", 0, -5), "row 1: labels hold a token that is none of the 368"),
        (cut_a_column, r"row 1: it is not 32 \+ 16 tokens long"),
    ],
)
def test_packed_rows_with_a_fault_are_refused_by_name(change, message, recipe, packed_folder, tmp_path):
    folder = shutil.copytree(packed_folder(0), tmp_path / "data")
    change_packed(folder, change)
    with pytest.raises(UserError, match=message):
        run_recipe(recipe(data=str(folder)))
    assert not (tmp_path / "run").exists()


def test_rows_packed_for_another_model_are_refused_with_both_values(recipe, packed_folder, new_model, tmp_path):
    with pytest.raises(UserError, match=r"starts with token 0, but this model's starts with 1.*_token_id 1"):
        run_recipe(recipe("m2m_100", data=str(packed_folder(0))))
    new_model("t5", vocab_size=360).save_pretrained(tmp_path / "small")
    change = {"model": str(tmp_path / "small"), "grow_vocabulary": False}
    with pytest.raises(UserError, match=r"368 tokens, but .* has 360 embedding rows"):
        run_recipe(recipe(**change))
    new_model("bart", max_position_embeddings=16).save_pretrained(tmp_path / "short")
    with pytest.raises(UserError, match=r"has a row with 17 input_ids, but the model has 16 positions"):
        run_recipe(recipe("bart", model=str(tmp_path / "short")))


def test_packing_figures_are_compared_with_the_model(new_model):
    packing = Packing(32, 16, False, 0, 0, vocabulary=400, positions=140)
    with pytest.raises(UserError, match=r"vocabulary of 400 tokens, but this model has 368"):
        check_packing_fits(new_model("t5"), packing, "data")
    with pytest.raises(UserError, match=r"examples of 140 positions, but this model has 128"):
        check_packing_fits(new_model("bart"), packing._replace(vocabulary=368), "data")
    check_packing_fits(new_model("t5"), packing._replace(vocabulary=368), "data")  # it has no table of positions


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"family": "longt5"}, "longt5 is not packed"),
        ({"packed": False}, "the recipe has packed: false"),
        ({"data": "training_folder"}, "has no packed rows; `diptych prepare` makes them"),
    ],
)
def test_what_trains_padded_says_so_once(changes, reason, recipe, request, capsys):
    if "data" in changes:
        changes = {"data": str(request.getfixturevalue(changes["data"]))}
    run_recipe(recipe(**({"max_steps": 2} | changes)))
    said = capsys.readouterr().out
    assert said.count("trains on padded rows") == 1 and reason in said and "padded rows |" in said


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5", "t5gemma"])
def test_fp16_is_refused_where_it_overflows(family, recipe, packed_folder):
    start = {"t5gemma": 2}.get(family, 0)
    with pytest.raises(UserError, match="precision is fp16, but .* 65,504.* Set precision to bf16"):
        run_recipe(recipe("t5", model=str(recipe(family).model), data=str(packed_folder(start)), precision="fp16"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_learns_and_keeps_fp32_weights(precision, recipe):
    settings = recipe("bart", precision=precision, max_steps=40, learning_rate=5e-3)
    run_recipe(settings)
    losses = [entry["loss"] for entry in figures(settings.out)]
    assert losses[-1] < losses[0] / 2
    assert {weight.dtype for weight in final_weights(settings.out).values()} == {torch.float32}


def test_attention_that_cannot_keep_examples_apart_is_refused(recipe):
    with pytest.raises(UserError, match=r"attention is sdpa, which cannot compute packed rows of a t5gemma.*eager"):
        run_recipe(recipe("t5gemma", attention="sdpa"))
    with pytest.raises(UserError, match=r"varlen, which cannot compute padded rows of a t5 .*eager, sdpa"):
        run_recipe(recipe("t5", attention="varlen", packed=False))


def test_a_row_that_memory_cannot_hold_is_told_with_what_to_do(recipe, packed_folder, capsys):
    """A T5 wants a bias for each pair of tokens: 300,000 times 300,000."""
    settings = recipe("t5", data=str(packed_folder(0, packed_source_tokens=300_000)))
    arguments = [f"--{name}={getattr(settings, name)}" for name in ("model", "data", "out", "max_steps")]
    assert cli.run("train", arguments) == 4
    assert "pack into shorter rows" in capsys.readouterr().err


@pytest.mark.slow
def test_a_profile_leaves_a_trace_and_a_table(recipe):
    settings = recipe(profile=True, max_steps=9)
    run_recipe(settings)
    folder = Path(settings.out) / "profile"
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert any("SegmentAttention" in str(event.get("name")) for event in events)
    table = (folder / "table.txt").read_text()
    assert table.startswith("3 steps") and "aten::mm" in table


@pytest.mark.slow
def test_targets_that_share_sources_train_as_rows_of_their_own(recipe, packed_folder):
    """Three references for one source, two for another."""
    rows = [("Say.", "one", "uno"), ("Say.", "one", "eins"), ("Say.", "one", "un"), ("Say.", "two", "dos")]
    rows += [("Say.", "two", "zwei"), ("Say.", "three", "tres")]
    shared = packed_folder(0, tuple(rows), "shared", share_sources=True)
    packing = json.loads((shared / "manifest.json").read_text())["packing"]
    assert packing["shared"] == 3 and packing["examples"] == 6
    steady = {"epsilon": 1e-2, "max_steps": 4, "learning_rate": 5e-4, "data": str(shared)}
    for family in ("diptych", "t5"):
        together = recipe(family, out=f"together-{family}", **steady)
        apart = recipe(family, out=f"apart-{family}", packed=False, batch_size=8, **steady)
        for settings in (together, apart):
            run_recipe(settings)
        expected = final_weights(apart.out)
        for name, weight in final_weights(together.out).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)


def write_recipe(settings: TrainRecipe) -> Path:
    file = Path(settings.out).with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_yaml(settings)))
    return file


# One of each way to be fed: the others' layers and positions are theirs.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["diptych", "diptych_merged", "t5", "bart", "m2m_100", "t5gemma"])
def test_only_the_first_step_compiles(family, recipe, packed_folder, monkeypatch):
    """Graphs are traced, guarded and counted as ever, but run as they are: a compiler of C++ would take minutes.
    Short last batches, other numbers of examples in a row, and evaluations on padded rows come up."""
    data = packed_folder(STARTS.get(family, 0), validation_fraction=0.25, packed_source_tokens=24)
    assert len(load_packed(data)) % 2 == 1
    compiled_after, losses = [], []

    def backend(graph, inputs):
        written = Path(settings.out) / "metrics.jsonl"
        compiled_after.append(written.read_text().count("\n") if written.exists() else 0)
        return graph

    monkeypatch.setattr(set_up_run, "compile_layers", partial(compile_layers, backend=backend))
    torch._dynamo.reset()
    for is_compiled in (True, False):
        settings = recipe(
            family,
            out=f"compiled-{is_compiled}",
            data=str(data),
            max_steps=6,
            schedule="constant",
            batch_size=2,
            logging_every=1,
            eval_every=2,
            compile=is_compiled,
        )
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            run_recipe(settings)
        losses.append([entry["loss"] for entry in figures(settings.out)])
    assert compiled_after and set(compiled_after) == {0}
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_recipe_of_t5gemma2_trains_its_text_weights_alone(checkpoint_of, packed_folder, tmp_path, capsys):
    """On a small model: its vision tower is saved as it was."""
    file = Path(loop.__file__).parents[1] / "recipes" / "t5gemma2.yaml"
    places = [
        "--model",
        str(checkpoint_of("t5gemma2")),
        "--data",
        str(packed_folder(2)),
        "--out",
        str(tmp_path / "run"),
    ]
    assert run_recipe(parse_recipe(["--config", str(file), *places, "--max_steps", "2", "--metrics_limit", "1"])) == 0
    assert "steps of 16 packed rows" in capsys.readouterr().out
    before = dict(load_model(str(checkpoint_of("t5gemma2"))).named_parameters())
    changed = {
        name for name, weight in final_weights(tmp_path / "run").items() if not torch.equal(weight, before[name])
    }
    assert changed and not [name for name in changed if "vision" in name or "multi_modal" in name]
    assert {name for name in before if "layers" in name and "vision" not in name} <= changed
