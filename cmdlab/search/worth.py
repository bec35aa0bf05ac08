"""What a search is worth to those who use it: how soon it finds their pictures, and the time saved.

The figures come from own pairs of a recording and its picture, or from what was said on the page.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cmdlab.corpora import (
    SAMPLE_RATE,
    BadEntry,
    bytes_of,
    decode_sound,
    load_corpus,
    read_pairs_csv,
    without_silence,
)
from cmdlab.errors import InputError
from cmdlab.evaluation import SCREEN
from cmdlab.reporting import Estimate, Worth, draw_worth
from cmdlab.search.index import Index
from cmdlab.search.retriever import Retriever
from cmdlab.search.verdicts import LOG, rank_of, read_verdicts

CUTOFFS = (1, 5, 10, SCREEN)
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Trials:
    """Queries and how far down their pictures were, arrays [queries].

    rank: float64, from 1, infinity where the picture was not found. gallery: int64, the pictures
    searched. seconds: float64, of speech. picture: int64, the same number for the same picture.
    """

    source: str
    rank: NDArray[np.float64]
    gallery: NDArray[np.int64]
    seconds: NDArray[np.float64]
    picture: NDArray[np.int64]


def write_worth(
    index: Index,
    retriever: Retriever | None,
    output: Path,
    *,
    queries: Path | None = None,
    corpus: Path | None = None,
    seconds_per_picture: float = 1.0,
    price: float | None = None,
    currency: str = "EUR",
) -> None:
    """Draw the sheet at `output`, from a CSV file of pairs with the columns audio and image, or
    without one from the page's log.

    corpus: that which was imported from these pairs, of which training has not seen the test split:
    then that split alone is asked. seconds_per_picture: what leafing through takes. price: of an
    hour on one GPU, in `currency`. Raises InputError for pairs or a log that cannot be used, or of
    fewer than two pictures.
    """
    if queries is None:
        trials = trials_of_log(index.folder)
    else:
        assert retriever is not None, "pairs are searched for"
        trials = trials_of_pairs(index, retriever, queries, corpus)
    draw_worth(measure(trials, seconds_per_picture), output, price=price, currency=currency)


def trials_of_pairs(
    index: Index, retriever: Retriever, file: Path, corpus: Path | None = None
) -> Trials:
    """Search for each recording of a CSV file of pairs, or of those that a corpus made of them has
    in its test split. Ties count against the search."""
    pairs = read_pairs_csv(file)
    if pairs.problems:
        raise InputError(f"{file}: {pairs.problems[0].entry}: {pairs.problems[0].message}")
    asked, source = pairs.pairs, f"pairs of {file.name}"
    if corpus is not None:
        names = _tested(corpus)
        asked = [pair for pair in asked if pair.image in names]
        source = f"pairs of {file.name} in the test split of {corpus.resolve().name}"
    if not asked:
        raise InputError(f"{file}: holds no {source}; name the file that the corpus was made of")
    row_of = {index.path(row): row for row in range(len(index))}
    root = index.pictures.resolve()
    rank, seconds, picture = [], [], []
    for pair in tqdm(asked, desc="searching", unit=" recordings"):
        own = row_of.get(os.path.relpath((file.parent / pair.image).resolve(), root))
        if own is None:
            raise InputError(
                f"{file}: {pair.place}: {pair.image} is not in the index; run `cmdlab index` again "
                "or remove the line"
            )
        try:
            waveform = decode_sound(bytes_of(file.parent / pair.audio))
        except BadEntry as error:
            raise InputError(f"{file}: {pair.place}: {pair.audio}: {error}") from error
        said = without_silence(waveform, SAMPLE_RATE)  # as a search has it
        vector = retriever.embed_speech(said, SAMPLE_RATE)
        rank.append(rank_of(index, vector, own))
        seconds.append(len(waveform) / SAMPLE_RATE)
        picture.append(own)
    return Trials(
        f"{len(rank):,} {source}",
        np.array(rank, np.float64),
        np.full(len(rank), len(index)),
        np.array(seconds, np.float64),
        np.array(picture, np.int64),
    )


def _tested(corpus: Path) -> set[str]:
    """What the source of an imported corpus calls the pictures of its test split."""
    test = load_corpus(corpus, "test")
    file = corpus / "sources.json"
    try:
        sources = json.loads(file.read_text(encoding="utf-8"))
        return {
            name
            for image in test.images
            for name in sources[image.path.relative_to(test.root).as_posix()]
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{file}: does not say where the corpus' pictures come from; name a corpus that "
            "`cmdlab corpus import` made of these pairs"
        ) from error


def trials_of_log(folder: Path) -> Trials:
    """What users said on the page. Where they gave a number alone, pictures count as different."""
    verdicts = read_verdicts(folder)
    names = [verdict.picture or i for i, verdict in enumerate(verdicts)]
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return Trials(
        f"{len(verdicts):,} verdicts of the page ({LOG})",
        np.array([np.inf if one.rank is None else one.rank for one in verdicts]),
        np.array([one.gallery for one in verdicts], np.int64),
        np.array([one.seconds for one in verdicts], np.float64),
        np.array([number[name] for name in names], np.int64),
    )


def measure(trials: Trials, seconds_per_picture: float) -> Worth:
    """The sheet's figures.

    Of a query whose picture was not found all pictures count as looked at. Leafing through in no
    order takes (gallery + 1) / 2 pictures on average. A search takes its speech and the pictures
    looked at. Raises InputError for fewer than two different pictures.
    """
    pictures = len(np.unique(trials.picture))
    if pictures < 2:
        raise InputError(f"{trials.source}: fewer than two pictures say nothing; collect more")
    looked = np.minimum(trials.rank, trials.gallery)
    leafing = (trials.gallery + 1) / 2
    taken = trials.seconds + looked * seconds_per_picture
    return Worth(
        source=trials.source,
        queries=len(trials.rank),
        pictures=pictures,
        gallery=int(trials.gallery.max()),
        not_found=int(np.isinf(trials.rank).sum()),
        screen=SCREEN,
        found={k: share(trials.rank <= k, trials.picture) for k in CUTOFFS},
        looked_at=mean(looked, trials.picture),
        median_rank=float(np.median(trials.rank)),
        leafed_through=float(leafing.mean()),
        seconds_per_picture=seconds_per_picture,
        seconds_searching=mean(taken, trials.picture),
        seconds_saved=mean(leafing * seconds_per_picture - taken, trials.picture),
        ranks=sorted(trials.rank.tolist()),
    )


def mean(values: NDArray[Any], cluster: NDArray[np.int64]) -> Estimate:
    """A mean with its 95 % interval, by a bootstrap of pictures with all their queries, which are
    no independent draws (Davison and Hinkley 1997, Bootstrap Methods and their Application, 3.8).

    `evaluation.interval` is for a gallery that is the queries' own pictures: an index holds more.
    """
    count = np.bincount(cluster)
    total = np.bincount(cluster, weights=values)[count > 0]
    count = count[count > 0]
    pictures = len(count)
    drawn = np.random.default_rng(0).multinomial(pictures, [1 / pictures] * pictures, RESAMPLES)
    low, high = np.quantile((drawn @ total) / (drawn @ count), [0.025, 0.975])
    return Estimate(float(np.mean(values)), float(low), float(high))


def share(hits: NDArray[np.bool_], cluster: NDArray[np.int64]) -> Estimate:
    """A share from 0 to 1 with its interval. Where all queries agree, a bootstrap would call that
    certain: then the open end is Wilson's (1927), for as many trials as there are pictures."""
    found = mean(hits, cluster)
    if 0 < found.mean < 1:
        return found
    bound = 1.959963984540054**2 / (len(np.unique(cluster)) + 1.959963984540054**2)
    return Estimate(1.0, 1 - bound, 1.0) if found.mean else Estimate(0.0, 0.0, bound)
