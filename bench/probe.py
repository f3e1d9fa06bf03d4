"""Probes of the benchmark: round trips over TCP, the first byte, a numbered UDP stream, and a flood.

    probe.py pong PORT                  TCP, dual stack, a thread per connection: each request goes back as its answer;
                                        prints `ready`
    probe.py ping ADDRESS PORT COUNT SECONDS
                                        one connection, 64-byte requests, so many or so long; prints p50, p99 in us and
                                        how many there were
    probe.py reach ADDRESS PORT SECONDS tries until an answer comes
    probe.py protected                  prints `ready`, reads up to a line that begins with `protected`
    probe.py first ADDRESS PORT         the same, then connects at once; prints `first` and the ms from that line to the
                                        first byte of an answer
    probe.py sink PORT                  UDP, dual stack: counts one stream; prints `ready`, then
                                        `received N duplicate D reordered R`
    probe.py stream ADDRESS PORT PPS SECONDS
                                        sends that stream, 1200 bytes each; prints `sent N seconds S errors E`
    probe.py drain PORT                 UDP, dual stack: counts a flood; prints `ready`, then `received N seconds S`
    probe.py flood ADDRESS PORT SIZE SECONDS
                                        sends datagrams of one size as fast as one thread can; prints `sent N`

A datagram of the stream starts with its number, from 0; the number END closes the stream.
"""

import ctypes
import gc
import os
import select
import socket
import struct
import sys
import threading
import time

REQUEST = 64
WARM_UP = 200
PAYLOAD = 1200
NUMBER = struct.Struct("!Q")
END = (1 << 64) - 1
# A stream that falls silent without an END is over after this many seconds.
SILENCE = 5.0
# Datagrams sent in one go at most: a sender that was not scheduled for a while does not catch up in one
# burst, which no queue on the path is made for.
BURST = 64
# Room for the receiver's own scheduling delays, so that a loss is the path's. Not in Python's socket module.
SO_RCVBUFFORCE = 33
RECEIVE_BUFFER = 32 << 20
# prctl: timers as exact as the kernel can (the default slack of 50 us is half a tick of the pacing).
PR_SET_TIMERSLACK = 29
TICK = 0.0002
# A flood takes so many datagrams per system call, each one a packet of its own: what a program can send that does
# not build super-packets. Silence ends it.
BATCH = 64
FLOOD_BUFFER = 4 << 20
FLOOD_SILENCE = 1.0
MSG_WAITFORONE = 0x10000


def dual_stack(kind, port):
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    return sock


def read_exactly(sock, buffer):
    """Fills the buffer; false at the end of the connection."""
    view = memoryview(buffer)
    while view:
        n = sock.recv_into(view)
        if n == 0:
            return False
        view = view[n:]
    return True


def echo(sock):
    buffer = bytearray(REQUEST)
    try:
        cubic(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while read_exactly(sock, buffer):
            sock.sendall(buffer)
    except OSError:
        # A client that went away is no news.
        pass
    finally:
        sock.close()


def pong(port):
    listener = dual_stack(socket.SOCK_STREAM, port)
    listener.listen(16)
    print("ready", flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=echo, args=(sock,), daemon=True).start()


def cubic(sock):
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")


def connect(address, port, timeout):
    sock = socket.create_connection((address, port), timeout=timeout)
    cubic(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ping(address, port, count, seconds):
    sock = connect(address, port, 10)
    buffer = bytearray(REQUEST)
    times = []
    until = time.perf_counter_ns() + int(seconds * 1e9)
    while len(times) < WARM_UP + count:
        began = time.perf_counter_ns()
        if began > until:
            break
        sock.sendall(buffer)
        if not read_exactly(sock, buffer):
            sys.exit("probe.py: the connection ended")
        times.append(time.perf_counter_ns() - began)
    times = sorted(times[min(WARM_UP, len(times) // 10):])
    n = len(times)
    if not n:
        sys.exit("probe.py: no answer in time")
    print(f"{times[n // 2] / 1000:.1f} {times[n * 99 // 100] / 1000:.1f} {n}")


def reach(address, port, seconds):
    until = time.monotonic() + seconds
    while True:
        try:
            with connect(address, port, 1) as sock:
                sock.sendall(bytes(REQUEST))
                if read_exactly(sock, bytearray(REQUEST)):
                    return
        except OSError:
            pass
        if time.monotonic() > until:
            sys.exit("probe.py: no answer")
        time.sleep(0.02)


def protected():
    print("ready", flush=True)
    line = b""
    while not line.startswith(b"protected") or not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("probe.py: no line that begins with `protected`")
        line = byte if line.endswith(b"\n") else line + byte


def first(address, port):
    # What this process itself loads for its first connection is not to be measured.
    try:
        connect("127.0.0.1", 9, 1).close()
    except OSError:
        pass
    protected()
    began = time.perf_counter_ns()
    sock = connect(address, port, 10)
    sock.sendall(bytes(REQUEST))
    sock.recv(1)
    print(f"first {(time.perf_counter_ns() - began) / 1e6:.3f}")


def sink(port):
    sock = dual_stack(socket.SOCK_DGRAM, port)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
    print("ready", flush=True)
    seen = bytearray()
    received = duplicate = reordered = highest = 0
    buffer = bytearray(2048)
    recv_into, unpack_from = sock.recv_into, NUMBER.unpack_from
    sock.settimeout(60)
    try:
        while True:
            recv_into(buffer)
            (number,) = unpack_from(buffer)
            if number == END:
                break
            if number >= len(seen):
                if not seen:
                    sock.settimeout(SILENCE)
                seen.extend(bytes(number + (1 << 20) - len(seen)))
            if seen[number]:
                duplicate += 1
                continue
            seen[number] = 1
            received += 1
            if number < highest:
                reordered += 1
            else:
                highest = number
    except TimeoutError:
        pass
    print(f"received {received} duplicate {duplicate} reordered {reordered}")


def stream(address, port, pps, seconds):
    ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.connect((address, port))
    total = int(pps * seconds)
    buffer = bytearray(NUMBER.size) + os.urandom(PAYLOAD - NUMBER.size)
    pack_into, send, clock = NUMBER.pack_into, sock.send, time.perf_counter
    sent = errors = 0
    began = clock()
    # The stream ends in time also when the sender cannot keep up; what counts is what was sent.
    while sent < total:
        elapsed = clock() - began
        if elapsed > seconds:
            break
        due = min(total, int(elapsed * pps) + 1)
        until = min(due, sent + BURST)
        while sent < until:
            pack_into(buffer, 0, sent)
            try:
                send(buffer)
            except OSError:
                errors += 1
            sent += 1
        time.sleep(TICK)
    elapsed = clock() - began
    # What is still under way arrives before the END.
    for _ in range(5):
        time.sleep(0.1)
        pack_into(buffer, 0, END)
        try:
            send(buffer)
        except OSError:
            # The sink heard an earlier one and has gone.
            break
    print(f"sent {sent} seconds {elapsed:.3f} errors {errors}")


class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class Header(ctypes.Structure):
    _fields_ = [("name", ctypes.c_void_p), ("name_size", ctypes.c_uint), ("vector", ctypes.POINTER(Vector)),
                ("vectors", ctypes.c_size_t), ("control", ctypes.c_void_p), ("control_size", ctypes.c_size_t),
                ("flags", ctypes.c_int)]


class Message(ctypes.Structure):
    """struct mmsghdr."""

    _fields_ = [("header", Header), ("done", ctypes.c_uint)]


def batch(size):
    """So many messages that share one buffer; whoever uses them keeps all three."""
    buffer = ctypes.create_string_buffer(size)
    vector = Vector(ctypes.cast(buffer, ctypes.c_void_p), size)
    messages = (Message * BATCH)()
    for message in messages:
        message.header.vector, message.header.vectors = ctypes.pointer(vector), 1
    return messages, vector, buffer


def flood(address, port, size, seconds):
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect((address, port))
    messages, *keep = batch(size)
    sendmmsg, fd, clock = ctypes.CDLL(None).sendmmsg, sock.fileno(), time.perf_counter
    sent = 0
    until = clock() + seconds
    while clock() < until:
        sent += max(sendmmsg(fd, messages, BATCH, 0), 0)
    print(f"sent {sent}")


def drain(port):
    sock = dual_stack(socket.SOCK_DGRAM, port)
    sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, FLOOD_BUFFER)
    messages, *keep = batch(2048)
    recvmmsg, fd, clock = ctypes.CDLL(None).recvmmsg, sock.fileno(), time.perf_counter
    print("ready", flush=True)
    select.select([sock], [], [], 30)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(FLOOD_SILENCE), 0))
    received = 0
    began = last = clock()
    while (got := recvmmsg(fd, messages, BATCH, MSG_WAITFORONE, None)) > 0:
        received += got
        last = clock()
    print(f"received {received} seconds {last - began:.3f}")


def main():
    gc.disable()
    command, *args = sys.argv[1:] or [""]
    if command == "pong" and len(args) == 1:
        pong(int(args[0]))
    elif command == "ping" and len(args) == 4:
        ping(args[0], int(args[1]), int(args[2]), float(args[3]))
    elif command == "reach" and len(args) == 3:
        reach(args[0], int(args[1]), float(args[2]))
    elif command == "protected" and not args:
        protected()
    elif command == "first" and len(args) == 2:
        first(args[0], int(args[1]))
    elif command == "sink" and len(args) == 1:
        sink(int(args[0]))
    elif command == "stream" and len(args) == 4:
        stream(args[0], int(args[1]), float(args[2]), float(args[3]))
    elif command == "flood" and len(args) == 4:
        flood(args[0], int(args[1]), int(args[2]), float(args[3]))
    elif command == "drain" and len(args) == 1:
        drain(int(args[0]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
