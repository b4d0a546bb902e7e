"""Losses of answers that the model wrote itself, against slow twins; and what sampling gives to them."""

import datasets
import pytest
import torch

from diptych.data_prep.packing.packed_row import MARKS_COLUMN
from diptych.data_prep.rows.records import IGNORE_INDEX
from diptych.data_prep.text_to_ids.templates import Template
from diptych.finetune.batches.padded_rows import Items, pad_sources, pad_targets
from diptych.finetune.model.adapters import add_adapter
from diptych.finetune.model.families import SOURCE_ROWS, decoder_start_token
from diptych.finetune.model.loaded_model import LoadedModel
from diptych.finetune.preferences.objective_settings import checked_settings
from diptych.finetune.preferences.online import DRAWS, FINISHED, REWARDS, OnlineObjective, SampledRows

SOURCES = [[12, 7, 9, 1], [5, 8, 1]]
ANSWERS = [  # source, ids, reward, mark
    (0, [31, 40, 35, 22, 1], 70.0, 0),
    (0, [31, 22, 1], 20.0, 0),
    (0, [9, 9, 9], 5.0, 0),
    (0, [31, 40, 1], 100.0, 1),
    (1, [22, 1], 40.0, 0),
    (1, [30, 1], 40.0, 0),
    (1, [8, 9, 22, 1], 90.0, 0),
    (1, [22, 9, 1], 100.0, 1),
]
MOST = 5
CASES = {
    "mrt": ("mrt", {"sharpness": 0.3}),
    "mrt of samples": ("mrt", {"with_target": False, "sharpness": 0.3, "supervised_weight": 0.4}),
    "grpo": ("grpo", {"samples": 3}),
    "grpo undivided": ("grpo", {"samples": 3, "by_deviation": False, "by_length": False, "supervised_weight": 0.1}),
    "grpo with kl": ("grpo", {"samples": 3, "kl_weight": 0.3}),
}


def batch_for(model) -> dict[str, torch.Tensor]:
    start = decoder_start_token(model)
    return {
        **pad_sources(SOURCES, 0),
        **pad_targets([{"labels": ids} for _, ids, _, _ in ANSWERS], 0, start),
        SOURCE_ROWS: torch.tensor([source for source, *_ in ANSWERS]),
        MARKS_COLUMN: torch.tensor([mark for *_, mark in ANSWERS]),
        REWARDS: torch.tensor([reward for _, _, reward, _ in ANSWERS], dtype=torch.float64),
        FINISHED: torch.tensor([int(ids[-1] == 1) for _, ids, _, _ in ANSWERS]),
        DRAWS: torch.tensor([1 - mark for *_, mark in ANSWERS]),
    }


def log_probabilities(model) -> list[torch.Tensor]:
    """Of each token of each answer, by one forward for each."""
    found = []
    for source, ids, _, _ in ANSWERS:
        inputs = {"input_ids": SOURCES[source], "decoder_input_ids": [decoder_start_token(model), *ids[:-1]]}
        inputs = {name: torch.tensor([its]) for name, its in inputs.items()}
        logits = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False).logits[0]
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0])
    return found


def naive_loss(model, case: str, reference) -> torch.Tensor:
    objective, given = CASES[case]
    own = checked_settings(objective, given)
    found, total = log_probabilities(model), 0.0
    with torch.no_grad():
        of_reference = log_probabilities(reference)
    for source in (0, 1):
        places = [place for place, answer in enumerate(ANSWERS) if answer[0] == source]
        samples = [place for place in places if ANSWERS[place][3] == 0]
        if objective == "mrt":
            taken = places if own["with_target"] else samples
            likely = torch.softmax(torch.stack([own["sharpness"] * found[place].sum() for place in taken]), 0)
            costs = torch.tensor([-ANSWERS[place][2] / 100 for place in taken], dtype=likely.dtype)
            total = total + (likely * costs).sum() / 2
            continue
        rewards = torch.tensor([ANSWERS[place][2] for place in samples], dtype=torch.float64)
        advantages = rewards - rewards.mean()
        advantages = advantages / (rewards.std() + 1e-4) if own["by_deviation"] else advantages / 100
        for place, advantage in zip(samples, advantages, strict=True):
            p, r = found[place], of_reference[place]
            gain = float(advantage) * torch.exp(p - p.detach())
            if own["kl_weight"]:
                gain = gain - own["kl_weight"] * (torch.exp(r - p) - (r - p) - 1)
            total = total - gain.sum() / (len(p) if own["by_length"] else MOST) / 6
    if own["supervised_weight"]:
        targets = [place for place, answer in enumerate(ANSWERS) if answer[3] == 1]
        tokens = sum(len(ANSWERS[place][1]) for place in targets)
        total = total - own["supervised_weight"] * sum(found[place].sum() for place in targets) / tokens
    return total


def gradients(model):
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["bart", "m2m_100", "t5", "t5gemma", "diptych", "diptych_merged"])
def test_loss_and_gradients_are_those_of_separate_forwards_in_fp64(family, case, new_model, in_fp64):
    model, reference = in_fp64(new_model(family)), in_fp64(new_model(family))
    with torch.no_grad():
        for weight in reference.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    expected_loss = naive_loss(model, case, reference)
    expected_loss.backward()
    expected = gradients(model)
    objective, given = CASES[case]
    settings = checked_settings(objective, given)
    at_once = 100 if case == "grpo" else 4  # of 25 target tokens
    loss = OnlineObjective(model, objective, settings, MOST, reference, tokens_at_once=at_once).train()(
        batch_for(model), Items(2, 6)
    )
    loss.backward()
    found = gradients(model)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    for name in expected.keys() | found.keys():
        scale = max(1.0, expected[name].abs().max().item())
        torch.testing.assert_close(found[name] / scale, expected[name] / scale, rtol=0, atol=1e-12)


def test_an_adapter_is_compared_with_its_base(new_model):
    """Where the adapter still does nothing the divergence is 0; then it is that from the base."""
    torch.manual_seed(0)
    base = new_model("t5")
    model = add_adapter(new_model("t5"), "base", rank=4, alpha=8)
    model.base_model.model.load_state_dict(base.state_dict(), strict=False)
    settings = checked_settings("grpo", {"samples": 3, "kl_weight": 0.3})
    objective = OnlineObjective(model, "grpo", settings, MOST).train()
    names = list(objective.figure_names)

    def divergence():
        objective(batch_for(model), Items(2, 6))
        total, count = objective.take_figures()[names.index("divergence")].tolist()
        return total / count

    assert divergence() == 0
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    own = [p.detach() for p in log_probabilities(model)]
    with model.disable_adapter():
        of_base = [p.detach() for p in log_probabilities(model)]
    ratios = torch.cat([r - p for p, r, answer in zip(own, of_base, ANSWERS, strict=True) if answer[3] == 0])
    assert divergence() == pytest.approx(float((torch.exp(ratios) - ratios - 1).mean()), rel=1e-4)
    assert model.training and model.base_model.model.training


def test_equal_rewards_teach_nothing(new_model):
    model = new_model("bart")
    batch = batch_for(model)
    batch[REWARDS][:] = 50.0
    objective = OnlineObjective(model, "grpo", checked_settings("grpo", {"samples": 3}), MOST).train()
    objective(batch, Items(2, 6)).backward()
    assert all(not weight.grad.any() for weight in model.parameters() if weight.grad is not None)
    figures = dict(zip(objective.figure_names, objective.take_figures().tolist(), strict=True))
    assert (
        figures["equal_rewards"] == [2, 2] and figures["unfinished_share"] == [1, 6] and figures["reward"] == [300, 6]
    )


@pytest.mark.parametrize("given", [{}, {"with_target": False}, {"with_target": False, "supervised_weight": 0.5}])
def test_samples_that_equal_the_target_count(given, loaded_t5, eight_prepared_rows):
    """Of a model that knows its rows by heart, nearly all do, and of some sources all."""
    torch.manual_seed(0)
    settings = checked_settings("mrt", {"samples": 4, "reward": "exact_match"} | given)
    rows = SampledRows(
        datasets.Dataset.from_list(eight_prepared_rows),
        loaded_t5.pad_token_id,
        loaded_t5.decoder_start_token_id,
        loaded=loaded_t5,
        settings=settings,
        metric_settings={},
        max_new_tokens=24,
    )
    batch = rows.tensors(range(8))
    assert batch[DRAWS].sum() == 32
    is_right = batch[REWARDS] == 100
    right = [int(batch[DRAWS][is_right & (batch[SOURCE_ROWS] == source)].sum()) for source in range(8)]
    assert 4 in right and sum(right) > 24
    objective = OnlineObjective(loaded_t5.model, "mrt", settings, 24)
    loss = objective(batch, Items(8, sum(len(row["labels"]) for row in eight_prepared_rows)))
    assert loss.isfinite() and (loss < -0.8 or settings["supervised_weight"])
    figures = dict(zip(objective.figure_names, objective.take_figures().tolist(), strict=True))
    assert figures["reward"] == [100 * sum(right), 32]
    assert figures["best_reward"] == [100 * sum(count > 0 for count in right), 8]
    assert figures["output_tokens"][1] == figures["unfinished_share"][1] == 32


@pytest.mark.parametrize("language", ["<ko>", "<en>"])
def test_forced_tokens_are_read_and_not_learned(two_languages, language):
    """Neither of samples nor of the target, which then are the same answer."""
    model, tokenizer, rows = two_languages
    rows = [row for row in rows if row["language"] == language]
    template = Template("one", "{{ instruction }}", decoder_prefix=(language,))
    loaded = LoadedModel.of(model, tokenizer, template)
    settings = checked_settings("mrt", {"samples": 3, "reward": "exact_match"})
    own = {"loaded": loaded, "settings": settings, "metric_settings": {}, "max_new_tokens": 24}
    split, ids = datasets.Dataset.from_list(rows), (loaded.pad_token_id, loaded.decoder_start_token_id)
    batch = SampledRows(split, *ids, **own).tensors(range(3))
    forced = tokenizer.convert_tokens_to_ids(language)
    assert (batch["decoder_input_ids"][:, 1] == forced).all() and (batch["labels"][:, 0] == IGNORE_INDEX).all()
    of_targets = batch["labels"][batch[MARKS_COLUMN] == 1]
    assert [[id for id in ids if id >= 0] for ids in of_targets.tolist()] == [row["labels"][1:] for row in rows]
    assert batch[DRAWS].sum() == 9 and batch[DRAWS][batch[MARKS_COLUMN] == 1].sum() > 4
