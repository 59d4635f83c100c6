"""A pod of the policy cases: serves ports 80 and 81 of TCP and UDP, and tries others when asked.

A line on standard input is a JSON list of [address, protocol, port, expected]; the answer is a line with a list of true and
false, true where the other side's greeting came. Those that are expected are waited for, and then as long for the others as the
first argument says, in seconds: what got through although it should not would not take longer than what may."""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time

LONGER = float(sys.argv[1])
PATIENCE = 10
PORTS = (80, 81)
GREETING = b"hello"


def serve():
    poll = select.poll()
    known = {}
    for family, any_address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for port in PORTS:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                one = socket.socket(family, kind)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind((any_address, port))
                if kind == socket.SOCK_STREAM:
                    one.listen(128)
                one.setblocking(False)
                poll.register(one, select.POLLIN)
                known[one.fileno()] = (one, kind)
    print("ready", flush=True)
    while True:
        for number, _ in poll.poll():
            one, kind = known[number]
            try:
                if kind == socket.SOCK_DGRAM:
                    _, sender = one.recvfrom(100)
                    one.sendto(GREETING, sender)
                else:
                    client, _ = one.accept()
                    client.send(GREETING)
                    client.close()
            except OSError:
                pass


def again(one):
    try:
        one.send(GREETING)
    except OSError:
        pass


def ask(targets):
    """Asks all at once."""
    poll = select.poll()
    waiting = {}
    got = [False] * len(targets)
    for at, (address, protocol, port, _) in enumerate(targets):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        is_stream = protocol == "tcp"
        one = socket.socket(family, socket.SOCK_STREAM if is_stream else socket.SOCK_DGRAM)
        one.setblocking(False)
        try:
            one.connect((address, port))
            one.send(GREETING)
        except BlockingIOError:
            pass
        except OSError:
            one.close()
            continue
        poll.register(one, select.POLLIN)
        waiting[one.fileno()] = (one, at)
    end = time.monotonic() + PATIENCE
    is_waiting = True
    while waiting and (left := end - time.monotonic()) > 0:
        if is_waiting and not any(targets[at][3] for _, at in waiting.values()):
            is_waiting = False
            end = time.monotonic() + LONGER
            continue
        events = poll.poll(min(left, 0.2) * 1000)
        if not events:
            # A datagram may be lost while a neighbor is asked for.
            for one, at in waiting.values():
                if targets[at][1] == "udp":
                    again(one)
        for number, _ in events:
            one, at = waiting.pop(number)
            poll.unregister(one)
            try:
                got[at] = one.recv(100) == GREETING
            except OSError:
                pass
            one.close()
    for one, _ in waiting.values():
        # No word to those that may not hear it.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.close()
    return got


# Two processes: threads of one interpreter would wait for each other.
parent = os.getpid()
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() == parent:
        serve()
    sys.exit()
for line in sys.stdin:
    print(json.dumps(ask(json.loads(line))), flush=True)
