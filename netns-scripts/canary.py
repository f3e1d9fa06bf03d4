"""The leak detector's second half: finds the tests' canary in frames of the pods' links, on one node.

    canary.py FIFO FILTER     FILTER: classic BPF as `tcpdump -ddd` prints it

Commands come in lines through FIFO:
    answer FILE               what the commands before it had to say goes to FILE, in one step
    counts | reset            lines of POD FAMILY DIRECTION canary FRAMES, and `detector - - lost FRAMES`; reset: and from zero
    declare ADDRESS PROTOCOL  packets of this protocol to and from there may bear the canary; `undeclare`: none may
    deep on | off             reads every frame of the links, sealed ones included, instead of those of FILTER

One packet socket hears every device of the node; those that are no pod's link (p-POD) are ignored. Frames that the kernel
could not queue are `lost`, which is a failure of the detector.
"""

import ctypes
import ipaddress
import os
import selectors
import socket
import struct
import sys

CANARIES = (b"TENCRYPT-TEST-CANARY", b"TENCRYPT-CANARY-")
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58}
ETH_P_ALL = 3
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
SOL_PACKET, PACKET_STATISTICS = 263, 6
BUFFER = 64 << 20
FRAME_MAX = 1 << 18


class Sniffer:
    """What was heard on the links so far."""

    def __init__(self, filter_file):
        self.program = self.parse(filter_file)
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self.sock.setblocking(False)
        self.found, self.lost, self.declared = {}, 0, set()
        self.attach(self.program)

    @staticmethod
    def parse(path):
        with open(path, encoding="ascii") as file:
            lines = file.read().split("\n")[1:]
        return [tuple(map(int, line.split())) for line in lines if line]

    def attach(self, program):
        code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
        self.code = ctypes.create_string_buffer(code)
        pointer = ctypes.addressof(self.code)
        self.sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxQ", len(program), pointer))

    def deep(self, on):
        # One instruction: take the whole frame.
        self.attach([(6, 0, 0, FRAME_MAX)] if on else self.program)

    def drain(self):
        while True:
            try:
                frame, (device, _, kind, *_) = self.sock.recvfrom(FRAME_MAX)
            except BlockingIOError:
                return
            except OSError:
                # A device went down: the socket goes on with the others.
                continue
            if device.startswith("p-") and any(canary in frame for canary in CANARIES):
                self.judge(frame, device[2:], "in" if kind == socket.PACKET_OUTGOING else "out")

    def judge(self, frame, pod, direction):
        kind, family, ends, protocol = frame[12:14], "link", (), 0
        if kind == b"\x08\x00":
            family, ends, protocol = "v4", (frame[26:30], frame[30:34]), frame[23]
        elif kind == b"\x86\xdd":
            family, ends, protocol = "v6", (frame[22:38], frame[38:54]), frame[20]
        if not self.declared.intersection((end, protocol) for end in ends):
            row = (pod, family, direction)
            self.found[row] = self.found.get(row, 0) + 1

    def counts(self):
        self.drain()
        _, dropped = struct.unpack("II", self.sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        self.lost += dropped
        rows = [f"{pod} {family} {direction} canary {n}\n" for (pod, family, direction), n in self.found.items()]
        return "".join(rows) + f"detector - - lost {self.lost}\n"

    def reset(self):
        text = self.counts()
        self.found, self.lost = {}, 0
        return text

    def command(self, words):
        """Carries out one command; its answer, or nothing."""
        match words:
            case ["counts"]:
                return self.counts()
            case ["reset"]:
                return self.reset()
            case ["declare", address, protocol]:
                address = ipaddress.ip_address(address)
                if protocol == "icmp" and address.version == 6:
                    protocol = "ipv6-icmp"
                number = PROTOCOLS.get(protocol) or int(protocol)
                self.declared.add((address.packed, number))
            case ["undeclare"]:
                self.declared.clear()
            case ["deep", state]:
                self.drain()
                self.deep(state == "on")
        return ""


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sniffer = Sniffer(sys.argv[2])
    # Open for writing too: it never reads an end of file.
    fifo = os.open(sys.argv[1], os.O_RDWR | os.O_NONBLOCK)
    waiting = selectors.DefaultSelector()
    waiting.register(sniffer.sock, selectors.EVENT_READ)
    waiting.register(fifo, selectors.EVENT_READ)
    unread, answer = b"", ""
    while True:
        waiting.select()
        sniffer.drain()
        try:
            unread += os.read(fifo, 65536)
        except BlockingIOError:
            continue
        *lines, unread = unread.split(b"\n")
        for line in lines:
            words = line.decode().split()
            if words[:1] == ["answer"]:
                with open(words[1] + ".new", "w", encoding="ascii") as file:
                    file.write(answer)
                os.rename(words[1] + ".new", words[1])
                answer = ""
            else:
                answer += sniffer.command(words)


if __name__ == "__main__":
    main()
