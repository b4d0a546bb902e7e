"""`diptych generate MODEL`: answers one prompt, a file of prompts (generate_file.py), or whoever types.

A single answer is printed token by token where that is possible: with one beam, one output and no stop strings.
"""

import sys
from contextlib import suppress
from dataclasses import replace

import torch
from transformers import TextStreamer

from diptych.data_prep.command_line.errors import UserError, excerpt
from diptych.data_prep.command_line.run_command import Printed
from diptych.data_prep.rows.language_names import languages_in
from diptych.data_prep.rows.terms import read_terms
from diptych.data_prep.text_to_ids.languages import codes_of, languages_note
from diptych.data_prep.text_to_ids.two_vocabularies import target_side
from diptych.finetune.commands import cli
from diptych.finetune.commands.ranks import several_ranks
from diptych.finetune.generating.documents import WHOLE, counts_of, documents_for
from diptych.finetune.generating.generate_file import generate_file
from diptych.finetune.generating.prompt_files import read_prompts
from diptych.finetune.inference.engine import TorchEngine
from diptych.finetune.inference.generate_settings import GenerateSettings
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS, check_generation_names
from diptych.finetune.inference.output_confidence import facts_of
from diptych.finetune.inference.outputs import Output
from diptych.finetune.inference.prompts import Prompt, Prompter
from diptych.finetune.model.device_speed import keep_memory
from diptych.finetune.model.loading import pick_device


def run(settings: GenerateSettings) -> int:
    check_generation_names(settings.generation)
    settings.generation_kwargs()  # refuses a form that no output can have
    keep_memory()
    # The file is read first, so that its mistakes show before a large model is loaded.
    asked = settings.instruction, settings.system, any(settings.languages)
    rows = read_prompts(settings.in_file, *asked) if settings.in_file else []
    if settings.terms:
        read_terms(settings.terms)
    accelerator = several_ranks()
    if accelerator and not settings.in_file:
        raise UserError("one process answers a prompt, but several were launched. Launch one, or give --in_file.")
    device = accelerator.device if accelerator and settings.device == "auto" else pick_device(settings.device)
    load_engine = cli.imported(cli.ENGINES[settings.engine])
    engine: TorchEngine = load_engine(settings.model, settings.dtype, device, settings.template)
    engine.check(settings)
    settings = resolve_limits(settings, engine)
    prompter = Prompter(engine.tokenizer, engine.template, settings.max_source_tokens, settings.languages)
    note = languages_note(engine.tokenizer, settings.languages)
    if note and not any(any(languages_in(row.fields)) for row in rows):
        print(f"({note})", file=sys.stderr)
    if settings.in_file:
        generate_file(engine, prompter, settings, rows, accelerator)
        if accelerator:
            accelerator.end_training()
        return 0
    torch.manual_seed(settings.seed)
    if isinstance(sys.stdout, Printed) and not sys.stdout.isatty():
        sys.stdout.kept = None  # answers stay as the model wrote them
    if settings.instruction or settings.input:
        answer(engine, prompter, settings, settings.instruction, settings.input)
    else:
        run_session(engine, prompter, settings)
    return 0


def resolve_limits(settings: GenerateSettings, engine: TorchEngine) -> GenerateSettings:
    """The settings with both token limits filled in; UserError for a limit beyond the model's positions."""
    limits = {"max_source_tokens": engine.max_source_tokens, "max_new_tokens": engine.max_target_tokens}
    for name, limit in limits.items():
        tokens = getattr(settings, name)
        if limit is not None and tokens is not None and tokens > limit:
            raise UserError(f"{name} is {tokens}, but {settings.model} was built for {limit} positions. Lower it.")
    default = min(DEFAULT_NEW_TOKENS, engine.max_target_tokens or DEFAULT_NEW_TOKENS)
    return replace(
        settings,
        max_source_tokens=settings.max_source_tokens or engine.max_source_tokens,
        max_new_tokens=settings.max_new_tokens or default,
    )


def answer(engine: TorchEngine, prompter: Prompter, settings: GenerateSettings, instruction: str, text: str) -> None:
    """Prints the outputs of one prompt."""
    documents = documents_for(settings, prompter, engine)
    (document,) = documents.encode([Prompt(instruction, text, system=settings.system)])
    if document.error:
        raise UserError(document.error)
    if document.is_cut_off:
        print(f"(the prompt was cut to {len(document.prompts[0].source_ids)} tokens)", file=sys.stderr)
    is_single = settings.num_beams == settings.num_return_sequences == 1 and not settings.mbr_samples
    has_stop = engine.template.stop or settings.generation.get("stop_strings")
    streaming = {}
    is_whole = document.pieces == WHOLE and not any(map(any, document.promises))
    if (
        engine.can_stream
        and is_single
        and is_whole
        and not (has_stop or settings.scores or settings.choices or settings.trusts)
    ):
        side = target_side(engine.tokenizer)
        streaming["streamer"] = TextStreamer(side, skip_prompt=True, skip_special_tokens=True)
    if streaming:
        outputs = engine.generate(document.prompts, settings, settings.seed, **streaming)
    else:
        ((outputs, missed, lost, rounds),) = documents.generate([document], settings, settings.seed)
        for output in outputs:
            print(_shown(output) if settings.scores else output.text, flush=True)
            if settings.trusts:
                _show_confidence(output, engine, settings)
        counts = counts_of([document]) | {"rounds": rounds if rounds > 1 else 0}
        if len(document.prompts) > 1:
            print(f"({', '.join(f'{number} {what}' for what, number in counts.items() if number)})", file=sys.stderr)
        for what, found in (("terms that are missing", missed), ("values that did not come back once", lost)):
            if any(found):
                print(f"({what}: {'; '.join(', '.join(of_output) or 'none' for of_output in found)})", file=sys.stderr)
    if not all(output.finished for output in outputs):
        print(f"(stopped at --max_new_tokens {settings.max_new_tokens}, before its end)", file=sys.stderr)


def _shown(output: Output) -> str:
    if output.log_probability is None:
        return output.text
    per_token = output.log_probability / max(1, len(output.ids))
    return f"{output.text}\t{output.log_probability:.4f} nats, {per_token:.4f} a token"


def _show_confidence(output: Output, engine: TorchEngine, settings: GenerateSettings) -> None:
    """On stderr."""
    if output.log_probability is None:
        return
    facts = facts_of(output, engine.calibration, settings.abstain_below)
    is_left = facts.pop("abstained", False)
    shown = [f"{name.replace('_', ' ')} {value}" for name, value in facts.items() if value not in (None, [])]
    print(f"({', '.join(shown)})", file=sys.stderr)
    if is_left:
        print(f"(below --abstain_below {settings.abstain_below:g}: leave it to a person)", file=sys.stderr)


def run_session(engine: TorchEngine, prompter: Prompter, settings: GenerateSettings) -> None:
    """Asks for an instruction and its input, answers, and asks again, until the end of input (Ctrl-D) or Ctrl-C.

    An empty instruction repeats the last one. With languages only inputs are asked for. Ctrl-C during an answer stops
    that answer only. On a pipe only the answers are printed.
    """
    with suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  arrow keys and history at the prompt
    is_typed = sys.stdin.isatty()
    if is_typed:
        print(f"{settings.model} on {engine.device}, template {engine.template.name}. Ctrl-D leaves.")
    has_languages = any(settings.languages) or codes_of(engine.tokenizer).is_around_texts
    instruction = ""
    try:
        while True:
            if has_languages:
                text = input("input> " if is_typed else "").strip()
            else:
                last = f" [{excerpt(instruction)}]" if instruction else ""
                instruction = input(f"instruction{last}> " if is_typed else "").strip() or instruction
                text = ""
                with suppress(EOFError):  # no input, so that the instruction before it is still answered
                    text = input("input (Enter for none)> " if is_typed else "").strip() if instruction else ""
            if not instruction and not text:
                continue
            try:
                answer(engine, prompter, settings, instruction, text)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
    except (EOFError, KeyboardInterrupt):
        print(end="\n" if is_typed else "")
