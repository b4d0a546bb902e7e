"""metrics.jsonl of a run in; loss.png out: training and validation loss over steps, and the learning rate below; of a
run with preferences, rewards, accuracy, probabilities and lengths between them."""

import os
from pathlib import Path

from diptych.data_prep.rows.named_splits import splits_of
from diptych.finetune.run_files.atomic_folders import read_json_lines

OF_PREFERENCES = {
    "reward": ("reward_chosen", "reward_rejected", "margin"),
    "share": ("accuracy", "unfinished_share"),
    "nats per token": ("nats_chosen", "nats_rejected", "entropy"),
    "metric": ("reward", "best_reward"),
    "tokens": ("output_tokens",),
}
"""Figures of a run with preferences that share a panel, by its label."""
COLORS = ("tab:blue", "tab:red", "tab:green")


def plot_loss(metrics_file: Path, picture: Path) -> None:
    entries = read_json_lines(metrics_file)
    if not entries:  # they were lost; an older picture may show them
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [entry for entry in entries if entry["split"] == "train"]
    sets = splits_of("validation", dict.fromkeys(entry["split"] for entry in entries))
    validation = {split: [entry for entry in entries if entry["split"] == split] for split in sets}
    known = {name for entry in entries for name in entry}
    names = {label: panel for label, panel in OF_PREFERENCES.items() if not known.isdisjoint(panel)}
    of_validation = ", nats per target token" if "best_reward" in known else ""
    heights = (3, *([2] * len(names)), 1)
    figure, (loss_axes, *further, rate_axes) = pyplot.subplots(
        len(heights), sharex=True, figsize=(8, 4 + 1.5 * len(heights[1:])), height_ratios=heights, layout="constrained"
    )
    loss_axes.plot(_column(train, "step"), _column(train, "loss"), label="training", linewidth=1.2)
    for split, of_split in validation.items():
        steps, losses = _column(of_split, "step"), _column(of_split, "loss")
        best = f"{split}{of_validation}, best {min(losses):.3f} after step {steps[losses.index(min(losses))]:,}"
        loss_axes.plot(steps, losses, "o-", label=best, markersize=3)
    loss_axes.set_ylabel("loss" if names else "loss (nats per target token)")
    for axes, (label, panel) in zip(further, names.items(), strict=True):
        axes.set_ylabel(label)
        for color, name in zip(COLORS, panel, strict=False):
            label = name.replace("_", " ")
            for kind, of_split in {"training": train, **validation}.items():
                points = [(entry["step"], entry[name]) for entry in of_split if name in entry]
                style = (
                    {"linewidth": 1.2} if kind == "training" else {"marker": "o", "markersize": 3, "linestyle": ":"}
                )
                if points:
                    axes.plot(*zip(*points, strict=True), label=label, color=color, **style)
                    label = None  # the same colour, dotted
    rate_axes.plot(_column(train, "step"), _column(train, "learning_rate"), color="tab:gray", linewidth=1.2)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("optimizer step")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    loss_axes.legend(fontsize="small")
    for axes in further:
        dotted = "dotted: validation" if any(it.get_linestyle() == ":" for it in axes.lines) else None
        axes.legend(fontsize="small", title=dotted, title_fontsize="small", framealpha=0.5)
    for axes in (loss_axes, *further, rate_axes):
        axes.grid(alpha=0.3)
    beside = picture.with_name(f"{picture.stem}.partial.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, picture)


def _column(entries: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in entries]
