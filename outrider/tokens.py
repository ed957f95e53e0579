"""The text of a token: what it is for, the fingerprint of the CA of the fleet that it belongs to, and the secret.

Whoever shows a token knows by it whom to show it to. Owns the form alone; validity is the fleet's to judge.
"""

import re

from outrider.errors import InputError
from outrider.model.access import TokenKind
from outrider.model.job import Value

_FORM = re.compile(r"^outrider-(?P<kind>join|user)\.(?P<ca>[0-9a-f]{64})\.[A-Za-z0-9_-]{20,}$")
# Where one stands in a text that people may see.
TOKEN_IN_TEXT = re.compile(r"(outrider-(?:join|user)\.[0-9a-f]{8})[0-9a-f]*\.[A-Za-z0-9_-]+")


class TokenText(Value, frozen=True, kw_only=True):
    kind: TokenKind
    ca_sha256: str


def join_token(*, ca_sha256: str, secret: str) -> str:
    return f"outrider-{TokenKind.JOIN}.{ca_sha256}.{secret}"


def user_token(*, ca_sha256: str, secret: str) -> str:
    return f"outrider-{TokenKind.USER}.{ca_sha256}.{secret}"


def parse_token(text: str) -> TokenText:
    """Raises InputError, which does not show `text`: it may be a secret in another place than meant."""
    match = _FORM.match(text.strip())
    if match is None:
        raise InputError("that is no token of Outrider: `outrider token create` makes one")
    return TokenText(kind=TokenKind(match["kind"]), ca_sha256=match["ca"])


def without_tokens(text: str) -> str:
    """`text` with the secret of any token in it left out."""
    return TOKEN_IN_TEXT.sub(r"\1...", text) if "outrider-" in text else text
