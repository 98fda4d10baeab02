"""Which families every run of the tests takes: a sixteenth, chosen by a hash of the name."""

import zlib

import pytest


def marked(families):
    """The families as parameters; fifteen in sixteen are marked, and run only if asked for."""
    rest = (pytest.mark.sweep, pytest.mark.slow)
    return [pytest.param(x, marks=rest if zlib.crc32(x.encode()) % 16 else ()) for x in families]
