"""The row stages as a step of datatrove, for data that is too much for one machine. The result is the same.

    diptych prepare --data my.jsonl --tokenizer folder --out prepared --engine datatrove --tasks 4 --workers 2

On a Slurm cluster tasks are launched from Python, with the words of the command line and paths that all nodes see:

    from datatrove.executor import SlurmPipelineExecutor
    from diptych.data_prep.pipeline.datatrove_rows import rows_step

    words = "--data my.jsonl --tokenizer folder --out prepared".split()
    SlurmPipelineExecutor(
        [rows_step(words, "parts")], tasks=64, time="04:00:00", partition="cpu", logging_dir="parts/logs"
    ).run()

and what needs all rows at once (duplicates, splits, packing, report) follows when they are done, with the same words:

    diptych prepare --data my.jsonl --tokenizer folder --out prepared --gathered parts

Why datatrove and not Ray Data: it is Hugging Face's own, needs no server, and all its executors (processes, Slurm,
Ray) give a step just its rank and the world size. A task that has ended leaves a file in logging_dir/completions and
is not run again. The local executor waits for ever for a process that was killed, mostly for lack of memory: stop it,
and start it again with fewer workers.
"""

from collections.abc import Sequence
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from diptych.data_prep.pipeline.checkpoint_tokenizer import load_tokenizer_and_template
from diptych.data_prep.pipeline.parallel_parts import RowJob, part_path, write_part
from diptych.data_prep.pipeline.prepare_inputs import fingerprint_of, make_stages, open_inputs
from diptych.data_prep.pipeline.prepare_settings import parse_settings


class GatherRows(PipelineStep):
    """Task `rank` of `world_size` writes its part into the folder. datatrove's documents, which have one text each,
    are passed on as they are."""

    name = "Diptych rows"
    type = "Gather"

    def __init__(self, job: RowJob, folder: str | Path) -> None:
        super().__init__()
        self.job, self.folder = job, str(folder)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        with self.track_time("part"):
            for batch in write_part(self.job, Path(self.folder), rank, world_size):
                self.stat_update("rows", value=batch.counts.rows, unit="chunk")
                self.stat_update("rejected", value=len(batch.rejects), unit="chunk")
        yield from data or ()


def rows_step(words: Sequence[str], folder: str | Path) -> GatherRows:
    """The step for an executor of your own; `words` are the arguments of `diptych prepare`. Files are hashed and
    formats recognised here, once, and not in each task."""
    settings = parse_settings(words)
    inputs = open_inputs(settings)
    tokenizer, template = load_tokenizer_and_template(settings, inputs.default_template)
    stages = make_stages(settings, inputs, tokenizer, template)
    return GatherRows(RowJob(inputs.sources, stages, fingerprint_of(settings, inputs, tokenizer, template)), folder)


def run_tasks(job: RowJob, folder: Path, tasks: int, workers: int) -> None:
    """Runs the tasks that have not ended yet, in `workers` processes of this machine."""
    logs = folder / "logs"
    for task in range(tasks):
        if not part_path(folder, task, tasks).is_file():
            (logs / "completions" / f"{task:05d}").unlink(missing_ok=True)
    step = GatherRows(job, folder)
    LocalPipelineExecutor([step], tasks=tasks, workers=min(workers, tasks), logging_dir=str(logs)).run()
