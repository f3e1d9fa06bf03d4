"""What runs inside the namespaces.

    probe.py echo FAMILY PORT                          UDP and TCP: everything comes back; prints `ready`
    probe.py transfer ADDRESS PORT BYTES               so many random bytes over TCP, then UDP datagrams of many sizes; each must
                                                       come back as it was
    probe.py pace ADDRESS PORT COUNT INTERVAL DELAY    after DELAY, every INTERVAL seconds a UDP datagram and, half an interval
                                                       later, a few bytes over one TCP connection
    probe.py refused ADDRESS PORT SECONDS              fails if a TCP connection comes about, or a UDP datagram is answered

All but `echo` print one line of JSON. The exit status is 0 when everything came back.
"""

import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time

# Around the padding to 16, around the MTU of either side, and fragmented inside the tunnel.
SIZES = (0, 1, 15, 16, 17, 31, 32, 33, 64, 512, 1280, *range(1340, 1420, 5), 1472, 4000, 20000)
WAIT = 2.0
# An answer that takes longer is late, not lost.
LAST_WAIT = 5.0
NUMBER = struct.Struct("!Q56x")


def done(good, **facts):
    print(json.dumps(facts), flush=True)
    return 0 if good else 1


def echo(family, port):
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[int(family)]
    udp = socket.socket(family, socket.SOCK_DGRAM)
    tcp = socket.socket(family, socket.SOCK_STREAM)
    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    for sock in (udp, tcp):
        sock.bind(("", int(port)))
    tcp.listen(16)

    def datagrams():
        while True:
            data, sender = udp.recvfrom(65535)
            udp.sendto(data, sender)

    def stream(connection):
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    threading.Thread(target=datagrams, daemon=True).start()
    print("ready", flush=True)
    while True:
        threading.Thread(target=stream, args=(tcp.accept()[0],), daemon=True).start()


def connected_udp(address, port, wait):
    udp = socket.socket(socket.getaddrinfo(address, None)[0][0], socket.SOCK_DGRAM)
    udp.connect((address, port))
    udp.settimeout(wait)
    return udp


def transfer(address, port, amount):
    data = os.urandom(int(amount))
    back, received = hashlib.sha256(), 0
    with socket.create_connection((address, int(port)), 5) as tcp:
        tcp.settimeout(15)

        def send():
            tcp.sendall(data)
            tcp.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        while part := tcp.recv(1 << 16):
            back.update(part)
            received += len(part)
        sender.join(15)
    equal = back.digest() == hashlib.sha256(data).digest()
    unequal = []
    with connected_udp(address, int(port), WAIT) as udp:
        for size in SIZES:
            sent = os.urandom(size)
            udp.send(sent)
            try:
                same = udp.recv(65535) == sent
            except OSError:
                same = False
            if not same:
                unequal.append(size)
    return done(equal and not unequal, tcp_bytes=received, tcp_equal=equal, udp=len(SIZES), udp_unequal_sizes=unequal)


def pace(address, port, count, interval, delay):
    count, interval = int(count), float(interval)
    time.sleep(float(delay))
    answered, slowest, duplicates, errors = set(), 0.0, 0, []
    sent_at = {}
    udp = connected_udp(address, int(port), 0.5)
    ended = threading.Event()

    def receive():
        nonlocal slowest, duplicates
        while not ended.is_set():
            try:
                number = NUMBER.unpack(udp.recv(65535))[0]
            except TimeoutError:
                continue
            except OSError as error:
                errors.append(str(error))
                continue
            duplicates += number in answered
            answered.add(number)
            slowest = max(slowest, time.monotonic() - sent_at[number])

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    stream = 0
    with socket.create_connection((address, int(port)), 5) as tcp:
        tcp.settimeout(interval)
        began = time.monotonic()
        for number in range(count):
            time.sleep(max(0.0, began + number * interval - time.monotonic()))
            sent_at[number] = time.monotonic()
            udp.send(NUMBER.pack(number))
            time.sleep(max(0.0, began + (number + 0.5) * interval - time.monotonic()))
            tcp.sendall(NUMBER.pack(number))
            part = b""
            while len(part) < NUMBER.size and (more := tcp.recv(NUMBER.size - len(part))):
                part += more
            stream += part == NUMBER.pack(number)
    last = time.monotonic() + LAST_WAIT
    while len(answered) < count and time.monotonic() < last:
        time.sleep(0.05)
    ended.set()
    receiver.join()
    return done(len(answered) == count and stream == count and not duplicates and not errors,
                sent=count, answered=len(answered), duplicates=duplicates, tcp=stream, slowest_ms=round(slowest * 1000, 1),
                errors=errors[:3])


def refused(address, port, seconds):
    came = []
    with connected_udp(address, int(port), float(seconds)) as udp:
        udp.send(b"anyone")
        try:
            socket.create_connection((address, int(port)), float(seconds)).close()
            came.append("tcp")
        except OSError:
            pass
        try:
            udp.recv(100)
            came.append("udp")
        except OSError:
            pass
    return done(not came, came=came)


if __name__ == "__main__":
    sys.exit({"echo": echo, "transfer": transfer, "pace": pace, "refused": refused}[sys.argv[1]](*sys.argv[2:]))
