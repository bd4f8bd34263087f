"""A schema registry from packages: Apicurio Registry, which has Confluent's API, on the packaged JDK."""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.request import urlopen

from pipeline.errors import ServiceUnavailable
from pipeline.local.kafka import JVM_OPTIONS, maven_context, packaged_jdk
from pipeline.local.process import LOOPBACK, ChildProcess, LocalServer, accepts_connections, free_port

REGISTRY_VERSION: Final = "3.3.3"
_API: Final = "/apis/ccompat/v7"
_HEAP: Final = "-Xmx512m"


def registry_folder(say: Callable[[str], None]) -> Path:
    """Return where Apicurio Registry is unpacked, in the local Maven repository; fetch it (160 MB) if it is not there.

    Raises:
        ConfigError: jgo is not installed.
        ServiceUnavailable: Maven Central can't be reached, or refuses.
    """
    component = maven_context().project("io.apicurio", "apicurio-registry-app").at_version(REGISTRY_VERSION)
    archive = component.artifact(classifier="all", packaging="tar.gz")
    folder = Path(str(archive.cached_path).removesuffix(".tar.gz"))
    if folder.exists():
        return folder
    if not archive.cached_path.exists():
        say(f"fetching Apicurio Registry {REGISTRY_VERSION}, once: 160 MB")
    try:
        packed = Path(archive.resolve())
        unpacked = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=packed.parent))
        try:
            with tarfile.open(packed) as tar:
                tar.extractall(unpacked, filter="data")
            unpacked.rename(folder)
        except (tarfile.TarError, EOFError):
            packed.unlink()  # half of a download: fetched again next time
            raise
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        if folder.exists():  # another process was faster
            return folder
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ServiceUnavailable(
            f"Apicurio Registry {REGISTRY_VERSION} could not be fetched from Maven Central ({reason}): let this "
            "machine reach it, or set AGENT_METADATA_SCHEMA_REGISTRY_URL"
        ) from error
    return folder


class PackagedRegistry(LocalServer):
    """One schema registry on a free port of 127.0.0.1, which it keeps, with its schemas, over a restart."""

    name = "the schema registry"
    start_seconds = 90.0

    def __init__(self, folder: Path) -> None:
        """Prepare a registry; `folder` is what registry_folder() returns."""
        self._java = packaged_jdk().JAVA
        super().__init__("registry")
        self._program = folder / "quarkus-run.jar"
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}{_API}"

    def _launch(self) -> ChildProcess:
        properties = {
            "java.io.tmpdir": str(self._home),
            "quarkus.http.host": LOOPBACK,
            "quarkus.http.port": str(self.port),
            "quarkus.management.host": LOOPBACK,
            "quarkus.management.port": "0",  # any: nobody asks there
            # On disk, and written before a schema's id is returned: H2 itself would lose the last half second.
            "apicurio.datasource.url": f"jdbc:h2:file:{self._home / 'schemas'};WRITE_DELAY=0",
        }
        arguments = [f"-D{name}={value}" for name, value in properties.items()]
        command = [self._java, _HEAP, *JVM_OPTIONS, *arguments, "-jar", str(self._program)]
        return ChildProcess(self.name, command, log_path=self.log_path)

    def _is_ready(self) -> bool:
        if not accepts_connections(self.port):
            return False
        try:
            with urlopen(f"{self.url}/subjects", timeout=5) as response:  # noqa: S310  # our own port
                return bool(response.status == 200)
        except OSError:
            return False
