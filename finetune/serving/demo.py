"""`diptych demo`: a page on which to try a checkpoint, or two of them side by side.

    diptych demo runs/full/final
    diptych demo runs/lora/final --beside my-checkpoint --examples prompts.jsonl

The answer comes as it is written, by serve's engine (batching.py), and is that of `diptych generate`; below it stands
where the decoder looked while it wrote. The page is Gradio's, at the loopback, asks nothing of any other host, takes
no files, and shows all text as text. Beyond the loopback it demands a password, from the environment:
DIPTYCH_PASSWORD.
"""

import os
import queue
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from transformers import PreTrainedModel

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.report.text_shown import token_markup
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.commands import cli
from diptych.finetune.inference.generation_config import DEFAULT_NEW_TOKENS
from diptych.finetune.inference.prompt_files import read_prompts
from diptych.finetune.inference.prompts import Prompt, Prompter, template_for
from diptych.finetune.inference.targets import given_tokens
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.model.attention_weights import mean_weights
from diptych.finetune.model.loading import load_checkpoint, pick_device, position_limit
from diptych.finetune.serving.request_batches import Answer, Decoding, Ended, Engine, Failed, Job, Piece
from diptych.finetune.serving.serve_settings import DemoSettings
from diptych.finetune.serving.web_address import address, is_asked_here, listen, need_secret, run_until_signal

INSTALL = "pip install 'diptych[gradio]'"
PASSWORD_VARIABLE = "DIPTYCH_PASSWORD"
USER = "diptych"
FRAMES = Path(__file__).parent / "frames"
MOST_MAP_TOKENS = 160
"""Of source and answer; a larger map cannot be read."""
MOST_EXAMPLES = 12
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none';"
)
"""By which a browser asks no other host. Gradio's own page needs inline scripts."""


class Contestant(NamedTuple):
    """One of the checkpoints on the page."""

    name: str
    model: PreTrainedModel
    prompter: Prompter
    engine: Engine
    most_tokens: int

    def attention(self, source_ids: list[int], given: Sequence[int], answer: Answer) -> str:
        """Where the decoder looked, as a table: rows are what it wrote, columns what it read."""
        tokenizer = self.prompter.tokenizer
        if max(len(source_ids), len(answer.ids)) > MOST_MAP_TOKENS or not answer.ids:
            return _note(f"A map of attention is drawn of up to {MOST_MAP_TOKENS} tokens on either side.")
        passage = facts.read_and_write(self.model, source_ids, [*given, *answer.ids])
        weights = mean_weights(passage.seen.cross)[-len(answer.ids) :]
        read = facts.token_chips(source_side(tokenizer), source_ids)
        written = facts.token_chips(target_side(tokenizer), answer.ids)
        most = float(weights.max())
        head = Markup("").join(Markup("<th><span>{}</span></th>").format(token_markup(it["text"])) for it in read)
        lines = []
        for token, row in zip(written, weights.tolist(), strict=True):
            cells = Markup("").join(
                Markup('<td style="--share:{:.0f}%" title="{:.1f} %"></td>').format(100 * (it / most) ** 0.5, 100 * it)
                for it in row
            )
            lines.append(Markup("<tr><th>{}</th>{}</tr>").format(token_markup(token["text"]), cells))
        rows = Markup("").join(lines)
        table = '<div class="looks"><table><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>'
        return str(Markup(table).format(head, rows))


def shown_name(checkpoint: str) -> str:
    return Path(checkpoint.rstrip("/")).name


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def load_contestant(settings: DemoSettings, name: str) -> Contestant:
    loaded = load_checkpoint(name, settings.dtype, pick_device(settings.device), template=settings.template)
    model, tokenizer = loaded.model, loaded.tokenizer
    template = template_for(settings.template, tokenizer)
    limit = position_limit(model)
    most = settings.max_new_tokens or min(DEFAULT_NEW_TOKENS, limit or DEFAULT_NEW_TOKENS)
    engine = Engine(model, tokenizer, template, batch_size=8, queue_size=64, batch_wait_ms=5)
    languages = Languages(settings.source_language, settings.target_language)
    prompter = Prompter(tokenizer, template, position_limit(model, of_source=True), languages)
    return Contestant(shown_name(name), model, prompter, engine, most)


class Asked(NamedTuple):
    """What a visitor wrote and chose, in the order of the page's inputs."""

    instruction: str
    input: str
    system: str
    max_new_tokens: float
    num_beams: float
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: float
    source_language: str = ""
    target_language: str = ""

    def decoding(self, most_tokens: int) -> Decoding:
        beams = 1 if self.temperature else int(self.num_beams)
        return Decoding(
            min(int(self.max_new_tokens), most_tokens),
            float(self.temperature),
            float(self.top_p) if self.temperature else 1.0,
            seed=int(self.seed) if self.temperature else None,
            num_beams=beams,
            repetition_penalty=float(self.repetition_penalty),
        )


def answer_all(contestants: Sequence[Contestant], asked: Asked) -> Iterator[list[str]]:
    """Ever longer texts, with a note each; at last with a map of attention. [text, note, map] for each contestant.

    When nobody takes the next one (the visitor pressed Stop, or left), their rows end.
    """
    shown = [["", "", ""] for _ in contestants]
    events: queue.Queue = queue.Queue()
    jobs: list[Job | None] = []
    for place, contestant in enumerate(contestants):
        job = None
        try:
            if not asked.instruction.strip() and not asked.input.strip():
                raise UserError("Write an instruction first. A model that needs none takes an input alone.")
            prompter, chosen = contestant.prompter, Languages(asked.source_language, asked.target_language)
            prompt = Prompt(asked.instruction, asked.input, system=asked.system, languages=chosen)
            text, languages = prompter.render(prompt)
            (source_ids,), (is_cut,) = prompter.encode([text], [languages])
            decoding = asked.decoding(contestant.most_tokens)
            job = Job(source_ids, decoding, lambda it, place=place: events.put((place, it)), wants_pieces=True)
            job.given = given_tokens(contestant.model, prompter.tokenizer, prompter.template, languages)
            shown[place][1] = _note(f"The prompt was cut to {len(source_ids)} tokens.") if is_cut else ""
            contestant.engine.submit([job])
        except UserError as error:
            shown[place][1] = _note(str(error))
        jobs.append(job)
    yield _flat(shown)
    try:
        yield from _written(contestants, jobs, events, shown)
    finally:
        for job in filter(None, jobs):
            job.is_dropped = True


def _written(
    contestants: Sequence[Contestant], jobs: list[Job | None], events: queue.Queue, shown: list[list[str]]
) -> Iterator[list[str]]:
    due = sum(job is not None for job in jobs)
    while due:
        place, event = events.get()
        if isinstance(event, Piece):
            shown[place][0] += event.text
        elif isinstance(event, Failed):
            due -= 1
            shown[place][1] = _note(f"The model failed: {event.error}")
        elif isinstance(event, Ended):
            due -= 1
            (answer,) = event.answers
            tokens = f"{len(answer.ids)} tokens"
            shown[place][:2] = (
                answer.text,
                shown[place][1] + _note(tokens if answer.finished else f"{tokens}, and stopped there, before its end"),
            )
            shown[place][2] = contestants[place].attention(list(jobs[place].source_ids), jobs[place].given, answer)
        if events.empty():
            yield _flat(shown)


def _flat(shown: list[list[str]]) -> list[str]:
    return [text for of_one in shown for text in of_one]


def build_page(contestants: Sequence[Contestant], examples: list[list[str]]) -> Any:
    """Gradio's Blocks."""
    import gradio

    has_system = any("system" in it.prompter.template.source_variables() for it in contestants)
    most_tokens = max(contestant.most_tokens for contestant in contestants)
    prompter = contestants[0].prompter
    codes = sorted(codes_of(prompter.tokenizer).tokens)
    chosen = codes_of(prompter.tokenizer).checked(prompter.languages).or_else(own_languages(prompter.tokenizer))
    has_languages = bool(codes) or any(chosen)
    title = " and ".join(contestant.name for contestant in contestants)
    with gradio.Blocks(analytics_enabled=False, fill_width=True, title=f"{title} · Diptych") as page:
        gradio.HTML(f'<h1 class="title">{escape(title)}</h1>')
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=4, min_width=320):
                instruction = gradio.Textbox(
                    label="Instruction", lines=2, max_lines=8, autofocus=True, elem_id="instruction"
                )
                text = gradio.Textbox(label="Input", info="What it is about, if anything", lines=5, elem_id="input")
                system = gradio.Textbox(label="System prompt", visible=has_system, elem_id="system")
                with gradio.Row(visible=has_languages):
                    languages = [
                        gradio.Dropdown(
                            codes,
                            value=code,
                            label=label,
                            allow_custom_value=True,
                            visible=has_languages,
                            elem_id=label,
                        )
                        for label, code in zip(("From", "Into"), chosen, strict=True)
                    ]
                with gradio.Row():
                    stop = gradio.Button("Stop", elem_id="stop")
                    go = gradio.Button("Write", variant="primary", elem_id="go")
                with gradio.Accordion("How it writes", open=False, elem_id="settings"):
                    first_tokens = min(128, most_tokens)
                    settings = [
                        gradio.Slider(1, most_tokens, first_tokens, step=1, label="Longest answer, tokens"),
                        gradio.Slider(
                            1, 8, 1, step=1, label="Beams", info="Searched side by side; without temperature"
                        ),
                        gradio.Slider(
                            0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token each time"
                        ),
                        gradio.Slider(
                            0.05, 1, 1, step=0.05, label="Top p", info="Draws from so much of the likeliest"
                        ),
                        gradio.Slider(1, 2, 1, step=0.05, label="Repetition penalty"),
                        gradio.Number(0, label="Seed", precision=0, minimum=0),
                    ]
            with gradio.Column(scale=7, min_width=320), gradio.Row(equal_height=False):
                outputs = []
                for place, contestant in enumerate(contestants):
                    with gradio.Column(min_width=300):
                        label = contestant.name if len(contestants) > 1 else "Answer"
                        outputs.append(
                            gradio.Textbox(
                                label=label, lines=4, interactive=False, buttons=["copy"], elem_id=f"answer-{place}"
                            )
                        )
                        outputs.append(gradio.HTML(elem_id=f"note-{place}"))
                        outputs.append(gradio.HTML(elem_id=f"looks-{place}"))
        if examples:
            gradio.Examples(examples, [instruction, text], label="Examples", cache_examples=False)

        def write(*values: Any) -> Iterator[list[str]]:
            # A box that is not shown has no value.
            yield from answer_all(contestants, Asked(*("" if value is None else value for value in values)))

        inputs = [instruction, text, system, *settings, *languages]
        running = [
            trigger(write, inputs, outputs, show_progress="hidden", api_visibility="private", concurrency_limit=8)
            for trigger in (go.click, instruction.submit)
        ]
        stop.click(None, cancels=running, api_visibility="private")
    return page


class Guard:
    """ASGI: who may ask (see web.py), no uploads, and a policy by which a browser asks no other host."""

    def __init__(self, app: Any, only_loopback: bool):
        self.app, self.only_loopback = app, only_loopback

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        request = Request(scope)
        if self.only_loopback and not is_asked_here(request.headers):
            return await PlainTextResponse("asked for as another host than this one, or by a page of one", 403)(
                scope, receive, send
            )
        if "/upload" in scope["path"] or "/proxy=" in scope["path"]:
            return await PlainTextResponse("this page takes no files", 403)(scope, receive, send)

        async def send_with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def run(settings: DemoSettings) -> int:
    with tempfile.TemporaryDirectory() as folder:  # Gradio makes one in any case, and would leave it there
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        return _serve(settings)


def _serve(settings: DemoSettings) -> int:
    try:
        import fastapi
        import gradio
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. `diptych demo` needs it: {INSTALL}") from error
    password = os.environ.get(PASSWORD_VARIABLE) or None
    need_secret(settings.host, password, PASSWORD_VARIABLE)
    rows = read_prompts(settings.examples, "", "") if settings.examples else []
    examples = [[row.prompt.instruction, row.prompt.input] for row in rows if row.prompt][:MOST_EXAMPLES]
    listener = listen(settings.host, settings.port)
    names = [settings.model, settings.beside] if settings.beside else [settings.model]
    contestants = [load_contestant(settings, name) for name in names]
    if len(contestants) == 2 and contestants[0].name == contestants[1].name:
        contestants = [it._replace(name=name.rstrip("/")) for it, name in zip(contestants, names, strict=True)]

    theme = gradio.themes.Default(
        primary_hue="orange",
        secondary_hue="cyan",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(contestants, examples),
        path="/",
        auth=None if password is None else [(USER, password)],
        theme=theme,
        css=(FRAMES / "demo.css").read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
    )
    guarded = Guard(app, only_loopback=password is None)
    message = f"{', '.join(it.name for it in contestants)}: {address(listener)}"
    run_until_signal(guarded, listener, message, 5, on_signal=lambda: None)
    for contestant in contestants:
        contestant.engine.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run("demo", argv)


if __name__ == "__main__":
    raise SystemExit(main())
