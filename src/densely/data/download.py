"""Fetching a file: mirrors in turn, progress, resumed when cut, verified before it is believed."""

import hashlib
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from queue import Empty, Queue

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from densely.errors import DataError

#: All mirrors together may take so long to answer, so that a machine without a network hears
#: about it soon; once bytes flow, only a pause of STALL_SECONDS ends an attempt.
CONNECT_SECONDS = 5.0
STALL_SECONDS = 30.0
CHUNK_BYTES = 1 << 18


def digest_of(path: Path, algorithm: str) -> str:
    """Digest of a file by "md5" or "sha256", as hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False))
    return digest.hexdigest()


def has_digest(path: Path, digest: str) -> bool:
    """Whether a file is the right one.

    Args:
        path: the file.
        digest: "md5:..." or "sha256:...", hexadecimal; only its first digits where no more are
            published. MD5 finds damage; it is no defence against malice.
    """
    algorithm, _, digits = digest.partition(":")
    return bool(digits) and digest_of(path, algorithm).startswith(digits)


def download(urls: Sequence[str], target: Path, digest: str | None) -> None:
    """Fetch `target` from the first of `urls` that gives the right file.

    Bytes gather in `TARGET.part`, from which a later call goes on; only a file whose digest is
    right takes the place of `target`, and what stood there before is kept beside it as
    `TARGET.damaged` (`.damaged-2`, ... where there are such).

    Args:
        urls: mirrors, tried in turn.
        target: where the file goes.
        digest: as `has_digest` takes it; None where none is published.

    Raises:
        DataError: no mirror gave the file; each one's reason is named.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    deadline = time.monotonic() + CONNECT_SECONDS
    reasons = []
    for tried, url in enumerate(urls):
        host = url.split("/")[2]
        share = max(0.5, (deadline - time.monotonic()) / (len(urls) - tried))
        try:
            _fetch(url, part, target.name, share)
        except (OSError, HTTPException) as error:
            reasons.append(f"{host}: {getattr(error, 'reason', None) or error}")
            continue
        if digest is None or has_digest(part, digest):
            if target.exists():
                os.replace(target, _free_name(target))
            os.replace(part, target)
            return
        kind = digest.partition(":")[0].upper()
        part.unlink()  # no prefix of the right file: nothing to go on from
        reasons.append(f"{host}: sent a file with another {kind}")
    raise DataError(f"{target.name} could not be downloaded ({'; '.join(reasons)})")


def _free_name(target: Path) -> Path:
    path, number = target.with_name(target.name + ".damaged"), 1
    while path.exists():
        number += 1
        path = target.with_name(f"{target.name}.damaged-{number}")
    return path


def _fetch(url: str, part: Path, label: str, connect_seconds: float) -> None:
    """Append to `part` what it lacks of the file at `url`."""
    have = part.stat().st_size if part.exists() else 0
    response = _open(url, have, connect_seconds)
    if response is None:  # the server has nothing beyond what we have
        return
    with response, part.open("ab" if response.status == 206 else "wb") as file:
        if response.status != 206:
            have = 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with _progress() as progress:
            task = progress.add_task(label, total=total, completed=have)
            while chunk := response.read1(CHUNK_BYTES):
                file.write(chunk)
                progress.advance(task, len(chunk))
        file.flush()
        if total is not None and file.tell() < total:
            raise OSError(f"cut after {file.tell()} of {total} bytes; run again to go on")


def _open(url: str, have: int, seconds: float) -> HTTPResponse | None:
    """Open `url` from byte `have` on, within `seconds`; None where the file ends there.

    In a thread, since looking up a name knows no timeout.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "densely"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    answers: Queue[HTTPResponse | Exception | None] = Queue()

    def ask() -> None:
        try:
            answers.put(urllib.request.urlopen(request, timeout=STALL_SECONDS))
        except urllib.error.HTTPError as error:
            error.close()
            answers.put(None if error.code == 416 and have else error)
        except Exception as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=seconds)
    except Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not Console(stderr=True).is_terminal,
    )
