"""The API and its event streams over HTTP, with a table filled by hand."""

import asyncio
import itertools
import socket
import time
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

import pipeline.serve.http
import pipeline.serve.streams
from pipeline.core.report import agent_uuid
from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.serve.http import listen
from tests.support.serving import WAIT_SECONDS, get, serving, watching

A1, A2, A3 = (uuid.UUID(int=number) for number in (1, 2, 3))


@pytest.fixture(autouse=True)
def _events_come_fast(monkeypatch):
    monkeypatch.setattr(pipeline.serve.streams, "_EVENT_SECONDS", 0.02)


async def test_agent_is_read_from_the_store_with_its_age():
    async with serving() as server:
        at = datetime.now(UTC) - timedelta(seconds=90)
        server.stored = [(A1, "cpu", "12%", "", at), (A1, "disk", "", "timed out", at)]
        status, body, _ = await get(server.url, f"/agents/{A1}/metadata")
    assert status == 200
    assert body["agent_id"] == str(A1)
    cpu, disk = body["metadata"]
    assert (cpu["key"], cpu["value"], cpu["error"]) == ("cpu", "12%", "")
    assert (disk["key"], disk["value"], disk["error"]) == ("disk", "", "timed out")
    assert datetime.fromisoformat(cpu["collected_at"]) == at
    assert 90 <= cpu["age_seconds"] < 120


async def test_many_agents_are_one_query_and_one_without_metadata_is_empty():
    async with serving() as server:
        server.stored = [(A1, "k", "one", "", datetime.now(UTC)), (A2, "k", "two", "", datetime.now(UTC))]
        status, body, _ = await get(server.url, f"/metadata?agent={A2}&agent={A3}&agent={A1}&agent={A1}")
    assert status == 200
    values = [(agent["agent_id"], [row["value"] for row in agent["metadata"]]) for agent in body["agents"]]
    assert values == [(str(A2), ["two"]), (str(A3), []), (str(A1), ["one"])]
    assert server.reads == [[A2, A3, A1]]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/agents/{A1}/metadata", 404),
        ("/agents/host-17/metadata", 404),
        (f"/agents/{'x' * 256}/metadata", 422),
        (f"/agents/{'x' * 256}/metadata/watch", 422),
        ("/metadata", 422),
        ("/metadata?agent=", 422),
        ("/metadata?" + "&".join(f"agent={uuid.UUID(int=number)}" for number in range(501)), 422),
        ("/elsewhere", 404),
        ("/../serve.py", 404),
        ("/%2e%2e/serve.py", 404),
    ],
)
async def test_request_for_what_is_not_there_is_told_so(path, status):
    async with serving() as server:
        assert (await get(server.url, path))[0] == status


@pytest.mark.parametrize("name", ["host-17", "rack 4/host 17", "Zürich#1?&%2F", "<b>\u202e\x1b[31m"])
async def test_agent_is_found_by_its_name_and_by_its_uuid_in_any_spelling(name):
    agent_id = uuid.UUID(agent_uuid(name))
    async with serving() as server:
        server.stored = [(agent_id, "cpu", "12%", "", datetime.now(UTC), name), (A1, "k", "v", "", datetime.now(UTC))]
        server.change(name, "cpu", "12%")
        bodies = []
        for text in (name, str(agent_id), agent_id.hex.upper()):
            bodies.append((await get(server.url, f"/agents/{quote(text, safe='')}/metadata"))[1])
            async with watching(server.url, f"/agents/{quote(text, safe='')}/metadata/watch") as stream:
                bodies.append((await stream.next()).body)
            bodies += (await get(server.url, f"/metadata?agent={quote(text)}"))[1]["agents"]
        async with watching(server.url, f"/metadata/watch?agent={quote(name)}&agent={A1}") as stream:
            bodies += (await stream.next()).body["agents"]
        unnamed = (await get(server.url, f"/agents/{A1}/metadata"))[1]
    assert [(body["agent_id"], body["name"]) for body in bodies] == [(str(agent_id), name)] * len(bodies)
    assert (unnamed["agent_id"], unnamed["name"]) == (str(A1), None)


async def test_agent_without_rows_is_named_as_it_was_asked_for():
    async with serving() as server:
        status, body, _ = await get(server.url, "/agents/rack%204%2Fhost%2017/metadata")
    assert (status, body) == (404, {"detail": "agent rack 4/host 17 has no metadata"})


async def test_database_that_is_away_is_a_503_in_one_line():
    async def read(_agent_ids):
        raise ServiceUnavailable("Postgres is unavailable")

    async with serving() as server:
        server.server._read = read
        status, body, _ = await get(server.url, f"/agents/{A1}/metadata")
    assert (status, body) == (503, {"detail": "Postgres is unavailable"})


async def test_pairs_left_out_are_said_in_streams_and_metrics_and_shown_by_a_read():
    async with serving(max_pairs=1) as server:
        server.change(A1, "k", "held")
        for path in ("/metadata/watch", f"/agents/{A2}/metadata/watch"):
            async with watching(server.url, path) as stream:
                assert (await stream.next()).body["left_out_pairs"] == 0
        server.change(A2, "k", "left out")
        server.change(A3, "k", "left out")
        async with watching(server.url, "/metadata/watch") as stream:
            event = await stream.next()
            assert (event.values(), event.body["left_out_pairs"]) == ({f"{A1}:k": "held"}, 2)
        async with watching(server.url, f"/agents/{A2}/metadata/watch") as stream:
            event = await stream.next()
            assert (event.values(), event.body["left_out_pairs"]) == ({}, 2)
        _, metrics, _ = await get(server.url, "/metrics")
        assert "agent_metadata_left_out_pairs 2.0" in metrics.splitlines()
        assert "agent_metadata_served_pairs 1.0" in metrics.splitlines()
        server.stored = [(A2, "k", "left out", "", datetime.now(UTC))]
        _, body, _ = await get(server.url, f"/agents/{A2}/metadata")
        assert [row["value"] for row in body["metadata"]] == ["left out"]
        assert (await get(server.url, f"/metadata?agent={A2}"))[1]["left_out_pairs"] == 0


async def test_stream_begins_with_a_snapshot_and_goes_on_with_what_changed():
    async with serving() as server:
        server.change(A1, "cpu", "1%")
        server.change(A1, "disk", "", "timed out")
        server.change(A2, "cpu", "other agent")
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            first = await stream.next()
            assert (first.name, first.values()) == ("snapshot", {"cpu": "1%", "disk": ""})
            assert [row["error"] for row in first.body["metadata"]] == ["", "timed out"]
            server.change(A2, "cpu", "still another agent")
            server.change(A1, "cpu", "2%")
            second = await stream.next()
            assert (second.name, second.values()) == ("changes", {"cpu": "2%"})


async def test_agent_that_has_no_metadata_yet_can_be_watched():
    async with serving() as server:
        server.change(A2, "cpu", "1%")
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            assert (await stream.next()).values() == {}
            server.change(A1, "cpu", "first")
            assert (await stream.next()).values() == {"cpu": "first"}


async def test_changes_come_no_faster_than_their_pace_and_end_with_the_last_value(monkeypatch):
    monkeypatch.setattr(pipeline.serve.streams, "_EVENT_SECONDS", 0.5)
    async with serving() as server:
        server.change(A1, "n", "0")
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            seen = [(time.monotonic(), await stream.next())]
            for number in range(1, 26):
                server.change(A1, "n", str(number))
                await asyncio.sleep(0.05)  # the load itself: changes that come faster than they may be sent
            while seen[-1][1].values()["n"] != "25":
                event = await stream.next()
                seen.append((time.monotonic(), event))
    assert len(seen) <= 2 + (seen[-1][0] - seen[0][0]) / 0.5


async def test_snapshot_is_sent_again_so_that_ages_stay_true(monkeypatch):
    monkeypatch.setattr(pipeline.serve.streams, "_RESEND_SECONDS", 0.3)
    async with serving() as server:
        server.change(A1, "cpu", "1%", ago=100)
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            ages = []
            for _ in range(3):
                event = await stream.next()
                assert (event.name, event.values()) == ("snapshot", {"cpu": "1%"})
                ages.append(event.body["metadata"][0]["age_seconds"])
    assert ages[0] >= 100
    assert all(later - earlier >= 0.29 for earlier, later in itertools.pairwise(ages))


async def test_stream_that_was_cut_resumes_with_what_it_missed():
    async with serving() as server:
        server.change(A1, "cpu", "1%")
        server.change(A1, "disk", "10 GB")
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            seen = await stream.next()
        server.change(A1, "cpu", "2%")
        async with watching(server.url, f"/agents/{A1}/metadata/watch", Last_Event_ID=seen.id) as stream:
            event = await stream.next()
            assert (event.name, event.values()) == ("changes", {"cpu": "2%"})


@pytest.mark.parametrize("event_id", ["", "0-1", "nonsense", "ffffffff-1", "-", "\u00b2-\u00b2", "0-" + "9" * 100])
async def test_event_id_of_another_process_or_of_nobody_means_a_snapshot(event_id):
    async with serving() as server:
        server.change(A1, "cpu", "1%")
        async with watching(server.url, f"/agents/{A1}/metadata/watch", Last_Event_ID=event_id) as stream:
            assert (await stream.next()).name == "snapshot"


async def test_event_id_from_the_future_misses_nothing_later():
    async with serving() as server:
        server.change(A1, "cpu", "1%")
        path = f"/agents/{A1}/metadata/watch"
        async with watching(server.url, path) as stream:
            run_id = (await stream.next()).id.partition("-")[0]
        async with watching(server.url, path, Last_Event_ID=f"{run_id}-999999") as stream:
            await stream.next()
            server.change(A1, "cpu", "2%")
            assert (await stream.next()).values() == {"cpu": "2%"}


async def test_everyone_is_watched_in_events_of_bounded_size(monkeypatch):
    monkeypatch.setattr(pipeline.serve.streams, "_EVENT_ROWS", 10)
    agents = [uuid.UUID(int=number) for number in range(25)]
    async with serving() as server:
        for agent in agents:
            server.change(agent, "k", str(agent.int))
        async with watching(server.url, "/metadata/watch") as stream:
            events = [await stream.next() for _ in range(3)]
            assert [event.name for event in events] == ["snapshot", "changes", "changes"]
            assert [len(event.body["agents"]) for event in events] == [10, 10, 5]
            assert events[0].values() | events[1].values() | events[2].values() == {
                f"{a}:k": str(a.int) for a in agents
            }
            server.change(A3, "k", "new")
            assert (await stream.next()).values() == {f"{A3}:k": "new"}
        async with watching(server.url, "/metadata/watch", Last_Event_ID=events[1].id) as stream:
            event = await stream.next()
            assert (event.name, len(event.body["agents"])) == ("changes", 6)


async def test_stream_of_everyone_says_the_time_when_nothing_changes(monkeypatch):
    monkeypatch.setattr(pipeline.serve.streams, "_RESEND_SECONDS", 0.3)
    async with serving() as server:
        server.change(A1, "k", "v")
        async with watching(server.url, "/metadata/watch") as stream:
            await stream.next()
            event = await stream.next()
    assert (event.name, event.body["agents"]) == ("changes", [])
    assert abs(datetime.fromisoformat(event.body["now"]).timestamp() - time.time()) < WAIT_SECONDS


async def test_some_agents_are_watched_in_one_stream():
    async with serving() as server:
        for agent in (A1, A2, A3):
            server.change(agent, "k", "old")
        async with watching(server.url, f"/metadata/watch?agent={A1}&agent={A3}") as stream:
            assert (await stream.next()).values() == {f"{A1}:k": "old", f"{A3}:k": "old"}
            server.change(A2, "k", "unwatched")
            server.change(A3, "k", "new")
            assert (await stream.next()).values() == {f"{A3}:k": "new"}


async def test_stream_waits_for_the_first_snapshot_of_the_table():
    async with serving() as server:
        server.why_not_ready = "Postgres is unavailable"
        status, body, response = await get(server.url, f"/agents/{A1}/metadata/watch")
        assert (status, body, response.headers["Retry-After"]) == (503, {"detail": "Postgres is unavailable"}, "1")
        assert (await get(server.url, "/ready"))[:2] == (503, "Postgres is unavailable\n")
        assert (await get(server.url, "/live"))[:2] == (200, "ok\n")
        server.why_not_ready = None
        assert (await get(server.url, "/ready"))[:2] == (200, "ok\n")


async def test_server_that_stops_ends_its_streams():
    async with serving() as server:
        server.change(A1, "k", "v")
        async with watching(server.url, "/metadata/watch") as stream:
            await stream.next()
            stopping = asyncio.create_task(server.stop())
            assert await stream.ended()
            await asyncio.wait_for(stopping, WAIT_SECONDS)


async def test_client_that_stops_reading_is_cut_off_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(pipeline.serve.http, "_STALLED_SECONDS", 2)
    monkeypatch.setattr(pipeline.serve.http, "_SEND_BUFFER_BYTES", 8192)
    async with serving() as server:
        server.change(A1, "k", "0")
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stuck, ("127.0.0.1", server.port))
        await loop.sock_sendall(stuck, b"GET /metadata/watch HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream, asyncio.timeout(60):
                number = 0
                while "agent_metadata_dropped_watchers_total 1.0" not in (await get(server.url, "/metrics"))[1]:
                    number += 1
                    server.change(A1, "k", str(number))
                    for filler in range(20):
                        server.change(A2, str(filler), f"{number} " * 1000)
                    while (await stream.next()).values().get("k") != str(number):
                        pass
                    await asyncio.sleep(0.1)  # the kernel gives up after a set time
                assert "agent_metadata_watchers 1.0" in (await get(server.url, "/metrics"))[1]
        finally:
            stuck.close()


async def test_token_guards_what_agents_say_and_nothing_else():
    async with serving(token="s3cret") as server:
        server.stored = [(A1, "k", "v", "", datetime.now(UTC))]
        server.change(A1, "k", "v")
        guarded = (f"/agents/{A1}/metadata", f"/metadata?agent={A1}", f"/agents/{A1}/metadata/watch", "/metadata/watch")
        for path in guarded:
            for wrong in ({}, {"Authorization": "Bearer nonsense"}, {"Authorization": "Basic s3cret"}):
                status, body, response = await get(server.url, path, **wrong)
                assert (status, body) == (401, {"detail": "a bearer token is required"}), path
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in guarded[:2]:
            assert (await get(server.url, path, Authorization="Bearer s3cret"))[0] == 200
        async with watching(server.url, guarded[2], Authorization="Bearer s3cret") as stream:
            await stream.next()
        for path in ("/", "/page.js", "/live", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert (await get(server.url, path))[0] == 200, path


async def test_foreign_name_that_leads_to_this_machine_is_refused_without_a_token():
    now = datetime.now(UTC)
    paths = (f"/agents/{A1}/metadata", f"/metadata?agent={A1}", f"/agents/{A1}/metadata/watch", "/metadata/watch")
    async with serving(is_local=True) as server:
        server.stored = [(A1, "k", "v", "", now)]
        for path in paths:
            status, body, _ = await get(server.url, path, Host="evil.example:8080")
            assert (status, "AGENT_METADATA_SERVE_TOKEN" in body["detail"]) == (403, True), path
        for name in ("localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080"):
            assert (await get(server.url, paths[0], Host=name))[0] == 200, name
    for options in ({"is_local": True, "token": "s3cret"}, {}):
        async with serving(**options) as server:
            server.stored = [(A1, "k", "v", "", now)]
            given = {"Host": "proxied.example", "Authorization": "Bearer s3cret"}
            assert (await get(server.url, paths[0], **given))[0] == 200


async def test_other_origins_may_read_only_if_they_are_named():
    async with serving() as server:
        _, _, response = await get(server.url, "/live", Origin="https://other.example")
        assert "Access-Control-Allow-Origin" not in response.headers
    async with serving(cors_origins=["https://other.example"]) as server:
        _, _, response = await get(server.url, "/live", Origin="https://other.example")
        assert response.headers["Access-Control-Allow-Origin"] == "https://other.example"
        _, _, response = await get(server.url, "/live", Origin="https://third.example")
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_page_and_docs_load_nothing_from_elsewhere():
    async with serving() as server:
        status, page, response = await get(server.url, "/")
        assert status == 200
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        status, docs, _ = await get(server.url, "/docs")
        assert status == 200
        for text in (page, docs):
            assert "https://" not in text
            assert "http://" not in text.replace("http://www.w3.org/", "")


async def test_openapi_names_the_routes_and_their_answers():
    async with serving() as server:
        _, api, _ = await get(server.url, "/openapi.json")
    answer = api["paths"]["/agents/{agent_id}/metadata"]["get"]["responses"]["200"]["content"]["application/json"]
    assert answer["schema"] == {"$ref": "#/components/schemas/AgentMetadata"}
    assert "text/event-stream" in api["paths"]["/metadata/watch"]["get"]["responses"]["200"]["content"]


async def test_metrics_tell_watchers_pairs_and_how_late_events_are():
    async with serving() as server:
        server.change(A1, "fresh", "v")
        server.change(A1, "old", "v", ago=10_000)
        async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
            await stream.next()
            server.change(A1, "fresh", "w")
            await stream.next()
            _, text, _ = await get(server.url, "/metrics")
    for line in (
        "agent_metadata_watchers 1.0",
        "agent_metadata_served_pairs 2.0",
        "agent_metadata_stale_pairs 1.0",
        'agent_metadata_freshness_seconds_count{hop="sent"} 1.0',
    ):
        assert line in text.splitlines()


async def test_port_that_is_taken_is_refused_with_its_settings():
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="AGENT_METADATA_SERVE_PORT"):
        listen("127.0.0.1", taken.getsockname()[1])
