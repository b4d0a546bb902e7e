"""metrics.jsonl of a run in; loss.png out: training and validation loss over steps, and the learning rate below."""

import os
from pathlib import Path

from diptych.data_prep.rows.named_splits import splits_of
from diptych.finetune.run_files.atomic_folders import read_json_lines


def plot_loss(metrics_file: Path, picture: Path) -> None:
    entries = read_json_lines(metrics_file)
    if not entries:  # they were lost; an older picture may show them
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [entry for entry in entries if entry["split"] == "train"]
    figure, (loss_axes, rate_axes) = pyplot.subplots(
        2, sharex=True, figsize=(8, 5.5), height_ratios=(3, 1), layout="constrained"
    )
    loss_axes.plot(_column(train, "step"), _column(train, "loss"), label="training", linewidth=1.2)
    for split in splits_of("validation", dict.fromkeys(entry["split"] for entry in entries)):
        validation = [entry for entry in entries if entry["split"] == split]
        steps, losses = _column(validation, "step"), _column(validation, "loss")
        best = f"{split}, best {min(losses):.3f} after step {steps[losses.index(min(losses))]:,}"
        loss_axes.plot(steps, losses, "o-", label=best, markersize=3)
    loss_axes.set_ylabel("loss (nats per target token)")
    loss_axes.legend()
    rate_axes.plot(_column(train, "step"), _column(train, "learning_rate"), color="tab:gray", linewidth=1.2)
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("optimizer step")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
    beside = picture.with_name(f"{picture.stem}.partial.png")
    figure.savefig(beside, dpi=120)
    pyplot.close(figure)
    os.replace(beside, picture)


def _column(entries: list[dict], name: str) -> list[float]:
    return [entry[name] for entry in entries]
