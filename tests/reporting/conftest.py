"""Run folders as a sweep leaves them, filled with made-up results."""

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw
from scipy.stats import norm

from cmdlab.evaluation import Voices
from cmdlab.evaluation.ranks import RankTable, retrieval_metrics
from cmdlab.records.records import write_listing, write_record

BASE = {"weight": 1.0, "direction": "image", "rate": 0.3, "corruption": "swap", "target": "tokens"}
CAPTION = "a small red circle left of the large blue star"
MakeStudy = Callable[..., Path]


@pytest.fixture(scope="session")
def make_study() -> MakeStudy:
    """A function that writes a runs folder: a listing, and a folder for each finished cell."""
    return write_study


def write_study(
    runs: Path,
    *,
    arms: Mapping[str, Mapping[str, Any]] | None = None,
    effects: Mapping[str, float] | None = None,
    axes: Mapping[str, list[Any]] | None = None,
    seeds: tuple[int, ...] = (1, 2, 3),
    images: int = 60,
    captions: int = 2,
    failed: tuple[tuple[str, int], ...] = (),
    missing: tuple[tuple[str, int], ...] = (),
    text: str = CAPTION,
    title: str = "Does denoising pay?",
    listing: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    examples: bool = True,
    voices: Voices | None = None,
    query_flops: Mapping[str, float] | None = None,
) -> Path:
    """Write the cells of `arms` (name → parameters that differ from BASE) at every seed.

    effects: arm → how much better than the baseline it ranks, in standard deviations of a query.
    listing, record: entries that replace the usual ones. query_flops: arm → the cost of a query,
    which no record tells without it. Returns the folder `runs`.
    """
    arms = arms or {"contrastive": {"weight": 0.0}, "cmd-image": {}}
    axes = axes or {}
    points = {arm: BASE | values for arm, values in arms.items()}
    listed: dict[str, list[dict[str, Any]]] = {}
    for axis, values in axes.items():
        for value in values:
            arm = "cmd-image" if value == BASE[axis] else f"cmd-image, {axis}={value}"
            points[arm] = BASE | {axis: value}
            listed.setdefault(axis, []).append({"value": value, "arm": arm})
    cells = []
    for seed in seeds:
        for arm, parameters in points.items():
            run_id = hashlib.sha256(f"{arm} {seed} {title}".encode()).hexdigest()[:16]
            status = "ok"
            if (arm, seed) in missing:
                status = "missing"
            elif (arm, seed) in failed:
                status = "failed"
                _write_failure(runs / run_id, run_id, arm, seed, parameters)
            else:
                effect = (effects or {}).get(arm, 0.0)
                _write_run(
                    runs / run_id,
                    _ranks(images, captions, effect, seed, arm),
                    {"id": run_id, "arm": arm, "seed": seed, "parameters": parameters},
                    dict(record or {}),
                    (query_flops or {}).get(arm),
                )
                if voices is not None:
                    voices.save(runs / run_id / "voices.npz")
                if examples:
                    write_examples(runs / run_id, text)
            cells.append({"id": run_id, "arm": arm, "seed": seed, "status": status})
    (runs / "sweeps").mkdir(parents=True, exist_ok=True)
    write_listing(
        runs / "sweeps" / "ablation.json",
        {
            "schema": 1,
            "sweep": "ablation",
            "title": title,
            "notebook": "train.ipynb",
            "smoke": False,
            "baseline": "contrastive",
            "axes": listed,
            "cells": cells,
        }
        | dict(listing or {}),
    )
    return runs


def write_examples(folder: Path, text: str, *, queries: int = 3) -> None:
    """examples.json with `queries` random queries and as many failures, and their media."""
    (folder / "examples").mkdir()
    (folder / "examples" / "clip.mp3").write_bytes(_tone())
    for index in range(5):
        _scene(index).save(folder / "examples" / f"scene-{index}.png")
    spoken = text.split()
    starts = np.linspace(0.1, 1.7, len(spoken))
    generator = np.random.default_rng(5)
    found = []
    for index in range(2 * queries):
        failure = index >= queries
        right = None if failure else index % 5
        found.append(
            {
                "kind": "failure" if failure else "random",
                "caption_id": f"caption-{index}",
                "text": text,
                "speaker": "en-gb-scotland+f3",
                "audio": "examples/clip.mp3",
                "rank": 40 - index if failure else index % 5 + 1,
                "top": [
                    {
                        "image_id": f"test/{place}.png",
                        "file": f"examples/scene-{place}.png",
                        "score": 0.6 - 0.03 * place,
                        "correct": place == right,
                    }
                    for place in range(5)
                ],
                "words": [
                    {"word": word, "start": float(start), "end": float(start) + 0.15}
                    for word, start in zip(spoken, starts, strict=True)
                ],
                "maps": {
                    "rows": 8,
                    "columns": 8,
                    "values": generator.dirichlet(np.full(64, 0.15), len(spoken)).tolist(),
                },
            }
        )
    (folder / "examples.json").write_text(json.dumps({"queries": found}), encoding="utf-8")


def _ranks(images: int, captions: int, effect: float, seed: int, arm: str) -> RankTable:
    """Ranks of a system; queries are as hard for every system, give or take its own luck."""
    shared = np.random.default_rng(0)
    luck = np.random.default_rng([seed, int.from_bytes(arm.encode()[-4:], "big")])
    total = images * captions

    def places(queries: int, gallery: int, steepness: float) -> np.ndarray:
        hardness = 0.9 * shared.standard_normal(queries) + 0.43 * luck.standard_normal(queries)
        spread = norm.cdf(hardness - effect - 0.02 * luck.standard_normal())
        return np.minimum(gallery * spread**steepness, gallery - 1).astype(np.int64)

    return RankTable(
        speech_greater=places(total, images, 5.5),
        speech_equal=np.zeros(total, np.int64),
        speech_image=np.repeat(np.arange(images), captions),
        image_greater=places(images, total - captions, 8.0),
        image_equal=np.zeros(images, np.int64),
        image_of_view=np.arange(images),
    )


def _write_run(
    folder: Path,
    ranks: RankTable,
    place: dict[str, Any],
    replaced: dict[str, Any],
    query_flops: float | None,
) -> None:
    folder.mkdir(parents=True)
    ranks.save(folder / "ranks.npz")
    test = retrieval_metrics(ranks)
    seed, weight = place["seed"], place["parameters"]["weight"]
    noise = np.random.default_rng([seed, ranks.speech_greater.sum()])
    steps = range(0, 401, 20)
    final = test["mean_R@1"]
    curve = [
        {
            "step": step,
            "loss": 4.9 * math.exp(-step / 150) + 1.2 + 0.1 * noise.random(),
            "contrastive": 4.0 * math.exp(-step / 150) + 1.0 + 0.1 * noise.random(),
            "denoising": 0.9 * math.exp(-step / 90) + 0.2 + 0.02 * noise.random()
            if weight
            else None,
            "temperature": 0.07,
            "validation_mean_R@1": final * (1 - math.exp(-step / 130)) + noise.random()
            if step % 40 == 0
            else None,
        }
        for step in steps
    ]
    values: dict[str, Any] = {
        "metrics": {"validation": test, "test": test},
        "ceiling": {
            "speech_to_image": {"R@1": 91.2, "R@5": 99.8, "R@10": 100.0},
            "image_to_speech": {"R@1": 96.0, "R@5": 99.9, "R@10": 100.0},
        },
        "text_ceiling": {
            "speech_to_image": {"R@1": 52.5, "R@5": 81.4, "R@10": 89.9},
            "image_to_speech": {"R@1": 60.1, "R@5": 86.0, "R@10": 93.3},
            "mean_R@1": 56.3,
            "foil": {"wins": 212, "ties": 1, "pairs": 400},
        },
        "learning_curve": curve,
        "cost": {
            "trainable_parameters": 612_353 + (198_400 if weight else 0),
            "denoiser_parameters": 198_400 if weight else 0,
            "inference_parameters": 612_353,
            "inference_flops": 41_300_000,
            "inference_ms": 2.3 + 0.2 * noise.random(),
            "training_seconds": 48.0 + 9 * bool(weight) + 2 * noise.random(),
            "steps": 400,
            "peak_memory_bytes": 700_000_000 + int(1e7 * noise.random()),
        },
        "alignment": {
            "pointing": {"hits": 300 + int(20 * noise.random()), "words": 1000, "chance": 0.114},
            "foil": {"wins": 260 + int(20 * noise.random()), "ties": 2, "pairs": 400},
        },
        "corpus": {
            "name": "SpokenScenes",
            "content_hash": "c0ffee" * 10,
            "gallery": len(ranks.image_greater),
            "captions": len(ranks.speech_greater),
        },
        "encoders": {
            "image": {"name": "tiny-image", "sha256": "1a" * 32},
            "speech": {"name": "tiny-speech", "sha256": "2b" * 32},
        },
        "determinism": {"seed": seed, "threads": 1, "deterministic_algorithms": True},
    }
    if query_flops is not None:
        values["cost"]["retrieval_flops_per_query"] = query_flops
        values["cost"]["retrieval_ms_per_query"] = query_flops / 1e7
    write_record(folder, _frame("ok") | values | place | replaced)


def _write_failure(
    folder: Path, run_id: str, arm: str, seed: int, parameters: dict[str, Any]
) -> None:
    folder.mkdir(parents=True)
    error = {"type": "FloatingPointError", "message": "the loss is NaN", "traceback": "…"}
    place = {"id": run_id, "arm": arm, "seed": seed, "parameters": parameters, "error": error}
    write_record(folder, _frame("failed") | place)


def _frame(status: str) -> dict[str, Any]:
    return {
        "schema": 1,
        "status": status,
        "sweep": "ablation",
        "wall_seconds": 61.5,
        "provenance": {
            "git_sha": "0123456789abcdef0123456789abcdef01234567",
            "uncommitted_sha256": None,
            "source_sha256": "3c" * 32,
            "notebook_sha256": "4d" * 32,
            "lock_sha256": "5e" * 32,
            "python": "3.11.9",
            "torch": "2.11.0",
            "triton": "3.6.0",
            "cuda": None,
            "driver": None,
            "cpu": "a CPU",
            "gpu": None,
            "cores": 2,
            "command": "cmdlab sweep notebooks/sweeps/ablation.yaml",
            "started": "2026-01-05T10:00:00+00:00",
        },
    }


def _tone(seconds: float = 2.0) -> bytes:
    written = io.BytesIO()
    time = np.arange(int(16_000 * seconds)) / 16_000
    soundfile.write(written, 0.2 * np.sin(2 * np.pi * 330 * time), 16_000, format="MP3")
    return written.getvalue()


def _scene(index: int) -> Image.Image:
    generator = np.random.default_rng(index)
    image = Image.fromarray(generator.integers(150, 190, (48, 48, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = generator.integers(2, 34, 2).tolist()
        colour = tuple(generator.integers(0, 255, 3).tolist())
        draw.ellipse((x, y, x + 12, y + 12), fill=colour)
    return image
