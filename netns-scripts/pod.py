"""What a pod of the lab runs: a web server, a UDP echo server, a sender of odd packets.

    pod.py http PORT DIRECTORY [ADDRESS]   files of a folder, dual stack, a thread per connection
    pod.py echo PORT                UDP, dual stack: each datagram goes back where it came from
    pod.py send CLASS ADDRESS PORT  one packet of a class of the leak detector; nothing is awaited
    pod.py frames DEVICE            one frame that is neither ARP nor IP
"""

import functools
import http.server
import socket
import socketserver
import struct
import sys


CANARY = b"TENCRYPT-TEST-CANARY"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files by sendfile; no names are looked up."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def copyfile(self, source, outputfile):
        outputfile.flush()
        self.connection.sendfile(source)


class Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 1024

    def server_bind(self):
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


def serve_http(port, directory, address="::"):
    Server((address, port), functools.partial(Handler, directory=directory)).serve_forever()


def serve_echo(port):
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sock.bind(("::", port))
    while True:
        try:
            data, peer = sock.recvfrom(65535)
            sock.sendto(data, peer)
        except OSError:
            # An ICMP error of an earlier answer: the next datagram is served as ever.
            continue


def udp(family, address, port, payload, source_port=0):
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if source_port:
        sock.bind(("", source_port))
    sock.sendto(payload, (address, port))


def raw(family, address, protocol, payload):
    sock = socket.socket(family, socket.SOCK_RAW, protocol)
    sock.sendto(payload, (address, 0))


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def send(kind, address, port):
    v6 = ":" in address
    family = socket.AF_INET6 if v6 else socket.AF_INET
    if kind == "tcp":
        with socket.socket(family) as sock:
            sock.settimeout(1)
            sock.connect_ex((address, port))
    elif kind == "udp":
        udp(family, address, port, b"plain text")
    elif kind == "port":
        udp(family, address, port, b"plain text", port)
    elif kind == "tunnel":
        udp(family, address, port, struct.pack("<I", 4) + bytes(28), port)
    elif kind == "fragment":
        udp(family, address, port, bytes(3000))
    elif kind == "options":
        # Record route; a destination option that is padding. No privilege is needed.
        option = (socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, bytes(8)) if v6 else (0, socket.IP_OPTIONS, bytes([7, 7, 4, 0, 0, 0, 0, 0]))
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(*option)
            sock.sendto(b"plain text", (address, port))
    elif kind in ("icmp", "canary"):
        # An echo request; the kernel fills in the ICMPv6 checksum, the IPv4 one is ours.
        head = struct.pack("!BBHHH", 128 if v6 else 8, 0, 0, 1, 1) + (CANARY if kind == "canary" else b"")
        if not v6:
            head = head[:2] + struct.pack("!H", checksum(head)) + head[4:]
        raw(family, address, socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP, head)
    elif kind == "other":
        raw(family, address, 253, b"plain text, protocol 253")
    else:
        sys.exit(f"pod.py: unknown class {kind}")


def frames(device):
    """A frame of an unknown type, for everybody on the link."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.sendto(b"\xff" * 6 + bytes(6) + b"\x88\xb5" + b"plain text".ljust(46), (device, 0x88B5))


def main():
    command, *args = sys.argv[1:] or [""]
    if command == "http" and len(args) in (2, 3):
        serve_http(int(args[0]), *args[1:])
    elif command == "echo" and len(args) == 1:
        serve_echo(int(args[0]))
    elif command == "frames" and len(args) == 1:
        frames(args[0])
    elif command == "send" and len(args) >= 3 and len(args) % 3 == 0:
        for kind, address, port in zip(args[0::3], args[1::3], args[2::3]):
            send(kind, address, int(port))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
