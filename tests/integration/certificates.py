"""A small certificate authority for tests: roots that rotate, leaves with SPIFFE names as Consul makes them."""

import datetime as dt

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outrider.ids import ServiceName
from outrider.model.mesh import Leaf, spiffe_id

_DAY = dt.timedelta(days=1)


class Authority:
    def __init__(self, trust_domain: str, datacenter: str) -> None:
        self.trust_domain, self.datacenter = trust_domain, datacenter
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"root {x509.random_serial_number():x}")])
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        self._certificate = self._sign(self._name, self._key, [(constraints, True)])
        self.certificate_pem = _pem(self._certificate)

    def leaf(self, service: str, uri: str = "", *, expired: bool = False, host: str = "") -> Leaf:
        """A certificate for `service`; under another name where `uri` says so; also for a `host` of the world."""
        uri = uri or spiffe_id(self.trust_domain, self.datacenter, ServiceName(service))
        key = ec.generate_private_key(ec.SECP256R1())
        usages = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        hosts = [x509.DNSName(host)] if host else []
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *hosts])
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)])
        certificate = self._sign(subject, key, [(usages, False), (names, True)], expired=expired)
        return Leaf(
            service=ServiceName(service),
            certificate_pem=_pem(certificate),
            key_pem=key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ).decode(),
            serial=f"{certificate.serial_number:x}",
        )

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extensions: list[tuple[x509.ExtensionType, bool]],
        *,
        expired: bool = False,
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - _DAY,
            not_valid_after=now - _DAY / 2 if expired else now + _DAY,
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
