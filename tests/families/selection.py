"""Which families every run of the tests takes: an eighth, chosen by a hash of the name."""

import zlib

import pytest


def marked(families):
    """The families as parameters; seven in eight are marked, and run only if asked for."""
    rest = (pytest.mark.sweep, pytest.mark.slow)
    return [pytest.param(x, marks=rest if zlib.crc32(x.encode()) % 8 else ()) for x in families]
