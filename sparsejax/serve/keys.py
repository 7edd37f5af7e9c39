"""API keys: who a caller is, for every protocol that has them."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable

API_KEY = "SPARSEJAX_API_KEY"
ANYONE = "anyone"


class KeyRing:
    """Knows callers by a digest of their key; without keys all are one caller.

    Args:
        keys: what is accepted, beside the key in the environment variable SPARSEJAX_API_KEY.
    """

    def __init__(self, keys: Iterable[str]):
        extra = os.environ.get(API_KEY)
        self._keys = [key.encode() for key in (*keys, *([extra] if extra else []))]

    def holder(self, authorization: str | bytes) -> str | None:
        """Who sent ``Bearer KEY``; None if that is none of the keys."""
        if not self._keys:
            return ANYONE
        given = authorization.encode() if isinstance(authorization, str) else authorization
        scheme, _, key = given.partition(b" ")
        # Every key is compared, so that the time taken tells nothing.
        found = [one for one in self._keys if hmac.compare_digest(one, key.strip())]
        if scheme.lower() != b"bearer" or not found:
            return None
        return hashlib.sha256(found[0]).hexdigest()[:12]
