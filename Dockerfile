# One image for all roles: `docker run agent-metadata worker`, `sink`, `serve`, ...
FROM python:3.12-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN python -m venv /opt/agent-metadata
COPY topics topics
COPY sql sql
COPY pipeline pipeline
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/agent-metadata/bin/pip install --quiet -c constraints.txt '.[serve,formats]' \
    && /opt/agent-metadata/bin/pip uninstall --quiet --yes pip

FROM python:3.12-slim
COPY --from=build /opt/agent-metadata /opt/agent-metadata
ENV PATH=/opt/agent-metadata/bin:$PATH PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --no-create-home --home-dir /tmp agent-metadata
USER 10001
WORKDIR /tmp
ENTRYPOINT ["agent-metadata"]
CMD ["--help"]
