# `diptych serve` from the wheel. In a clone:
#
#     make release                                                 dist/diptych-….whl
#     docker build --tag diptych .                         torch as the default index has it, for GPUs: run --gpus all
#     docker build --tag diptych --build-arg INDEX=… .     torch of another index, such as PyTorch's own one for CPUs,
#                                                          whose builds are several gigabytes smaller
#     docker run -p 8000:8000 -v ./runs/first/final:/model:ro -e DIPTYCH_TOKEN=… diptych
#
# Any other command is given at the end: docker run … diptych serve /model --engine ctranslate2 --host 0.0.0.0

# The one that the versions in constraints.txt are for.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# The address of a further index of wheels.
ARG INDEX=
# Of setup.py.
ARG EXTRAS=serve,sentencepiece,ctranslate2

COPY constraints.txt dist/diptych-*.whl /build/
# A build of torch such as 2.13.0+cpu is preferred to the plain 2.13.0 of the default index.
RUN wheel="$(echo /build/diptych-*.whl)" \
    && pip install --no-cache-dir --constraint /build/constraints.txt \
        ${INDEX:+--extra-index-url "${INDEX}"} "${wheel}[${EXTRAS}]" \
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
