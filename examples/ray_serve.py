"""`diptych serve` in several processes, on one machine or on many, behind one address: a deployment for Ray Serve.

    pip install 'diptych[serve,ray]'
    serve run --app-dir examples ray_serve:app model=runs/first/final replicas=2
    curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "final", "prompt": "Name the capital.", "input": "France"}'

`replicas` (2 unless given) is how many processes load the model, `cpus` and `gpus` what each of them takes (1 and 0).
Everything else is a setting of `diptych serve`: `engine=ctranslate2`, `name=ko`, `batch_size=32`. Ray starts a replica
that dies again, and spreads the requests; each replica makes its own batches, and answers `/metrics` for itself. Ray's
proxy takes the connections, so the limits of `diptych serve` on slow clients are not in force. For clients on other
machines set DIPTYCH_TOKEN, as for `diptych serve`.
"""

import os

from ray import serve

from diptych.data_prep.command_line.arguments import parse
from diptych.finetune.serving.serve import load_service
from diptych.finetune.serving.serve_settings import ServeSettings

WAITING = 64
"""Requests that a replica has at a time, of which it makes batches. Ray's own default is 5."""


def app(arguments: dict[str, str]) -> serve.Application:
    own = {"replicas": 2, "cpus": 1, "gpus": 0}
    replicas, cpus, gpus = (float(arguments.pop(name, default)) for name, default in own.items())
    words = [word for name, value in arguments.items() if name != "model" for word in (f"--{name}", value)]
    settings = parse(ServeSettings, "serve run ray_serve:app", [arguments.get("model", ""), *words])
    token = os.environ.get("DIPTYCH_TOKEN") or None

    def build():
        """In each replica."""
        from diptych.finetune.serving.completion_service import build_app

        return build_app(load_service(settings, token))

    deployment = serve.deployment(serve.ingress(build)()).options(
        name=settings.model_name,
        num_replicas=int(replicas),
        max_ongoing_requests=WAITING,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )
    return deployment.bind()
