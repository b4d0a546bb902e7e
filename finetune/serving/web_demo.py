"""`diptych demo`: a page on which to try a checkpoint, or two of them side by side.

    diptych demo runs/full/final
    diptych demo runs/lora/final --beside my-checkpoint --examples prompts.jsonl

The answer is streamed by serve's engine (request_batches.py) and is that of `diptych generate`; a map below it shows
the cross-attention of each step. The page is made by Gradio, listens at the loopback, loads nothing from other hosts,
accepts no files, and shows all text as text. Beyond the loopback a password is needed, from the environment:
DIPTYCH_PASSWORD.
"""

import contextlib
import os
import queue
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from diptych.data_prep.command_line.errors import UserError, in_short
from diptych.data_prep.report.visible_text import token_markup
from diptych.data_prep.rows.records import Languages
from diptych.data_prep.text_to_ids.languages import codes_of, own_languages
from diptych.data_prep.text_to_ids.two_vocabularies import source_side, target_side
from diptych.finetune.generating.prompt_files import read_prompts
from diptych.finetune.inference.attention_weights import mean_weights
from diptych.finetune.inference.prompts import Prompt
from diptych.finetune.inspecting import inspection_facts as facts
from diptych.finetune.serving import web_address
from diptych.finetune.serving.request_batches import LOG, Answer, Decoding, Ended, Engine, Failed, Job, Piece
from diptych.finetune.serving.serve_settings import DemoSettings
from diptych.finetune.serving.served_model import ServedModel, load_served

INSTALL = "pip install 'diptych[gradio]'"
USER = "diptych"
TEMPLATES = Path(__file__).parent / "templates"
MOST_MAP_TOKENS = 160
"""Of source and answer; a larger map cannot be read."""
MOST_EXAMPLES = 12
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; form-action 'self'; "
    "frame-ancestors 'none';"
)
"""With it a browser asks no other host. Gradio's own page needs inline scripts."""


class Contestant(NamedTuple):
    """One of the checkpoints on the page."""

    name: str
    served: ServedModel
    engine: Engine

    def attention(self, source_ids: Sequence[int], given: Sequence[int], answer: Answer) -> str:
        """The mean cross-attention as an HTML table: a row for each written token, a column for each source token."""
        if not self.served.is_torch:
            return _note("CTranslate2 gives no map of attention.")
        if max(len(source_ids), len(answer.ids)) > MOST_MAP_TOKENS or not answer.ids:
            return _note(f"A map of attention is drawn of up to {MOST_MAP_TOKENS} tokens on either side.")
        loaded = self.served.loaded
        passage = facts.read_and_write(loaded, source_ids, [*given, *answer.ids])
        weights = mean_weights(passage.seen.cross)[-len(answer.ids) :]
        read = facts.token_chips(source_side(loaded.tokenizer), source_ids)
        written = facts.token_chips(target_side(loaded.tokenizer), answer.ids)
        head = _join(Markup("<th><span>{}</span></th>").format(token_markup(chip["text"])) for chip in read)
        cell, most = Markup('<td style="--share:{:.0f}%" title="{:.1f} %"></td>'), float(weights.max())
        rows = _join(
            Markup("<tr><th>{}</th>{}</tr>").format(
                token_markup(chip["text"]), _join(cell.format(100 * (it / most) ** 0.5, 100 * it) for it in row)
            )
            for chip, row in zip(written, weights.tolist(), strict=True)
        )
        table = '<div class="looks"><table><thead><tr><td></td>{}</tr></thead><tbody>{}</tbody></table></div>'
        return str(Markup(table).format(head, rows))


def _join(parts: Iterator[Markup]) -> Markup:
    return Markup("").join(parts)


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


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

    def prompt(self) -> Prompt:
        if not self.instruction.strip() and not self.input.strip():
            raise UserError("Write an instruction first. A model that needs none takes an input alone.")
        languages = Languages(self.source_language, self.target_language)
        return Prompt(self.instruction, self.input, system=self.system, languages=languages)

    def decoding(self, most_tokens: int) -> Decoding:
        """Beams without a temperature; top_p and the seed with one."""
        max_new_tokens, penalty = min(int(self.max_new_tokens), most_tokens), float(self.repetition_penalty)
        if not self.temperature:
            return Decoding(max_new_tokens, num_beams=int(self.num_beams), repetition_penalty=penalty)
        temperature, top_p, seed = float(self.temperature), float(self.top_p), int(self.seed)
        return Decoding(max_new_tokens, temperature, top_p, seed=seed, repetition_penalty=penalty)


def answer_all(contestants: Sequence[Contestant], asked: Asked) -> Iterator[list[str]]:
    """[text, note, map] for each contestant, one behind the other: the texts grow, and at last there is the map.

    When the generator is closed (the visitor pressed Stop, or left), the rows end.
    """
    shown = [["", "", ""] for _ in contestants]
    events: queue.Queue = queue.Queue()
    jobs: dict[int, Job] = {}
    for place, contestant in enumerate(contestants):
        try:
            source_ids, tokens, given = contestant.served.encode(asked.prompt())
            decoding = asked.decoding(contestant.served.most_tokens)
            contestant.served.check(len(source_ids), decoding)
            to_queue = lambda event, place=place: events.put((place, event))  # noqa: E731
            job = Job(source_ids, decoding, to_queue, wants_pieces=True, given=given)
            contestant.engine.submit([job])
        except UserError as error:
            shown[place][1] = _note(str(error))
            continue
        is_cut = tokens > len(source_ids)
        shown[place][1] = _note(f"The prompt has {tokens} tokens and was cut to {len(source_ids)}.") if is_cut else ""
        jobs[place] = job
    try:
        yield sum(shown, [])
        open_jobs = len(jobs)
        while open_jobs:
            place, event = events.get()
            if isinstance(event, Piece):
                shown[place][0] += event.text
            else:
                open_jobs -= 1
                show_end(shown[place], contestants[place], jobs[place], event)
            if events.empty():
                yield sum(shown, [])
    finally:
        for job in jobs.values():
            job.is_dropped = True


def show_end(shown: list[str], contestant: Contestant, job: Job, event: Ended | Failed) -> None:
    if isinstance(event, Failed):
        shown[1] = _note(f"The model failed: {event.error}")
        return
    (answer,) = event.answers
    tokens = f"{len(answer.ids)} tokens"
    shown[0] = answer.text
    shown[1] += _note(tokens if answer.finished else f"{tokens}, and stopped there, before its end")
    shown[2] = contestant.attention(job.source_ids, job.given, answer)


def build_page(contestants: Sequence[Contestant], examples: list[list[str]]) -> Any:
    """Gradio's Blocks."""
    import gradio

    title = " and ".join(contestant.name for contestant in contestants)
    with gradio.Blocks(analytics_enabled=False, fill_width=True, title=f"{title} · Diptych") as page:
        gradio.HTML(f'<h1 class="title">{escape(title)}</h1>')
        with gradio.Row(equal_height=False):
            with gradio.Column(scale=4, min_width=320):
                inputs, go, stop = _input_boxes(gradio, [contestant.served for contestant in contestants])
            with gradio.Column(scale=7, min_width=320), gradio.Row(equal_height=False):
                outputs = []
                for place, contestant in enumerate(contestants):
                    label = contestant.name if len(contestants) > 1 else "Answer"
                    box = {"label": label, "lines": 4, "interactive": False, "buttons": ["copy"]}
                    with gradio.Column(min_width=300):
                        outputs.append(gradio.Textbox(elem_id=f"answer-{place}", **box))
                        outputs += [gradio.HTML(elem_id=f"{name}-{place}") for name in ("note", "looks")]
        instruction, text, *_ = inputs
        if examples:
            gradio.Examples(examples, [instruction, text], label="Examples", cache_examples=False)

        def write(*values: Any) -> Iterator[list[str]]:
            # A box that is not shown has no value.
            yield from answer_all(contestants, Asked(*("" if value is None else value for value in values)))

        running = [
            trigger(write, inputs, outputs, show_progress="hidden", api_visibility="private", concurrency_limit=8)
            for trigger in (go.click, instruction.submit)
        ]
        stop.click(None, cancels=running, api_visibility="private")
    return page


def _input_boxes(gradio: Any, models: Sequence[ServedModel]) -> tuple[list[Any], Any, Any]:
    """The boxes in the order of `Asked`, and the buttons to write and to stop."""
    first = models[0].loaded
    has_system = any("system" in model.loaded.template.source_variables() for model in models)
    most_tokens = max(model.most_tokens for model in models)
    known = codes_of(first.tokenizer)
    codes = sorted(known.tokens)
    chosen = known.checked(models[0].prompter.languages).filled_from(own_languages(first.tokenizer))
    has_languages = bool(codes) or any(chosen)
    instruction = gradio.Textbox(label="Instruction", lines=2, max_lines=8, autofocus=True, elem_id="instruction")
    text = gradio.Textbox(label="Input", info="What it is about, if anything", lines=5, elem_id="input")
    system = gradio.Textbox(label="System prompt", visible=has_system, elem_id="system")
    with gradio.Row(visible=has_languages):
        languages = [
            gradio.Dropdown(codes, value=code, label=label, allow_custom_value=True, visible=has_languages)
            for label, code in zip(("From", "Into"), chosen, strict=True)
        ]
    with gradio.Row():
        stop = gradio.Button("Stop", elem_id="stop")
        go = gradio.Button("Write", variant="primary", elem_id="go")
    with gradio.Accordion("How it writes", open=False, elem_id="settings"):
        settings = [
            gradio.Slider(1, most_tokens, min(128, most_tokens), step=1, label="Longest answer, tokens"),
            gradio.Slider(1, 8, 1, step=1, label="Beams", info="Searched side by side; without temperature"),
            gradio.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token each time"),
            gradio.Slider(0.05, 1, 1, step=0.05, label="Top p", info="Draws from so much of the likeliest"),
            gradio.Slider(1, 2, 1, step=0.05, label="Repetition penalty"),
            gradio.Number(0, label="Seed", precision=0, minimum=0),
        ]
    return [instruction, text, system, *settings, *languages], go, stop


class Guard:
    """ASGI: checks who asks (web_address.py), refuses uploads and large requests, and adds a policy by which a browser
    asks no other host. What Gradio raises for a request that its page does not make is a line of the log."""

    def __init__(self, app: Any, only_loopback: bool):
        self.app, self.only_loopback = app, only_loopback

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refusal = ""
        if self.only_loopback and not web_address.is_asked_here(Request(scope).headers):
            refusal = "asked for as another host than this one, or by a page of one"
        elif "/upload" in scope["path"] or "/proxy=" in scope["path"]:
            refusal = "this page takes no files"
        if refusal:
            return await PlainTextResponse(refusal, 403)(scope, receive, send)

        size, has_more, has_begun, most = 0, True, False, web_address.LARGEST_BODY

        async def send_with_policy(message: dict[str, Any]) -> None:
            nonlocal has_begun
            if size > most and not has_begun:
                return  # a status 500, in whose place comes ours
            has_begun = True
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        async def receive_little() -> dict[str, Any]:
            nonlocal size, has_more
            message = await receive()
            size, has_more = size + len(message.get("body", b"")), message.get("more_body", False)
            if size > most:
                raise ValueError(f"it has more than {most:,} bytes")
            return message

        try:
            await self.app(scope, receive_little, send_with_policy)
        except Exception as error:  # Gradio raises errors of any type here; starlette has sent a status 500 before
            LOG.warning("a request to the page failed: %s", in_short(error))
        if size > most and not has_begun:
            while has_more and size < 2 * most:  # who is still sending reads no answer
                with contextlib.suppress(ValueError):
                    await receive_little()
            await PlainTextResponse(f"a request to this page has at most {most:,} bytes", 413)(scope, receive, send)


def run(settings: DemoSettings) -> int:
    with tempfile.TemporaryDirectory() as folder:  # Gradio makes one in any case, and would leave it there
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder}
        return _serve(settings)


def _serve(settings: DemoSettings) -> int:
    try:
        import fastapi
        import gradio

        from diptych.finetune.serving.guarded_server import run_until_signal
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. `diptych demo` needs it: {INSTALL}") from error
    password = os.environ.get(web_address.PASSWORD_VARIABLE) or None
    web_address.need_secret(settings.host, password, web_address.PASSWORD_VARIABLE)
    rows = read_prompts(settings.examples, "", "") if settings.examples else []
    examples = [[row.prompt.instruction, row.prompt.input] for row in rows if row.prompt][:MOST_EXAMPLES]
    listener = web_address.listen(settings.host, settings.port)
    contestants = []
    names = [*filter(None, [settings.model, settings.beside])]
    for name, served in zip(names, load_served(settings, names), strict=True):
        engine = Engine(served.loaded, batch_size=8, queue_size=64, batch_wait_ms=5)
        engine.fits = served.budget.fits
        is_taken = any(Path(name).name == other.name for other in contestants)
        contestants.append(Contestant(name if is_taken else Path(name).name, served, engine))
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    app = gradio.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(contestants, examples),
        path="/",
        auth=None if password is None else [(USER, password)],
        theme=gradio.themes.Default(primary_hue="orange", secondary_hue="cyan", neutral_hue="stone", **fonts),
        css=(TEMPLATES / "demo.css").read_text(encoding="utf-8"),
        footer_links=[],
        ssr_mode=False,
        enable_monitoring=False,
        show_error=False,
    )
    message = f"{', '.join(it.name for it in contestants)}: {web_address.address(listener)}"
    run_until_signal(Guard(app, only_loopback=password is None), listener, message, seconds=5)
    for contestant in contestants:
        contestant.engine.close()
    return 0
