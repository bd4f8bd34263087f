"""What is wrong with a server's certificate and how to fix it, in the same words for Kafka and Postgres."""

from __future__ import annotations

import ssl
from typing import Final

# OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED, and X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH.
_EXPIRED: Final = 10
_OTHER_NAME: Final = (62, 64)


def certificate_complaint(error: ssl.SSLCertVerificationError, *, ca_setting: str) -> str:
    """Explain in one line why a certificate is refused and how to fix that; `ca_setting` is where its CA is set."""
    if error.verify_code == _EXPIRED:
        advice = "renew the server's certificate"
    elif error.verify_code in _OTHER_NAME:
        advice = "use a host name that the certificate carries"
    else:
        advice = f"give the certificate's CA in {ca_setting}"
    return f"{error.verify_message.rstrip('.')}; {advice}"
