"""Drive pub_sub_nats_os.py as people do: as a process, against a real nats-server."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pub_sub_nats_os as script

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
SCRIPTS = sysconfig.get_path("scripts")
NATS_SERVER = shutil.which("nats-server", path=SCRIPTS) or shutil.which("nats-server")
TIMEOUT = 20  # seconds, after which anything that is waited for counts as hanging


class Program:
    """The running script, whose lines can be waited for."""

    def __init__(self, *args: str, code: str = "", **popen: Any) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "NATS_URL"}
        environment |= popen.pop("env", {})
        start = ["-c", code] if code else [SCRIPT]
        self.process = subprocess.Popen(
            [sys.executable, *start, *args],
            stdin=subprocess.DEVNULL,
            stdout=popen.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env=environment,
            errors="replace",
            **popen,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self.news = threading.Condition()
        pipes = [(self.process.stdout, self.out), (self.process.stderr, self.err)]
        self.readers = [
            threading.Thread(target=self.read, args=pipe, daemon=True) for pipe in pipes if pipe[0]
        ]
        for reader in self.readers:
            reader.start()

    def read(self, pipe: Any, lines: list[str]) -> None:
        for line in pipe:
            with self.news:
                lines.append(line.rstrip("\n"))
                self.news.notify_all()

    def wait_for(self, pattern: str, times: int = 1) -> str:
        """Return the line that matches, the `times`-th one, as soon as it is there."""

        def found() -> list[str]:
            lines = [line for line in self.out + self.err if re.search(pattern, line)]
            return lines if len(lines) >= times else []

        with self.news:
            lines = self.news.wait_for(found, TIMEOUT)
        assert lines, f"no {pattern!r} in {self.out + self.err}"
        return lines[times - 1]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, within: float = TIMEOUT) -> int:
        """Return the exit status; there is never a traceback."""
        status = self.process.wait(within)
        for reader in self.readers:
            reader.join(TIMEOUT)
        assert not [line for line in self.err if "Traceback" in line], self.err
        return status

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.out + self.err)


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    """Start the script; whatever is still running at the end is killed."""
    with contextlib.ExitStack() as stack:

        def start(*args: str, **popen: Any) -> Program:
            started = Program(*args, **popen)
            stack.callback(started.process.wait)
            stack.callback(started.process.kill)
            return started

        yield start


@pytest.fixture
def run(program: Callable[..., Program]) -> Callable[..., Program]:
    """Run the script to its end."""

    def to_the_end(*args: str, **popen: Any) -> Program:
        finished = program(*args, **popen)
        finished.end()
        return finished

    return to_the_end


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Server:
    """A nats-server on a free port of 127.0.0.1."""

    def __init__(self, *options: str) -> None:
        self.port = free_port()
        self.options = options
        self.url = f"nats://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        assert NATS_SERVER
        command = [NATS_SERVER, "-a", "127.0.0.1", "-p", str(self.port), *self.options]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: port_answers(self.port))

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(TIMEOUT)

    def send(self, *messages: tuple[bytes, bytes]) -> None:
        """Publish (subject, payload) from a raw socket, and return when the server has them."""
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as client:
            lines = [b"PUB %b %d\r\n%b\r\n" % (s, len(data), data) for s, data in messages]
            client.sendall(b'CONNECT {"verbose":false}\r\n' + b"".join(lines) + b"PING\r\n")
            answer = b""
            while b"PONG" not in answer:
                answer += client.recv(65536)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def port_answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT):
        return True
    return False


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
def port_4222() -> None:
    if port_answers(script.PORT):
        pytest.skip(f"something else answers at port {script.PORT}")


def numbered(first: int, last: int, process_id: int = 7) -> list[tuple[bytes, bytes]]:
    now = time.time_ns()
    return [(b"greetings", b"%d %d %d Hi" % (process_id, n, now)) for n in range(first, last + 1)]


# --- What people see -----------------------------------------------------------------------------
