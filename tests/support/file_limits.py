"""A disk that is full, for this process: no file may become larger than so many bytes."""

import resource
from contextlib import contextmanager


@contextmanager
def files_of_at_most(size):
    """Let each write beyond `size` bytes of a file fail inside."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
