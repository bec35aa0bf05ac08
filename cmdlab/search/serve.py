"""Serves a page on this machine alone: speak or type, and see the pictures that fit best.

Starlette and a page of our own. Gradio, which people in this field know (6.31 was looked at), asks
for 28 packages and holds Pillow below 13, reports its use unless told not to, serves files by their
paths, and has no part that lays a map over a picture along a time line.
"""

import io
import json
import re
import secrets
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cmdlab.corpora import (
    SAMPLE_RATE,
    BadEntry,
    Utterance,
    bytes_of,
    decode_picture,
    decode_sound,
    speak,
    without_silence,
)
from cmdlab.errors import InputError
from cmdlab.search.index import Index
from cmdlab.search.maps import frame_map
from cmdlab.search.query import VOICE
from cmdlab.search.retriever import Retriever
from cmdlab.search.verdicts import HOW, Verdict, log_verdict, rank_of

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

PORT = 7860
MAX_UPLOAD = 20 << 20  # bytes; a minute at 48 kHz in two channels has 12 MB
MAX_SECONDS = 60
MAX_LETTERS = 300
MAX_SHOWN = 120  # pictures of one answer
KEPT = 64  # queries that can be asked about again
THUMBNAIL, LARGE = 320, 1024  # pixels of the longer side
STEP = 0.2  # seconds that a map of recorded speech stands for
HERE = Path(__file__).parent
FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "recorder.js": ("recorder.js", "text/javascript"),
}


def serve_page(index: Index, retriever: Retriever, *, port: int = PORT) -> None:
    """Serve the page at http://127.0.0.1:port until Ctrl-C.

    Raises InputError where the port is taken or a package is missing.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    page = make_page(index, retriever)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port}: {error.strerror}; choose another by --port") from error
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        print(f"{len(index):,} pictures at {address} (Ctrl-C ends it)", file=sys.stderr)
        config = uvicorn.Config(
            page, log_level="warning", access_log=False, server_header=False, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listening])


def make_page(index: Index, retriever: Retriever) -> "Starlette":
    """The page as an ASGI application.

    It answers its own origin alone, under a name of this machine, and says so little to others that
    no site in another tab can use it. Pictures are reached by their row in the index, and are drawn
    anew without what cameras write into them.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.responses import JSONResponse
        from starlette.routing import Route
    except ModuleNotFoundError as error:
        raise _missing(error) from error

    def refused(_: "Request", error: Exception) -> "Response":
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code, error.headers)
        return JSONResponse({"error": " ".join(str(error).split())}, 400)

    page = _Page(index, retriever)
    routes = [Route(f"/{name}", page.file(name)) for name in FILES]
    routes += [
        Route("/search", page.search, methods=["POST"]),
        Route("/say", page.say, methods=["POST"]),
        Route("/answer/{query}", page.answer),
        Route("/sound/{query}", page.sound),
        Route("/map/{query}/{row:int}", page.map),
        Route("/thumbnail/{row:int}", page.thumbnail),
        Route("/picture/{row:int}", page.picture),
        Route("/verdict", page.verdict, methods=["POST"]),
    ]
    handlers: Any = dict.fromkeys((HTTPException, InputError, BadEntry), refused)
    return Starlette(routes=routes, middleware=[Middleware(_Guard)], exception_handlers=handlers)


@dataclass(frozen=True, eq=False)
class _Query:
    """What was asked: `waveform` float32 [samples] at 16 kHz, its vector [D], and the words that
    were typed, each with its start and end in seconds."""

    how: str
    waveform: NDArray[np.float32]
    vector: NDArray[np.float32]
    words: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return len(self.waveform) / SAMPLE_RATE


class _Page:
    def __init__(self, index: Index, retriever: Retriever) -> None:
        self._index = index
        self._retriever = retriever
        self._queries: OrderedDict[str, _Query] = OrderedDict()
        self._lock = threading.Lock()  # one computation at a time: each takes all cores

    def file(self, name: str) -> "Callable[[Request], Response]":
        from starlette.responses import Response

        file, kind = FILES[name]
        content = (HERE / file).read_text(encoding="utf-8")
        return lambda _: Response(content, media_type=kind)

    async def search(self, request: "Request") -> "Response":
        """A sound file of any kind as the body → the answer."""
        from starlette.concurrency import run_in_threadpool

        how = request.query_params.get("how", "file")
        if how not in HOW[:2]:
            raise InputError(f"how: {how!r} is neither 'recorded' nor 'file'")
        content = await _body(request, MAX_UPLOAD)

        def answer() -> dict[str, Any]:
            try:
                waveform = decode_sound(content, longest=MAX_SECONDS)
            except BadEntry as error:
                raise InputError(f"This {error}.") from error
            return self._ask(how, without_silence(waveform, SAMPLE_RATE), [])

        return _json(await run_in_threadpool(answer))

    async def say(self, request: "Request") -> "Response":
        """A text as the body, spoken by espeak-ng → the answer."""
        from starlette.concurrency import run_in_threadpool

        text = (await _body(request, 4 * MAX_LETTERS)).decode(errors="replace").strip()
        if not text or len(text) > MAX_LETTERS:
            raise InputError(f"Type 1 to {MAX_LETTERS} letters.")

        def answer() -> dict[str, Any]:
            try:
                [spoken] = speak([Utterance(text, VOICE)])
            except ValueError as error:
                raise InputError("There is no word to speak in it.") from error
            except ModuleNotFoundError as error:
                raise _missing(error) from error
            words = [{"word": w.word, "start": w.start, "end": w.end} for w in spoken.words]
            waveform = spoken.samples.astype(np.float32) / np.float32(32768)
            return self._ask("typed", waveform, words)

        return _json(await run_in_threadpool(answer))

    def _ask(
        self, how: str, waveform: NDArray[np.float32], words: list[dict[str, Any]]
    ) -> dict[str, Any]:
        with self._lock:
            vector = self._retriever.embed_speech(waveform, SAMPLE_RATE)
            name = secrets.token_urlsafe(9)
            self._queries[name] = query = _Query(how, waveform, vector, words)
            while len(self._queries) > KEPT:
                self._queries.popitem(last=False)
        return {
            "query": name,
            "seconds": query.seconds,
            "words": words,
            "gallery": len(self._index),
            "results": self._best(query, 12),
        }

    def answer(self, request: "Request") -> "Response":
        """More of an answer: ?k= pictures from the first on."""
        asked = request.query_params.get("k", "12")
        k = int(asked) if re.fullmatch("[0-9]{1,3}", asked) else 0
        if not 1 <= k <= MAX_SHOWN:
            raise InputError(f"k: {asked!r} is not 1 to {MAX_SHOWN}")
        return _json({"results": self._best(self._query(request), k)})

    def _best(self, query: _Query, k: int) -> list[dict[str, Any]]:
        return [
            {"row": match.row, "score": match.score, "name": _shown(match.path)}
            for match in self._index.nearest(query.vector, min(k, len(self._index)))
        ]

    def sound(self, request: "Request") -> "Response":
        """What was searched for, as a WAV file."""
        import soundfile
        from starlette.responses import Response

        waveform = self._query(request).waveform
        content = io.BytesIO()
        soundfile.write(content, waveform, SAMPLE_RATE, format="WAV", subtype="PCM_16")
        return Response(content.getvalue(), media_type="audio/wav")

    def map(self, request: "Request") -> "Response":
        """Which patches of a picture each word fits, or each STEP of speech without known words."""
        query = self._query(request)
        path = self._path(request)
        with self._lock:
            found = frame_map(self._retriever, query.waveform, path)
        count = max(1, round(query.seconds / STEP))
        times = [{"start": i * STEP, "end": (i + 1) * STEP} for i in range(count)]
        steps = [
            step | {"values": np.round(found.between(step["start"], step["end"]), 5).tolist()}
            for step in query.words or times
        ]
        return _json({"steps": steps, "seconds": query.seconds})

    def thumbnail(self, request: "Request") -> "Response":
        return self._drawn(request, THUMBNAIL)

    def picture(self, request: "Request") -> "Response":
        return self._drawn(request, LARGE)

    def _drawn(self, request: "Request", side: int) -> "Response":
        from PIL import Image
        from starlette.responses import Response

        picture = decode_picture(bytes_of(self._path(request)))
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        bare = Image.fromarray(np.asarray(picture))  # pixels alone: no place, camera or comment
        content = io.BytesIO()
        bare.save(content, "JPEG", quality=88, subsampling=0)
        return Response(content.getvalue(), media_type="image/jpeg")

    async def verdict(self, request: "Request") -> "Response":
        """{"query": …, "row": …} for the right picture, or {"query": …, "rank": … or null}."""
        from starlette.concurrency import run_in_threadpool

        try:
            said = json.loads(await _body(request, 1000))
            query = self._queries[said["query"]]
            row, rank = said.get("row"), said.get("rank")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise InputError("That query is no longer known; ask again.") from error
        gallery = len(self._index)
        if row is not None and not (type(row) is int and 0 <= row < gallery):
            raise InputError("There is no such picture.")
        if rank is not None and not (type(rank) is int and 1 <= rank <= gallery):
            raise InputError(f"Give a whole number from 1 to {gallery:,}.")

        def log() -> int | None:
            place = rank if row is None else rank_of(self._index, query.vector, row)
            picture = None if row is None else _shown(self._index.path(row))
            verdict = Verdict(query.how, round(query.seconds, 2), gallery, place, picture)
            log_verdict(self._index.folder, verdict)
            return place

        return _json({"rank": await run_in_threadpool(log)})

    def _query(self, request: "Request") -> _Query:
        from starlette.exceptions import HTTPException

        query = self._queries.get(request.path_params["query"])
        if query is None:
            raise HTTPException(404, "That query is no longer known; ask again.")
        return query

    def _path(self, request: "Request") -> Path:
        """The file of a row, still a file of the indexed folder."""
        from starlette.exceptions import HTTPException

        row = request.path_params["row"]
        if row >= len(self._index):
            raise HTTPException(404, "There is no such picture.")
        folder = self._index.pictures
        path = (folder / self._index.path(row)).resolve()
        if not path.is_relative_to(folder.resolve()) or not path.is_file():
            raise HTTPException(404, "The picture is gone; run `cmdlab index` again.")
        return path


class _Guard:
    """Refuses what another site asks for, and lets the page itself load nothing from elsewhere."""

    HEADERS = (
        (
            b"content-security-policy",
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            b"media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
            b"frame-ancestors 'none'",
        ),
        (b"cache-control", b"no-store"),
        (b"cross-origin-opener-policy", b"same-origin"),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"permissions-policy", b"microphone=(self), camera=(), geolocation=()"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    )

    def __init__(self, app: "ASGIApp") -> None:
        self._app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.responses import JSONResponse

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self.HEADERS]
            await send(message)

        if scope["type"] == "http" and not _is_own(scope):
            response = JSONResponse({"error": "This page answers itself alone."}, 403)
            await response(scope, receive, send_guarded)
        else:
            await self._app(scope, receive, send_guarded)


def _is_own(scope: "Scope") -> bool:
    """Whether a request comes from this page or a user's own hand.

    The name of the host is looked at because a foreign site can have its own name lead to this
    machine (DNS rebinding); origin and Sec-Fetch-Site, because it can send requests here openly.
    """
    from starlette.datastructures import Headers

    headers = Headers(scope=scope)
    host = headers.get("host", "")
    return (
        re.fullmatch(r"(127\.0\.0\.1|localhost)(:[0-9]+)?", host) is not None
        and headers.get("origin", f"http://{host}") == f"http://{host}"
        and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
    )


async def _body(request: "Request", limit: int) -> bytes:
    """A request's content, up to `limit` bytes, whether it states its length or not."""
    from starlette.exceptions import HTTPException

    # The connection is closed, or the rest would still be taken in.
    too_large = HTTPException(413, f"That is over {limit:,} bytes.", {"Connection": "close"})
    stated = request.headers.get("content-length", "0")
    if not stated.isdecimal() or int(stated) > limit:
        raise too_large
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > limit:
            raise too_large
    return bytes(content)


def _missing(error: ModuleNotFoundError) -> InputError:
    return InputError(f"{error.name} is not installed; pip install cmdlab[serve]")


def _json(value: Any) -> "Response":
    from starlette.responses import JSONResponse

    return JSONResponse(value)


def _shown(path: str) -> str:
    """A path that may be no UTF-8, as text."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
