"""What an application may do with its sockets to reach an address: one way after the other; nothing is awaited.

    odd.py [--unprivileged] [--device NAME] [--mark N] WAY ADDRESS PORT ...

A line for each: `sent WAY ADDRESS`, `refused WAY ADDRESS ERROR` or `lacking WAY ADDRESS ERROR` (the kernel has no such option).
Every payload bears the tests' canary, but that of `zero`. --unprivileged: as uid 65534, without capabilities. --device binds the
sockets to it. --mark sets SO_MARK. Source: ip(7), ipv6(7), udp(7), tcp(7); RFC 8754 (segment routing header), RFC 791.
"""

import errno
import os
import socket
import struct
import sys

CANARY = b"TENCRYPT-TEST-CANARY"
IP_OPTIONS, IP_RETOPTS, IP_PKTINFO, IP_FREEBIND, IP_TRANSPARENT = 4, 7, 8, 15, 19
IPV6_PKTINFO, IPV6_HOPOPTS, IPV6_RTHDRDSTOPTS, IPV6_RTHDR, IPV6_DSTOPTS = 50, 54, 55, 57, 59
IPV6_TRANSPARENT, IPV6_FREEBIND, SO_MARK, UDP_CORK, UDP_SEGMENT = 75, 78, 36, 1, 103
UDPLITE = 136
TCP_FASTOPEN_NO_COOKIE = 34
LACKING = {errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT}
# First hops of source routes, which are nobody's of the project: the pod's gateway where it has such an address, else the outside.
HOP4, HOP6 = "203.0.113.10", "2001:db8:113::10"
FOREIGN4, FOREIGN6 = "10.9.9.9", "fd00:9::9"


class Sender:
    """How sockets are made, and where to."""

    def __init__(self, device, mark, address, port):
        self.device, self.mark, self.port = device, mark, port
        info = socket.getaddrinfo(address.encode(), port, type=socket.SOCK_DGRAM)[0]
        self.family, self.to = info[0], info[4]
        self.v6 = self.family == socket.AF_INET6
        self.text = address

    def socket(self, kind=socket.SOCK_DGRAM, protocol=0, family=None):
        sock = socket.socket(family or self.family, kind, protocol)
        sock.settimeout(0.5)
        if self.device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self.device.encode())
        if self.mark:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, self.mark)
        return sock

    def option(self, level, name, value):
        sock = self.socket()
        sock.setsockopt(level, name, value)
        sock.sendto(CANARY, self.to)

    def four(self, options):
        """An IPv4 option; the target's own family must be that."""
        if self.v6:
            raise OSError(errno.EAFNOSUPPORT, "")
        self.option(socket.IPPROTO_IP, IP_OPTIONS, options)

    def six(self, name, header):
        if not self.v6:
            raise OSError(errno.EAFNOSUPPORT, "")
        self.option(socket.IPPROTO_IPV6, name, header)

    # ---- plain datagrams

    def udp(self):
        self.socket().sendto(CANARY, self.to)

    def zero(self):
        self.socket().sendto(b"", self.to)

    def big(self):
        self.socket().sendto(CANARY * 200, self.to)

    def cork(self):
        sock = self.socket()
        sock.connect(self.to)
        sock.setsockopt(socket.IPPROTO_UDP, UDP_CORK, 1)
        sock.send(CANARY)
        sock.send(CANARY * 100)
        sock.setsockopt(socket.IPPROTO_UDP, UDP_CORK, 0)

    def more(self):
        sock = self.socket()
        sock.sendto(CANARY, socket.MSG_MORE, self.to)
        sock.sendto(CANARY, self.to)

    def segments(self):
        sock = self.socket()
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
        sock.sendto(CANARY * 150, self.to)

    def dontroute(self):
        self.option(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)

    def pktinfo(self):
        index = socket.if_nametoindex("eth0")
        if self.v6:
            control = (socket.IPPROTO_IPV6, IPV6_PKTINFO, bytes(16) + struct.pack("i", index))
        else:
            control = (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("i8x", index))
        self.socket().sendmsg([CANARY], [control], 0, self.to)

    def udplite(self):
        self.socket(socket.SOCK_DGRAM, UDPLITE).sendto(CANARY, self.to)

    def mapped(self):
        if self.v6:
            raise OSError(errno.EAFNOSUPPORT, "")
        sock = self.socket(family=socket.AF_INET6)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.sendto(CANARY, ("::ffff:" + self.text, self.port))

    def broadcast(self):
        self.option(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

    def group(self):
        index = socket.if_nametoindex("eth0")
        if self.v6:
            self.option(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        else:
            self.option(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("4s4si", bytes(4), bytes(4), index))

    # ---- sources of one's own

    def foreign_source(self, name4, name6):
        sock = self.socket()
        if self.v6:
            sock.setsockopt(socket.IPPROTO_IPV6, name6, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, name4, 1)
        sock.bind((FOREIGN6 if self.v6 else FOREIGN4, 0))
        sock.sendto(CANARY, self.to)

    def freebind(self):
        self.foreign_source(IP_FREEBIND, IPV6_FREEBIND)

    def transparent(self):
        self.foreign_source(IP_TRANSPARENT, IPV6_TRANSPARENT)

    # ---- TCP

    def tcp(self):
        sock = self.socket(socket.SOCK_STREAM)
        sock.connect(self.to)
        sock.sendall(CANARY)

    def fastopen(self):
        sock = self.socket(socket.SOCK_STREAM)
        # It waits for the connection: not for ever.
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 300_000))
        sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_NO_COOKIE, 1)
        try:
            sock.sendto(CANARY, socket.MSG_FASTOPEN, self.to)
        except BlockingIOError:
            # Its time is over; the SYN was sent.
            pass

    # ---- options and extension headers

    def record_route(self):
        self.four(bytes([7, 7, 4, 0, 0, 0, 0, 0]))

    def timestamp(self):
        self.four(bytes([68, 8, 5, 0, 0, 0, 0, 0]))

    def loose_route(self):
        self.four(bytes([131, 7, 4]) + socket.inet_aton(HOP4) + bytes(1))

    def strict_route(self):
        self.four(bytes([137, 7, 4]) + socket.inet_aton(HOP4) + bytes(1))

    def returned_route(self):
        if self.v6:
            raise OSError(errno.EAFNOSUPPORT, "")
        options = bytes([131, 7, 4]) + socket.inet_aton(HOP4) + bytes(1)
        self.socket().sendmsg([CANARY], [(socket.IPPROTO_IP, IP_RETOPTS, options)], 0, self.to)

    def segment_routing(self):
        # Two segments: the last is filled in by the kernel, the first is where the packet goes at first.
        head = struct.pack("!BBBBBBH", 0, 4, 4, 1, 1, 0, 0)
        self.six(IPV6_RTHDR, head + bytes(16) + socket.inet_pton(socket.AF_INET6, HOP6))

    def home_address(self):
        head = struct.pack("!BBBBI", 0, 2, 2, 1, 0)
        self.six(IPV6_RTHDR, head + socket.inet_pton(socket.AF_INET6, HOP6))

    def hop_by_hop(self):
        self.six(IPV6_HOPOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))

    def destination_options(self):
        self.six(IPV6_DSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))

    def routed_options(self):
        self.six(IPV6_RTHDRDSTOPTS, bytes([0, 0, 1, 4, 0, 0, 0, 0]))


def unprivileged():
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def attempt(way, device, mark, address, port):
    try:
        getattr(Sender(device, mark, address, port), way)()
        return "sent", ""
    except TimeoutError:
        return "sent", ""
    except OSError as error:
        return "lacking" if error.errno in LACKING else "refused", errno.errorcode.get(error.errno, str(error))


def main():
    args, device, mark = sys.argv[1:], "", 0
    while args and args[0].startswith("--"):
        name = args.pop(0)
        if name == "--unprivileged":
            unprivileged()
        elif name == "--device":
            device = args.pop(0)
        elif name == "--mark":
            mark = int(args.pop(0), 0)
        else:
            sys.exit(__doc__)
    if not args or len(args) % 3:
        sys.exit(__doc__)
    for way, address, port in zip(args[0::3], args[1::3], args[2::3]):
        outcome, error = attempt(way, device, mark, address, int(port))
        print(outcome, way, address, error, flush=True)


if __name__ == "__main__":
    main()
