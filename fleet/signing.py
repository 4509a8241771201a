"""Ed25519 signatures (RFC 8032) of bundles and advisories, with the library `cryptography`.

What is signed is the canonical JSON of a document without its ``signature``; its ``key`` is the
signer's public key in hex and is signed with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.codec import canonical
from ..errors import Refused
from ..machine import files
from .extras import need

_MOST = 1 << 20
"""Bytes of a file of keys."""

_PEM = re.compile(r"-----BEGIN PUBLIC KEY-----.+?-----END PUBLIC KEY-----", re.S)
_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


@dataclass(frozen=True, slots=True)
class Trusted:
    """A public key (hex) whose signature counts; for one node only where `node` says so."""

    key: str
    node: str | None = None


class Untrusted(ValueError):
    """A signature that is missing, wrong, or by a key that does not count."""


def sign(document: Mapping[str, Any], key_file: Path) -> dict[str, Any]:
    """`document` with ``key`` and ``signature``, signed by the PEM private key in `key_file`.

    Raises Refused where that is no Ed25519 private key.
    """
    serialization = need("cryptography.hazmat.primitives.serialization")
    ed25519 = need("cryptography.hazmat.primitives.asymmetric.ed25519")
    try:
        private = serialization.load_pem_private_key(files.whole(key_file, _MOST, links=True), None)
    except OSError as error:
        raise Refused(f"the key {key_file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError):
        private = None
    except Exception as error:  # cryptography's own, e.g. an algorithm it lacks
        raise Refused(f"the key {key_file} cannot be used: {error}") from None
    if not isinstance(private, ed25519.Ed25519PrivateKey):
        raise Refused(f"{key_file} is not an unencrypted Ed25519 private key in PEM")
    known = {**document, "key": private.public_key().public_bytes_raw().hex()}
    known.pop("signature", None)
    return {**known, "signature": private.sign(_signed_part(known)).hex()}


def unsigned(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` as it is written without a signature."""
    return {**document, "key": None, "signature": None}


def check(
    document: Mapping[str, Any], trusted: Iterable[Trusted] | None, node: str | None = None
) -> str | None:
    """The key that signed `document`, or None where nobody did and nobody need.

    With `trusted`, one of those must have signed it, for `node` where the key is bound to one.
    Raises Untrusted.
    """
    key, signature = document.get("key"), document.get("signature")
    if key is None and signature is None:
        if trusted is not None:
            raise Untrusted("it is not signed")
        return None
    if not (isinstance(key, str) and _HEX_KEY.fullmatch(key)):
        raise Untrusted("its key is not an Ed25519 public key")
    if not (isinstance(signature, str) and _SIGNATURE.fullmatch(signature)):
        raise Untrusted("its signature is not one")
    if trusted is not None:
        mine = [t for t in trusted if t.key == key]
        if not mine:
            raise Untrusted("it is signed by a key that is not among those trusted")
        if all(t.node not in (None, node) for t in mine):
            raise Untrusted("it is signed by another node's key")
    ed25519 = need("cryptography.hazmat.primitives.asymmetric.ed25519")
    invalid = need("cryptography.exceptions").InvalidSignature
    part = {name: value for name, value in document.items() if name != "signature"}
    try:
        public = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
        public.verify(bytes.fromhex(signature), _signed_part(part))
    except (invalid, ValueError):
        raise Untrusted("its signature is wrong") from None
    return key


def keys(path: Path) -> tuple[Trusted, ...]:
    """The trusted keys in a file: PEM public keys one after the other, or JSON
    ``{"keys": [{"key": "<64 hex digits>", "node": "<node id>" or null}]}``.

    Raises Refused.
    """
    try:
        text = files.text(path, _MOST)
    except (OSError, ValueError) as error:
        raise Refused(f"the keys {path} cannot be read: {error}") from None
    found = _from_pem(text) if "BEGIN PUBLIC KEY" in text else _from_json(text)
    if not found:
        raise Refused(f"{path} holds no Ed25519 public key, neither as PEM nor as JSON")
    return found


def _from_pem(text: str) -> tuple[Trusted, ...]:
    serialization = need("cryptography.hazmat.primitives.serialization")
    ed25519 = need("cryptography.hazmat.primitives.asymmetric.ed25519")
    found = []
    for block in _PEM.findall(text):
        try:
            key = serialization.load_pem_public_key(block.encode())
        except ValueError:
            return ()
        if not isinstance(key, ed25519.Ed25519PublicKey):
            return ()
        found.append(Trusted(key.public_bytes_raw().hex()))
    return tuple(found)


def _from_json(text: str) -> tuple[Trusted, ...]:
    try:
        rows = json.loads(text)["keys"]
        found = tuple(Trusted(row["key"], row.get("node")) for row in rows)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ()
    fits = all(isinstance(t.key, str) and _HEX_KEY.fullmatch(t.key) for t in found)
    return found if fits else ()


def _signed_part(document: Mapping[str, Any]) -> bytes:
    return canonical(document).encode()
