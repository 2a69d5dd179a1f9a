"""What pub_sub_nats_os.py promises: run as people run it, against a real nats-server.

The server is the container of docker-compose.yml where Docker can run it, or else the
nats-server program. REQUIRE_CONTAINER=1 makes a missing container a failure.
"""

import asyncio
import os
import pty
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
README = (HERE / "README.md").read_text()
PATH = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
ROLES = ["both", "publish", "subscribe"]
Start = Callable[..., "Program"]


class Program:
    """A running command, whose output goes to a file, errors included."""

    def __init__(self, file: Path, *command: str, **more: Any) -> None:
        self.file = file
        environment = {**os.environ, "PATH": PATH} | more.pop("env", {})
        with file.open("wb") as out:
            popen = {"stdout": out, "stderr": out, "env": environment} | more
            self.process = subprocess.Popen(command, **popen)

    def output(self) -> str:
        return self.file.read_text()

    def wait_for(self, text: str) -> None:
        eventually(lambda: text in self.output())

    def end(self, *signals: int, within: float = 20) -> int:
        """Send the signals, and return the exit status."""
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(within)

    def numbers(self, start: str) -> list[int]:
        """Return the numbers of the messages whose lines start so."""
        return [int(n) for n in re.findall(rf"(?m)^{start} \S+ #(\d+)", self.output())]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def publish(url: str, *payloads: bytes, **more: Any) -> None:
    """Publish as another program does."""

    async def send() -> None:
        nc = await nats.connect(url)
        for payload in payloads:
            await nc.publish("greetings", payload, **more)
        await nc.drain()

    asyncio.run(send())


# --- Fixtures: what a test can start ---


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Start a command. What still runs after the test is ended."""
    programs: list[Program] = []

    def start(*command: str, **more: Any) -> Program:
        programs.append(Program(tmp_path / f"output{len(programs)}", *command, **more))
        return programs[-1]

    yield start
    for program in programs:
        program.end(signal.SIGCONT, TERM, TERM)
        print(program.process.args, program.output()[-3000:])  # shown after a failure


@pytest.fixture
def script(run: Start) -> Start:
    """Start the script with these arguments."""
    return lambda *arguments, **more: run(sys.executable, SCRIPT, *arguments, **more)


@pytest.fixture
def changed(run: Start) -> Start:
    """Start the script after a line of Python that replaces a name."""
    rest = f"import runpy; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    return lambda change, *arguments: run(
        sys.executable, "-c", f"{change}\n{rest}", *arguments
    )


@pytest.fixture
def port() -> int:
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def start_server(run: Start) -> Start:
    """Start a nats-server of the test's own, and wait until it listens."""

    def start(port: int, *options: str) -> Program:
        program = run("nats-server", "-a", "127.0.0.1", "-p", str(port), *options)
        eventually(lambda: listens(port))
        return program

    return start


@pytest.fixture
def own_server() -> Iterator[None]:
    """Nothing listens at port 4222 before the test, and nothing after it."""
    assert not listens(4222), "these tests need port 4222, where something listens"
    yield
    eventually(lambda: not listens(4222))


@pytest.fixture(scope="session")
def server(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of the server that most tests share."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    environment = {"PATH": PATH, "NATS_PORT": port, "COMPOSE_PROJECT_NAME": f"t{port}"}
    options: Any = {"cwd": HERE, "env": {**os.environ, **environment}, "text": True}
    compose = ["docker", "compose"]
    up = ["sh", "-c", "docker compose up -d --wait"]
    started = subprocess.run(up, capture_output=True, **options)
    if started.returncode == 0:
        what = "the container of docker-compose.yml"
    elif os.environ.get("REQUIRE_CONTAINER") == "1":
        pytest.fail(started.stderr)
    else:
        what = f"the nats-server program, for want of a container: {started.stderr}"
        program = subprocess.Popen(
            ["nats-server", "-a", "127.0.0.1", "-p", port, "-l", os.devnull], **options
        )
        eventually(lambda: listens(int(port)))
    yield f"nats://127.0.0.1:{port}"
    if started.returncode == 0:
        subprocess.run([*compose, "down"], check=True, capture_output=True, **options)
    else:
        program.terminate()
        program.wait()
    reporter: Any = pytestconfig.pluginmanager.getplugin("terminalreporter")
    reporter.ensure_newline()
    reporter.write_line(f"server: {what.strip()}")


# --- The server of the script's own ---


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_own_server_is_stopped_after_a_signal(
    own_server: None, script: Start, role: str, number: int
) -> None:
    program = script(role, "-i", "0.02", "-c", "9999")
    program.wait_for("listening" if role == "subscribe" else "#2 ")
    assert listens(4222) and not listens(4222, "127.0.0.2"), "on loopback only"
    assert program.end(number) == 0
    assert not listens(4222)


@pytest.mark.parametrize("name", ["127.0.0.1:4222", "nats://127.0.0.1:4222"])
def test_own_server_is_started_at_the_default_address_when_it_is_named(
    own_server: None, script: Start, name: str
) -> None:
    assert script("-c", "1", "-s", name).end() == 0
    assert script("-c", "1", env={"NATS_URL": name}).end() == 0


def test_own_server_is_stopped_after_an_error(own_server: None, script: Start) -> None:
    program = script("publish", "--subject", "not valid")
    assert program.end() == 1
    assert "error: nats: invalid subject" in program.output()


def test_own_server_is_stopped_when_the_terminal_is_closed(own_server: None) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, SCRIPT, "-c", "9999"])
    while b"#1 " not in os.read(terminal, 4096):
        pass
    os.close(terminal)
    os.waitpid(pid, 0)


def test_own_server_outlives_a_ctrl_c_in_the_terminal(
    own_server: None, changed: Start
) -> None:
    program = changed(SLOW, "-c", "20", "-i", "0", start_new_session=True)
