"""`diptych serve`: an encoder-decoder behind OpenAI's HTTP interface, for clients that know that one.

    diptych serve runs/full/final --port 8000
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "final", "prompt": "Name the capital.", "input": "France"}'

    POST /v1/completions         the prompt is an instruction, which is put into the checkpoint's template as by
                                 `diptych generate`; `input`, `system`, `source_language` and `target_language` may
                                 stand beside it
    POST /v1/chat/completions    messages; the next answer is written
    POST /v1/translations        a text and its languages
    GET  /v1/models, /health, /metrics (Prometheus)

Decoding is greedy unless a temperature is given, and then the text is that of `diptych generate`, however many clients
there are (request_batches.py). openai_requests.py says which fields are read. Beyond the loopback a token is needed,
from the environment: DIPTYCH_TOKEN. No text of a request is written anywhere.
"""

import os
from typing import TYPE_CHECKING

from diptych.data_prep.command_line.errors import UserError
from diptych.data_prep.rows.terms import read_terms
from diptych.finetune.serving.request_batches import Engine
from diptych.finetune.serving.serve_settings import ServeSettings
from diptych.finetune.serving.served_model import load_served, with_documents
from diptych.finetune.serving.web_address import TOKEN_VARIABLE, address, listen, need_secret

if TYPE_CHECKING:
    from diptych.finetune.serving.completion_service import Service

INSTALL = "pip install 'diptych[serve]'"


def run(settings: ServeSettings) -> int:
    try:
        # These need the extra `serve`.
        from diptych.finetune.serving.completion_service import build_app
        from diptych.finetune.serving.guarded_server import run_until_signal
    except ImportError as error:
        raise UserError(f"{error.name} is not installed. `diptych serve` needs it: {INSTALL}") from error
    token = os.environ.get(TOKEN_VARIABLE) or None
    need_secret(settings.host, token, TOKEN_VARIABLE)
    listener = listen(settings.host, settings.port)  # before the model, which takes longer
    service = load_service(settings, token)
    message = f"{', '.join(service.models)} on {service.device}: {address(listener)}/v1"
    run_until_signal(build_app(service), listener, message, settings.timeout, on_signal=service.close)
    for model in service.models.values():
        model.engine.close()
    return 0


def load_service(settings: ServeSettings, token: str | None) -> "Service":
    """The models of the settings with their queues, and what answers requests; `build_app` makes an ASGI application
    of it. `token` is what requests have to bring, if any. The host and port of the settings are not used."""
    from diptych.finetune.serving.completion_service import Hosted, Service

    names = settings.named_models
    if settings.terms:
        read_terms(settings.terms)  # their mistakes, before the model too
    limits = {"queue_size": settings.queue, "batch_wait_ms": settings.batch_wait_ms}
    models = []
    for name, served in zip(names, load_served(settings, [*names.values()], settings.max_source_tokens), strict=True):
        engine = Engine(served.loaded, batch_size=settings.batch_size, **limits)
        engine.fits, engine.calibration = served.budget.fits, served.calibration
        models.append(Hosted(name, with_documents(served, settings), engine))
    return Service(settings, models, token)
