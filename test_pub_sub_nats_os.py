"""Drive pub_sub_nats_os.py as people do: as a process, against a real nats-server."""

from __future__ import annotations

import ast
import contextlib
import json
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
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.errors import FlushTimeoutError

import pub_sub_nats_os as script

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
SCRIPTS = sysconfig.get_path("scripts")
NATS_SERVER = shutil.which("nats-server", path=SCRIPTS) or shutil.which("nats-server")
MAIN = "sys.exit(script.main())"
SOON = f"script.CONNECT_WITHIN = 1; {MAIN}"  # for what never connects
OURS = ("NATS_URL", "PYTHONUNBUFFERED")  # what would change how the script behaves
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in OURS}
README = (HERE / "README.md").read_text()
# The lines in the table of what to do, with other numbers, and with anything in place of "...".
TABLE = README.partition("| it says |")[2].partition("\n\n")[0]
SAYS = [says for row in TABLE.splitlines() for says in re.findall("`(.*?)`", row.split("|")[1])]
ERRORS = [re.sub(r"\d+", r"\\d+", re.escape(says).replace(r"\.\.\.", ".*")) for says in SAYS]
TIMEOUT = 20  # seconds, after which anything that is waited for counts as hanging


class Program:
    """The running script, whose lines can be waited for."""

    def __init__(self, *args: str, code: str = "", **popen: Any) -> None:
        environment = ENVIRONMENT | popen.pop("env", {})
        start = ["-c", f"import json, sys, pub_sub_nats_os as script; {code}"] if code else [SCRIPT]
        self.process = subprocess.Popen(
            [sys.executable, *start, *args],
            stdin=subprocess.DEVNULL,
            stdout=popen.pop("stdout", subprocess.PIPE),
            stderr=subprocess.PIPE,
            env=environment | {"PYTHONPATH": str(HERE)},
            errors="replace",
            **popen,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        self.lines: list[str] = []  # of both, as they came
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
                self.lines.append(lines[-1])
                self.news.notify_all()

    def wait_for(self, pattern: str, times: int = 1) -> str:
        """Return the line that matches, the `times`-th one, as soon as it is there."""
        deadline = time.monotonic() + TIMEOUT
        position = 0
        while True:
            with self.news:
                if position == len(self.lines):
                    assert self.news.wait(deadline - time.monotonic()), (pattern, self.lines[-20:])
            line = self.lines[position]
            position += 1
            times -= bool(re.search(pattern, line))
            if not times:
                return line

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, within: float = TIMEOUT) -> int:
        """Return the exit status; there is no traceback, and no error that the README lacks."""
        status = self.process.wait(within)
        for reader in self.readers:
            reader.join(TIMEOUT)
        assert not [line for line in self.err if "Traceback" in line], self.err
        for line in self.err:
            if line.startswith("error: "):
                assert any(re.fullmatch(row, line[7:]) for row in ERRORS), line
        return status

    def stop(self) -> None:
        for _ in range(2):  # the second one ends it at once
            self.process.terminate()
        try:
            self.process.wait(TIMEOUT)
        finally:
            self.process.kill()

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.lines)


Start = Callable[..., Program]


@pytest.fixture
def program() -> Iterator[Start]:
    """Start the script; whatever is still running at the end is ended, with its server."""
    with contextlib.ExitStack() as stack:

        def start(*args: str, **popen: Any) -> Program:
            started = Program(*args, **popen)
            stack.callback(started.stop)
            return started

        yield start


@pytest.fixture
def run(program: Start) -> Start:
    """Run the script to its end."""

    def to_the_end(*args: str, **popen: Any) -> Program:
        finished = program(*args, **popen)
        finished.end()
        return finished

    return to_the_end


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def dead_port() -> Iterator[int]:
    """A port that nobody else can have, and at which nobody answers."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


class Server:
    """A nats-server of the requirements, on a free port of 127.0.0.1."""

    def __init__(self, *options: str, port: int = 0) -> None:
        self.port = port or free_port()
        self.options = options
        self.url = f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        assert NATS_SERVER
        command = [NATS_SERVER, "-a", "127.0.0.1", "-p", str(self.port), *self.options]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until(lambda: port_answers(self.port))

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

    def send(self, *messages: tuple[bytes, bytes]) -> None:
        """Publish (subject, payload) from a raw socket, and return when the server has them."""
        with socket.create_connection(("127.0.0.1", self.port), TIMEOUT) as client:
            lines = [b"PUB %b %d\r\n%b\r\n" % (s, len(data), data) for s, data in messages]
            client.sendall(b'CONNECT {"verbose":false}\r\n' + b"".join(lines) + b"PING\r\n")
            answer = b""
            while b"PONG" not in answer:
                answer += client.recv(65536)

    def end(self) -> None:
        self.kill()

    def __enter__(self) -> Server:
        with contextlib.ExitStack() as stack:
            stack.callback(self.end)
            self.start()
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


class Container(Server):
    """The server of docker-compose.yml, under a project name of its own."""

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

    def compose(self, *arguments: str) -> str:
        project = ["docker", "compose", "-p", f"pub_sub_nats_os_{self.port}"]
        environment = os.environ | {"NATS_PORT": str(self.port)}
        done = subprocess.run(
            [*project, *arguments], cwd=HERE, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


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
def process() -> Iterator[Server]:
    """A server for one test."""
    with Server() as server:
        yield server


@pytest.fixture(scope="session")
def engine() -> None:
    """Skip without a Docker Engine and Compose, and say why; fail if they are required."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True)
            problem = done.stderr.strip() if done.returncode else ""
        except FileNotFoundError:
            problem = "there is no docker program"
        if problem:
            why = f"no container: {' '.join(command)}: {problem.splitlines()[-1]}"
            if os.environ.get("REQUIRE_CONTAINER") == "1":
                pytest.fail(why)
            pytest.skip(why)


@pytest.fixture(scope="session")
def container(engine: None) -> Iterator[Server]:
    """One container for the whole run."""
    with Container() as server:
        yield server


ONE_CONTAINER = pytest.mark.xdist_group("container")  # all in one worker


@pytest.fixture(params=["process", pytest.param("container", marks=ONE_CONTAINER)])
def server(request: pytest.FixtureRequest) -> Server:
    """A server of each kind, in turn."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(params=[pytest.param(script.PORT, marks=pytest.mark.xdist_group("port"))])
def port_4222() -> None:
    """Nobody else has that port: its tests run in one worker, one after the other."""
    if port_answers(script.PORT):
        pytest.skip(f"something else answers at port {script.PORT}")


def numbered(first: int, last: int, process_id: int = 7) -> list[tuple[bytes, bytes]]:
    now = time.time_ns()
    return [(b"greetings", b"%d %d %d Hi" % (process_id, n, now)) for n in range(first, last + 1)]


# --- What people see -----------------------------------------------------------------------------


def test_messages_flow_with_no_option_and_no_server(port_4222: None, run: Start) -> None:
    done = run()
    process_id = done.process.pid
    shapes = [r"subscriber listening on greetings"]
    for n in range(1, 6):
        shapes.append(rf"publisher  -> greetings #{n} Hello, NATS!")
        origin = rf"\(\d+\.\d\d ms from process {process_id}\)"
        shapes.append(rf"subscriber <- greetings #{n} Hello, NATS! {origin}")
    shapes.append(r"--- greetings ---")
    shapes.append(r"5 sent, 5 received, 0 lost in 2\.\d\d s \(2 msg/s\)")
    shapes.append(r"delay min/avg/max \d+\.\d\d/\d+\.\d\d/\d+\.\d\d ms")
    assert all(map(re.fullmatch, shapes, done.out)) and len(done.out) == len(shapes), done.out
    assert len(done.err) == 1 and "started" in done.err[0]
    assert done.process.returncode == 0
    assert not port_answers(script.PORT)


def test_script_metadata_equals_the_requirements() -> None:
    pins = re.findall(r"^(\S+) +# (run|test):", (HERE / "requirements.txt").read_text(), re.M)
    block = re.search(r"^# /// script\n(.*?)^# ///$", Path(SCRIPT).read_text(), re.M | re.S)
    assert block
    metadata = tomllib.loads(re.sub("^# ?", "", block[1], flags=re.M))
    assert metadata["dependencies"] == [pin for pin, use in pins if use == "run"]
    assert metadata["requires-python"] == ">=3.11"


def test_lines_come_one_by_one_into_a_file(process: Server, program: Start, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        running = program("-s", process.url, "-c", "2", "-i", "60", stdout=out)
        wait_until(lambda: "subscriber <- greetings #1" in (tmp_path / "out").read_text())
        assert running.process.poll() is None


def test_quiet_shows_only_the_statistics(process: Server, run: Start) -> None:
    done = run("-s", process.url, "-q", "-c", "3", "-i", "0")
    assert [line.split()[0] for line in done.out] == ["---", "3", "delay"]
    assert done.err == []


def test_several_subscribers_get_a_copy_each(server: Server, run: Start) -> None:
    done = run("-s", server.url, "-n", "3", "-c", "4", "-i", "0")
    for n in (1, 2, 3):
        assert done.count(rf"^subscriber {n} listening on greetings$") == 1
        assert done.count(rf"^subscriber {n} <- greetings #\d Hello") == 4
    assert done.count("^4 sent, 12 received, 0 lost in ") == 1


def test_queue_group_shares_the_messages(server: Server, run: Start) -> None:
    done = run("-s", server.url, "-n", "3", "-c", "60", "-i", "0", "--queue", "workers")
    assert sorted(re.findall(r"<- greetings #(\d+) ", "\n".join(done.out)), key=int) == [
        str(n) for n in range(1, 61)
    ]
    assert done.count("^60 sent, 60 received, 0 lost in ") == 1


def test_two_processes(server: Server, program: Start, run: Start) -> None:
    subscriber = program("subscribe", "-s", server.url, "-c", "3")
    subscriber.wait_for("listening")
    publisher = run("publish", "-c", "3", "-i", "0.05", "-m", "Hi ✓", env={"NATS_URL": server.url})
    assert subscriber.end() == 0
    assert publisher.process.returncode == 0
    assert publisher.count("^3 sent in ") == 1 and publisher.count("received|delay") == 0
    assert subscriber.count(rf"#3 Hi ✓ \(.* from process {publisher.process.pid}\)$") == 1
    assert subscriber.count(r"^3 received, 0 lost in ") == 1


def test_subscriber_ends_after_exactly_the_count(process: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", process.url, "-c", "3", "-n", "2")
    subscriber.wait_for("subscriber 2 listening")
    process.send(*numbered(1, 100))
    assert subscriber.end() == 0
    assert subscriber.count(" <- ") == 3 and subscriber.count("^3 received, 0 lost in") == 1


def test_wildcards(server: Server, program: Start) -> None:
    stars = program("subscribe", "-s", server.url, "--subject", "news.*.now", "-c", "1")
    rest = program("subscribe", "-s", server.url, "--subject", "news.>", "-c", "3")
    stars.wait_for("listening")
    rest.wait_for("listening")
    server.send((b"news", b"no"), (b"news.a", b"x"), (b"news.a.now", b"y"), (b"news.a.b.c", b"z"))
    assert stars.end() == rest.end() == 0
    assert [line for line in stars.out if "<-" in line] == ["subscriber <- news.a.now y"]
    assert [line for line in rest.out if "<-" in line][::2] == [
        "subscriber <- news.a x",
        "subscriber <- news.a.b.c z",
    ]


# --- Nothing is lost without a word --------------------------------------------------------------


@pytest.fixture
def slow_way(process: Server) -> Iterator[str]:
    """The URL of a way to the server on which each line takes its time."""

    def back(upstream: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the script may close first
            while data := upstream.recv(65536):
                client.sendall(data)

    def forward() -> None:
        client = listener.accept()[0]
        upstream = socket.create_connection(("127.0.0.1", process.port))
        threading.Thread(target=back, args=(upstream, client), daemon=True).start()
        with contextlib.suppress(OSError):
            for line in client.makefile("rb"):
                time.sleep(0.05)
                upstream.sendall(line)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=forward, daemon=True).start()
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}"


def test_listening_means_that_the_server_has_the_subscription(
    process: Server, slow_way: str, program: Start
) -> None:
    subscriber = program("subscribe", "-s", slow_way, "-c", "1")
    subscriber.wait_for("listening")
    process.send((b"greetings", b"at once"))
    assert subscriber.end() == 0


def test_drain_waits_for_the_messages_that_are_on_their_way(slow_way: str, run: Start) -> None:
    done = run("-s", slow_way, "-c", "3", "-i", "0")
    assert done.count("^3 sent, 3 received, 0 lost in") == 1


def test_publisher_does_not_wait_and_the_drain_hands_over_all(server: Server, run: Start) -> None:
    done = run("-s", server.url, "-c", "8", "-i", "0", "--work", "0.1")
    last_sent = done.out.index("publisher  -> greetings #8 Hello, NATS!")
    second = next(i for i, line in enumerate(done.out) if "<- greetings #2" in line)
    assert last_sent < second
    assert done.count("^8 sent, 8 received, 0 lost") == 1 and done.process.returncode == 0


def test_flood_without_loss(server: Server, run: Start) -> None:
    done = run("-s", server.url, "-q", "-i", "0", "-c", "100000")
    assert done.count("^100000 sent, 100000 received, 0 lost") == 1, done.out


def test_gaps_in_the_numbers_are_losses(process: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", process.url, "-c", "10")
    subscriber.wait_for("listening")
    a, b = numbered(5, 12), numbered(1, 3, process_id=8)
    again = numbered(1, 2)  # of a new process with an old process id
    process.send(a[0], b[0], a[1], a[4], a[3], b[2], a[7], a[6], *again)
    assert subscriber.end() == 1
    assert subscriber.count("^10 received, 3 lost in ") == 1, subscriber.out


def test_queue_group_member_does_not_claim_to_know_losses(process: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", process.url, "-c", "2", "--queue", "workers")
    subscriber.wait_for("listening")
    process.send(numbered(1, 1)[0], numbered(9, 9)[0])
    assert subscriber.end() == 0
    assert subscriber.count("^2 received in ") == 1 and subscriber.count("lost") == 0


STRANGE = [
    b"",
    b" ",
    b"just text",
    b"\xff\xfe not UTF-8",
    bytes(range(32)) + b"\x7f",
    "\x9b31m C1, \u202e right to left".encode(),
    b"1 2 3",
    b"7 x 1763809955123456789 no number",
    b"7 0 1763809955123456789 no number 0",
    b"7 -1 1763809955123456789 no sign",
    b"7 +1 1763809955123456789 no sign",
    b"7 1_0 1763809955123456789 no underscore",
    b"7 1.5 1763809955123456789 no fraction",
    b"7 1 nan Hi",
    b"7 1 -176380995512345678 Hi",
    b"7 1 99999999999999999999999999 Hi",
    b"7  1763809955123456789 no number",
    b" 1 1763809955123456789 no process",
    b"\x1b[31m 1 1763809955123456789 no process",
    "७ १ १७६३८०९९५५१२३४५६७८९ other digits".encode(),
    b"9" * 100 + b" 1 1763809955123456789 Hi",
    b"7 " + b"9" * 5000 + b" 1763809955123456789 Hi",
    b"9" * 500_000,
    b"7 1 1763809955123456789",
    b"\r\nPUB greetings 2\r\nhi\r\n",
    b"%s %d {} \\x1b \\",
    b"x" * 1_000_000,
]


def test_strange_messages_are_shown_and_counted(process: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", process.url, "-c", str(len(STRANGE) + 1))
    subscriber.wait_for("listening")
    process.send(*[(b"greetings", data) for data in STRANGE], *numbered(1, 1))
    assert subscriber.end() == 0
    shown = [line for line in subscriber.out if " <- " in line]
    assert len(shown) == len(STRANGE) + 1
    assert all(line.isprintable() for line in subscriber.out)
    assert all("#" not in line and "from process" not in line for line in shown[:-1]), shown
    assert "subscriber <- greetings just text" in shown
    assert shown[-2].endswith("x... (1000000 bytes)") and len(shown[-2]) < 300
    assert subscriber.count(f"^{len(STRANGE) + 1} received, 0 lost") == 1
    assert subscriber.count(r"^delay min/avg/max (\S+)/\1/\1 ms$") == 1  # of the numbered one


def test_strange_subjects_do_not_stop_the_subscriber(process: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", process.url, "--subject", "*.>")
    subscriber.wait_for("listening")
    process.send((b"a.\x1b[31m", b"colour"))
    subscriber.wait_for(r"<- a\.\\x1b\[31m colour$")
    process.send((b"a.\xff", b"not UTF-8"))  # the client stops reading here
    subscriber.wait_for("reconnected")
    process.send((b"a.b", b"still here"))
    subscriber.wait_for("<- a.b still here")
    subscriber.signal(signal.SIGINT)
    assert subscriber.end() == 0


def test_message_text_is_shown_without_control_characters(process: Server, run: Start) -> None:
    done = run("-s", process.url, "-c", "1", "-m", "bell\a \x1b[31m\nred \udcff")
    assert all(line.isprintable() for line in done.out)
    assert done.count(r"#1 bell\\x07 \\x1b\[31m\\nred ") == 2


def test_characters_that_the_output_lacks_are_no_error(process: Server, run: Start) -> None:
    done = run("-s", process.url, "-c", "1", "-m", "é", env={"PYTHONIOENCODING": "ascii"})
    assert done.process.returncode == 0 and done.count(r"#1 \\xe9") == 2


def test_slow_consumer_is_told_once_and_counted(server: Server, program: Start, run: Start) -> None:
    code = f"script.DRAIN_WITHIN = 1; {MAIN}"
    slow = program("subscribe", "-s", server.url, "--work", "60", code=code)
    slow.wait_for("listening")
    run("publish", "-q", "-s", server.url, "-m", "x" * 100_000, "-c", "1500", "-i", "0")
    slow.wait_for("slow consumer")
    slow.signal(signal.SIGINT)
    assert slow.end() == 1
    dropped = int(slow.wait_for(r"^slow consumer: \d+ ").split()[2])
    abandoned = int(slow.wait_for("not worked on").split()[3])
    assert slow.count("slow consumer") == 2
    assert slow.count(f"^1 received, {dropped + abandoned} lost") == 1
    assert 1 + dropped + abandoned == 1500


def test_two_publishers_and_one_killed(server: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", server.url)
    subscriber.wait_for("listening")
    steady = program("publish", "-s", server.url, "-c", "40", "-i", "0.02")
    victim = program("publish", "-s", server.url, "-c", "1000000", "-i", "0.01")
    subscriber.wait_for(f"#5 .* from process {victim.process.pid}")
    victim.process.kill()
    assert steady.end() == 0
    subscriber.wait_for(f"#40 .* from process {steady.process.pid}")
    subscriber.signal(signal.SIGINT)
    assert subscriber.end() == 0
    assert subscriber.count(f"from process {steady.process.pid}") == 40


# What a message may look like: anything, and what comes near to what the script writes.
ANYTHING = st.binary() | st.lists(
    st.binary(max_size=3) | st.integers(-1, 10**20).map(lambda n: b"%d" % n)
).map(b" ".join)


# On a busy machine an example may take its time.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patient
@given(number=st.integers(1, 10**12 - 1), text=ANYTHING)
def test_what_was_written_is_read(number: int, text: bytes) -> None:
    before = time.time_ns()
    process_id, read_number, sent, read_text = script.decode(script.encode(number, text))
    assert (int(process_id), read_number, read_text) == (os.getpid(), number, text)
    assert before <= sent <= time.time_ns()


@patient
@given(data=ANYTHING)
def test_whatever_comes_can_be_read_and_shown(data: bytes) -> None:
    process_id, number, _, text = script.decode(data)
    assert data.startswith(process_id) and data.endswith(text)
    assert number > 0 or text == data
    assert script.display(data).isprintable() and len(script.display(data)) < 1000


# --- The end -------------------------------------------------------------------------------------

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def start_each_role(server: Server, program: Start) -> dict[str, Program]:
    """Return a run of each role that is at work, each with its role as its subject."""
    runs = {}
    for role in ("both", "publish", "subscribe"):
        runs[role] = program(role, "-s", server.url, "--subject", role, "-i", "0.02", "-c", "9999")
    for role, running in runs.items():
        running.wait_for("listening" if role == "subscribe" else "#3 ")
    return runs


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_drains_and_shows_the_statistics(
    server: Server, program: Start, number: int
) -> None:
    runs = start_each_role(server, program)
    for role, running in runs.items():
        running.signal(number)
        assert running.end(within=2) == 0
        assert running.count(f"^--- {role} ---$") == 1 and running.err == []
        assert running.count("^0 received, 0 lost|^[0-9]+ sent in|^[0-9]+ sent, .*, 0 lost") == 1


def test_ctrl_c_in_a_flood_drains_at_once(server: Server, program: Start) -> None:
    running = program("-s", server.url, "-i", "0", "-c", "99999999")
    running.wait_for("<- greetings #1000 ")
    running.signal(signal.SIGINT)
    assert running.end(within=2) == 0
    assert running.count("0 lost in") == 1


def test_ctrl_c_for_the_whole_process_group_drains_and_ends_the_server(
    port_4222: None, program: Start
) -> None:
    running = program("-i", "0.02", "-c", "1000", "--work", "0.1", start_new_session=True)
    running.wait_for("<- greetings #3 ")
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end(within=5) == 0
    assert running.count("0 lost in") == 1
    assert not port_answers(script.PORT)


def test_backlog_ends_within_five_seconds_and_is_counted(process: Server, program: Start) -> None:
    running = program("-s", process.url, "-i", "0", "-c", "50", "--work", "1")
    running.wait_for("<- greetings #1 ")
    running.signal(signal.SIGINT)
    assert running.end(within=5) == 1
    received = running.count("<-")
    assert 3 <= received < 10
    assert running.count(f"^50 sent, {received} received, {50 - received} lost in") == 1


def test_first_signal_bounds_a_drain_that_is_under_way(process: Server, program: Start) -> None:
    running = program("-s", process.url, "-i", "0", "-c", "3", "--work", "0.3")
    running.wait_for("-> greetings #3 ")
    running.wait_for("<- greetings #1 ")
    running.signal(signal.SIGTERM)
    assert running.end(within=5) == 0
    assert running.count("^3 sent, 3 received, 0 lost") == 1


def test_second_signal_ends_at_once_and_ends_the_server(port_4222: None, program: Start) -> None:
    running = program("-i", "0", "-c", "50", "--work", "30", "-n", "2")
    running.wait_for("<- greetings #1 ", times=2)
    running.signal(signal.SIGINT)
    running.signal(signal.SIGTERM)
    assert running.end(within=2) == 1
    assert running.count("^50 sent, 2 received, 98 lost in") == 1
    assert not port_answers(script.PORT)


def test_closed_pipe_ends_quietly(port_4222: None) -> None:
    command = f"{sys.executable} {SCRIPT} -i 0.01 -c 1000000 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.stdout == "subscriber listening on greetings\n"
    assert done.stderr.count("\n") == 1 and "server started" in done.stderr
    assert not port_answers(script.PORT)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("arguments", [[], ["-q", "-c", "1"]], ids=["lines", "statistics"])
def test_full_disk_is_an_error(process: Server, run: Start, arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = run("-s", process.url, *arguments, stdout=full)
    assert done.process.returncode == 2
    assert done.err == ["error: can't write the output: No space left on device"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_error_ends_the_server(port_4222: None, run: Start) -> None:
    with open("/dev/full", "w") as full:
        done = run(stdout=full)
    assert done.process.returncode == 2 and done.count("server started") == 1
    assert not port_answers(script.PORT)


# --- The server ----------------------------------------------------------------------------------


def test_container_is_used_with_no_option(engine: None, port_4222: None, program: Start) -> None:
    with Container(port=script.PORT) as container:
        running = program("-i", "0.05", "-c", "9999")
        running.wait_for("<- greetings #3 ")
        container.restart()
        running.wait_for("reconnected")
        running.wait_for("<-", times=running.count("<-") + 3)
        running.signal(signal.SIGINT)
        assert running.end(within=2) in (0, 1)
    assert running.count("disconnected") == 1 and running.count("server started") == 0


@ONE_CONTAINER
def test_container_serves_this_machine_only_and_has_no_privilege(container: Container) -> None:
    ids = container.compose("ps", "-q").split()
    inspect = subprocess.run(["docker", "inspect", *ids], capture_output=True, check=True)
    [host] = [each["HostConfig"] for each in json.loads(inspect.stdout)]
    assert {b["HostIp"] for bindings in host["PortBindings"].values() for b in bindings} == {
        "127.0.0.1"
    }
    assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and not host["CapAdd"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"] and 0 < host["Memory"] <= 2**28


def test_second_run_finds_the_server_of_the_first(
    port_4222: None, program: Start, run: Start
) -> None:
    subscriber = program("subscribe", "-c", "2")
    subscriber.wait_for("listening")
    publisher = run("publish", "-c", "2", "-i", "0")
    assert publisher.process.returncode == 0 and publisher.err == []
    assert subscriber.end() == 0
    assert not port_answers(script.PORT)


def test_started_server_serves_this_machine_only(port_4222: None, program: Start) -> None:
    program("subscribe").wait_for("listening")
    with pytest.raises(OSError):  # a server for all addresses would answer here, too
        socket.create_connection(("127.0.0.2", script.PORT), TIMEOUT)


def test_two_runs_at_the_same_moment_both_work(port_4222: None, program: Start) -> None:
    runs = [program("-c", "4", "-i", "0.3") for _ in range(2)]
    assert [each.end() for each in runs] == [0, 0], [each.err for each in runs]
    assert all(each.count("^4 sent, [4-8] received, 0 lost") == 1 for each in runs)
    assert sum(each.count("server started") for each in runs) == 1
    assert not port_answers(script.PORT)


def test_server_outlives_its_run_for_another_one_that_is_about_to_end(
    port_4222: None, program: Start
) -> None:
    running = program("-c", "2", "-i", "0.5")
    running.wait_for("listening")
    with socket.create_connection((script.HOST, script.PORT), TIMEOUT) as another:
        answers = another.makefile("rb")
        another.sendall(b"CONNECT {}\r\n")
        running.wait_for("^delay")
        for _ in range(10):
            another.sendall(b"PING\r\n")
            assert b"PONG\r\n" in iter(answers.readline, b"")
            time.sleep(0.01)
    assert running.end(within=3) == 0
    assert not port_answers(script.PORT)


def test_publish_starts_no_server(port_4222: None, run: Start) -> None:
    done = run("publish")
    assert done.process.returncode == 2 and done.out == []
    assert len(done.err) == 1 and "docker compose up -d" in done.err[0], done.err


def test_named_server_is_never_started(dead_port: int, program: Start) -> None:
    url = f"nats://127.0.0.1:{dead_port}"
    for done in (program("-s", url), program("subscribe", env={"NATS_URL": url})):
        assert done.end(within=5) == 2 and done.out == []
        assert done.err == [f"error: no connection to {url[7:]}: Connection refused"]


def test_own_server_that_dies_ends_the_run_with_the_statistics(
    port_4222: None, program: Start
) -> None:
    running = program("-c", "1000", "-i", "0.05", "--queue", "q")
    running.wait_for("<- greetings #2 ")
    children = f"/proc/{running.process.pid}/task/{running.process.pid}/children"
    os.kill(int(Path(children).read_text()), signal.SIGKILL)
    assert running.end(within=3) == 2
    assert running.count("that this program started has ended") == 1
    assert running.count("sent, .* received, ") == 1


def test_no_server_program_is_an_error_that_says_what_to_install(
    port_4222: None, run: Start
) -> None:
    code = f"sys.executable = '/none/python'; {MAIN}"
    done = run(code=code, env={"PATH": ""})
    assert done.process.returncode == 2 and done.out == []
    assert len(done.err) == 1 and "pip install -r requirements.txt" in done.err[0]


def test_server_that_ends_at_once_is_an_error_that_says_how_to_see_why(
    dead_port: int, run: Start
) -> None:
    done = run(code=f"script.PORT = {dead_port}; {MAIN}")
    assert done.process.returncode == 2 and done.out == []
    assert len(done.err) == 1 and f"nats-server -a 127.0.0.1 -p {dead_port}" in done.err[0]


def test_what_is_not_nats_is_named(program: Start) -> None:
    clients = []

    def greet(listener: socket.socket, greeting: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                clients.append(listener.accept()[0])
                clients[-1].sendall(greeting)

    with contextlib.ExitStack() as listeners:
        runs = []
        for greeting in (b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n"):
            listener = listeners.enter_context(socket.create_server(("127.0.0.1", 0)))
            threading.Thread(target=greet, args=(listener, greeting), daemon=True).start()
            where = f"127.0.0.1:{listener.getsockname()[1]}"
            runs.append((where, program("-s", f"nats://{where}", code=SOON)))
        for where, done in runs:
            assert done.end(within=5) == 2 and done.out == []
            assert len(done.err) == 1 and where in done.err[0] and "NATS server" in done.err[0]


def test_disconnection_is_told_once_and_the_flow_resumes(server: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", server.url)
    subscriber.wait_for("listening")
    publisher = program("publish", "-s", server.url, "-i", "0.05", "-c", "1000")
    subscriber.wait_for("#4 ")
    server.kill()
    for each in (subscriber, publisher):
        each.wait_for("disconnected")
    sent = publisher.count("->")
    time.sleep(0.5)  # the publisher has nothing to tell while it waits
    assert publisher.count("->") == sent
    server.start()
    subscriber.wait_for("reconnected")
    publisher.wait_for("reconnected")
    now = subscriber.count("<-")
    subscriber.wait_for("<-", times=now + 3)
    publisher.signal(signal.SIGINT)
    assert publisher.end(within=2) in (0, 1)
    sent = publisher.count("->")
    subscriber.wait_for(f"#{sent} ")
    subscriber.signal(signal.SIGINT)
    status = subscriber.end(within=2)
    received = subscriber.count("<-")
    assert subscriber.count(f"^{received} received, {sent - received} lost") == 1
    assert status == (1 if sent - received else 0)
    for each in (subscriber, publisher):
        assert each.count("disconnected") == each.count("reconnected") == 1


def test_lost_server_is_tried_every_quarter_of_a_second(process: Server, program: Start) -> None:
    program("subscribe", "-s", process.url).wait_for("listening")
    process.kill()
    with socket.create_server(("127.0.0.1", process.port)) as listener:
        listener.settimeout(TIMEOUT)
        began = time.monotonic()
        for _ in range(8):
            listener.accept()[0].close()
    assert time.monotonic() < began + 8  # the client's own pause makes it 14 s


def test_every_copy_that_a_killed_server_had_is_counted(process: Server, program: Start) -> None:
    running = program("-s", process.url, "-i", "0.02", "-c", "40", "-n", "2")
    running.wait_for("<- greetings #3 ", times=2)
    process.freeze()  # so that it has messages that it does not deliver
    sent = running.count("->")
    running.wait_for("->", times=sent + 5)
    process.kill()
    process.start()
    running.wait_for("reconnected")
    process.send(*numbered(1, 9))  # what others send makes up for nothing
    assert running.end() == 1
    own = running.count(f"<- .* from process {running.process.pid}")
    received = running.count("<-")
    assert own <= 2 * (40 - 4) and received == own + 18
    assert running.count(f"^40 sent, {received} received, {80 - own} lost in") == 1
    assert running.count("<- greetings #40 ") == 2


def test_flood_over_a_killed_server_is_counted(server: Server, program: Start) -> None:
    subscriber = program("subscribe", "-s", server.url)
    subscriber.wait_for("listening")
    publisher = program("publish", "-q", "-s", server.url, "-i", "0", "-c", "200000")
    subscriber.wait_for("#1000 ")
    server.kill()
    publisher.wait_for("disconnected")
    time.sleep(2)
    server.start()
    assert publisher.end(60) == 0
    subscriber.wait_for("#200000 ")
    subscriber.signal(signal.SIGINT)
    subscriber.end()
    received = subscriber.count("<-")
    assert 1000 < received < 200000
    assert subscriber.process.returncode == 1
    assert subscriber.count(f"^{received} received, {200000 - received} lost in") == 1


def test_restarted_server_is_told_and_the_flow_resumes(server: Server, program: Start) -> None:
    running = program("-s", server.url, "-i", "0.02", "-c", "9999")
    running.wait_for("<- greetings #3 ")
    server.restart()
    running.wait_for("reconnected")
    running.wait_for("<-", times=running.count("<-") + 3)
    running.signal(signal.SIGINT)
    running.end(within=2)
    sent, received = running.count("->"), running.count("<-")
    assert running.count(f"^{sent} sent, {received} received, {sent - received} lost") == 1
    assert running.count("disconnected") == running.count("reconnected") == 1


def test_frozen_server_loses_nothing(server: Server, program: Start) -> None:
    running = program("-s", server.url, "-i", "0.05", "-c", "20")
    running.wait_for("<- greetings #3 ")
    server.freeze()
    time.sleep(3)
    server.thaw()
    assert running.end() == 0
    assert running.count("^20 sent, 20 received, 0 lost") == 1 and running.err == []


def monitor(server: Server, page: str) -> Any:
    url = f"http://127.0.0.1:{server.options[-1]}/{page}"
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
        return json.load(answer)


def neighbours(server: Server) -> set[str]:
    return {route["remote_id"] for route in monitor(server, "routez")["routes"]}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Server]]:
    """Three servers with routes between them; a lame duck closes its connections after 1 s."""
    config = tmp_path / "nats.conf"
    config.write_text("lame_duck_duration: 30s, lame_duck_grace_period: 1s")
    ports = [free_port() for _ in range(3)]
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports)
    with contextlib.ExitStack() as stack:
        servers = []
        for port in ports:
            options = ["-c", str(config), "--cluster_name", "c", "--routes", routes]
            options += ["--cluster", f"nats://127.0.0.1:{port}", "-m", str(free_port())]
            servers.append(stack.enter_context(Server(*options)))
        wait_until(lambda: all(len(neighbours(server)) == 2 for server in servers))
        yield servers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR2])
def test_flow_goes_on_through_another_server_of_the_cluster(
    cluster: list[Server], program: Start, number: int
) -> None:
    urls = ",".join(server.url for server in cluster)
    subscriber = program("subscribe", "-s", urls)
    subscriber.wait_for("listening")
    home = next(s for s in cluster if monitor(s, "connz")["num_connections"])
    publisher = program("publish", "-s", urls, "-i", "0.02", "-c", "9999")
    first = int(re.findall(r"#(\d+)", subscriber.wait_for("<-"))[0])
    home.process.send_signal(number)  # SIGUSR2 makes it a lame duck: it sends its clients away
    subscriber.wait_for("reconnected")
    subscriber.wait_for("<-", times=subscriber.count("<-") + 5)
    publisher.signal(signal.SIGINT)
    publisher.end(within=5)
    sent = publisher.count("->")
    subscriber.wait_for(f"#{sent} ")
    subscriber.signal(signal.SIGINT)
    status = subscriber.end(within=2)
    received = subscriber.count("<-")
    lost = sent - first + 1 - received
    assert subscriber.count(f"^{received} received, {lost} lost in") == 1, subscriber.out[-2:]
    assert status == (1 if lost else 0)


def test_gives_up_without_a_server_and_shows_the_statistics(
    process: Server, program: Start
) -> None:
    code = f"script.GIVE_UP_AFTER = 1; {MAIN}"
    running = program("-s", process.url, "-i", "0.01", "-c", "100000", code=code)
    running.wait_for("<- greetings #3 ")
    process.kill()
    assert running.end(within=5) == 2
    assert running.count(r"^error: no server for 1 s: Connection refused$") == 1
    assert running.count(r"^\d+ sent, \d+ received, \d+ lost") == 1


def test_ctrl_c_without_an_answering_server_ends_in_five_seconds(program: Start) -> None:
    with Server() as gone, Server() as frozen:
        runs = [
            *start_each_role(gone, program).values(),
            *start_each_role(frozen, program).values(),
        ]
        gone.kill()
        for running in runs[:3]:
            running.wait_for("disconnected")
        frozen.freeze()
        for running in runs:
            running.signal(signal.SIGINT)
        for running in runs:
            running.end(within=5)
            assert running.count("^--- ") == 1, running.out
        for publisher in runs[1], runs[4]:  # it can't know whether all that it sent has arrived
            assert publisher.process.returncode == 2
            assert publisher.count("^error: ended before the drain") == 1


def test_passwords_work_and_are_never_shown(program: Start, run: Start) -> None:
    with Server("--user", "me", "--pass", "se/cret") as server:
        at = f"127.0.0.1:{server.port}"
        assert run("-s", f"nats://me:se%2Fcret@{at}", "-c", "1").process.returncode == 0
        logins = ("me:wr0ng@", "wr0ng@", "")
        for done in [program("-s", f"nats://{login}{at}", code=SOON) for login in logins]:
            assert done.end(within=5) == 2 and done.out == []
            assert done.err == [f"error: no connection to {at}: user or password refused"]


def test_tls_needs_a_trusted_certificate(program: Start, tmp_path: Path) -> None:
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    paths = [str(tmp_path / name) for name in ("ca.pem", "cert.pem", "key.pem")]
    authority.cert_pem.write_to_path(paths[0])
    certificate.cert_chain_pems[0].write_to_path(paths[1])
    certificate.private_key_pem.write_to_path(paths[2])
    with Server("--tls", "--tlscert", paths[1], "--tlskey", paths[2]) as server:
        at = f"127.0.0.1:{server.port}"
        trusting = program("-s", f"tls://{at}", "-c", "1", env={"SSL_CERT_FILE": paths[0]})
        doubting = program("-s", f"tls://{at}", "-c", "1", code=SOON)
        assert trusting.end() == 0 and trusting.count("^1 sent, 1 received, 0 lost") == 1
        assert doubting.end(within=5) == 2 and doubting.out == []
    assert len(doubting.err) == 1 and f"{at}: certificate verify failed" in doubting.err[0]


def test_what_the_server_does_not_permit_is_refused(run: Start, tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text(
        "authorization { users = [{user: me, password: pw, permissions: {publish: a}}] }"
    )
    with Server("-c", str(config)) as server:
        done = run("-s", f"nats://me:pw@127.0.0.1:{server.port}")
    assert done.process.returncode == 2
    assert done.count("^error: refused by the server: .*permissions violation") == 1, done.err


def test_message_over_the_limit_is_refused_before_the_first(run: Start, tmp_path: Path) -> None:
    config = tmp_path / "nats.conf"
    config.write_text("max_payload: 1000")
    with Server("-c", str(config)) as server:
        done = run("publish", "-s", server.url, "-m", "x" * 1000)
    assert done.process.returncode == 2 and done.count("->") == 0
    assert len(done.err) == 1 and re.search(r"\b10\d\d bytes.*\b1000\b", done.err[0]), done.err


# --- The README --------------------------------------------------------------------------------

SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
Command = tuple[str, str, list[str]]  # the terminal's digit, the command, the output shown


class Chapter:
    """A chapter of the README, with the commands of each of its console blocks."""

    def __init__(self, text: str) -> None:
        self.title = text.splitlines()[0].lstrip("# ")
        self.blocks: list[list[Command]] = []
        for block in re.findall(r"^```console\n(.*?)^```$", text, re.M | re.S):
            found = re.findall(r"^(\d?)\$ (.*)\n((?:(?!\d?\$ ).*\n)*)", block, re.M)
            self.blocks.append([(name, command, out.splitlines()) for name, command, out in found])

    def shape(self, line: str) -> str:
        """Return the line without what differs from run to run."""
        line = re.sub(r"^bash: .* Killed .*", "Killed", line)
        line = re.sub(r"\d+\.\d\d\b|(?<=from process )\d+|\d+(?= msg/s)", "N", line)
        if self.title in ("At most once", "Falling behind"):
            line = re.sub(r"#\d+|\d+ (?=messages)", "N", line)
            line = re.sub(r"\d+ received, [1-9]\d* lost", "N received, N lost", line)
        if self.title == "Sharing work":
            line = re.sub(r"^subscriber \d <-", "a member <-", line)
        return line

    def compare(self, shown: list[str], printed: list[str]) -> None:
        """Each speaker says what is shown, in that order; "..." stands for any lines."""
        expected, said = list(map(self.shape, shown)), list(map(self.shape, printed))
        for who in set(map(speaker, expected + said)) - {"...", "^C"}:
            lines = [line for line in expected if speaker(line) in (who, "...")]
            pattern = "".join(
                "(.*\n)*" if line == "..." else f"{re.escape(line)}\n" for line in lines
            )
            assert re.fullmatch(pattern, "".join(f"{x}\n" for x in said if speaker(x) == who)), (
                printed
            )


def speaker(line: str) -> str:
    """Return who says it: messages go their ways at the same time, in no order between them."""
    match = re.match(r"\.\.\.$|\^C$|(publisher|subscriber \d|subscriber|a member)(?= )", line)
    return match[0] if match else ""


TEXTS = re.split(r"^##+ ", README, flags=re.M)
CHAPTERS = [Chapter(text) for text in TEXTS if "```console" in text]


class Terminal:
    """A shell with a session of its own, as each terminal has; one command at a time."""

    READY = "$ "
    PROJECT = "pub_sub_nats_os_readme"  # of docker compose

    def __init__(self, folder: Path) -> None:
        path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"  # as .venv/bin/activate sets it
        self.shell = subprocess.Popen(
            ["bash"],
            cwd=folder,
            env=ENVIRONMENT | {"PATH": path, "COMPOSE_PROJECT_NAME": self.PROJECT},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            start_new_session=True,
        )
        self.lines = [self.READY]
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        assert self.shell.stdout
        with contextlib.suppress(ValueError):  # closed
            for line in self.shell.stdout:
                self.lines.append(line.rstrip("\n"))

    def ready(self) -> bool:
        return self.lines[-1:] == [self.READY]

    def start(self, command: str) -> None:
        wait_until(self.ready)
        self.lines = []
        assert self.shell.stdin
        self.shell.stdin.write(f"{command}\necho '{self.READY}'\n")
        self.shell.stdin.flush()

    def signal(self, number: int) -> None:
        os.killpg(self.shell.pid, number)

    def end(self) -> None:
        for _ in range(2):  # the second one ends what drains
            self.signal(signal.SIGTERM)
        self.shell.communicate(timeout=TIMEOUT)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.title)
def test_readme_shows_what_its_commands_print(
    chapter: Chapter, port_4222: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for file in ("pub_sub_nats_os.py", "docker-compose.yml"):
        (tmp_path / file).symlink_to(HERE / file)
    with contextlib.ExitStack() as stack:
        if "docker" in str(chapter.blocks):
            request.getfixturevalue("engine")
            down = ["docker", "compose", "-p", Terminal.PROJECT, "down"]
            stack.callback(subprocess.run, down, cwd=HERE, check=True, capture_output=True)
        for block in chapter.blocks:
            run_block(chapter, block, tmp_path, stack)


def run_block(
    chapter: Chapter, block: list[Command], folder: Path, stack: contextlib.ExitStack
) -> None:
    """Give each terminal its commands in the order of the page, and compare what they print."""
    terminals: dict[str, Terminal] = {}
    running: list[tuple[Terminal, list[str], list[str]]] = []
    for name, command, shown in block:
        if command == SET_UP + ".venv/bin/python -m pytest":
            continue  # this very run
        if name not in terminals:
            terminals[name] = Terminal(folder)
            stack.callback(terminals[name].end)
        terminal = terminals[name]
        terminal.start(command.removeprefix(SET_UP))  # what the tests run with is set up already
        running.append((terminal, shown, terminal.lines))
        if command.startswith("nats-server"):
            wait_until(lambda: port_answers(script.PORT))
        elif " -q " not in command:
            wait_until(lambda: terminal.ready() or any(map(speaker, terminal.lines)))  # noqa: B023
    for terminal, shown, lines in sorted(running, key=lambda each: "^C" in each[1]):
        if "^C" in shown:
            before = {chapter.shape(line) for line in shown[: shown.index("^C")]} - {"..."}
            wait_until(lambda: before <= set(map(chapter.shape, lines)))  # noqa: B023
            terminal.signal(signal.SIGINT)
        wait_until(lambda: Terminal.READY in lines)  # noqa: B023
        chapter.compare(shown, lines[:-1])


def test_readme_says_what_to_do_at_each_error() -> None:
    beginnings: dict[str, set[str]] = {
        "argparse": {"argument "},
        "nats": {str(FlushTimeoutError())},
    }
    for node in ast.walk(ast.parse(Path(SCRIPT).read_text())):
        if isinstance(node, ast.Call) and node.args:
            text = next(
                (n.value for n in ast.walk(node.args[0]) if isinstance(n, ast.Constant)), ""
            )
            beginnings.setdefault(ast.unparse(node.func), set()).add(str(text))
    documented = [says.partition("...")[0] for says in SAYS]
    for source in ("argparse", "nats", "Fault"):
        for text in beginnings[source]:
            assert any(says.startswith(text[: len(says)]) for says in documented), text
    known = set.union(*beginnings.values()) - {""}
    assert all(any(says.startswith(text[: len(says)]) for text in known) for says in documented)


def test_functions_that_the_readme_names_exist() -> None:
    tree = ast.walk(ast.parse(Path(SCRIPT).read_text()))
    functions = {n.name for n in tree if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    named = set(re.findall(r"`(\w+)\(\)`", README))
    assert named and named <= functions


def test_links_inside_the_readme_resolve() -> None:
    titles = re.findall(r"^#+ (.*)", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    links = set(re.findall(r"\]\(#(.*?)\)", README))
    assert links and links <= anchors


# --- The command line ----------------------------------------------------------------------------

BAD = {
    "count": "-c 0|-c -1|-c 1.5|-c x|-c |-c 99999999999999999999|-n 0|-n one",
    "seconds": "-i -1|-i nan|-i inf|-i 1e999|-i x|-i |--work -0.1|--work NaN|--work -inf",
    "subject": "--subject |--subject a..b|--subject .a|--subject a.|--subject a b|--subject a\tb"
    "|--subject a\n|--subject \x1b|--subject \udcff|--subject " + "a" * 5000,
    "wildcard": "--subject *|--subject a.>|--subject a*b|publish --subject a.*"
    "|subscribe --subject a*|subscribe --subject >.a|subscribe --subject a.>b"
    "|subscribe --subject a..>",
    "queue": "--queue |--queue a b|--queue a\tb|--queue a\n|--queue " + "q" * 5000,
    "server": "-s |-s localhost|-s http://a|-s nats://|-s nats://a,|-s nats://a b"
    "|-s nats://a,ftp://b",
    "secret": "-s nats://me:secret@|-s me:secret@a|-s http://me:sec ret@a|--sever x://me:secret@h"
    "|-s nats://me:secret@a:999999|-s ftp://secret@a",
    "other": "neither|both \x1b[31m|both publish|--unknown|--su a|-c|-s",
}


# One process for all of a kind: only the start of Python would be repeated.
EACH = """
statuses = []
for line in json.loads(sys.argv[1]):
    sys.argv[1:] = line.split(" ", 2)
    statuses.append(script.main())
print(statuses)
"""


@pytest.mark.parametrize("kind", BAD)
def test_bad_arguments_get_one_line(run: Start, kind: str) -> None:
    lines = BAD[kind].split("|")
    done = run(json.dumps(lines), code=EACH)
    assert done.out == [str([2] * len(lines))], done.lines
    assert len(done.err) == len(lines)
    for error in done.err:
        assert error.startswith("error: ") and error.isprintable() and len(error) < 400
        assert "ret@" not in error


def test_bad_argument_ends_the_script_with_status_2(run: Start) -> None:
    done = run("--subject", "a..b")
    assert done.process.returncode == 2 and done.out == [] and len(done.err) == 1


def test_help_fits_a_terminal(run: Start) -> None:
    done = run("--help", env={"COLUMNS": "80"})
    assert done.process.returncode == 0 and all(len(line) <= 80 for line in done.out)


ROLES = """
for sys.argv[1:] in json.loads(sys.argv[1]):
    print(script.arguments().role)
"""


def test_help_is_enough(run: Start) -> None:
    done = run("--help")
    for default in "both", "greetings", "5", "0.5", "Hello, NATS!", "1", "0":
        assert done.count(re.escape(f"({default})")) >= 1, default
    examples = [re.split("  +", line.strip())[0] for line in done.out if ".py" in line][1:]
    parsed = run(json.dumps([shlex.split(line)[1:] for line in examples]), code=ROLES)
    assert parsed.out == ["both", "subscribe", "publish"]
