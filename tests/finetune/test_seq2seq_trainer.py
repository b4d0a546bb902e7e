"""Diptych models in transformers' own Seq2SeqTrainer, which scales the loss of many encoder-decoders wrongly: of a
Diptych it gets one gradient, however a step is cut, padded or packed, on one rank and on two."""

import json

import pytest
import torch

# One step of twelve examples: (micro-batch rows, micro-batches, packed); two ranks have half the rows each.
LAYOUTS = {
    1: [(12, 1, False), (4, 3, False), (1, 12, False), (8, 1, True), (2, 4, True), (1, 8, True)],
    2: [(6, 1, False), (2, 3, False), (1, 6, False), (4, 1, True), (2, 2, True), (1, 4, True)],
}
ONE_STEP = """
import gc, json, sys, tempfile
import datasets, numpy as np, torch
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from diptych.data_prep.packing.packed_row import Budget, assemble_row
import diptych.modeling
from diptych.finetune.batches.padded_rows import pad_batch
from diptych.finetune.batches.packed_rows import packed_batch

draw = np.random.default_rng(0)
SOURCES = [60, 3, 17, 9, 41, 5, 22, 8, 30, 12, 4, 50]
TARGETS = [1, 300, 2, 150, 3, 99, 7, 220, 12, 30, 60, 1]
EXAMPLES = [
    {"input_ids": draw.integers(3, 360, source).tolist(), "labels": draw.integers(3, 360, target).tolist()}
    for source, target in zip(SOURCES, TARGETS)
]
ROWS = [[1], [3, 4], [7, 0, 2], [5, 6], [8, 9], [10], [11]]  # eight with the empty one
PACKED = [assemble_row([EXAMPLES[i] for i in row], Budget(128, 320), 0, 0) for row in ROWS]
EMPTY = {name: np.full_like(column, -100 if name == "labels" else 0) for name, column in PACKED[0].items()}
PACKED.append(EMPTY)

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, *_, model, **__):
        self.gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}

def step(folder, dtype, rows_per_batch, batches, packed):
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)
    keep = Keep()
    arguments = Seq2SeqTrainingArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=rows_per_batch, gradient_accumulation_steps=batches,
        max_steps=1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
        logging_steps=1, remove_unused_columns=False, train_sampling_strategy="sequential", learning_rate=0.0,
    )
    stack = lambda rows: packed_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    collate = stack if packed else lambda rows: pad_batch(rows, 0, 0)
    trainer = Seq2SeqTrainer(model, arguments, collate, PACKED if packed else EXAMPLES, callbacks=[keep])
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"loss": torch.tensor(float(loss), dtype=dtype), **keep.gradients}

if __name__ == "__main__":
    folder, layouts, out = sys.argv[1:]
    dtypes = torch.float64, torch.float32
    results = [step(folder, dtype, *layout) for dtype in dtypes for layout in json.loads(layouts)]
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        torch.save(results, out)
    gc.collect()  # DDP before the process group: see finetune/train.py
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_twelve_layouts_of_one_step_give_one_gradient_in_the_trainer(new_model, nursery, tmp_path):
    """In float64 to 1e-12, in float32 to 1e-6."""
    model = new_model("diptych")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.4)  # the usual weights of our tests are so large that fp32 has only five digits
    model.save_pretrained(tmp_path / "model")
    script = tmp_path / "one_step.py"
    script.write_text(ONE_STEP)
    results = {torch.float64: [], torch.float32: []}
    for ranks, layouts in LAYOUTS.items():
        out = tmp_path / f"{ranks}.pt"
        nursery.run_script([script, tmp_path / "model", json.dumps(layouts), out], tmp_path / "log", ranks)
        for found in torch.load(out):
            results[found["loss"].dtype].append(found)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        expected, *others = results[dtype]
        assert len(others) == 11
        for found in others:
            # the trainer rounds the loss that it logs
            assert found.pop("loss").item() == pytest.approx(expected["loss"].item(), abs=1e-3)
            difference = torch.cat([(found[name] - expected[name]).flatten() for name in found]).norm()
            whole = torch.cat([expected[name].flatten() for name in found]).norm()
            assert difference / whole <= tolerance, (dtype, difference / whole)
