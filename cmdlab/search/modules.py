"""Trained models to hand on: three files with a card, pushed to and pulled from a hub."""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmdlab.errors import InputError
from cmdlab.evaluation import RankTable, interval
from cmdlab.outputs import write_file
from cmdlab.records import read_record, read_result
from cmdlab.retrieval import Frozen, RetrievalModel

CARD = "MODEL_CARD.md"
NAMES_ON_A_HUB = {
    "model.safetensors": "model.safetensors",
    "model.json": "model.json",
    CARD: "README.md",  # what a hub shows
}
CUTOFFS = (1, 5, 10)


def make_module(run: Path, folder: Path) -> None:
    """Write the model of a finished run to `folder`, by whose name it is known, with its card.

    The card has data, recipe, metrics with intervals, cost and limits, all of them from the run's
    own files. Raises InputError for a run that is not finished, or whose model does not say which
    frozen encoders it belongs to.
    """
    name = folder.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise InputError(f"{folder}: its name is the module's; make it of letters, digits, . _ -")
    result = _result(run)
    model = RetrievalModel.from_pretrained(run / "model")
    if not model.encoders:
        raise InputError(
            f"{run / 'model'}: does not say which frozen encoders it belongs to; train it again"
        )
    table = RankTable.load(run / "ranks.npz")
    card = _card(name, result, _settings(run), model.encoders, table)
    model.save_pretrained(folder)
    write_file(folder / CARD, card)


def push_module(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload a module's files as one commit to OWNER/NAME of the Hugging Face hub. Returns its
    address.

    The repository is made where there is none. Who one is there, `hf auth login` has asked.
    Raises InputError for a folder without the files, and where the hub refuses.
    """
    RetrievalModel.from_pretrained(folder)
    if not (folder / CARD).is_file():
        raise InputError(f"{folder}: holds no {CARD}; make it by `cmdlab module make`")
    with _hub(repository) as hub:
        client = hub.HfApi()
        client.create_repo(repository, private=private, exist_ok=True)
        files = [
            hub.CommitOperationAdd(there, (folder / here).read_bytes())
            for here, there in NAMES_ON_A_HUB.items()
        ]
        commit = client.create_commit(repository, files, commit_message="Add the trained model")
    return str(commit.repo_url)


def pull_module(repository: str, folder: Path, *, revision: str | None = None) -> None:
    """Download the three files of OWNER/NAME to `folder`, once they prove to be a model.

    revision: a branch, tag or commit; default: the newest. Raises InputError for what is no model,
    and where the hub refuses.
    """
    with tempfile.TemporaryDirectory() as aside:
        with _hub(repository) as hub:
            for here, there in NAMES_ON_A_HUB.items():
                file = hub.hf_hub_download(repository, there, revision=revision, local_dir=aside)
                Path(file).replace(Path(aside) / here)
        RetrievalModel.from_pretrained(Path(aside))
        for name in NAMES_ON_A_HUB:
            write_file(folder / name, (Path(aside) / name).read_bytes())


@contextmanager
def _hub(repository: str) -> Iterator[Any]:
    """The hub's own client, whose refusals are InputErrors."""
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise InputError("huggingface_hub is not installed; pip install cmdlab[hub]") from error
    try:
        yield hub
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{repository}: the hub refuses ({reason}); see name, rights (hf auth login), network"
        ) from error


def _result(run: Path) -> dict[str, Any]:
    """What was measured: a sweep keeps it in record.json, `cmdlab train` in result.json."""
    if not (run / "record.json").exists():
        return read_result(run / "result.json")
    record = read_record(run)
    if record["status"] != "ok":
        raise InputError(f"{run}: the run failed; name a finished one")
    return record


def _settings(run: Path) -> dict[str, Any]:
    path = run / "settings.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        denoising = settings.pop("denoising")
        return {**settings, **(denoising if settings["weight"] else {})}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: holds no recipe; train the model again") from error


def _card(
    name: str,
    result: dict[str, Any],
    settings: dict[str, Any],
    encoders: dict[str, Frozen],
    table: RankTable,
) -> str:
    corpus, cost = result["corpus"], result["cost"]
    generated = result["ceiling"] is not None
    size = f"{corpus['gallery']:,} pictures and {corpus['captions']:,} spoken captions"
    return f"""\
---
library_name: cmdlab
tags: [speech-image-retrieval, cross-modal-denoising]
---
# {name}

The trained heads of a speech–image retrieval model: a spoken caption and the picture that it \
describes get vectors with a high dot product. {_training(settings)} The frozen encoders are not \
in it.

```python
from cmdlab.search import Retriever

retriever = Retriever("{name}")
retriever.embed_speech("query.wav") @ retriever.embed_image("picture.png")
```

## Encoders

It works with these weights alone, and refuses others.

| of | encoder | states kept | SHA-256 of its weights |
|---|---|---|---|
{_encoder_rows(encoders)}

## Data

Trained on the training split of {_code(corpus["name"])}. Measured on its test split: {size}, \
with the content hash {_code(corpus["content_hash"])}.

## Recipe

{_table([(_code(key), _code(value)) for key, value in settings.items()], ("parameter", "value"))}

## Metrics

In percent, on that test split; ties count against the system. In brackets 95 % intervals from a \
bootstrap of the pictures: they speak of this one trained model. Another seed gives another one.

{_metrics(result, table)}

## Cost

{cost["inference_parameters"]:,} parameters and {cost["inference_flops"] / 1e6:.1f} million \
floating-point operations for a caption of median length, beside the frozen encoders'. Trained in \
{cost["training_seconds"]:.0f} s.

## Limits

{_GENERATED if generated else _RECORDED}
"""


_GENERATED = """\
For study and demonstration. The corpus is generated: drawn scenes, told in few words by a \
synthesiser's voices. On photographs and on people's speech it was not measured, and is not \
expected to be of use."""
_RECORDED = """\
Measured on the test split of its own corpus alone. On other pictures, other voices, other \
languages and in other rooms it was not measured; measure it on your own pairs before you rely on \
it."""


def _training(settings: dict[str, Any]) -> str:
    if settings["weight"]:
        return (
            "It was trained by a contrastive loss with Cross-Modal Denoising beside it, of which "
            "nothing is left at retrieval."
        )
    return "It was trained by a contrastive loss alone."


def _encoder_rows(encoders: dict[str, Frozen]) -> str:
    return "\n".join(
        f"| {kind} | {_code(one.name)} | {', '.join(map(str, one.layers)) or 'all'} "
        f"| {_code(one.sha256)} |"
        for kind, one in encoders.items()
    )


def _metrics(result: dict[str, Any], table: RankTable) -> str:
    rows = []
    for direction, words in (("speech_to_image", "speech → image"), ("image_to_speech", "reverse")):
        found = [interval([table], f"{direction}/R@{k}") for k in CUTOFFS]
        cells = [f"{one.mean:.1f} ({one.low:.1f}–{one.high:.1f})" for one in found]
        rows.append((words, *cells))
        if result["ceiling"]:
            ceiling = result["ceiling"][direction]
            rows.append(("an all-knowing system", *[f"{ceiling[f'R@{k}']:.1f}" for k in CUTOFFS]))
    return _table(rows, ("", *(f"R@{k}" for k in CUTOFFS)))


def _table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: object) -> str:
    """A value of a file that nobody vouches for, as Markdown that is text and nothing else."""
    text = "".join(c for c in str(value) if c.isprintable() and c not in "`|")
    return f"`{text}`"
