"""Chooses example queries of a run and writes what a report needs to show them.

The random ones are chosen by a fixed seed, the same for every arm; the failures are the worst.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image as Picture

from cmdlab.corpora import SAMPLE_RATE, read_audio, read_image
from cmdlab.evaluation import RankTable
from cmdlab.experiment.alignment import align
from cmdlab.experiment.run import Data, searcher
from cmdlab.outputs import write_file
from cmdlab.records import write_json
from cmdlab.retrieval import Ranker, RetrievalModel

RANDOM, FAILURES, TOP = 8, 8, 5
CHOICE_SEED = 20_24
LONGEST = 4.0  # seconds of a clip


def write_examples(
    data: Data, model: RetrievalModel, run_folder: Path, ranker: Ranker | None = None
) -> None:
    """Write examples.json and examples/ (mp3 clips, png pictures) into the run's folder.

    With a `ranker`, whose scores are not those of the shared space, they have no word maps.
    """
    ranks = RankTable.load(run_folder / "ranks.npz").ranks("speech_to_image")
    chosen = np.random.default_rng(CHOICE_SEED).choice(
        len(ranks), min(RANDOM, len(ranks)), replace=False
    )
    worst = [i for i in np.argsort(-ranks, kind="stable") if i not in chosen][:FAILURES]
    shutil.rmtree(run_folder / "examples", ignore_errors=True)  # they may be of another corpus
    (run_folder / "examples").mkdir()
    shown = [*chosen.tolist(), *map(int, worst)]
    search = searcher(model, data.test, shown, ranker)
    mapped = model if ranker is None else None
    queries = [
        _query(
            *(data, mapped, run_folder, "random" if i < len(chosen) else "failure"),
            *(caption, int(ranks[caption]), search(i)),
        )
        for i, caption in enumerate(shown)
    ]
    write_json(run_folder / "examples.json", {"queries": queries})


def _query(
    data: Data,
    model: RetrievalModel | None,
    run_folder: Path,
    kind: str,
    index: int,
    rank: int,
    scores: torch.Tensor,
) -> dict[str, Any]:
    corpus = data.test.corpus
    caption = corpus.captions[index]
    clip = f"examples/caption-{index:05d}.mp3"
    waveform = read_audio(caption.audio)[: int(LONGEST * SAMPLE_RATE)]
    spoken = io.BytesIO()
    soundfile.write(spoken, waveform, SAMPLE_RATE, format="MP3")
    write_file(run_folder / clip, spoken.getvalue())
    own = int(data.test.image_index[index])
    best = scores.argsort(descending=True, stable=True)[:TOP].tolist()
    top = [
        {
            "image_id": corpus.images[other].id,
            "file": _picture(data, other, run_folder),
            "score": float(scores[other]),
            "correct": other == own,
        }
        for other in best
    ]
    query: dict[str, Any] = {
        "kind": kind,
        "caption_id": caption.id,
        "text": caption.text,
        "speaker": caption.speaker,
        "audio": clip,
        "rank": rank,
        "image": _picture(data, own, run_folder),
        "top": top,
        "words": [],
    }
    if data.truth and model is not None:
        words = data.truth.words[index]
        maps = next(align(model, data.test, [index])).word_maps(words)
        query["words"] = [{"word": w.word, "start": w.start, "end": w.end} for w in words]
        rows, columns = data.test.image.description.grid or (0, 0)
        query["maps"] = {"rows": rows, "columns": columns, "values": maps.tolist()}
    return query


def _picture(data: Data, index: int, run_folder: Path) -> str:
    file = f"examples/image-{index:05d}.png"  # is there if another query shows it too
    if not (run_folder / file).exists():
        shown = io.BytesIO()
        Picture.fromarray(read_image(data.test.corpus.images[index].path)).save(shown, "PNG")
        write_file(run_folder / file, shown.getvalue())
    return file
