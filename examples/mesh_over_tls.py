"""
A mesh over TLS: a certificate that one makes oneself, and words that keep strangers out.

Nobody has to sign the certificate, as those who dial name its fingerprint in the URL. With one that
an authority has signed, leave out what follows the #: `wss://relay.example:8765`. Instead of words,
each agent can have a join token of its own (`crdtstate mesh create`, `crdtstate invite NAME`).
"""

import asyncio
import secrets
import ssl
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from crdtstate import Replica, WaitTimeout
from crdtstate.transports.websocket import fingerprint


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for a year, and its key: `openssl req -x509 ...`."""
    certificate, key = folder / "relay.crt", folder / "relay.key"
    request = ["req", "-x509", "-newkey", "ed25519", "-nodes", "-days", "365"]
    names = ["-subj", "/CN=relay", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *request, *names, *files], check=True, capture_output=True)
    return certificate, key


async def main() -> None:
    words = secrets.token_hex(16)  # the same for all, from a file that only they may read
    with tempfile.TemporaryDirectory() as folder:
        certificate, key = make_certificate(Path(folder))
        shown = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        shown.load_cert_chain(certificate, key)

        async with Replica("ann", listen="wss://127.0.0.1:0", tls=shown, mesh=words) as ann:
            url = f"{ann.address}#{fingerprint(str(certificate))}"
            async with Replica("bob", peers=[url], mesh=words) as bob:
                ann.map("plan")["goal"] = "ship it"
                await bob.wait_for(ann.version(), timeout=5)
                print("bob reads:", bob.map("plan")["goal"])

            async with Replica("eve", peers=[url], mesh="what eve thinks they are") as eve:
                with suppress(WaitTimeout):
                    await eve.synced(timeout=1)
                print("eve is told:", eve.unreachable()[url])
                print("eve has:", list(eve.documents()))


if __name__ == "__main__":
    asyncio.run(main())
