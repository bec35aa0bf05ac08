"""Where the study's time goes on the machine at hand: each stage on a small corpus, on one core."""

import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cmdlab.corpora import Utterance, load_corpus, make_corpus, speak
from cmdlab.experiment import make_deterministic, measure, open_data, write_examples
from cmdlab.records import collect_provenance
from cmdlab.retrieval import Training, train

STEPS = 10
LINES = 8  # functions or operations listed of a stage


def profile_study() -> None:
    """Run every stage once on one core, and print its time and what that went into.

    Functions are listed by their own time, measured by cProfile, whose cost is in it (espeak-ng
    speaks in a thread apart, for which the others wait to acquire a lock); the operations of
    training by torch's profiler, in steps of their own.
    """
    make_deterministic()
    machine = collect_provenance()
    print(f"{machine['cpu']}, {torch.backends.cpu.get_cpu_capability()}; one core of it")
    with tempfile.TemporaryDirectory(prefix="cmdlab-profile-") as name:
        folder = Path(name)
        corpus = folder / "corpus"
        _stage("corpus", "image", 80, lambda: make_corpus(corpus, preset="smoke", workers=1))
        texts = [Utterance(one.text, one.speaker) for one in load_corpus(corpus, "val").captions]
        _stage("speech alone, part of it", "caption", len(texts), lambda: speak(texts))
        _stage("features", "caption", 400, lambda: open_data(corpus, workers=1))
        data = open_data(corpus)
        for arm, weight in (("contrastive", 0.0), ("cmd-image", 1.0)):
            training = Training(steps=STEPS, validate_every=STEPS, warm_up=1, weight=weight)
            trained = train(training, data.train, data.validation)
            print(f"\ntraining, {arm}: {1e3 * trained.seconds / STEPS:.1f} ms a step")
            with torch.profiler.profile(acc_events=True) as profiler:
                train(training, data.train, data.validation)
            operations = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
            for one in operations[:LINES]:
                milliseconds = one.self_cpu_time_total / 1e3 / STEPS
                print(f"  {milliseconds:8.2f} ms a step  {one.count / STEPS:6.1f} ×  {one.key}")
        run = folder / "run"
        run.mkdir()
        _stage("evaluation", "caption", 100, lambda: measure(data, trained, training, run))
        _stage("examples", "query", 16, lambda: write_examples(data, trained.model, run))


def _stage(name: str, unit: str, count: int, work: Callable[[], object]) -> None:
    """Do the work, with `count` items in it, and print what its time went into."""
    profiler, started = cProfile.Profile(), time.perf_counter()
    profiler.runcall(work)
    seconds = time.perf_counter() - started
    print(f"\n{name}: {seconds:.2f} s, {1e3 * seconds / count:.1f} ms for each {unit}")
    for (file, line, function), (_, calls, own, _, _) in sorted(
        pstats.Stats(profiler).stats.items(),  # type: ignore[attr-defined]
        key=lambda entry: -entry[1][2],
    )[:LINES]:
        place = f"{Path(file).name}:{line} " if line else ""
        print(f"  {1e3 * own / count:8.2f} ms a {unit}  {calls / count:6.1f} ×  {place}{function}")
