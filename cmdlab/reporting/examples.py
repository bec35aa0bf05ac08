"""Examples of one run: spoken queries with their answers, and word maps, media embedded.

The media belong to a data set, so each file is checked before it is embedded: that it lies in the
run's folder, what its first bytes say it is, its size and its length.
"""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from cmdlab.errors import InputError
from cmdlab.reporting.figures import word_maps_svg
from cmdlab.reporting.page import Figure, paragraph, template
from cmdlab.reporting.study import Run, Study

MOST_CLIPS = 16
LONGEST_CLIP = 4.1  # seconds; an mp3 frame may overhang the four
MEDIA_BUDGET = 2_400_000  # bytes before base64, of a page that may have 5 MB
MOST_MAPS = 4
LARGEST_SIDE = 512  # pixels


@dataclass(frozen=True)
class Examples:
    """The queries of one run that fit on the page; `left_out` counts the others."""

    run: Run
    random: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    left_out: int
    baseline_ranks: dict[str, int]


def read_examples(study: Study) -> Examples | None:
    """Examples of the first run that recorded some, of the arm that is best on validation or else
    of the baseline; None where there are none.

    Raises InputError for a media file that is not what it should be.
    """
    runs = [*study.of(study.best_on_validation or study.baseline), *study.of(study.baseline)]
    run = next((run for run in runs if (run.folder / "examples.json").is_file()), None)
    if run is None:
        return None
    recorded = _read_queries(run.folder)
    half = MOST_CLIPS // 2
    chosen = [
        *[query for query in recorded if query["kind"] == "random"][:half],
        *[query for query in recorded if query["kind"] == "failure"][:half],
    ]
    shown: dict[str, list[dict[str, Any]]] = {"random": [], "failure": []}
    spent = 0
    for query in chosen:
        embedded, size = _embed(run.folder, query)
        if spent + size > MEDIA_BUDGET:
            break
        spent += size
        shown[query["kind"]].append(embedded)
    left_out = len(recorded) - len(shown["random"]) - len(shown["failure"])
    others = [other for other in study.of(study.baseline) if other.seed == run.seed]
    ranks = {
        query["caption_id"]: query["rank"]
        for other in others
        if other.id != run.id and (other.folder / "examples.json").is_file()
        for query in _read_queries(other.folder)
        # Of failures it is known only where the baseline fails too, which would flatter.
        if query["kind"] == "random"
    }
    return Examples(run, shown["random"], shown["failure"], left_out, ranks)


def queries_html(study: Study, examples: Examples, queries: list[dict[str, Any]]) -> Markup:
    """The queries one below the other."""
    page = template("examples.html")
    return Markup("\n").join(
        Markup(
            page.render(
                query=query,
                baseline=study.baseline,
                baseline_rank=examples.baseline_ranks.get(query["caption_id"]),
            )
        )
        for query in queries
    )


def map_blocks(examples: Examples) -> list[Markup | Figure]:
    """Word × patch maps of the first queries that have them."""
    queries = [*examples.random, *examples.failures]
    with_maps = [query for query in queries if query.get("maps") and query.get("words")]
    if not with_maps:
        return [paragraph('<span class="absent">No maps were recorded.</span>')]
    blocks: list[Markup | Figure] = []
    for index, query in enumerate(with_maps[:MOST_MAPS]):
        svg = word_maps_svg(f"map-{index}", query["words"], query["maps"], query["photo"])
        caption = Markup(
            "“{}” (caption {}, rank {}). Bright: patches that the word fits. Cross: the best one. "
            "Each word has a scale of its own."
        )
        caption = caption.format(query["text"], query["caption_id"], f"{query['rank']:,}")
        blocks.append(Figure(f"map-figure-{index}", caption, [svg], wide=True))
    return blocks


def _read_queries(folder: Path) -> list[dict[str, Any]]:
    path = folder / "examples.json"
    try:
        queries = json.loads(path.read_text(encoding="utf-8"))["queries"]
        for query in queries:
            _check_query(query)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{path}: queries: {reason}; run the cell again") from error
    return queries


def _check_query(query: dict[str, Any]) -> None:
    """Raise ValueError, TypeError or KeyError where a query lacks what is drawn of it."""
    if query["kind"] not in ("random", "failure"):
        raise ValueError(f"kind {query['kind']!r} is neither random nor failure")
    for name, kind in {"caption_id": str, "text": str, "speaker": str, "rank": int}.items():
        if not isinstance(query[name], kind):
            raise TypeError(f"{name} is {query[name]!r}")
    for answer in query["top"]:
        float(answer["score"]), str(answer["image_id"]), bool(answer["correct"])
        if not isinstance(answer["file"], str):
            raise TypeError(f"file is {answer['file']!r}")
    words = query.get("words") or []
    for word in words:
        if not 0 <= float(word["start"]) <= float(word["end"]) < float("inf"):
            raise ValueError(f"word {word['word']!r} has no place in time")
    maps = query.get("maps")
    if maps:
        values = np.asarray(maps["values"], dtype=float)
        if values.shape != (len(words), maps["rows"] * maps["columns"]):
            raise ValueError(f"maps have the shape {list(values.shape)}, with {len(words)} words")
        if not np.isfinite(values).all():
            raise ValueError("maps hold NaN or infinity")


def _embed(folder: Path, query: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The query with data URIs for its files, and the number of bytes that they hold."""
    size = 0
    audio = None
    if query.get("audio"):
        content = _read_media(folder, query["audio"], "mp3")
        size += len(content)
        audio = _data_uri(content, "audio/mpeg")
    top, photo = [], None
    for answer in query["top"][:5]:
        content = _read_media(folder, answer["file"], "png")
        size += len(content)
        top.append(answer | {"file": _data_uri(content, "image/png")})
    if query.get("image"):
        photo = _pixels(_read_media(folder, query["image"], "png"))
    found = any(answer["correct"] for answer in top)
    return query | {"audio": audio, "top": top, "found": found, "photo": photo}, size


def _read_media(folder: Path, name: str, kind: str) -> bytes:
    """The file's content, once it is known to be a short mp3 or a small png of this run."""
    path = folder / name
    place = f"{folder / 'examples.json'}: {name}"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{place}: lies outside the run's folder; run the cell again")
    try:
        if path.stat().st_size > MEDIA_BUDGET:
            raise InputError(f"{place}: is larger than {MEDIA_BUDGET:,} bytes; record it smaller")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{place}: cannot be read ({error.strerror}); run the cell again"
        ) from None
    if kind == "png":
        sides = [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)]
        if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
            raise InputError(f"{place}: is no PNG; run the cell again")
        if not all(0 < side <= LARGEST_SIDE for side in sides):
            raise InputError(f"{place}: is larger than {LARGEST_SIDE} pixels; record it smaller")
    else:
        frame = content[:1] == b"\xff" and content[1:2] and content[1] & 0xE0 == 0xE0
        if not (content[:3] == b"ID3" or frame):
            raise InputError(f"{place}: is no mp3; run the cell again")
        seconds = _seconds(content, place)
        if seconds > LONGEST_CLIP:
            raise InputError(f"{place}: lasts {seconds:.1f} s; record at most 4 s")
    return content


def _seconds(content: bytes, place: str) -> float:
    import soundfile

    try:
        return float(soundfile.info(io.BytesIO(content)).duration)
    except soundfile.LibsndfileError as error:
        raise InputError(f"{place}: cannot be decoded ({error}); run the cell again") from None


def _pixels(content: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
