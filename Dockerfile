# `diptych serve` from the wheel. In a clone:
#
#     make release                                                 dist/diptych-….whl
#     docker build --tag diptych .                                 with torch for CPUs
#     docker build --tag diptych --build-arg TORCH=cu130 .         with torch for GPUs; run it with --gpus all
#     docker run -p 8000:8000 -v ./runs/first/final:/model:ro -e DIPTYCH_TOKEN=… diptych
#
# Any other command is given at the end: docker run … diptych serve /model --engine ctranslate2 --host 0.0.0.0

# The one that the versions in constraints.txt are for.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# A wheel index of PyTorch: cpu, cu126, cu130 …
ARG TORCH=cpu
# Of setup.py.
ARG EXTRAS=serve,sentencepiece,ctranslate2

COPY constraints.txt dist/diptych-*.whl /build/
# A build of torch such as 2.13.0+cpu is preferred to the plain 2.13.0 of the default index.
RUN wheel="$(echo /build/diptych-*.whl)" \
    && pip install --no-cache-dir --constraint /build/constraints.txt \
        --extra-index-url "https://download.pytorch.org/whl/${TORCH}" "${wheel}[${EXTRAS}]" \
    && pip check \
    && rm -r /build \
    && useradd --create-home --home-dir /srv/diptych --uid 10001 diptych

USER 10001
WORKDIR /srv/diptych
ENV PYTHONUNBUFFERED=1
EXPOSE 8000

HEALTHCHECK --interval=30s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["diptych"]
# Beyond the loopback the server starts only with DIPTYCH_TOKEN.
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
