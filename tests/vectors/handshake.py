#!/usr/bin/env python3
"""The known answers of src/proto/noise/tests/vectors.rs, from the WireGuard paper's sections 5.4.2 to 5.4.7.

handshake.py     needs Python 3 and the `cryptography` package; prints initiation, response, data and keepalive per suite,
                 and per sender the cookie reply to an initiation, and that initiation's MAC2 with the cookie
"""

import hashlib
import hmac
import ipaddress
import struct

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

SUITES = {
    "chacha20poly1305": (b"Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s", ChaCha20Poly1305, "<Q"),
    "aes256gcm": (b"Noise_IKpsk2_25519_AESGCM_BLAKE2s", AESGCM, ">Q"),
}


def blake2s(*parts):
    return hashlib.blake2s(b"".join(parts)).digest()


def kdf(key, data, n):
    mac = lambda k, d: hmac.new(k, d, lambda: hashlib.new("blake2s256")).digest()
    secret, out, last = mac(key, data), [], b""
    for i in range(1, n + 1):
        last = mac(secret, last + bytes([i]))
        out.append(last)
    return out


def public(secret):
    return secret.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)


def dh(secret, point):
    return secret.exchange(X25519PublicKey.from_public_bytes(point))


def with_macs(message, receiver):
    key = blake2s(b"mac1----", receiver)
    return message + hashlib.blake2s(message, digest_size=16, key=key).digest() + bytes(16)


def vectors(name, cipher, order):
    def seal(key, counter, text, associated):
        return cipher(key).encrypt(bytes(4) + struct.pack(order, counter), text, associated)

    key = lambda byte: X25519PrivateKey.from_private_bytes(bytes([byte]) * 32)
    si, sr, ei, er = key(0x11), key(0x22), key(0x33), key(0x44)
    psk, index_i, index_r = bytes([0x55]) * 32, struct.pack("<I", 0x01020304), struct.pack("<I", 0x0A0B0C0D)
    stamp = struct.pack(">QI", 0x400000000000000A + 1_700_000_000, 123_456_789)

    # A Noise name longer than a hash is hashed, a shorter one is padded; both are longer.
    ck = blake2s(name)
    h = blake2s(blake2s(ck, b"WireGuard v1 zx2c4 Jason@zx2c4.com"), public(sr))
    h, (ck,) = blake2s(h, public(ei)), kdf(ck, public(ei), 1)
    ck, k = kdf(ck, dh(ei, public(sr)), 2)
    static = seal(k, 0, public(si), h)
    h = blake2s(h, static)
    ck, k = kdf(ck, dh(si, public(sr)), 2)
    time = seal(k, 0, stamp, h)
    h = blake2s(h, time)
    initiation = with_macs(b"\x01\0\0\0" + index_i + public(ei) + static + time, public(sr))

    h, (ck,) = blake2s(h, public(er)), kdf(ck, public(er), 1)
    (ck,) = kdf(ck, dh(er, public(ei)), 1)
    (ck,) = kdf(ck, dh(er, public(si)), 1)
    ck, t, k = kdf(ck, psk, 3)
    h = blake2s(h, t)
    empty = seal(k, 0, b"", h)
    response = with_macs(b"\x02\0\0\0" + index_r + index_i + public(er) + empty, public(si))

    send_i, send_r = kdf(ck, b"", 2)
    data = b"\x04\0\0\0" + index_r + bytes(8) + seal(send_i, 0, b"sixteen bytes ok", b"")
    keepalive = b"\x04\0\0\0" + index_i + bytes(8) + seal(send_r, 0, b"", b"")
    return {"initiation": initiation, "response": response, "data": data, "keepalive": keepalive}


def hchacha20(key, nonce):
    """The key of an XChaCha20 nonce (draft-irtf-cfrg-xchacha-03, section 2.2), out of the block function: it adds its input."""
    block = Cipher(ChaCha20(key, nonce), mode=None).encryptor().update(bytes(64))
    words, start = struct.unpack("<16I", block), struct.unpack("<4I", b"expand 32-byte k")
    added = start + struct.unpack("<8I4I", key + nonce)
    plain = [(word - add) % 2**32 for word, add in zip(words, added)]
    return struct.pack("<8I", *plain[:4], *plain[12:])


def cookie_vectors(initiation, receiver, address):
    mac = lambda key, data: hashlib.blake2s(data, digest_size=16, key=key).digest()
    secret, nonce, mac1 = bytes([0x66]) * 32, bytes([0x77]) * 24, initiation[-32:-16]
    cookie = mac(secret, ipaddress.ip_address(address).packed + struct.pack(">H", 51820))
    key = hchacha20(blake2s(b"cookie--", receiver), nonce[:16])
    sealed = ChaCha20Poly1305(key).encrypt(bytes(4) + nonce[16:], cookie, mac1)
    return b"\x03\0\0\0" + initiation[4:8] + nonce + sealed, mac(cookie, initiation[:-16])


for suite, parameters in SUITES.items():
    for message, value in vectors(*parameters).items():
        print(suite, message, value.hex())

initiation = vectors(*SUITES["chacha20poly1305"])["initiation"]
for address in ("10.0.0.1", "fd00::1"):
    reply, mac2 = cookie_vectors(initiation, public(X25519PrivateKey.from_private_bytes(bytes([0x22]) * 32)), address)
    print(address, "cookie reply", reply.hex())
    print(address, "mac2", mac2.hex())
