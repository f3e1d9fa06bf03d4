"""What a taken-over agent could write: packets into its pod's stack, through the descriptor of `tenc0` that it holds.

    taken.py PID OWN FROM...   run in the pod's network namespace; copies the descriptor from the process PID

For each address FROM of OWN's family: an echo request, a datagram to a closed port and a SYN to a closed and to an open one, all in
FROM's name, with the tests' canary. The pod's kernel is the one that answers. Source: pidfd_getfd(2), tun(4).
"""

import ctypes
import fcntl
import ipaddress
import os
import struct
import sys

CANARY = b"TENCRYPT-TEST-CANARY"
SYS_PIDFD_GETFD = 438
TUNGETVNETHDRSZ = 0x800454D7


def device(path):
    """The device of a TUN descriptor, by its fdinfo."""
    with open(path, encoding="ascii") as file:
        return next((line.split()[1] for line in file if line.startswith("iff:")), "")


def tun_of(pid):
    """A descriptor of our own for `tenc0` of the process."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}") == "/dev/net/tun" and device(f"/proc/{pid}/fdinfo/{name}") == "tenc0":
            pidfd = os.pidfd_open(int(pid))
            fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_PIDFD_GETFD, pidfd, int(name), 0)
            if fd < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            return fd
    sys.exit(f"taken.py: process {pid} does not hold tenc0")


def checksum(data):
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def ip(source, to, protocol, payload):
    if source.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(payload), protocol, 64) + source.packed + to.packed + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0) + source.packed + to.packed
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def summed(source, to, protocol, payload, at):
    """The payload with its checksum at offset `at`."""
    pseudo = source.packed + to.packed + struct.pack("!II", len(payload), protocol)
    value = checksum((b"" if protocol == 1 else pseudo) + payload)
    return payload[:at] + struct.pack("!H", value) + payload[at + 2 :]


def packets(source, to):
    kind, icmp = (8, 1) if source.version == 4 else (128, 58)
    echo = struct.pack("!BBHHH", kind, 0, 0, 1, 1) + CANARY
    yield ip(source, to, icmp, summed(source, to, icmp, echo, 2))
    datagram = struct.pack("!HHHH", 7, 9, 8 + len(CANARY), 0) + CANARY
    yield ip(source, to, 17, summed(source, to, 17, datagram, 6))
    for port in (9, 8080):
        syn = struct.pack("!HHIIBBHHH", 4_000, port, 7, 0, 5 << 4, 2, 64_000, 0, 0)
        yield ip(source, to, 6, summed(source, to, 6, syn, 16))


def main():
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    tun, own = tun_of(sys.argv[1]), ipaddress.ip_address(sys.argv[2])
    size = bytearray(4)
    fcntl.ioctl(tun, TUNGETVNETHDRSZ, size)
    for source in map(ipaddress.ip_address, sys.argv[3:]):
        for packet in packets(source, own):
            os.write(tun, bytes(struct.unpack("i", size)[0]) + packet)
            print("written", source)


if __name__ == "__main__":
    main()
