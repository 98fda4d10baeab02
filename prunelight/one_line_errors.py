"""Errors of the command line in one line: which were raised on purpose, and what libraries said.

An error that is none of these is a fault of ours, and shows its traceback.
"""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# An installed `callbacks` lies in the package, that of a source checkout beside it.
PACKAGES = [PACKAGE, PACKAGE.parent / "callbacks"]


def one_line_error(error: BaseException) -> BaseException | None:
    """Return an error to show in one line, without its traceback; None for a fault of ours."""
    known = our_error(error) or path_error(error) or disk_error(error) or missing_package(error)
    return known or union_error(error)


def our_error(error: BaseException | None) -> BaseException | None:
    """Return the error in a chain of causes that prunelight raised on purpose, if there is one.

    It is one whose last frame is in our code. jsonargparse wraps errors of constructors in its own.
    """
    expected = (ValueError, TypeError, OSError, ImportError, RuntimeError)
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        folders = Path(frames[-1].filename).resolve().parents if frames else ()
        if isinstance(error, expected) and any(package in folders for package in PACKAGES):
            return error
        error = error.__cause__ or error.__context__
    return None


def missing_package(error: BaseException | None) -> ImportError | None:
    """Return an error for a package that another library misses, such as a logger's, if it is that.

    What prunelight itself needs is told where it is needed, in `our_error`.
    """
    while error is not None:
        text = " ".join(str(error).split())
        needed = re.search(r"No module named '(\w+)|Try running `pip install -U '?([\w.-]+)", text)
        needed = needed or re.search(r"`?pip install (?:-U )?['\"]?([\w.-]+)()", text)
        if needed and (isinstance(error, ImportError) or "ModuleNotFoundError" in text):
            package = (needed[1] or needed[2]).replace("tensorboardX", "tensorboard")
            return ImportError(
                f"a class or option of this run needs the package {package}, which is not "
                f"installed; install it with: pip install {package}"
            )
        error = error.__cause__ or error.__context__
    return None


def union_error(error: BaseException) -> ValueError | None:
    """Return what a class refuses that jsonargparse makes for one of several kinds of value."""
    if not isinstance(error, ValueError) or "Union subtypes" not in str(error):
        return None
    of_other_kinds = ("Expected ", "Not a valid subclass")
    refusals = re.findall(r"^  - (.+)$", str(error), flags=re.MULTILINE)
    reasons = [text for text in refusals if not text.startswith(of_other_kinds)]
    return ValueError(f"a class of the config cannot be made: {reasons[0]}") if reasons else None


def path_error(error: BaseException | None) -> ValueError | None:
    """Return an error for a name that no file can have, if it is that."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            return ValueError(f"{error.filename}: {error.strerror}; give a shorter one")
        if isinstance(error, RuntimeError) and "determine home directory" in str(error):
            return ValueError("~NAME/... is the home of a user whom this machine does not know")
        error = error.__cause__ or error.__context__
    return None


def disk_error(error: BaseException | None) -> OSError | None:
    """Return an error for a file that a library could not write, such as a logger's, if it is that.

    What prunelight itself writes says more, see `explaining_write_errors` of
    `prunelight.runtime.files.atomic_files`.
    """
    expected = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
    while error is not None:
        if isinstance(error, OSError) and error.errno in expected:
            return OSError(
                f"cannot write {error.filename or 'a file of the run'}: {error.strerror}; "
                "checkpoints that were written before are intact. Start the same command again "
                "when there is room"
            )
        error = error.__cause__ or error.__context__
    return None
