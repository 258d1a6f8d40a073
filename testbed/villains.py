# SPDX-License-Identifier: Apache-2.0
"""Certificates that a gateway or a device must refuse, made anew for each run.

- :data:`VILLAINS`: each kind with what is wrong with it and what OpenSSL says about it.
- :func:`make`: one of them, for a given CA.
- :func:`credential_of`: a good one, to compare with.

Those that carry our CA's signature need the issuing CA's key: the lab's suites read it out of the lab's CA host. There
is no such thing on a real site, and no need: what it shows there is shown by the canary and by false CAs.
"""

from __future__ import annotations

import ipaddress
import warnings
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Key: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

DAY = timedelta(days=1)
CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
# AlgorithmIdentifiers in DER: cryptography no longer signs with SHA-1, so we put it in ourselves (RFC 3279 2.2).
SHA1_INSTEAD_OF = {
    bytes.fromhex("300a06082a8648ce3d040302"): bytes.fromhex("300906072a8648ce3d0401"),
    bytes.fromhex("300d06092a864886f70d01010b0500"): bytes.fromhex("300d06092a864886f70d0101050500"),
}


@dataclass(frozen=True)
class Credential:
    """A certificate (PEM, its chain behind it) and its private key (PEM)."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Case:
    """What a villain is made of."""

    ca: Credential
    name: str
    other: str
    dns: tuple[str, ...]
    ip: tuple[str, ...]
    now: datetime


@dataclass(frozen=True)
class Villain:
    """One kind of bad certificate.

    :param make: makes it.
    :param what: what is wrong with it, as a sentence for a report.
    :param reason: what OpenSSL 3 says when it verifies it against our CA; None where TLS has nothing against it, and
        the broker has to deal with its name.
    :param alert: the TLS alert that its bearer gets, in OpenSSL's words; None likewise.
    :param purpose: what it is presented as: sslclient or sslserver.
    :param level: the OpenSSL security level from which on it is refused (Debian's default is 2).
    """

    make: Callable[[Case], Credential]
    what: str
    reason: str | None
    alert: str | None
    purpose: str = "sslclient"
    level: int = 1


def make(
    kind: str,
    ca: Credential,
    *,
    now: datetime,
    name: str = "temp-101",
    other: str = "plc-201",
    dns: Sequence[str] = ("gateway-1.plant.example",),
    ip: Sequence[str] = (),
) -> Credential:
    """Make a villain.

    :param kind: a key of :data:`VILLAINS`.
    :param ca: certificate and key of the issuing CA that it pretends to come from, or does come from.
    :param name: the device whose name it bears.
    :param other: another device of the same site.
    :param dns: the gateway's DNS names, for those that pose as a gateway.
    :param ip: the gateway's addresses, likewise.
    :raises KeyError: when there is no such kind.
    """
    return VILLAINS[kind].make(Case(ca, name, other, tuple(dns), tuple(ip), now))


def credential_of(ca: Credential, name: str, now: datetime) -> Credential:
    """Make a good device certificate: what differs from it is what a villain is refused for."""
    return _ours(Case(ca, name, name, (), (), now))


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


def _load(credential: Credential) -> tuple[x509.Certificate, Key]:
    key = load_pem_private_key(credential.key, password=None)
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)):
        raise TypeError(f"no key that our CAs have: {type(key).__name__}")
    return x509.load_pem_x509_certificate(credential.certificate), key


def _pem(*certificates: x509.Certificate, key: Key) -> Credential:
    chain = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
    return Credential(chain, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _hash(key: Key) -> hashes.SHA256 | None:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _subject(issuer: x509.Certificate, *names: str) -> x509.Name:
    """Name a leaf as bednet-ca does, but for the CNs, which may be anything."""
    organisation = issuer.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[:1]
    with warnings.catch_warnings():
        # An empty CN is against X.520; that is what we are here for, and the check cannot be left out otherwise.
        warnings.simplefilter("ignore", UserWarning)
        common = [x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in names]
    return x509.Name([*organisation, *common])


def _builder(
    case: Case,
    issuer: x509.Certificate,
    key: Key,
    *,
    subject: x509.Name | None = None,
    usage: x509.ObjectIdentifier = CLIENT,
    start: datetime | None = None,
    end: datetime | None = None,
) -> x509.CertificateBuilder:
    """Begin a leaf like those that bednet-ca signs."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(issuer, case.name) if subject is None else subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start or case.now - DAY)
        .not_valid_after(end or case.now + DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(_authority_key_identifier(issuer), critical=False)
    )
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in case.dns]
    names += [x509.IPAddress(ipaddress.ip_address(address)) for address in case.ip]
    if usage == SERVER and names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        key_cert_sign=ca,
        crl_sign=ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _authority(
    subject: x509.Name,
    key: Key,
    now: datetime,
    *,
    issuer: tuple[x509.Certificate, Key] | None = None,
    key_identifier: x509.SubjectKeyIdentifier | None = None,
) -> x509.Certificate:
    """Make a CA certificate, signed by ``issuer`` or by itself."""
    signer = issuer[1] if issuer else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        .add_extension(key_identifier or x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if issuer:
        builder = builder.add_extension(_authority_key_identifier(issuer[0]), critical=False)
    return builder.sign(signer, _hash(signer))


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _ours(
    case: Case,
    *,
    subject: Sequence[str] | None = None,
    key: Key | None = None,
    usage: x509.ObjectIdentifier = CLIENT,
    start: datetime | None = None,
    end: datetime | None = None,
) -> Credential:
    """Sign with our own CA what it would never sign."""
    issuer, issuer_key = _load(case.ca)
    key = key or _new_key()
    name = None if subject is None else _subject(issuer, *subject)
    builder = _builder(case, issuer, key, subject=name, usage=usage, start=start, end=end)
    return _pem(builder.sign(issuer_key, _hash(issuer_key)), issuer, key=key)


# ---------------------------------------------------------------------------------------------------------------------
# The villains
# ---------------------------------------------------------------------------------------------------------------------


def _false_ca(case: Case, *, same_key_identifier: bool = False) -> tuple[x509.Certificate, Key]:
    """Make an issuing CA with our issuing CA's name, below a root with our root's name; the keys are its own."""
    ours, _ = _load(case.ca)
    root_key, key = _new_key(), _new_key()
    root = _authority(ours.issuer, root_key, case.now)
    identifier = None
    if same_key_identifier:
        identifier = ours.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return _authority(ours.subject, key, case.now, issuer=(root, root_key), key_identifier=identifier), key


def _wrong_ca(case: Case) -> Credential:
    issuer, issuer_key = _false_ca(case)
    key = _new_key()
    return _pem(_builder(case, issuer, key).sign(issuer_key, _hash(issuer_key)), issuer, key=key)


def _wrong_ca_same_key_identifier(case: Case) -> Credential:
    issuer, issuer_key = _false_ca(case, same_key_identifier=True)
    key = _new_key()
    return _pem(_builder(case, issuer, key).sign(issuer_key, _hash(issuer_key)), key=key)


def _wrong_ca_server(case: Case) -> Credential:
    issuer, issuer_key = _false_ca(case)
    key = _new_key()
    return _pem(_builder(case, issuer, key, usage=SERVER).sign(issuer_key, _hash(issuer_key)), issuer, key=key)


def _self_signed(case: Case) -> Credential:
    issuer, _ = _load(case.ca)
    key = _new_key()
    subject = _subject(issuer, case.name)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(case.now - DAY)
        .not_valid_after(case.now + DAY)
        .add_extension(x509.ExtendedKeyUsage([CLIENT]), critical=False)
    )
    return _pem(builder.sign(key, _hash(key)), key=key)


def _lonely_ca(case: Case) -> Credential:
    key = _new_key()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A CA that signed nothing")])
    return _pem(_authority(subject, key, case.now), key=key)


def _leaf_as_ca(case: Case) -> Credential:
    """Let a device's good certificate sign one for another device."""
    device = credential_of(case.ca, case.other, case.now)
    issuer, issuer_key = _load(device)
    key = _new_key()
    leaf = _builder(case, issuer, key).sign(issuer_key, _hash(issuer_key))
    return Credential(_pem(leaf, key=key).certificate + device.certificate, _pem(key=key).key)


def _path_length(case: Case) -> Credential:
    """Let the issuing CA, which has path length 0, make a CA below it."""
    ours, ours_key = _load(case.ca)
    middle_key = _new_key()
    middle = _authority(_subject(ours, "A CA too many"), middle_key, case.now, issuer=(ours, ours_key))
    key = _new_key()
    leaf = _builder(case, middle, key).sign(middle_key, _hash(middle_key))
    return _pem(leaf, middle, ours, key=key)


def _sha1(case: Case) -> Credential:
    """Sign with SHA-1.

    :raises ValueError: when the CA's key is of a kind that has no SHA-1 signature (Ed25519).
    """
    issuer, issuer_key = _load(case.ca)
    key = _new_key()
    # SHA-256 also where the CA would take SHA-384: the identifier below is what we look for.
    good = _builder(case, issuer, key).sign(issuer_key, _hash(issuer_key))
    body = _inside(good.tbs_certificate_bytes)
    for strong, weak in SHA1_INSTEAD_OF.items():
        if strong in body:
            tbs = _sequence(body.replace(strong, weak, 1))
            algorithm = weak
            break
    else:
        raise ValueError("this CA's key has no SHA-1 signature")
    if isinstance(issuer_key, ec.EllipticCurvePrivateKey):
        signature = issuer_key.sign(tbs, ec.ECDSA(hashes.SHA1()))  # noqa: S303
    elif isinstance(issuer_key, rsa.RSAPrivateKey):
        signature = issuer_key.sign(tbs, padding.PKCS1v15(), hashes.SHA1())  # noqa: S303
    else:
        raise ValueError("this CA's key has no SHA-1 signature")
    bits = b"\x03" + _length(len(signature) + 1) + b"\x00" + signature
    return _pem(x509.load_der_x509_certificate(_sequence(tbs + algorithm + bits)), issuer, key=key)


def _length(size: int) -> bytes:
    """Encode a length in DER (X.690 8.1.3)."""
    if size < 128:  # noqa: PLR2004  (the short form)
        return bytes([size])
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(octets)]) + octets


def _sequence(content: bytes) -> bytes:
    return b"\x30" + _length(len(content)) + content


def _inside(sequence: bytes) -> bytes:
    """Take the outermost tag and length off."""
    header = 2 if sequence[1] < 128 else 2 + (sequence[1] & 0x7F)  # noqa: PLR2004
    return sequence[header:]


_UNKNOWN = "unable to get local issuer certificate"

VILLAINS: dict[str, Villain] = {
    "expired": Villain(
        lambda case: _ours(case, start=case.now - 30 * DAY, end=case.now - timedelta(minutes=1)),
        "a certificate of ours that expired a minute ago",
        "certificate has expired",
        "certificate expired",
    ),
    "not-yet-valid": Villain(
        lambda case: _ours(case, start=case.now + timedelta(hours=1), end=case.now + 30 * DAY),
        "a certificate of ours that becomes valid in an hour",
        "certificate is not yet valid",
        "bad certificate",
    ),
    "wrong-ca": Villain(_wrong_ca, "the right names from a CA that only has our CA's name", _UNKNOWN, "unknown ca"),
    "wrong-ca-same-key-identifier": Villain(
        _wrong_ca_same_key_identifier,
        "the same, and its CA claims our key identifier as well: only the signature tells",
        "certificate signature failure",
        "decrypt error",
    ),
    "self-signed": Villain(
        _self_signed, "a certificate that signed itself, with a device's name", "self-signed certificate", "unknown ca"
    ),
    "server-as-client": Villain(
        lambda case: _ours(case, usage=SERVER),
        "a server certificate of ours, used as a client",
        "unsuitable certificate purpose",
        "unsupported certificate",
    ),
    "leaf-as-ca": Villain(
        _leaf_as_ca,
        "a certificate that another device signed with its own good certificate",
        "invalid CA certificate",
        "unknown ca",
    ),
    "path-length": Villain(
        _path_length,
        "a certificate of a CA below our issuing CA, which may have none below it",
        "path length constraint exceeded",
        "unknown ca",
    ),
    "weak-key": Villain(
        lambda case: _ours(case, key=rsa.generate_private_key(public_exponent=65537, key_size=1024)),  # noqa: S505
        "a certificate of ours for an RSA key of 1024 bits",
        "EE certificate key too weak",
        "bad certificate",
        level=2,
    ),
    "sha1": Villain(
        _sha1, "a certificate of ours signed over SHA-1", "CA signature digest algorithm too weak", "bad certificate"
    ),
    "other-device": Villain(
        lambda case: _ours(case, subject=[case.other]),
        "a good certificate of another device: it is that device, whatever its bearer says",
        None,
        None,
    ),
    "cn-plus": Villain(lambda case: _ours(case, subject=["+"]), "a certificate of ours with the CN +", None, None),
    "cn-hash": Villain(lambda case: _ours(case, subject=["#"]), "a certificate of ours with the CN #", None, None),
    "cn-slash": Villain(
        lambda case: _ours(case, subject=[f"{case.name}/{case.other}"]), "a CN with a topic separator", None, None
    ),
    "cn-nul": Villain(
        lambda case: _ours(case, subject=[f"{case.name}\0.evil"]),
        "a CN with a device's id before a NUL: our CA's name constraints make OpenSSL look at it",
        "unsupported or invalid name syntax",
        "certificate unknown",
    ),
    "cn-empty": Villain(lambda case: _ours(case, subject=[""]), "a certificate of ours with an empty CN", None, None),
    "cn-none": Villain(lambda case: _ours(case, subject=[]), "a certificate of ours without a CN", None, None),
    "cn-two": Villain(
        lambda case: _ours(case, subject=[case.other, case.name]), "a certificate of ours with two CNs", None, None
    ),
    "client-as-server": Villain(
        _ours,
        "a device's good certificate, used as a gateway",
        "unsuitable certificate purpose",
        "unsupported certificate",
        purpose="sslserver",
    ),
    "wrong-ca-server": Villain(
        _wrong_ca_server,
        "a gateway's names from a CA that only has our CA's name",
        _UNKNOWN,
        "unknown ca",
        purpose="sslserver",
    ),
    "lonely-ca": Villain(
        _lonely_ca,
        "a CA that signed nothing: who trusts it alone must refuse our gateways, and it may not be a client",
        "self-signed certificate",
        "unknown ca",
    ),
}
