"""A separate process that decodes files which may be expensive, and is killed if they are.

It processes one file after the other: a request is a line of JSON with the path, a response a line of JSON and the raw
pixels. The system limits its memory and its processor time per file if it can; the parent process limits its time.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from PIL import Image

from ringmark.data.decode import Decoded, bands, counted, decode
from ringmark.data.files import open_regular
from ringmark.errors import ImageError

__all__ = ["CPU_SECONDS", "MEMORY_BYTES", "WAIT_SECONDS", "decode_apart", "serve"]

LOG = logging.getLogger(__name__)

CPU_SECONDS = 8
WAIT_SECONDS = 60
MEMORY_BYTES = 900 << 20
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}  # threads reserve memory


def decode_apart(path: str | os.PathLike[str]) -> Decoded:
    """As `decode`, in a process that is started on first use, reused, and killed if a file costs too much."""
    return _PROCESS.decode(path)


class _Process:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def decode(self, path: str | os.PathLike[str]) -> Decoded:
        with self._lock:
            child = self._running(path)
            timer = threading.Timer(WAIT_SECONDS, child.kill)
            timer.start()
            try:
                return self._ask(child, path)
            except ImageError:
                raise
            except (EOFError, OSError, ValueError) as error:
                raise self._given_up(child, path) from error
            except BaseException:  # interrupted: its pending output belongs to this file
                self.stop()
                raise
            finally:
                timer.cancel()

    def _running(self, path: str | os.PathLike[str]) -> subprocess.Popen[bytes]:
        """The child process; a new one if there is none, if it has ended, or if we are a fork of its parent."""
        if self._child and self._owner == os.getpid() and self._child.poll() is None:
            return self._child
        script = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); " + (
            "from ringmark.data.decoder_process import serve; serve()"
        )
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-c", script, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # libtiff writes there without naming the file
                env={**os.environ, **QUIET},
            )
        except OSError as error:
            fact = f"cannot be decoded: the decoder process cannot be started ({error.strerror})"
            raise ImageError("image.no-process", fact, subject=path) from error
        self._owner = os.getpid()
        return self._child

    def _ask(self, child: subprocess.Popen[bytes], path: str | os.PathLike[str]) -> Decoded:
        assert child.stdin and child.stdout
        child.stdin.write(json.dumps(os.path.abspath(os.fspath(path))).encode() + b"\n")
        child.stdin.flush()
        answer = json.loads(_line(child.stdout))
        if "code" in answer:
            raise ImageError(answer["code"], answer["fact"], subject=path)
        image = Image.new("RGB", answer["size"])
        for box in bands(image):
            size = (box[2], box[3] - box[1])
            image.paste(Image.frombytes("RGB", size, _exactly(child.stdout, 3 * size[0] * size[1])), box)
        return Decoded(image, tuple(answer["notes"]))

    def _given_up(self, child: subprocess.Popen[bytes], path: str | os.PathLike[str]) -> ImageError:
        """The error for a missing response: the child was killed by a limit, or could not run."""
        try:
            ended = child.wait(1)
        except subprocess.TimeoutExpired:
            ended = -1
        self.stop()
        LOG.warning("%s: decoding was aborted", path)
        if ended > 0 and os.name == "posix":  # signals are negative
            return ImageError(
                "image.no-process", f"cannot be decoded: the decoder process ended with exit code {ended}", subject=path
            )
        fact = f"needs more than {CPU_SECONDS} s of processor time or {MEMORY_BYTES >> 20} MB to decode"
        return ImageError("image.too-costly", fact, subject=path)

    def stop(self) -> None:
        """Kill the child, if it is ours."""
        child, self._child = self._child, None
        if child and self._owner == os.getpid():
            child.kill()
            child.communicate()


def _line(pipe: IO[bytes]) -> bytes:
    line = pipe.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return line


def _exactly(pipe: IO[bytes], number: int) -> bytes:
    content = pipe.read(number)
    if len(content) != number:
        raise EOFError
    return content


_PROCESS = _Process()
atexit.register(_PROCESS.stop)


# -- in the process ---------------------------------------------------------------------------------------------------


def serve() -> None:
    """Process requests until the input ends."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles interrupts and ends this process
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing else may write between the responses
    _limit_memory()
    _one_thread()
    for line in sys.stdin.buffer:
        _limit_time()
        _answer(json.loads(line), out)
        out.flush()


def _answer(path: str, out: IO[bytes]) -> None:
    try:
        with open_regular(path, ImageError, "image") as file:
            decoded = decode(path, counted(file), limited=True)
    except ImageError as error:
        out.write(json.dumps({"code": error.code, "fact": error.fact}).encode() + b"\n")
        return
    assert decoded is not None
    image, notes = decoded
    out.write(json.dumps({"size": image.size, "notes": notes}).encode() + b"\n")
    for box in bands(image):
        out.write(image.crop(box).tobytes())


def _one_thread() -> None:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1


def _limit_time() -> None:
    """Let the system kill this process after CPU_SECONDS from now."""
    try:
        import resource
    except ImportError:  # Windows: the parent has a timeout
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    now = int(used.ru_utime + used.ru_stime) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (now + CPU_SECONDS, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _limit_memory() -> None:
    """Allow MEMORY_BYTES more than this process uses now."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    except (ImportError, OSError, ValueError):  # the system has no such limit
        return
