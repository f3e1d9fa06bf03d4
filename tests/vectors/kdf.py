#!/usr/bin/env python3
"""Writes kdf.json: known answers of the key derivation, from an implementation that shares no code with src/.

HKDF-SHA256 is written out from RFC 5869 over Python's hmac and hashlib; X25519 from RFC 7748 section 5.
Both are checked against the vectors of those RFCs before anything is written.
Usage: python3 tests/vectors/kdf.py > tests/vectors/kdf.json
"""

import base64
import hashlib
import hmac
import ipaddress
import json

P = 2**255 - 19


def hkdf_sha256(salt: bytes, ikm: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869; an empty salt stands for 32 zero bytes."""
    prk = hmac.new(salt or bytes(32), ikm, hashlib.sha256).digest()
    block, out, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        out, counter = out + block, counter + 1
    return out[:length]


def x25519(k: bytes, u: int) -> bytes:
    """RFC 7748 section 5; `k` is used as it is: our scalars are clamped already."""
    scalar = int.from_bytes(k, "little")
    x1, x2, z2, x3, z3, swap = u, 1, 0, u, 1, 0
    for t in reversed(range(255)):
        bit = (scalar >> t) & 1
        if swap ^ bit:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = bit
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a, b * b, d * a, c * b
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, x1 * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def clamp(k: bytes) -> bytes:
    b = bytearray(k)
    b[0] &= 248
    b[31] = b[31] & 127 | 64
    return bytes(b)


def address(text: str) -> bytes:
    ip = ipaddress.ip_address(text)
    return bytes([ip.version]) + ip.packed


def info(label: str, suite: str, domain: str, *addresses: bytes) -> bytes:
    head = b"\0".join([label.encode(), suite.encode(), domain.encode()])
    return head + b"\0" + b"".join(addresses)


def self_check() -> None:
    okm = hkdf_sha256(bytes(range(13)), b"\x0b" * 22, bytes(range(0xF0, 0xFA)), 42)
    assert okm.hex().startswith("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c"), "RFC 5869 A.1"
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    u = int.from_bytes(bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c"), "little")
    expected = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert x25519(clamp(scalar), u % P).hex() == expected, "RFC 7748 5.2"


def main() -> None:
    self_check()
    key = hashlib.sha256(b"tencrypt kdf vectors, key one").digest()
    statics, psks = [], []
    pairs = [
        ("10.42.0.17", "10.42.1.9"),
        ("10.42.1.9", "10.42.0.17"),
        ("10.42.0.17", "10.42.0.17"),
        ("9.255.255.255", "10.0.0.0"),
        ("fd00:42::11", "fd00:42:0:1::9"),
        ("fd00:42:0:1::9", "fd00:42::11"),
    ]
    for domain in ["shop", "a-rather-long-project-name-0123456789"]:
        for suite in ["chacha20poly1305", "aes256gcm"]:
            for a in ["10.42.0.17", "255.255.255.255", "fd00:42::11", "2001:db8::1"]:
                secret = clamp(hkdf_sha256(b"", key, info("tencrypt v1 static", suite, domain, address(a)), 32))
                statics.append({"project": domain, "suite": suite, "address": a,
                                "secret": secret.hex(), "public": x25519(secret, 9).hex()})
            for a, b in pairs:
                both = sorted([address(a), address(b)])
                psks.append({"project": domain, "suite": suite, "own": a, "peer": b,
                             "psk": hkdf_sha256(b"", key, info("tencrypt v1 psk", suite, domain, *both), 32).hex()})
    print(json.dumps({
        "method": "python3 tests/vectors/kdf.py: HKDF-SHA256 (RFC 5869) over hmac/hashlib, X25519 written out from RFC 7748",
        "project_key": base64.b64encode(key).decode(),
        "static": statics,
        "psk": psks,
    }, indent=1))


if __name__ == "__main__":
    main()
