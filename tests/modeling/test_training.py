"""Training: the loss is the one on paper, whoever runs the loop.

The rows are real ones of a kind: sources of 3 to 6 tokens, targets that are the source reversed, of as many lengths.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

PAD, EOS, START = 0, 1, 2


@pytest.fixture(scope="module")
def rows(draw_tokens) -> list[dict[str, list[int]]]:
    sources = [draw_tokens(3 + i % 4, seed=i).tolist() for i in range(8)]
    return [{"input_ids": [*source, EOS], "labels": [*reversed(source), EOS]} for source in sources]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<s>": START} | {f"w{i}": i for i in range(3, 53)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def batch(rows, tokenizer):
    return dict(DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in rows]))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours: dict, theirs: dict, tolerance: float):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=name)


def test_labels_are_shifted_right_once_behind_the_start_token(build_model):
    labels = torch.tensor([[31, 40, 1, -100], [22, 1, -100, -100]])
    shifted = build_model().prepare_decoder_input_ids_from_labels(labels)
    assert shifted.tolist() == [[START, 31, 40, 1], [START, 22, 1, PAD]]
    assert labels[0, 3] == -100, "the caller's labels are left alone"


def test_labels_without_a_start_or_padding_token_are_refused(build_model, draw_tokens):
    model = build_model(pad_token_id=None, decoder_start_token_id=None)
    with pytest.raises(ValueError, match="decoder_start_token_id is None and pad_token_id is None"):
        model(input_ids=draw_tokens(1, 4), labels=draw_tokens(1, 3))


def test_loss_is_the_mean_or_the_sum_over_the_count_of_target_tokens(build_model, batch):
    model = build_model()
    labels = batch["labels"]
    outputs = model(**batch)
    by_hand = 0.0
    for row, targets in enumerate(labels.tolist()):  # no shift: place t of the logits answers to place t of the labels
        for place, target in enumerate(targets):
            if target != -100:
                by_hand -= outputs.logits[row, place].log_softmax(-1)[target]
    count = int((labels != -100).sum())
    torch.testing.assert_close(outputs.loss, by_hand / count)
    torch.testing.assert_close(model(**batch, num_items_in_batch=100).loss, by_hand / 100)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(100)).loss, by_hand / 100)
    shifted = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(model(**batch, decoder_input_ids=shifted).loss, outputs.loss)
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], outputs.loss) and torch.equal(as_tuple[1], outputs.logits)


def test_padding_beyond_the_labels_changes_neither_loss_nor_gradients(build_model, batch):
    model = build_model(initializer_range=0.2)
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    wider = {
        "input_ids": F.pad(batch["input_ids"], (0, 3), value=PAD),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "labels": F.pad(batch["labels"], (0, 2), value=-100),
    }
    model(**wider).loss.backward()
    assert_same(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, implementation, build_model, batch):
    """transformers 5.23 calls it activation checkpointing."""
    model = build_model(attn_implementation=implementation, initializer_range=0.2).train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    recomputed = 0

    def count(*_):
        nonlocal recomputed
        recomputed += 1

    for panel in (model.get_encoder(), model.get_decoder()):
        for layer in panel.layers:
            layer.mlp.register_forward_pre_hook(count)
    model(**batch).loss.backward()
    assert recomputed == 2 * (2 + 3), "every layer of both panels runs twice"
    assert_same(gradients(model), expected, 1e-5)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_gradient_checkpointing_repeats_its_dropout(build_model, batch):
    def train(checkpointing):
        model = build_model(initializer_range=0.2, residual_dropout=0.3, attention_dropout=0.3).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**batch).loss.backward()
        return gradients(model)

    assert_same(train(True), train(False), 1e-5)


class KeepLosses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def run_trainer(rows, tokenizer, tmp_path):
    def run(model, **settings):
        losses = KeepLosses()
        arguments = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "max_steps": 1,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 0,
        }
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(**(arguments | settings)),
            train_dataset=rows,
            eval_dataset=rows,
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            callbacks=[losses],
        )
        trainer.train()
        return trainer, losses.losses

    return run


def test_the_librarys_trainer_learns_rows_by_heart_and_generates_them(build_model, run_trainer, rows):
    model = build_model(initializer_range=0.05, tie_word_embeddings=True)
    trainer, losses = run_trainer(
        model, max_steps=120, learning_rate=1e-2, gradient_checkpointing=True, predict_with_generate=True
    )
    assert losses[0] > 3 and losses[-1] < 0.05
    metrics = trainer.evaluate(max_length=10, num_beams=1)
    assert metrics["eval_loss"] < 0.05
    predictions = trainer.predict(rows, max_length=10, num_beams=2).predictions
    for row, written in zip(rows, predictions.tolist(), strict=True):
        assert written[: 1 + len(row["labels"])] == [START, *row["labels"]]


def test_the_trainers_accumulated_steps_are_one_large_step(build_model, run_trainer, batch):
    """Rows have 4 to 7 target tokens, so that the mean of micro-batch means would be another number."""
    model = build_model(initializer_range=0.2)
    expected_loss = model(**batch).loss.item()
    large, small = copy.deepcopy(model), copy.deepcopy(model)
    plain = {"optim": "sgd", "learning_rate": 0.1}
    _, large_losses = run_trainer(large, **plain)
    _, small_losses = run_trainer(small, per_device_train_batch_size=2, gradient_accumulation_steps=4, **plain)
    assert large_losses == pytest.approx([expected_loss], abs=1e-3)
    assert small_losses == pytest.approx(large_losses, abs=1e-3)
    assert_same(dict(small.named_parameters()), dict(large.named_parameters()), 1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(large.parameters(), model.parameters(), strict=True))


def test_the_trainers_label_smoothing_is_the_smoothed_loss(build_model, run_trainer, batch):
    model = build_model(initializer_range=0.2)
    labels = batch["labels"]
    expected = F.cross_entropy(
        model(**batch).logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.1
    )
    _, losses = run_trainer(model, label_smoothing_factor=0.1)
    assert losses == pytest.approx([expected.item()], abs=1e-3)


def test_evaluation_returns_logits_and_labels(build_model, run_trainer, rows):
    trainer, _ = run_trainer(build_model())
    result = trainer.predict(rows)
    assert result.predictions[0].shape == (*result.label_ids.shape, 53)


def test_lora_learns_merges_and_reloads(build_model, batch, tmp_path, hinge):
    base = build_model(initializer_range=0.2)
    untouched = copy.deepcopy(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=targets, r=4, lora_dropout=0.0))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_a_decoder_layer = 7 if hinge == "merged" else 11
    assert len(trained) == 2 * (2 * 7 + 3 * in_a_decoder_layer), "two factors at every projection, the hinge's too"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with_adapter = model(**batch).logits
    assert not torch.allclose(with_adapter, untouched(**batch).logits, atol=1e-2)
    generated = model.generate(**{name: batch[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=5)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(untouched, tmp_path).eval()
    torch.testing.assert_close(reloaded(**batch).logits, with_adapter)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, with_adapter, rtol=1e-5, atol=1e-5)
    again = merged.generate(**{name: batch[name] for name in ("input_ids", "attention_mask")}, max_new_tokens=5)
    assert torch.equal(again, generated)
