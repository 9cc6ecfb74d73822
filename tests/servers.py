"""
Real servers for tests: Redis, and S3 as Ceph's RGW speaks it. Both on loopback, both in a directory
of their own that goes with them. A test asks for `redis_server` or `s3_server`; each is started
once, when the first asks. Whoever breaks a server starts one of its own.

Why RGW: it is the only S3 server in Debian that checks what Amazon checks (signatures, checksums of
bodies, sizes of parts), and the whole of it, monitor, object store in memory and gateway, is up in
a second. That takes three tricks: the map of the cluster is made beforehand, so nothing has to be
asked of a manager or by Ceph's Python tools; the monitor decides within 20 ms instead of a second;
and a pool is one placement group.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SHM = Path(f"/dev/shm/crdtstate-{os.geteuid()}")

START_SECONDS = 60
"""For one that is slow; half a second is usual."""

ACCESS_KEY, SECRET_KEY = "crdtstate-tests", "not-a-secret-of-anybody"
REGION = "us-east-1"


class Processes:
    """Programs that run in a directory and end with it."""

    def __init__(self) -> None:
        # Short: sockets are in it, and their names may have 100 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="crdt-", dir="/tmp"))
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, *command: object) -> subprocess.Popen[bytes]:
        with open(self.directory / "output", "ab") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.running.append(process)
        return process

    def run(self, *command: object) -> None:
        process = self.start(*command)
        if process.wait(START_SECONDS) != 0:
            pytest.fail(f"{command[0]} failed:\n{self.output()}")
        self.running.remove(process)

    def output(self) -> str:
        return (self.directory / "output").read_text(errors="replace")[-3000:]

    def wait_until(self, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            ended = [process for process in self.running if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                pytest.fail(f"a server does not start:\n{self.output()}")
            time.sleep(0.01)

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()
        self.running.clear()
        shutil.rmtree(self.directory, ignore_errors=True)


def check_installed(package: str, *programs: str) -> None:
    """Fail the test, with what to do, if a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"no {missing[0]}: apt-get install --no-install-recommends {package}")


def free_port() -> int:
    """A port that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    request = ["req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "2", "-subj", "/CN=test"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *request, *names, *files], check=True, capture_output=True)
    return certificate, key


class RedisServer:
    """One redis-server: nothing on the disk, all of its memory given back at the end."""

    def __init__(self, *options: str) -> None:
        check_installed("redis-server", "redis-server")
        self.options = options
        self.port = free_port()
        self.processes = Processes()
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it, or start it anew on the same port, empty."""
        place = ["--bind", "127.0.0.1", "--port", self.port]
        nothing_kept = ["--save", "", "--appendonly", "no"]
        command = ["redis-server", *place, *nothing_kept, *self.options]
        self.process = self.processes.start(*command)
        self.processes.wait_until(lambda: _accepts(self.port))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.processes.running.remove(self.process)

    def stop(self) -> None:
        self.processes.stop()


class S3Server:
    """A Ceph cluster of one, and its gateway. See above for what makes it quick."""

    def __init__(self) -> None:
        check_installed("radosgw ceph-mon ceph-osd", "radosgw", "ceph-mon", "ceph-osd")
        self.processes = Processes()
        self.port = free_port()
        try:
            self._start_cluster()
            self._run("radosgw-admin", *USER)
            self.gateway = self.start_gateway(self.port)
        except BaseException:
            self.stop()
            raise

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def url(self, bucket: str, prefix: str = "") -> str:
        return f"s3://{bucket}/{prefix}?endpoint={self.endpoint}&region={REGION}"

    def start_gateway(self, port: int) -> subprocess.Popen[bytes]:
        """Start a gateway; there may be several."""
        frontend = f"--rgw-frontends=beast endpoint=127.0.0.1:{port} tcp_nodelay=1"
        process = self.processes.start("radosgw", *self._daemon, "-n", f"client.{port}", frontend)
        self.processes.wait_until(lambda: _answers(port))
        return process

    def end_gateway(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        self.processes.running.remove(process)

    def limit(self, bucket: str, bytes_max: int) -> None:
        """Let a bucket have no more than so many bytes."""
        of = [f"--bucket={bucket}", "--quota-scope=bucket"]
        self._run("radosgw-admin", "quota", "set", *of, f"--max-size={bytes_max}B")
        self._run("radosgw-admin", "quota", "enable", *of)

    def make_bucket(self) -> str:
        """Make an empty bucket and return its name."""
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        with urllib.request.urlopen(_signed(self.endpoint, "PUT", f"/{bucket}"), timeout=30):
            return bucket

    def stop(self) -> None:
        self.processes.stop()

    def _start_cluster(self) -> None:
        directory, cluster = self.processes.directory, uuid.uuid4()
        monitor = f"[v1:127.0.0.1:{free_port()}]"
        for name in ("mon", "osd", "rgw"):
            (directory / name).mkdir()
        config = directory / "ceph.conf"
        config.write_text(CONFIG.format(cluster=cluster, monitor=monitor, directory=directory))
        self._config = ["-c", config]
        self._daemon = [*self._config, "-f"]
        keys, monitors, map_ = directory / "keyring", directory / "monmap", directory / "osdmap"
        rights = ["--gen-key", "-n", "mon.", "--cap", "mon", "allow *"]
        self._run("ceph-authtool", "--create-keyring", keys, *rights)
        self._run("monmaptool", "--create", "--addv", "a", monitor, "--fsid", cluster, monitors)
        self._run("osdmaptool", "--createsimple", "1", map_)
        self._run(
            *("ceph-mon", "-i", "a", "--mkfs"),
            *("--monmap", monitors, "--osdmap", map_, "--keyring", keys),
        )
        self.processes.start("ceph-mon", *self._daemon, "-i", "a")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", uuid.uuid4())
        self.processes.start("ceph-osd", *self._daemon, "-i", "0")

    def _run(self, program: str, *arguments: object) -> None:
        self.processes.run(program, *self._config, *arguments)


USER = (
    *("user", "create", "--uid=tests", "--display-name=tests"),
    *(f"--access-key={ACCESS_KEY}", f"--secret={SECRET_KEY}"),
)

CONFIG = """
[global]
fsid = {cluster}
mon host = {monitor}
mon initial members = a
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
public addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
run dir = {directory}
admin socket = {directory}/$name.asok
log file = {directory}/$name.log
keyring = {directory}/keyring
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}/rgw
mon data avail warn = 2
mon data avail crit = 1
mon allow pool size one = true
mon max pg per osd = 2000
paxos propose interval = 0.02
paxos min wait = 0.01
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd crush update on start = false
osd class update on start = false
osd objectstore = memstore
memstore device bytes = 2147483648
rgw dns name = localhost
rgw thread pool size = 32
rgw cache enabled = false
"""


def _accepts(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
    except OSError:
        return False


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return True
    except OSError:  # Of which urllib's are.
        return False


def _signed(endpoint: str, method: str, path: str) -> urllib.request.Request:
    """A request without a body, signed as S3 wants it (version 4)."""
    host, moment = endpoint.partition("//")[2], time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    nothing = hashlib.sha256(b"").hexdigest()
    headers = {"host": host, "x-amz-content-sha256": nothing, "x-amz-date": moment}
    names = ";".join(headers)
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    request = f"{method}\n{path}\n\n{lines}\n{names}\n{nothing}"
    scope = f"{moment[:8]}/{REGION}/s3/aws4_request"
    text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(request.encode()).hexdigest()}"
    key = f"AWS4{SECRET_KEY}".encode()
    for word in scope.split("/"):
        key = hmac.digest(key, word.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    headers["Authorization"] = (
        f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, "
        f"SignedHeaders={names}, Signature={signature}"
    )
    return urllib.request.Request(endpoint + path, method=method, headers=headers)


class Gateway:
    """One more gateway to the cluster of an `S3Server`, to be broken as a `RedisServer` can be."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self.server, self.port = server, free_port()
        self.url = f"s3://{bucket}/{uuid.uuid4().hex}?endpoint=http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = self.server.start_gateway(self.port)

    def kill(self) -> None:
        self.server.end_gateway(self.process)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.kill()


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process hang meanwhile: it keeps its connections and answers nothing."""
    os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process.pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the credentials of `s3_server` where they belong: in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture(scope="session")
def bucket(s3_server: S3Server) -> str:
    return s3_server.make_bucket()


def url_of(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of an empty tier of that kind."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    match kind:
        case "memory":
            yield "memory://"
        case "shm":
            yield f"shm://{name}"
            shutil.rmtree(SHM / name, ignore_errors=True)
        case "sqlite":
            yield f"sqlite:///{request.getfixturevalue('tmp_path')}/tier.db"
        case "redis":
            yield f"{request.getfixturevalue('redis_server').url}?prefix={name}:"
        case "s3":
            request.getfixturevalue("s3_credentials")
            server, bucket = (request.getfixturevalue(each) for each in ("s3_server", "bucket"))
            yield server.url(bucket, name)
