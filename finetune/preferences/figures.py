"""What a run with preferences is watched by.

validation_figures(loss, answers)     {"loss": 0.61, "accuracy": 0.72, "margin": 0.9, …} of a whole split
drift(usual, now)                     what has gone far from where it was, as lines to print
"""

from collections.abc import Iterator, Mapping

import torch

from diptych.finetune.preferences.losses import AnswerFigures, PreferenceLoss

FIGURES = ("reward_chosen", "reward_rejected", "accuracy", "nats_chosen", "nats_rejected")
COLLAPSED, DOUBLED, MORE_NATS, MORE_UNFINISHED = 0.25, 2.0, 2.0, 0.25


def preference_figures(
    loss: PreferenceLoss, answers: AnswerFigures, divergence: float | torch.Tensor = 0.0
) -> dict[str, torch.Tensor]:
    """Values whose means are logged. Rewards are those of the method; accuracy is the share of pairs whose chosen
    answer has the larger one, or of marked answers that are on the right side; nats are per token."""
    rewards, marks, nats = loss.rewards(answers), answers.marks, -answers.means
    found = {"reward_chosen": rewards[marks > 0], "reward_rejected": rewards[marks < 0]}
    if loss.is_marked:
        least = loss.settings["beta"] * max(float(divergence), 0.0)
        found["accuracy"] = ((rewards[0::2] - least) * marks[0::2] > 0).double()
    else:
        found["margin"] = rewards[0::2] - rewards[1::2]
        found["accuracy"] = (found["margin"] > 0).double()
    return found | {"nats_chosen": nats[marks > 0], "nats_rejected": nats[marks < 0]}


def validation_figures(loss: PreferenceLoss, answers: AnswerFigures) -> dict[str, float]:
    """The loss and the figures of a split, as one batch would have them."""
    unrelated = answers.marks == 0
    divergence = answers.ratios[unrelated].mean() if loss.is_marked else 0.0
    value = loss.of_examples(answers, divergence).mean()
    if loss.supervised_weight:
        chosen = answers.marks > 0
        nats = -answers.log_probabilities[chosen].sum() / answers.tokens[chosen].sum()
        value = value + loss.supervised_weight * nats
    found = preference_figures(loss, answers, divergence)
    return {"loss": float(value)} | {name: float(values.mean()) for name, values in found.items() if len(values)}


def drift(usual: Mapping[str, float], now: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Name of a figure, and what is to be said of it, where it is far from its usual value."""
    for name in now.keys() & usual.keys():
        before, value = usual[name], now[name]
        if name == "entropy" and value < COLLAPSED * before:
            what = f"the entropy fell from {before:.2f} to {value:.2f} nats: one answer becomes certain"
        elif name == "nats_chosen" and value > before + MORE_NATS:
            what = (
                f"chosen answers became less likely, {before:.2f} -> {value:.2f} nats per token; a supervised_weight,"
                f" a larger beta or a lower learning_rate holds them"
            )
        elif name == "output_characters" and value > DOUBLED * before > 0:
            what = f"outputs grew from {before:.0f} to {value:.0f} characters"
        elif name == "unfinished_share" and value > before + MORE_UNFINISHED:
            what = f"outputs without an end grew from {before:.0%} to {value:.0%}"
        else:
            continue
        yield name, what
