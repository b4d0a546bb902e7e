"""Losses of preferences against slow twins: each answer by itself through the whole model, and papers' formulas."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from small_families import PACKED

from diptych.data_prep.packing.packed_row import MARKS_COLUMN, SHARED_COLUMN
from diptych.finetune.batches.packed_rows import REFERENCE, pack_examples
from diptych.finetune.batches.padded_rows import Items
from diptych.finetune.batches.preference_rows import PairedRows
from diptych.finetune.model.families import SOURCE_ROWS, decoder_start_token
from diptych.finetune.preferences.losses import PreferenceLoss
from diptych.finetune.preferences.objective import PreferenceObjective
from diptych.finetune.training.training_batches import as_a_step

ROWS = [
    {"input_ids": [12, 7, 9, 1], "labels": [31, 40, 35, 22, 1], "other_labels": [31, 22, 1], "mark": 1},
    {"input_ids": [5, 8, 1], "labels": [22, 1], "other_labels": [9, 9, 30, 1], "mark": -1},
    {"input_ids": [12, 7, 9, 1], "labels": [31, 22, 1], "other_labels": [8, 1], "mark": 1},
]
EVEN_ROWS = [
    {"input_ids": [number, 7, 1], "labels": [31, 30 + number, 1], "other_labels": [40, 20 + number, 1], "mark": 1}
    for number in (5, 6, 7)
]
"""For models of transformers in which padding changes what other tokens see."""
REFERENCES = [[-9.0, -14.5], [-7.25, -21.0], [-14.5, -3.0]]
CASES = {
    "dpo": ("dpo", {}),
    "dpo smoothed": ("dpo", {"label_smoothing": 0.2, "beta": 0.3, "supervised_weight": 0.5}),
    "hinge": ("dpo", {"loss": "hinge", "beta": 0.05}),
    "ipo": ("dpo", {"loss": "ipo"}),
    "robust": ("dpo", {"loss": "robust", "label_smoothing": 0.1}),
    "simpo": ("simpo", {}),
    "cpo": ("cpo", {"label_smoothing": 0.1}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {"not_liked_weight": 1.5, "supervised_weight": 0.2}),
}
DIVERGENCE = 0.7


def split_of(case: str, rows=ROWS) -> Dataset:
    """Pairs, or with kto marked rows."""
    rows = [row | {REFERENCE: reference} for row, reference in zip(rows, REFERENCES, strict=True)]
    return Dataset.from_list([row if case == "kto" else {n: v for n, v in row.items() if n != "mark"} for row in rows])


def padded_batch(model, case: str, rows=ROWS) -> dict[str, torch.Tensor]:
    return PairedRows(split_of(case, rows), 0, decoder_start_token(model)).tensors([0, 1, 2])


def packed_batch(model, case: str) -> dict[str, torch.Tensor]:
    """One row, in the order that prepare packs: the third row's answers read the first one's source."""
    order = [0, 2, 1]
    examples = [
        {"input_ids": ROWS[row]["input_ids"], "labels": ROWS[row][name]}
        for row in order
        for name in ("labels", "other_labels")
    ]
    batch = pack_examples(examples, 0, decoder_start_token(model), share_sources=True)
    of_row = [(row["mark"], 0) if case == "kto" else (1, -1) for row in ROWS]
    marks = [mark for row in order for mark in of_row[row]]
    lengths = [len(example["labels"]) for example in examples]
    batch[MARKS_COLUMN] = torch.tensor(np.repeat(marks, lengths))[None]
    batch[REFERENCE] = torch.tensor([REFERENCES[row] for row in order], dtype=torch.float64).flatten()
    assert batch[SHARED_COLUMN].max() == 2
    return batch


def naive_loss(model, case: str, rows=ROWS) -> torch.Tensor:
    """Two whole forwards for each row, and the formulas as the papers have them."""
    objective, settings = CASES[case]
    own = {"beta": {"simpo": 2.0}.get(objective, 0.1), "label_smoothing": 0.0} | settings
    beta, eps, start = own["beta"], own["label_smoothing"], decoder_start_token(model)
    losses, chosen_nats, chosen_tokens = [], [], 0
    for row, references in zip(rows, REFERENCES, strict=True):
        found = []
        for labels in (row["labels"], row["other_labels"]):
            inputs = {"input_ids": row["input_ids"], "decoder_input_ids": [start, *labels[:-1]]}
            inputs = {name: torch.tensor([ids]) for name, ids in inputs.items()}
            mask = torch.ones_like(inputs["input_ids"])
            logits = model(**inputs, attention_mask=mask, use_cache=False).logits[0]
            found.append(logits.log_softmax(-1).gather(1, torch.tensor(labels)[:, None]).sum())
        (policy, other), (reference, other_reference) = found, references
        n, other_n = len(row["labels"]), len(row["other_labels"])
        ratio, other_ratio = policy - reference, other - other_reference
        logit = beta * (ratio - other_ratio)
        if case == "hinge":
            losses.append(F.relu(1 - logit))
        elif case == "ipo":
            losses.append((ratio / n - other_ratio / other_n - 1 / (2 * beta)) ** 2)
        elif case == "robust":
            losses.append((-F.logsigmoid(logit) * (1 - eps) + F.logsigmoid(-logit) * eps) / (1 - 2 * eps))
        elif objective == "dpo":
            losses.append(-F.logsigmoid(logit) * (1 - eps) - F.logsigmoid(-logit) * eps)
        elif objective == "simpo":
            losses.append(-F.logsigmoid(beta * (policy / n - other / other_n) - 1.0))
        elif objective == "cpo":
            logit = beta * (policy - other)
            losses.append(-F.logsigmoid(logit) * (1 - eps) - F.logsigmoid(-logit) * eps)
        elif objective == "orpo":
            p, q = (policy / n).exp(), (other / other_n).exp()
            losses.append(-beta * F.logsigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q))))
        elif row["mark"] > 0:
            losses.append(1 - torch.sigmoid(beta * (ratio - DIVERGENCE)))
        else:
            losses.append(1.5 * (1 - torch.sigmoid(beta * (DIVERGENCE - ratio))))
        if objective != "kto" or row["mark"] > 0:
            chosen_nats.append(-policy)
            chosen_tokens += n
    supervised = own.get("supervised_weight", 1.0 if objective in ("cpo", "orpo") else 0.0)
    return sum(losses) / len(losses) + supervised * sum(chosen_nats) / chosen_tokens


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def found_loss(model, case: str, batch, tokens_at_once: int = 4) -> torch.Tensor:
    """19 target tokens: 4 are looked at in chunks, 100 at once."""
    objective = PreferenceObjective(model, PreferenceLoss.of(*CASES[case]), tokens_at_once).train()
    objective.divergence = DIVERGENCE
    marks = batch[MARKS_COLUMN] if batch[MARKS_COLUMN].ndim == 2 else batch[MARKS_COLUMN][:, None]
    return objective(batch, Items(3, int(((batch["labels"] != -100) & (marks > 0)).sum())))


def assert_same(loss, found, expected_loss, expected, tolerance):
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    assert expected and found.keys() == expected.keys()
    for name in expected:
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=tolerance)


PRECISE = ["bart", "m2m_100", "t5", "t5gemma", "diptych", "diptych_merged"]


@pytest.mark.parametrize("family, case", [*itertools.product(["bart", "t5"], CASES), *((f, "dpo") for f in PRECISE)])
def test_loss_and_gradients_are_those_of_separate_forwards_in_fp64(family, case, new_model, in_fp64):
    model = in_fp64(new_model(family))
    expected_loss = naive_loss(model, case)
    expected_loss.backward()
    expected = gradients(model)
    batches = [(padded_batch(model, case), 4), (padded_batch(model, case), 100), (packed_batch(model, case), 4)]
    for batch, tokens_at_once in batches:
        loss = found_loss(model, case, batch, tokens_at_once)
        loss.backward()
        assert_same(loss, gradients(model), expected_loss, expected, 1e-12)


@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_a_rank_for_which_no_row_is_left_adds_nothing(case, new_model):
    model = new_model("t5")
    batch = PairedRows(split_of(case), 0, decoder_start_token(model)).tensors([])
    objective = PreferenceObjective(model, PreferenceLoss.of(*CASES[case])).train()
    assert objective.divergence_of(batch).tolist() == [0, 0]
    loss = objective(batch, Items(3, 10))
    loss.backward()
    assert loss == 0 and all(not weight.grad.any() for weight in model.parameters())
    assert not objective.take_figures().any()


@pytest.mark.parametrize("make", [padded_batch, packed_batch])
def test_a_trial_of_memory_needs_no_reference(make, new_model):
    """`batch_tokens: auto` looks for what fits before the reference has read the rows."""
    model = new_model("t5")
    batch = make(model, "dpo")
    del batch[REFERENCE]
    objective = PreferenceObjective(model, PreferenceLoss.of(*CASES["dpo"])).train()
    objective(*as_a_step(batch)).backward()
    assert all(weight.grad.any() for weight in model.parameters())


@pytest.mark.parametrize("family", ["t5", "bart", "m2m_100"])
def test_log_probabilities_are_those_of_what_was_generated(family, new_model):
    """As transformers' compute_transition_scores gives them for greedy outputs."""
    model = new_model(family).eval()
    start, source = decoder_start_token(model), torch.tensor([ROWS[0]["input_ids"]])
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "decoder_start_token_id": start}
    settings |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = model.generate(input_ids=source, attention_mask=torch.ones_like(source), **settings)
    expected = model.compute_transition_scores(found.sequences, found.logits, normalize_logits=True).sum()
    row = {"input_ids": ROWS[0]["input_ids"], "labels": found.sequences[0, 1:].tolist(), "other_labels": [9, 1]}
    batch = PairedRows(Dataset.from_list([row]), 0, start).tensors([0])
    objective = PreferenceObjective(model, PreferenceLoss.of("cpo", {}))
    torch.testing.assert_close(objective.answer_log_probabilities(batch)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [*PACKED, "longt5", "led", "pegasus_x", "prophetnet", "fsmt", "encoder-decoder"])
def test_every_family_reads_a_source_once_for_both_answers(family, new_model):
    """Padded, and packed where the family packs, against separate forwards, in fp32."""
    model = new_model(family)
    if family == "prophetnet":
        model.config.disable_ngram_loss = True
    rows = EVEN_ROWS if family in ("fsmt", "prophetnet") else ROWS
    expected_loss = naive_loss(model, "cpo", rows)
    expected_loss.backward()
    expected = gradients(model)
    batches = [padded_batch(model, "cpo", rows)] + ([packed_batch(model, "cpo")] if family in PACKED else [])
    assert batches[0][SOURCE_ROWS].tolist() == [0, 0, 1, 1, 2, 2]
    for batch in batches:
        loss = found_loss(model, "cpo", batch)
        loss.backward()
        assert_same(loss, gradients(model), expected_loss, expected, 2e-5)
