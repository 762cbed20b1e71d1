"""Names of raw files -> keys of samples."""

import hashlib
import os
import re

#: Longest part of a key that is taken from a name.
READABLE = 80


def sample_key(name: str) -> str:
    """The name where it can be a key, else a readable beginning of it and a digest.

    The digest keeps a/b, a_b and a.b apart. Pass names without their extension.
    """
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", name.replace("/", "-"))
    if readable == name and len(name) <= READABLE:
        return name
    return f"{readable[:READABLE]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


def hash_fraction(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name only: splits that new files do not move."""
    digest = hashlib.sha256(os.fsencode(f"{seed}:{name}")).hexdigest()
    return int(digest[:13], 16) / 16**13
