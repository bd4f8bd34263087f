"""POST /reports: reports over HTTP, produced to the events topic; for agents without a Kafka client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import ClientDisconnect

from pipeline.core.report import PARSE_ERRORS
from pipeline.errors import ANSWER_SECONDS, DecodeError, PipelineError
from pipeline.monitoring.metrics import ServeMetrics
from pipeline.serve.access import require_token
from pipeline.serve.bodies import MAX_BODY_BYTES, Posted, posted, reports_in, request_body, require_readable, too_large

# Of all requests: bodies that are being read, or whose reports Kafka has not acknowledged. A waiting report takes about
# 1 kB besides, so together they take 200 MB at most. The queue of Kafka's client takes twice as many reports.
MAX_WAITING_BYTES: Final = 64 * MAX_BODY_BYTES
MAX_WAITING_REPORTS: Final = 100_000
_BODY_SECONDS: Final = 30.0
_ACKNOWLEDGE_SECONDS: Final = ANSWER_SECONDS
# Reports decoded, or sent, before others get their turn on the event loop: a few milliseconds.
_REPORTS_PER_TURN: Final = 200
_SHOWN_REFUSALS: Final = 100

# Queues a record, by value and key; what it returns is done when Kafka has acknowledged the record.
Send = Callable[[bytes, bytes], Awaitable[asyncio.Future[None]]]


class Intake(NamedTuple):
    """What POST /reports needs: the token that it asks for, and where reports go."""

    token: str
    send: Send


@dataclass(slots=True)
class Taken:
    """Kafka has acknowledged these; reports without entries are not among them, as there is nothing to send."""

    reports: int
    entries: int


@dataclass(slots=True)
class Refusal:
    """A report that can't be used; `index` counts the request's reports from 0."""

    index: int
    reason: str


@dataclass(slots=True)
class Refused:
    """Nothing of the request was taken; `refused` has the first 100 reports that can't be used."""

    detail: str
    refused: list[Refusal] = field(default_factory=list)


@dataclass(slots=True)
class Problem:
    """Why the request was not taken."""

    detail: str


class ReportsRoute:
    """Takes requests, or says of each why not.

    Guarantee: all reports of a request are produced, or, if one of them can't be used or there is no room for all, none
    is. 202 comes after Kafka has acknowledged all of them. After a 503 some may be in Kafka, or get there later;
    sending the request again is harmless, as the latest value wins.
    """

    def __init__(self, intake: Intake | None, metrics: ServeMetrics) -> None:
        """Without an `intake` every request gets 404."""
        self._intake = intake
        self._metrics = metrics
        self._waiting_bytes = 0
        self._waiting_reports = 0
        metrics.waiting_reports.set_function(lambda: self._waiting_reports)

    def add_to(self, app: FastAPI) -> None:
        """Add the route, which is described only if it is on."""
        is_on = self._intake is not None
        responses: dict[int | str, dict[str, Any]] = {status: {"model": Problem} for status in _PROBLEMS}
        responses |= {202: {"model": Taken}, 400: {"model": Refused}}
        options: dict[str, Any] = {"openapi_extra": {"requestBody": request_body()}} if is_on else {}
        app.post("/reports", status_code=202, responses=responses, include_in_schema=is_on, **options)(self._post)

    async def _post(
        self,
        request: Request,
        given: Annotated[
            HTTPAuthorizationCredentials | None,
            Depends(
                HTTPBearer(auto_error=False, scheme_name="reports", description="AGENT_METADATA_SERVE_REPORTS_TOKEN")
            ),
        ],
    ) -> Response:
        """Produce reports to the events topic: one JSON object, a JSON list of them, or one per line (NDJSON).

        All of them are taken, or none. An answer of 429 or 503 means: send the same request again, later.
        """
        response = await self._answer(request, given)
        self._metrics.report_requests.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: Request, given: HTTPAuthorizationCredentials | None) -> Response:
        intake = self._intake
        if intake is None:
            return _problem(404, "POST /reports is off: set AGENT_METADATA_SERVE_REPORTS_TOKEN to turn it on")
        hold = _Hold(self)
        try:
            require_token(given, intake.token)
            return await self._take(request, intake.send, hold)
        except HTTPException as error:
            return _problem(error.status_code, str(error.detail), error.headers)
        except ClientDisconnect:
            return _problem(400, "the client left before its body ended")
        except PipelineError as error:
            return _problem(503, str(error), {"Retry-After": "1"})
        finally:
            hold.release()

    async def _take(self, request: Request, send: Send, hold: _Hold) -> Response:
        is_ndjson = require_readable(request)
        body = await self._read(request, hold)
        try:
            raws = reports_in(body, is_ndjson=is_ndjson)
        except PARSE_ERRORS as error:
            return _refused("the body is not JSON: " + str(error), [])
        records: list[Posted] = []
        first_refused: list[Refusal] = []
        count = refused = 0
        for index, raw in enumerate(raws):
            await _let_others_run(index)
            count += 1
            try:
                records.append(posted(raw))
            except DecodeError as error:
                refused += 1
                if refused <= _SHOWN_REFUSALS:  # no more are kept either: a body may hold half a million
                    first_refused.append(Refusal(index, str(error)))
        if refused:
            self._metrics.posted_reports.labels("refused").inc(refused)
            return _refused(f"{refused} of {count} reports can't be used, and none was taken", first_refused)
        records = [record for record in records if record.entries]
        return await self._send(records, send, hold)

    async def _read(self, request: Request, hold: _Hold) -> bytes:
        """Read the body, up to the limits."""
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    if len(body) + len(chunk) > MAX_BODY_BYTES:
                        raise too_large()
                    if self._waiting_bytes + len(chunk) > MAX_WAITING_BYTES:
                        raise _too_busy()
                    hold.add(len(chunk))
                    body += chunk
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {_BODY_SECONDS:g} s") from None
        return bytes(body)

    async def _send(self, records: Sequence[Posted], send: Send, hold: _Hold) -> Response:
        if self._waiting_reports + len(records) > MAX_WAITING_REPORTS:
            raise _too_busy()
        hold.add(0, len(records))
        acknowledgements = []
        for index, record in enumerate(records):
            await _let_others_run(index)
            acknowledgements.append(await send(record.value, record.key))
        if not await _are_done(acknowledgements, _ACKNOWLEDGE_SECONDS):
            hold.until(asyncio.gather(*acknowledgements, return_exceptions=True))
            raise HTTPException(
                503,
                f"Kafka did not acknowledge the reports within {_ACKNOWLEDGE_SECONDS:g} s; they may still be taken",
                {"Retry-After": "1"},
            )
        if errors := [error for done in acknowledgements if (error := done.exception()) is not None]:
            raise errors[0]
        self._metrics.posted_reports.labels("accepted").inc(len(records))
        return _json(202, Taken(len(records), sum(record.entries for record in records)))


class _Hold:
    """What one request adds to what waits."""

    def __init__(self, route: ReportsRoute) -> None:
        self._route = route
        self._bytes = 0
        self._reports = 0

    def add(self, size_bytes: int, reports: int = 0) -> None:
        self._bytes += size_bytes
        self._reports += reports
        self._route._waiting_bytes += size_bytes
        self._route._waiting_reports += reports

    def until(self, done: asyncio.Future[Any]) -> None:
        """Leave the release to a future, which may outlive the request."""
        later = _Hold(self._route)
        later._bytes, later._reports = self._bytes, self._reports
        self._bytes = self._reports = 0
        done.add_done_callback(lambda _: later.release())

    def release(self) -> None:
        self.add(-self._bytes, -self._reports)


async def _are_done(futures: Sequence[asyncio.Future[None]], timeout_seconds: float) -> bool:
    """Wait for futures that are usually done in the order in which they are given, and many at once."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_seconds
    for future in futures:
        if not future.done():
            await asyncio.wait([future], timeout=max(0.0, deadline - loop.time()))
            if not future.done():
                return False
    return True


async def _let_others_run(index: int) -> None:
    if index and index % _REPORTS_PER_TURN == 0:
        await asyncio.sleep(0)


def _too_busy() -> HTTPException:
    return HTTPException(429, "too many reports wait for Kafka: send this request again, later", {"Retry-After": "1"})


_PROBLEMS: Final = (401, 408, 413, 415, 429, 503)


def _json(status: int, body: Taken | Refused | Problem, headers: Any = None) -> Response:
    content = msgspec.json.encode(body)
    return Response(content, HTTPStatus(status), {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def _problem(status: int, detail: str, headers: Any = None) -> Response:
    return _json(status, Problem(detail), headers)


def _refused(detail: str, refused: list[Refusal]) -> Response:
    return _json(400, Refused(detail, refused))
