"""PostgreSQL, HAProxy, RPC servers and replicas of `deltamem serve` as processes of a folder, for tests and tools.

PostgreSQL refuses to run as root: where we are root, it runs as an ordinary user. `make fleet-tools` installs both.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from pydeltamem.models import default_files

ROOT = Path(__file__).resolve().parent.parent
CONFIGURATION = ROOT / "deploy" / "haproxy" / "haproxy.cfg"


def postgresql_folder() -> Path | None:
    """Where PostgreSQL's programs are; Debian keeps them off the PATH. None: not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    program = str(found[-1]) if found else shutil.which("initdb")
    return None if program is None else Path(program).parent


def haproxy_program() -> str | None:
    """HAProxy. None: not installed."""
    return shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(condition: Callable[[], bool], seconds: float = 120, what: str = "it does not come true") -> None:
    """Waits until it is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)


P = TypeVar("P", bound="_Process")


class _Process:
    """A process that can be started again, and that a `with` starts and kills. Its output goes to `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.popen: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_ready(self) -> bool:
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        return {}

    @property
    def is_running(self) -> bool:
        return self.popen is not None and self.popen.poll() is None

    def begin(self) -> None:
        """Starts it, and does not wait."""
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(
                self.command(), stdout=out, stderr=out, start_new_session=True, **self.options()
            )

    def start(self, seconds: float = 120) -> None:
        """Starts it, and waits until it is ready. Starts it again if it ends, as a supervisor does."""
        self.begin()
        end = time.monotonic() + seconds
        while not self.is_ready():
            if time.monotonic() > end:
                raise TimeoutError(f"{type(self).__name__} does not come up:\n{self.log.read_text()[-2000:]}")
            if not self.is_running:
                self.begin()
            time.sleep(0.05)

    def kill(self) -> None:
        """Ends all of its processes at once (SIGKILL)."""
        if self.popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)
            self.popen.wait()

    def end(self, seconds: float = 60) -> int:
        """Tells it to end (SIGTERM). Returns its exit status."""
        assert self.popen is not None  # it was started
        if self.is_running:
            self.popen.terminate()
        return self.popen.wait(seconds)

    def __enter__(self: P) -> P:
        try:
            self.start()
        except BaseException:  # Ctrl-C does not reach its process group
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()


class PostgreSQL(_Process):
    """A PostgreSQL with an empty database, in a folder of its own, which goes with it."""

    def __init__(self, port: int | None = None) -> None:
        programs = postgresql_folder()
        if programs is None:
            raise FileNotFoundError("PostgreSQL is not installed: make fleet-tools")
        self.programs, self.port = programs, free_port() if port is None else port
        self.folder = Path(tempfile.mkdtemp(prefix="deltamem-pg-"))
        self.user: int | None = None
        if os.geteuid() == 0:
            names = [entry.pw_name for entry in pwd.getpwall()]
            self.user = pwd.getpwnam("postgres" if "postgres" in names else "nobody").pw_uid
            os.chown(self.folder, self.user, -1)
        super().__init__(self.folder / "log")
        make = [self.programs / "initdb", "-D", self.data, "-A", "trust", "-U", "deltamem", "-E", "UTF8"]
        done = subprocess.run(
            [*map(str, make), "--locale=C", "--no-sync"], capture_output=True, text=True, **self.options()
        )
        if done.returncode != 0:
            self.__exit__()
            raise RuntimeError(f"initdb: {done.stderr}")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://deltamem@127.0.0.1:{self.port}/postgres"

    def options(self) -> dict[str, Any]:
        return {"cwd": self.folder} if self.user is None else {"cwd": self.folder, "user": self.user}

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": self.folder,
            "shared_buffers": "64MB",
        }  # fmt: skip
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [str(self.programs / "postgres"), "-D", str(self.data), *given]

    def is_ready(self) -> bool:
        asked = [self.programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(list(map(str, asked))).returncode == 0

    def sql(self, text: str) -> str:
        """What psql prints for a command."""
        asked = [self.programs / "psql", "-h", "127.0.0.1", "-p", self.port, "-U", "deltamem", "-At", "-c", text]
        return subprocess.run([*map(str, asked), "postgres"], capture_output=True, text=True, check=True).stdout.strip()

    def __exit__(self, *error: object) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Replica(_Process):
    """A `deltamem serve` of the package's model."""

    def __init__(self, folder: Path, name: str, store: str, *options: object) -> None:
        super().__init__(folder / f"{name}.log")
        self.name, self.store, self.given, self.port = name, store, options, free_port()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        base, adapters = default_files()
        model = ["-m", base, "--deltamem", adapters["msw"], "-c", 1024, "-t", 1, "-tb", 1, "--no-page"]
        server = ["--port", self.port, "--store", self.store, *self.given]
        return [sys.executable, "-m", "pydeltamem.cli", "serve", *map(str, [*model, *server])]

    def health(self) -> tuple[int, str]:
        """The status of /health, and what it says; 0 if nobody answers."""
        try:
            answer = httpx.get(f"{self.address}/health", timeout=10)
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.json()["status"]

    def is_ready(self) -> bool:
        return self.health()[0] == 200


class RpcServer(_Process):
    """A `deltamem rpc-server` of this machine's CPU."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        super().__init__(folder / f"rpc-{self.port}.log")

    def command(self) -> list[str]:
        return [sys.executable, "-m", "pydeltamem.cli", "rpc-server", "--port", str(self.port), "-t", "1"]

    def is_ready(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True


class HAProxy(_Process):
    """HAProxy with the configuration of deploy/haproxy, before two replicas."""

    def __init__(self, folder: Path, replicas: tuple[Replica, Replica]) -> None:
        super().__init__(folder / "haproxy.log")
        self.replicas, self.port = replicas, free_port()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [str(haproxy_program()), "-f", str(CONFIGURATION), "-db"]

    def options(self) -> dict[str, Any]:
        one, two = (f"127.0.0.1:{replica.port}" for replica in self.replicas)
        named = {"DELTAMEM_BIND": f"127.0.0.1:{self.port}", "DELTAMEM_REPLICA_1": one, "DELTAMEM_REPLICA_2": two}
        return {"env": {**os.environ, **named}}

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@contextlib.contextmanager
def fleet(
    folder: Path, *options: object, of_one: tuple[object, ...] = (), of_two: tuple[object, ...] = ()
) -> Iterator[tuple[PostgreSQL, tuple[Replica, Replica], HAProxy]]:
    """One PostgreSQL, two replicas and one HAProxy, all ready. `options`: of both replicas."""
    with PostgreSQL() as database, contextlib.ExitStack() as stack:
        one = Replica(folder, "one", database.url, *options, *of_one)
        two = Replica(folder, "two", database.url, *options, *of_two)
        for replica in (one, two):
            stack.push(replica)
            replica.begin()
        for replica in (one, two):
            until(replica.is_ready, what=f"{replica.name} is not ready: {replica.log}")
        balancer = stack.enter_context(HAProxy(folder, (one, two)))
        yield database, (one, two), balancer
