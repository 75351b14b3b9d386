"""The results file of a batch job: lines are only ever added, and a killed job goes on from them.

Every line's "id" holds a digest of the input line and the model, and the number of that line, so
the file itself says what is done and whether it belongs to this job. A line that was cut by a kill
has no newline at its end and is removed before anything is added.
"""

import errno
import fcntl
import json
import os
import re
import stat
import time
from pathlib import Path

from ..errors import RaddleIOError

_SYNC_SECONDS = 1.0
_LINE_ID = re.compile("batch_req_([0-9a-f]{16})_([1-9][0-9]{0,17})")


def line_id(digest, number):
    """Of the result of an input line."""
    return f"batch_req_{digest:016x}_{number}"


class DiskFullError(RaddleIOError):
    """No room for another line; all lines before it are in the file."""


class ResultsFile:
    """Open for one job, locked against a second one.

    done: {number: digest} of the input lines that have their result; num_errors: how many of those
    are errors. A file that is no regular one (a pipe, /dev/stdout) is written without any of that.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.done, self.num_errors = {}, 0
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise RaddleIOError(f"{self.path}: cannot be written: {error.strerror}") from None
        try:
            self._is_regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._size = self._take_over() if self._is_regular else 0
        except BaseException:
            os.close(self._fd)
            raise
        self._synced = time.monotonic()

    def append(self, records):
        """Write result lines (dictionaries), whole or not at all: DiskFullError, RaddleIOError."""
        if not records:
            return
        data = memoryview(b"".join(_encode(record) for record in records))
        size = len(data)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            if self._is_regular:
                os.ftruncate(self._fd, self._size)
            is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            kind = DiskFullError if is_full else RaddleIOError
            raise kind(f"{self.path}: {error.strerror}") from None
        self._size += size
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self):
        if self._is_regular:
            os.fsync(self._fd)
            self._synced = time.monotonic()

    def close(self):
        os.close(self._fd)

    def _take_over(self):
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RaddleIOError(f"{self.path}: another job is writing to it") from None
        size = 0
        with open(self.path, "rb") as file:
            for row, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                self._note(row, line)
                size += len(line)
        os.ftruncate(self._fd, size)
        return size

    def _note(self, row, line):
        try:
            record = json.loads(line)
            found = _LINE_ID.fullmatch(record["id"])
            is_error = record["response"]["status_code"] != 200
        except (ValueError, TypeError, KeyError):
            found = None
        if found is None:
            raise RaddleIOError(
                f"{self.path}: line {row} is no result line; name another output file"
            )
        number = int(found[2])
        if number in self.done:
            raise RaddleIOError(
                f"{self.path}: line {row} is a second result of input line {number}; name another "
                "output file, or remove this one"
            )
        self.done[number] = int(found[1], 16)
        self.num_errors += is_error


def _encode(record):
    try:
        return (json.dumps(record, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair, from the input's custom_id
        return (json.dumps(record) + "\n").encode()
