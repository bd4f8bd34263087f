"""POST /reports over HTTP, with a Kafka that the test plays."""

import asyncio
import json
import tracemalloc
import uuid

import aiohttp
import pytest

import pipeline.serve.reports
from pipeline.core.report import agent_uuid, decode_report
from pipeline.errors import PipelineError
from pipeline.serve.bodies import MAX_BODY_BYTES
from pipeline.serve.reports import Intake
from tests.support.deployment import eventually
from tests.support.serving import get, post_reports, serving

A1 = uuid.UUID(int=1)
TOKEN = "write.only"
JSON, NDJSON = "application/json", "application/x-ndjson"


class Kafka:
    """Takes records; acknowledges each at once, or, if it is away, none."""

    def __init__(self):
        self.records = []
        self.is_away = False
        self.refusal = None
        self.unacknowledged = []

    async def send(self, value, key):
        self.records.append((key, value))
        acknowledged = asyncio.get_running_loop().create_future()
        if self.refusal:
            acknowledged.set_exception(self.refusal)
        elif self.is_away:
            self.unacknowledged.append(acknowledged)
        else:
            acknowledged.set_result(None)
        return acknowledged

    def come_back(self):
        self.is_away = False
        for acknowledged in self.unacknowledged:
            acknowledged.set_result(None)
        self.unacknowledged.clear()

    @property
    def reports(self):
        return [decode_report(value)[0] for _, value in self.records]


@pytest.fixture
def kafka():
    return Kafka()


@pytest.fixture
async def server(kafka):
    async with serving(intake=Intake(TOKEN, kafka.send)) as server:
        yield server


async def post(server, body, *, token=TOKEN, **options):
    return await post_reports(server.url, body, token, **options)


def a_report(agent="host-17", **values):
    return {"agent_id": agent, "entries": [{"key": key, "value": value} for key, value in values.items()]}


async def test_one_report_a_list_and_lines_are_taken(server, kafka):
    lines = "\r\n".join(["", json.dumps(a_report(cpu="3")), "  ", json.dumps(a_report(cpu="4", mem=5)), ""]).encode()
    answers = [
        await post(server, a_report(cpu="0")),
        await post(server, [a_report(cpu="1"), a_report(str(A1).upper(), cpu=2)]),
        await post(server, lines, kind=f"{NDJSON}; charset=utf-8"),
        await post(server, []),
        await post(server, b"", kind=NDJSON),
        await post(server, a_report()),
    ]
    counts = [(1, 1), (2, 2), (2, 3), (0, 0), (0, 0), (0, 0)]
    assert [answer[:2] for answer in answers] == [(202, {"reports": n, "entries": m}) for n, m in counts]
    assert [[entry.value for entry in report.entries] for report in kafka.reports] == [
        ["0"],
        ["1"],
        ["2"],
        ["3"],
        ["4", "5"],
    ]
    assert [key.decode() for key, _ in kafka.records] == ["host-17", "host-17", str(A1), "host-17", "host-17"]
    assert {answer[2]["Cache-Control"] for answer in answers} == {"no-store"}


async def test_answer_comes_once_kafka_has_acknowledged_everything(server, kafka):
    kafka.is_away = True
    posting = asyncio.create_task(post(server, [a_report(cpu="1"), a_report(cpu="2")]))
    await eventually("both are sent", lambda: len(kafka.unacknowledged) == 2)
    kafka.unacknowledged.pop().set_result(None)
    assert not (await asyncio.wait([posting], timeout=0.2))[0]
    kafka.come_back()
    assert (await posting)[0] == 202


BAD = [
    (b"nonsense", "not a report"),
    (a_report(""), "agent_id has 0 characters"),
    (a_report("x" * 256), "agent_id has 256 characters"),
    ({"agent_id": "host-17"}, "entries"),
    ([], "not a report"),
    ({**a_report(cpu="1"), "collected_at": "2026-01-02T03:04:05"}, "collected_at"),
    (a_report(**{"k" * 128: "v"}), "key of 128 characters"),
    (a_report(**{f"{number:0100}": "v" for number in range(62)}), "keys exceeded 6144 bytes"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD, ids=[reason for _, reason in BAD])
async def test_bad_report_is_named_by_its_index_and_nothing_is_taken(server, kafka, bad, reason):
    raw = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    good = json.dumps(a_report(cpu="1")).encode()
    status, body, _ = await post(server, b"\n".join([good, raw, good, raw]), kind=NDJSON)
    assert (status, body["detail"]) == (400, "2 of 4 reports can't be used, and none was taken")
    assert [refused["index"] for refused in body["refused"]] == [1, 3]
    assert all(reason in refused["reason"] for refused in body["refused"]), body
    assert kafka.records == []


async def test_only_the_first_hundred_bad_reports_are_named(server):
    status, body, _ = await post(server, [{}] * 250)
    assert (status, body["detail"]) == (400, "250 of 250 reports can't be used, and none was taken")
    assert [refused["index"] for refused in body["refused"]] == list(range(100))


async def test_bad_reports_that_are_not_named_take_no_memory(server, kafka):
    count = 30_000
    body = b"[" + b",".join([b"1"] * count) + b"]"
    tracemalloc.start()
    try:
        status, answer, _ = await post(server, body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (status, answer["detail"]) == (400, f"{count} of {count} reports can't be used, and none was taken")
    assert peak_bytes / count < 130  # undecoded they take 80 each, as long as the request lasts


@pytest.mark.parametrize("raw", [b"", b"{", b'[{"agent_id":"a","entries":[]}', b"[" * 100_000, b"\xff", b"[] []"])
async def test_body_that_is_no_json_is_refused(server, kafka, raw):
    status, body, _ = await post(server, raw)
    assert (status, body["refused"], kafka.records) == (400, [], [])
    assert body["detail"].startswith("the body is not JSON: ")


async def test_report_too_large_for_a_record_is_refused(server, kafka):
    entries = [{"key": f"{number % 1000}", "value": "v" * 1000} for number in range(980)]
    status, body, _ = await post(server, {"agent_id": "a", "entries": entries})
    assert status == 400
    assert "too large for a record" in body["refused"][0]["reason"]
    assert kafka.records == []


@pytest.mark.parametrize("token", [None, "wrong", "", TOKEN[:-1], "read.only"])
async def test_without_the_token_for_reports_nothing_is_read(kafka, token):
    async with serving(intake=Intake(TOKEN, kafka.send), token="read.only") as server:
        for body in (a_report(cpu="1"), b"x" * 2 * MAX_BODY_BYTES):
            status, _, headers = await post(server, body, token=token)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
    assert kafka.records == []


async def test_token_for_reports_reads_nothing(kafka):
    async with serving(intake=Intake(TOKEN, kafka.send), token="read.only") as server:
        assert (await get(server.url, "/metadata/watch", Authorization=f"Bearer {TOKEN}"))[0] == 401


async def test_route_is_off_without_its_token_and_says_so():
    async with serving() as server:
        status, body, _ = await post(server, a_report(cpu="1"))
        described = (await get(server.url, "/openapi.json"))[1]
    assert status == 404
    assert body == {"detail": "POST /reports is off: set AGENT_METADATA_SERVE_REPORTS_TOKEN to turn it on"}
    assert "/reports" not in described["paths"]


async def test_foreign_page_gets_no_leave_to_post(kafka):
    origin = "https://page.example"
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    async with (
        serving(intake=Intake(TOKEN, kafka.send), cors_origins=[origin]) as server,
        aiohttp.ClientSession() as session,
        session.options(server.url + "/reports", headers=asked) as answer,
    ):
        assert answer.status == 400  # to the browser's question, which it asks before a request with a token


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({"kind": "application/x-www-form-urlencoded"}, "must be application/json or application/x-ndjson"),
        ({"kind": "text/plain"}, "must be application/json or application/x-ndjson"),
        ({"Content_Encoding": "gzip"}, "send the body as it is"),
        ({"Content_Encoding": "identity, zstd"}, "send the body as it is"),
    ],
)
async def test_body_of_another_kind_or_compressed_is_refused(server, kafka, headers, said):
    status, body, _ = await post(server, b"\x1f\x8b" + b"x" * 100, **headers)
    assert (status, said in body["detail"], kafka.records) == (415, True, [])


async def chunks(count):
    for _ in range(count):
        yield b" " * 65_536


async def test_body_over_the_limit_is_refused_announced_or_not(server, kafka, monkeypatch):
    held = []
    hold = pipeline.serve.reports._Hold.add
    monkeypatch.setattr(
        pipeline.serve.reports._Hold, "add", lambda self, *more: (hold(self, *more), held.append(self._bytes))
    )
    assert (await post(server, b" " * (MAX_BODY_BYTES + 1)))[0] == 413
    assert held == [0]  # not read at all
    status, body, _ = await post(server, chunks(64))
    assert (status, body["detail"]) == (413, f"the body exceeds {MAX_BODY_BYTES} bytes: send fewer reports at once")
    assert max(held) <= MAX_BODY_BYTES
    largest = json.dumps(a_report(cpu="1")).encode().ljust(MAX_BODY_BYTES)
    assert (await post(server, largest))[0] == 202


async def test_body_that_does_not_arrive_is_given_up(server, monkeypatch):
    async def stalled():
        yield b"["
        await asyncio.sleep(60)

    monkeypatch.setattr(pipeline.serve.reports, "_BODY_SECONDS", 0.1)
    assert (await post(server, stalled()))[0] == 408


async def test_kafka_that_is_away_is_a_503_and_a_full_queue_a_429(server, kafka, monkeypatch):
    monkeypatch.setattr(pipeline.serve.reports, "_ACKNOWLEDGE_SECONDS", 0.05)
    monkeypatch.setattr(pipeline.serve.reports, "MAX_WAITING_REPORTS", 3)
    kafka.is_away = True
    two = [a_report(cpu="1"), a_report(cpu="2")]
    status, body, headers = await post(server, two)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "may still be taken" in body["detail"]
    status, body, headers = await post(server, two)  # it has no room for two, so it takes neither
    assert (status, headers["Retry-After"], len(kafka.records)) == (429, "1", 2)
    assert (await post(server, two[:1]))[0] == 503
    assert (await post(server, two[:1]))[0] == 429
    kafka.come_back()
    assert (await post(server, two))[0] == 202


async def test_bytes_that_wait_are_bounded_over_all_requests(server, kafka, monkeypatch):
    monkeypatch.setattr(pipeline.serve.reports, "_ACKNOWLEDGE_SECONDS", 0.05)
    monkeypatch.setattr(pipeline.serve.reports, "MAX_WAITING_BYTES", 100_000)
    large = json.dumps(a_report(cpu="1")).encode().ljust(60_000)
    kafka.is_away = True
    assert [(await post(server, large))[0] for _ in range(2)] == [503, 429]
    kafka.come_back()
    assert [(await post(server, large))[0] for _ in range(2)] == [202, 202]  # what was refused is not counted


async def test_reports_that_kafka_refuses_are_a_503_with_its_reason(server, kafka):
    kafka.refusal = PipelineError("Kafka refused a record for events: not authorized")
    status, body, _ = await post(server, [a_report(cpu="1"), a_report(cpu="2")])
    assert (status, body["detail"]) == (503, "Kafka refused a record for events: not authorized")


async def test_client_that_leaves_holds_nothing(server, kafka):
    async def cut():
        yield b"[" * 1000
        raise ConnectionError

    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await post(server, cut())
    await eventually("it is counted", lambda: requests(server, "400"))
    assert server.server._reports._waiting_bytes == 0


async def requests(server, status):
    _, text, _ = await get(server.url, "/metrics")
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return float(lines.get(f'agent_metadata_report_requests_total{{status="{status}"}}', 0))


async def test_requests_and_reports_are_counted(server, kafka):
    await post(server, [a_report(cpu="1"), a_report(cpu="2")])
    await post(server, [a_report(cpu="1"), {}])
    await post(server, a_report(cpu="1"), token="wrong")
    assert [await requests(server, status) for status in ("202", "400", "401")] == [1, 1, 1]
    _, text, _ = await get(server.url, "/metrics")
    assert 'agent_metadata_posted_reports_total{outcome="accepted"} 2.0' in text
    assert 'agent_metadata_posted_reports_total{outcome="refused"} 1.0' in text
    assert "agent_metadata_waiting_reports 0.0" in text


async def test_large_request_leaves_the_event_loop_to_others_between_its_reports(server, kafka):
    body = json.dumps([a_report(f"host-{number}", c=1) for number in range(12_000)]).encode()
    posting = asyncio.create_task(post(server, body))
    most, before = 0, 0
    while not posting.done():
        await asyncio.sleep(0)
        most, before = max(most, len(kafka.records) - before), len(kafka.records)
    assert posting.result()[:2] == (202, {"reports": 12_000, "entries": 12_000})
    assert most <= 200
    assert len({agent_uuid(key.decode()) for key, _ in kafka.records}) == 12_000


async def test_openapi_describes_bodies_answers_and_the_token(server):
    described = (await get(server.url, "/openapi.json"))[1]
    route = described["paths"]["/reports"]["post"]
    assert set(route["responses"]) == {"202", "400", "401", "408", "413", "415", "429", "503"}
    assert set(route["requestBody"]["content"]) == {JSON, NDJSON}
    assert route["requestBody"]["content"][NDJSON]["schema"]["required"] == ["agent_id", "entries"]
    assert described["components"]["securitySchemes"]["reports"] | {"description": ""} == {
        "type": "http",
        "scheme": "bearer",
        "description": "",
    }
    assert route["security"] == [{"reports": []}]
