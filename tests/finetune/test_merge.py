"""`diptych merge`: an adapter becomes a plain checkpoint; and what ties a head to its table holds wherever it goes."""

import json
from functools import partial

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spoiled_model_files import make_adapter
from transformers import AutoModelForSeq2SeqLM

from diptych.data_prep.text_to_ids.templates import carried_template
from diptych.finetune.commands.cli import main
from diptych.finetune.model.adapters import ADAPTER_WEIGHTS
from diptych.finetune.model.families import input_and_output_tables
from diptych.finetune.model.loading import load_checkpoint
from diptych.finetune.run_files.atomic_folders import fault_of
from diptych.finetune.train import run_recipe
from diptych.finetune.training import set_up_run
from diptych.finetune.training.recipe import TrainRecipe
from diptych.finetune.training.resuming import to_yaml
from diptych.finetune.training.throughput import compile_layers


@pytest.fixture
def recipe(short_run, training_folder):
    return partial(short_run, data=str(training_folder), max_steps=3, learning_rate=1e-2)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    ids = torch.tensor([[12, 7, 9, 1]])
    return model(input_ids=ids, decoder_input_ids=ids).logits


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma", "diptych"])
def test_merged_folder_is_a_plain_checkpoint(family, recipe, tmp_path, capsys):
    run_recipe(recipe(family, method="lora", lora_variant="dora"))
    adapter, merged = tmp_path / "run" / "final", tmp_path / "new" / "merged"
    capsys.readouterr()
    assert main(["merge", str(adapter), "--out", str(merged)]) == 0
    assert capsys.readouterr().out == f"{adapter}, merged into its base, is in {merged} (float32)\n"
    assert not fault_of(merged) and not (merged / "adapter_config.json").exists()

    loaded = load_checkpoint(adapter)
    expected, tokenizer = loaded.model, loaded.tokenizer
    plain = AutoModelForSeq2SeqLM.from_pretrained(merged).eval()
    assert torch.equal(logits(plain), logits(expected))
    assert plain.generation_config.decoder_start_token_id == expected.generation_config.decoder_start_token_id
    *_, decoder_table, head = input_and_output_tables(plain)
    assert head is decoder_table
    own = load_checkpoint(merged).tokenizer
    assert own.get_vocab() == tokenizer.get_vocab() and carried_template(own) == carried_template(tokenizer)


def test_merged_weights_are_rounded_last(recipe, tmp_path):
    """Also those of an adapter that is used unmerged on a base in bf16."""
    base = AutoModelForSeq2SeqLM.from_pretrained(recipe().model, dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    run_recipe(recipe(method="lora", model=str(tmp_path / "base")))
    adapter = str(tmp_path / "run" / "final")
    for dtype in ("float32", "bfloat16"):
        assert main(["merge", adapter, "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
    exact = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "float32").state_dict()
    loaded = load_checkpoint(adapter).model.state_dict()
    for name, weight in AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "bfloat16").state_dict().items():
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, exact[name].bfloat16()), name
        assert loaded[name].dtype == torch.bfloat16 and torch.equal(weight, loaded[name]), name


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_adapter_on_the_head_is_evaluated_as_it_was_trained(family, recipe, packed_folder, tmp_path):
    data = str(packed_folder(0, validation_fraction=0.25))
    targets = "q,v,lm_head" if family == "t5" else "q_proj,v_proj,lm_head"
    run_recipe(recipe(family, method="lora", lora_targets=targets, data=data))
    *_, trained = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    adapter, merged = tmp_path / "run" / "final", tmp_path / "merged"
    assert main(["merge", str(adapter), "--out", str(merged)]) == 0
    for model in (adapter, merged):
        main(["evaluate", str(model), "--data", data, "--split", "validation", "--out", str(tmp_path / "report.json")])
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["figures"]["loss"] == pytest.approx(trained["loss"], rel=1e-5)
        (tmp_path / "report.json").unlink()


def test_what_cannot_be_merged_is_refused(recipe, checkpoint_of, tmp_path, capsys):
    def says(arguments: list, message: str) -> None:
        try:
            code = main(["merge", *map(str, arguments)])
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        assert code == 2 and message in error and error.startswith("diptych merge: ") and "Traceback" not in error

    run_recipe(recipe(method="lora"))
    adapter, new = tmp_path / "run" / "final", tmp_path / "new"
    says([adapter], "out is not set")
    says([adapter, "--out", tmp_path / "run"], "is there already")
    says([checkpoint_of("t5"), "--out", new], "is a whole model: there is no adapter to merge")
    says([tmp_path / "absent", "--out", new], "absent")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(checkpoint_of("bart"))
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    says([adapter, "--out", new], "does not fit its base")
    assert not new.exists() and not list(tmp_path.glob("*partial"))


def saved_names(folder) -> set[str]:
    """Of every weight in every file of a run."""
    names = set()
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names |= set(tensors.keys())
    return names


def assert_names_are_the_models_own(run, recipe: TrainRecipe) -> None:
    names = saved_names(run)
    assert names and not [name for name in names if "_orig_mod" in name or "module." in name]
    model = load_checkpoint(run / "final").model
    *_, decoder_table, head = input_and_output_tables(model)
    assert head is decoder_table
    if recipe.method == "full":
        assert set(saved_names(run / "final")) == saved_names_of_plain(recipe)


def saved_names_of_plain(recipe: TrainRecipe) -> set[str]:
    with safe_open(f"{recipe.model}/model.safetensors", "pt") as tensors:
        return set(tensors.keys())


@pytest.fixture
def new_accelerate():
    """accelerate reads its environment once a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, method, compiler",
    [
        ("t5", "full", "ours"),
        ("t5gemma", "lora", "ours"),
        ("t5gemma", "full", "accelerate's"),
        ("t5", "lora", "accelerate's"),
    ],
)
def test_compiled_models_are_saved_under_their_own_names(
    family, method, compiler, recipe, new_accelerate, tmp_path, monkeypatch
):
    """The graphs are traced and run as they are: a compiler of C++ would take minutes."""
    monkeypatch.setattr(set_up_run, "compile_layers", partial(compile_layers, backend="eager"))
    if compiler == "accelerate's":
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    settings = recipe(family, method=method, compile=compiler == "ours", max_steps=1, batch_size=8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_recipe(settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_names_are_the_models_own(tmp_path / "run", settings)


@pytest.mark.slow
def test_ranks_save_under_the_models_own_names(recipe, nursery, tmp_path):
    for family, method in (("t5", "lora"), ("t5gemma", "full")):
        run = tmp_path / f"{family}-{method}"
        settings = recipe(family, method=method, out=str(run), max_steps=2, batch_size=2)
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(to_yaml(settings)))
        ranks = nursery.train(["--config", str(file)], log=tmp_path / "log", ranks=2)
        assert [rank.wait(120) for rank in ranks] == [0, 0], (tmp_path / "log.0").read_text()[-2000:]
        assert_names_are_the_models_own(run, settings)


@pytest.fixture
def adapter(tmp_path, monkeypatch):
    """Untrained, beside its base."""
    make_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_generation_config_that_transformers_saves_no_more_is_no_obstacle(adapter, tmp_path):
    odd = {"do_sample": False, "temperature": 0.6, "eos_token_id": [1, 2], "decoder_start_token_id": 0}
    (adapter / "generation_config.json").write_text(json.dumps(odd))
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    saved = load_checkpoint(tmp_path / "merged").model.generation_config
    assert saved.eos_token_id == [1, 2] and not saved.temperature


SPOILED = {
    "whole numbers": (
        lambda its: {name: it.mul(9).to(torch.int8) for name, it in its.items()},
        "is stored as I8, and",
    ),
    "complex numbers": (
        lambda its: {name: it.to(torch.complex64) for name, it in its.items()},
        "is stored as C64, and",
    ),
    "too large for fp16": (
        lambda its: {name: it * 3e3 for name, it in its.items()},
        "and float16 ends at 65,504. Take b",
    ),
}


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_would_be_others_once_merged_are_refused(case, adapter, tmp_path, capsys):
    spoil, said = SPOILED[case]
    save_file(spoil(load_file(adapter / ADAPTER_WEIGHTS)), adapter / ADAPTER_WEIGHTS)
    assert main(["merge", str(adapter), "--out", str(tmp_path / "merged"), "--dtype", "float16"]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "merged").exists()
