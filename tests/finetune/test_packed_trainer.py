"""PackedSeq2SeqTrainer: transformers' Trainer, with one gradient however a step is cut, packed or padded, on one rank
and on two; and all else as the Trainer has it."""

import json

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Seq2SeqTrainingArguments, TrainerCallback

from diptych.data_prep.command_line.errors import UserError
from diptych.finetune.model.loss import Seq2SeqObjective
from diptych.finetune.training.packed_trainer import PackedSeq2SeqTrainer

FAMILIES = ("t5", "bart", "m2m_100")
# One step of twelve examples, which are eight packed rows: (rows, micro-batches, packed). Two ranks have half each.
LAYOUTS = {
    1: [(12, 1, False), (1, 12, False), (8, 1, True), (1, 8, True)],
    2: [(6, 1, False), (1, 4, True)],
}
ONE_STEP = """
import gc, json, sys, tempfile
import datasets, numpy as np, torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Seq2SeqTrainingArguments, TrainerCallback
from diptych.finetune.training.packed_trainer import PackedSeq2SeqTrainer

draw = np.random.default_rng(0)
SOURCES = [32, 30, 31, 29, 20, 12, 19, 13, 25, 7, 16, 16]
TARGETS = [16, 15, 12, 14, 10, 6, 2, 14, 11, 5, 1, 15]
EXAMPLES = datasets.Dataset.from_list([
    {"input_ids": draw.integers(3, 360, source).tolist(), "labels": draw.integers(3, 360, target).tolist()}
    for source, target in zip(SOURCES, TARGETS)
])

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, *_, model, **__):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}

def step(folder, tokenizer, rows_per_batch, batches, packed):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64)
    keep = Keep()
    arguments = Seq2SeqTrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=rows_per_batch, gradient_accumulation_steps=batches,
        max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        logging_steps=1, train_sampling_strategy="sequential", learning_rate=0.0,
    )
    trainer = PackedSeq2SeqTrainer(
        model, arguments, EXAMPLES, processing_class=tokenizer, callbacks=[keep], packed=packed,
        packed_source_tokens=32, packed_target_tokens=16,
    )
    assert len(trainer.train_dataset) == (8 if packed else 12), len(trainer.train_dataset)
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": torch.tensor(float(loss), dtype=torch.float64), **keep.gradients}

if __name__ == "__main__":
    tokenizer, folders, layouts, out = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    results = [[step(folder, tokenizer, *layout) for layout in json.loads(layouts)] for folder in json.loads(folders)]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, out)
    gc.collect()  # DDP before the process group: see finetune/train.py
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_layouts_of_one_step_give_one_gradient(checkpoint_of, tiny_tokenizer, nursery, tmp_path):
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    folders = json.dumps([str(checkpoint_of(family)) for family in FAMILIES])
    found = {}
    for ranks, layouts in LAYOUTS.items():
        words = [tmp_path / "one_step.py", tmp_path / "tokenizer", folders, json.dumps(layouts), tmp_path / "out.pt"]
        nursery.run_script(words, tmp_path / "log", ranks)
        for family, results in zip(FAMILIES, torch.load(tmp_path / "out.pt"), strict=True):
            found.setdefault(family, []).extend(results)
    for family, (reference, *others) in found.items():
        for layout, result in zip([*LAYOUTS[1], *LAYOUTS[2]][1:], others, strict=True):
            assert result.keys() == reference.keys()
            for name, tensor in result.items():
                scale = reference[name].abs().max().clamp_min(1e-5)  # a key's bias has none
                difference = float((tensor - reference[name]).abs().max() / scale)
                assert difference < (1e-6 if name == "loss" else 1e-9), (family, layout, name, difference)


@pytest.fixture
def rows(tiny_tokenizer):
    draw = np.random.default_rng(1)
    lengths = zip(draw.integers(3, 20, 24), draw.integers(2, 9, 24), strict=True)
    return datasets.Dataset.from_list(
        [
            {"input_ids": draw.integers(3, 360, s).tolist(), "labels": draw.integers(3, 360, t).tolist()}
            for s, t in lengths
        ]
    )


def arguments(folder, **settings):
    usual = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 5, "use_cpu": True, "report_to": []}
    usual |= {"disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1, "seed": 3}
    return Seq2SeqTrainingArguments(str(folder), **(usual | settings))


def test_evaluation_is_the_mean_over_target_tokens(new_model, tiny_tokenizer, rows, tmp_path):
    """Of all batches together, with logits, without, and with generation."""
    seen = []
    for settings, compute_metrics in (
        ({}, None),
        ({}, lambda found: seen.append(found.predictions[0].shape) or {"rows": len(found.label_ids)}),
        (
            {"predict_with_generate": True, "generation_max_length": 6},
            lambda found: seen.append(found.predictions.shape) or {"rows": len(found.label_ids)},
        ),
    ):
        model = new_model("t5").eval()
        trainer = PackedSeq2SeqTrainer(
            model, arguments(tmp_path, **settings), eval_dataset=rows, processing_class=tiny_tokenizer,
            compute_metrics=compute_metrics,
        )  # fmt: skip
        batch = trainer.data_collator(rows.to_list())
        tokens = int((batch["labels"] != -100).sum())
        expected = Seq2SeqObjective(model).eval()(batch, num_items_in_batch=tokens).item()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert [shape[0] for shape in seen] == [24, 24]


def weights_after(model, args, rows, tokenizer, **settings):
    PackedSeq2SeqTrainer(model, args, rows, processing_class=tokenizer).train(**settings)
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_a_resumed_run_ends_with_the_same_weights(new_model, tiny_tokenizer, rows, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_steps": 2}
    whole = weights_after(new_model("t5"), arguments(tmp_path / "a", **settings), rows, tiny_tokenizer)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    model, args = new_model("t5"), arguments(tmp_path / "b", **settings)
    trainer = PackedSeq2SeqTrainer(model, args, rows, processing_class=tiny_tokenizer, callbacks=[Stop()])
    trainer.train()
    resumed = weights_after(new_model("t5"), args, rows, tiny_tokenizer, resume_from_checkpoint=True)
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


def test_an_adapter_learns_packed_rows_and_its_base_stays(new_model, tiny_tokenizer, rows, tmp_path):
    model = get_peft_model(
        new_model("bart"), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj", "v_proj"])
    )
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = PackedSeq2SeqTrainer(
        model, arguments(tmp_path, num_train_epochs=4), rows, rows, tiny_tokenizer, packed_target_tokens=40
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed and all("lora_" in name for name in changed)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_prepared_folder_is_trained_on_by_models_of_a_search(new_model, packed_folder, tiny_tokenizer, tmp_path):
    trainer = PackedSeq2SeqTrainer(
        args=arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1), train_dataset=packed_folder(),
        processing_class=tiny_tokenizer, model_init=lambda: new_model("t5"),
    )  # fmt: skip
    assert trainer.train().training_loss > 0
    first = trainer.model
    trainer.train()
    assert trainer.model is not first


def test_what_would_be_another_loss_is_refused(new_model, tiny_tokenizer, rows, tmp_path):
    def refused(args=None, **settings) -> str:
        args = args or arguments(tmp_path)
        with pytest.raises(UserError) as caught:
            PackedSeq2SeqTrainer(new_model("t5"), args, **({"processing_class": tiny_tokenizer} | settings))
        return str(caught.value)

    assert "takes no data_collator" in refused(data_collator=len)
    assert "a tokenizer with a padding token" in refused(processing_class=None)
    assert "mean of each rank's mean" in refused(arguments(tmp_path, average_tokens_across_devices=False))
    assert "have no column labels; they have input_ids" in refused(train_dataset=rows.select_columns("input_ids"))
    assert "the train rows are a list. Give a datasets.Dataset" in refused(train_dataset=rows.to_list())
    assert "the eval rows are a str" in refused(eval_dataset="prepared")
    too_large = datasets.Dataset.from_list([{"input_ids": [100_000], "labels": [1]}])
    assert "embedding rows" in refused(train_dataset=too_large)
