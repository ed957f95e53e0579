"""Fingerprints of public keys: how the fleet remembers with which key a node joined. Owns no key."""

import hashlib
from typing import Any

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes as PublicKey


def peer_key_sha256(context: "grpc.aio.ServicerContext[Any, Any]") -> str:
    """Of the key in the certificate that the caller showed and TLS verified; "" without one."""
    pem = next(iter(context.auth_context().get("x509_pem_cert", ())), b"")
    return key_sha256(x509.load_pem_x509_certificate(pem).public_key()) if pem else ""


def key_sha256(key: PublicKey) -> str:
    """Of its SubjectPublicKeyInfo, in hexadecimal."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
