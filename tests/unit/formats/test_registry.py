"""What a registry answers, or doesn't, becomes what the caller should do next."""

import base64
import contextlib
import socket
import ssl
import threading

import pytest
import trustme

from pipeline.errors import ConfigError, DecodeError, PipelineError, ServiceUnavailable
from pipeline.formats import registry as registry_module
from pipeline.formats.registry import SchemaRegistry, UnknownSchema
from tests.support.stub_registry import StubRegistry

GUID = "89791762-2336-4186-9674-299b90a802e2"


@pytest.fixture
def stub():
    with StubRegistry() as stub:
        yield stub


@pytest.fixture
def registry(stub):
    return SchemaRegistry({"url": stub.url})


def test_schema_is_fetched_by_number_and_by_guid(stub, registry):
    stub.answers |= {
        "/schemas/ids/1": (200, {"schema": '"string"'}),
        f"/schemas/guids/{GUID}": (200, {"schema": "{}", "schemaType": "JSON"}),
    }
    assert registry.fetch(1) == ("AVRO", '"string"', {})
    assert registry.fetch(GUID) == ("JSON", "{}", {})


def test_references_are_fetched_once_each_after_what_it_refers_to(stub, registry):
    def schema(text, *names):
        references = [{"name": name, "subject": f"s-{name}", "version": 3} for name in names]
        return 200, {"schema": text, "schemaType": "PROTOBUF", "references": references, "version": 3, "id": 9}

    stub.answers |= {
        "/schemas/ids/1": schema("main", "a", "b"),
        "/subjects/s-a/versions/3": schema("A", "b", "c"),
        "/subjects/s-b/versions/3": schema("B", "c", "a"),  # and back to a: a circle
        "/subjects/s-c/versions/3": schema("C"),
    }
    fetched = registry.fetch(1)
    assert list(fetched.references.items()) == [("c", "C"), ("b", "B"), ("a", "A")]
    assert max(stub.requests.values()) == 1


@pytest.mark.parametrize("schema_id", [7, 2**31, 2**32 - 1, GUID])
def test_id_that_the_registry_does_not_have_is_unknown(registry, schema_id):
    with pytest.raises(UnknownSchema):
        registry.fetch(schema_id)


def test_path_that_the_registry_does_not_have_means_an_unknown_id(stub, registry):
    stub.default = (404, "")  # as Apicurio answers to GUIDs
    with pytest.raises(UnknownSchema):
        registry.fetch(GUID)


def test_missing_reference_makes_the_schema_unknown(stub, registry):
    references = [{"name": "a", "subject": "gone", "version": 1}]
    stub.answers["/schemas/ids/1"] = (200, {"schema": "{}", "references": references})
    with pytest.raises(UnknownSchema):
        registry.fetch(1)


def test_schema_of_another_kind_is_refused(stub, registry):
    stub.answers["/schemas/ids/1"] = (200, {"schema": "{}", "schemaType": "XML"})
    with pytest.raises(DecodeError, match="of the kind 'XML'"):
        registry.fetch(1)


ANSWERS = {
    "401": (401, {"error_code": 40101, "message": "Unauthorized"}, ConfigError, "check the user and password"),
    "403": (403, "", ConfigError, "check the user and password"),
    "429": (429, "slow down", ServiceUnavailable, "unavailable"),
    "500": (500, {"error_code": 50001, "message": "Error in the backend"}, ServiceUnavailable, "in the backend"),
    "503": (503, "<html>", ServiceUnavailable, "unavailable"),
    "redirect": (302, "", ConfigError, "redirects"),
    "a page": (200, "<html>Welcome</html>", ServiceUnavailable, "does not answer as a schema registry does"),
    "a list": (200, [1], ServiceUnavailable, "does not answer as a schema registry does"),
    "nothing": (200, "", ServiceUnavailable, "does not answer as a schema registry does"),
    "no certificate": (400, "<html>No required SSL certificate was sent</html>", ConfigError, "client certificate"),
    "405": (405, "", ConfigError, "any proxy in between"),
    "422": (422, {"error_code": 42201, "message": "bad id"}, ConfigError, "bad id"),
    "400 of no such schema": (400, {"error_code": 40403, "message": "not here"}, UnknownSchema, "not here"),
}


@pytest.mark.parametrize(("status", "body", "kind", "message"), ANSWERS.values(), ids=ANSWERS)
def test_answer_says_what_to_do(stub, registry, status, body, kind, message):
    stub.default = status, body
    with pytest.raises(kind, match=message):
        registry.fetch(1)


def test_server_that_is_no_registry_is_a_wrong_setting_and_no_dead_letter(stub):
    stub.answers, stub.default = {}, (404, "not here")
    with pytest.raises(ConfigError, match=r"no schema registry is at .*/ui"):
        SchemaRegistry({"url": f"{stub.url}/ui"}).fetch(1)


def test_registry_that_refuses_connections_is_an_outage():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            SchemaRegistry({"url": f"http://127.0.0.1:{unused.getsockname()[1]}"}).fetch(1)


def test_registry_that_is_silent_is_an_outage(monkeypatch):
    monkeypatch.setattr(registry_module, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ServiceUnavailable, match="ReadTimeout"):
        SchemaRegistry({"url": f"http://127.0.0.1:{silent.getsockname()[1]}"}).fetch(1)


def test_second_url_is_asked_where_the_first_is_away(stub):
    stub.answers["/schemas/ids/1"] = (200, {"schema": "{}"})
    assert SchemaRegistry({"url": f"http://127.0.0.1:1,{stub.url}"}).fetch(1).text == "{}"


@pytest.mark.parametrize(
    ("login", "sent"),
    [
        ({"basic.auth.user.info": "me:se:cret"}, "Basic " + base64.b64encode(b"me:se:cret").decode()),
        ({"bearer.auth.token": "tok"}, "Bearer tok"),
        ({}, None),
    ],
)
def test_login_is_sent(stub, login, sent):
    SchemaRegistry({"url": stub.url, **login})._client.get_schema_types()
    assert stub.authorization == sent


def test_secrets_are_never_in_errors(stub):
    url = stub.url.replace("http://", "http://me:hunter2@")
    for status in (401, 404, 500, 302, 200):
        stub.answers, stub.default = {}, (status, "<html>")
        with pytest.raises(PipelineError) as raised:
            SchemaRegistry({"url": url}).fetch(1)
        assert "hunter2" not in str(raised.value)


def test_certificate_of_an_unknown_ca_is_a_wrong_setting(tmp_path):
    authority, other = trustme.CA(), tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with contextlib.suppress(OSError), connection:  # the client hangs up
                context.wrap_socket(connection, server_side=True)

        server = threading.Thread(target=answer)
        server.start()
        config = {"url": f"https://127.0.0.1:{listening.getsockname()[1]}", "ssl.ca.location": str(other)}
        with pytest.raises(ConfigError, match="AGENT_METADATA_SCHEMA_REGISTRY_SSL_CAFILE"):
            SchemaRegistry(config).fetch(1)
        server.join()


@pytest.mark.parametrize(
    "config", [{"url": "ftp://x"}, {"url": "http://x", "no.such": 1}, {"url": "http://x", "ssl.ca.location": "/no"}]
)
def test_configuration_that_can_not_be_used_is_refused(config):
    with pytest.raises(ConfigError, match="can't be used"):
        SchemaRegistry(config)


def test_schema_is_registered_and_its_id_returned(stub, registry):
    stub.answers["/subjects/t-value/versions"] = (200, {"id": 12})
    assert registry.register("t-value", "AVRO", '"string"') == 12


def test_schema_is_only_looked_up_where_it_may_not_be_registered(stub):
    registry = SchemaRegistry({"url": stub.url, "auto.register.schemas": False})
    with pytest.raises(ConfigError, match="not registered under the subject t-value"):
        registry.register("t-value", "AVRO", '"string"')
    stub.answers["/subjects/t-value"] = (200, {"subject": "t-value", "id": 12, "version": 1, "schema": '"string"'})
    assert registry.register("t-value", "AVRO", '"string"') == 12
    assert "/subjects/t-value/versions" not in stub.requests


@pytest.mark.parametrize("status", [409, 422])
def test_schema_that_the_registry_refuses_is_a_wrong_setting(stub, registry, status):
    stub.default = (status, {"error_code": 409, "message": "incompatible with an earlier schema"})
    with pytest.raises(ConfigError, match="incompatible with an earlier"):
        registry.register("t-value", "AVRO", '"string"')
