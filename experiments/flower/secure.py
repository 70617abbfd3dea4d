"""Certificates for TLS on the loopback, and keys of nodes, made as in the guide of fedq on Flower."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_PEM = serialization.Encoding.PEM


def certificates(folder: Path) -> None:
    """Writes ca.crt, server.key and server.pem, a certificate of 127.0.0.1 that is valid for a day."""
    now = datetime.datetime.now(datetime.UTC)
    names = {who: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)]) for who in ("fedq test CA", "127.0.0.1")}
    ca, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    for who, key, name in (("fedq test CA", ca, "ca.crt"), ("127.0.0.1", server, "server.pem")):
        builder = (
            x509.CertificateBuilder()
            .subject_name(names[who])
            .issuer_name(names["fedq test CA"])
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=key is ca, path_length=None), critical=True)
        )
        if key is server:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        (folder / name).write_bytes(builder.sign(ca, hashes.SHA384()).public_bytes(_PEM))
    plain = serialization.NoEncryption()
    text = server.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "server.key").write_bytes(text)


def node_key(folder: Path, name: str) -> None:
    """Writes NAME and NAME.pub, as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(_PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / name).write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)
