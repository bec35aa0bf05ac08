"""The command line: it reads arguments, calls the library, and turns refusals into one line."""

import argparse
import inspect
import io
import json
import math
import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cmdlab.errors import InputError
from cmdlab.outputs import is_standard_output, write_file


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for benchmarks that found a wrong answer, 2
    for a refusal, 130 when interrupted.

    Results go to standard output, progress and warnings to standard error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a notebook has others
            stream.reconfigure(errors="backslashreplace")  # any file name, on any terminal
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _refusing_output():
            chosen = _parser().parse_args(arguments)
            return chosen.run(chosen) or 0
    except InputError as error:
        print("cmdlab:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = shlex.join(["cmdlab", *arguments])
        print(f"cmdlab: stopped; what was finished is kept, go on with: {again}", file=sys.stderr)
        return 130


@contextmanager
def _refusing_output() -> Iterator[None]:
    """Standard output for the time of a command, flushed at its end.

    Where it cannot be written (a full disk, a pipe that nobody reads), that is an InputError.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed; lead it somewhere, to /dev/null at least")
    output: Any = _StandardOutput(sys.stdout)
    with redirect_stdout(output):
        try:
            yield
        finally:
            output.flush()


class _StandardOutput:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Callable[..., Any], *arguments: str) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            # What could not be written is still held, and would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise InputError(
                f"standard output cannot be written ({error.strerror}); lead it somewhere else"
            ) from error


def _study(chosen: Namespace) -> None:
    from cmdlab.study import run_study

    run_study(chosen.folder, smoke=chosen.smoke)


def _corpus_make(chosen: Namespace) -> None:
    from cmdlab.corpora import make_corpus

    make_corpus(chosen.folder, preset=chosen.preset, seed=chosen.seed, workers=chosen.workers)


def _corpus_vary(chosen: Namespace) -> None:
    from cmdlab.corpora import make_variant

    make_variant(chosen.source, chosen.folder, chosen.kind)


def _corpus_check(chosen: Namespace) -> None:
    from collections import Counter

    from cmdlab.corpora import check_corpus
    from cmdlab.encoders import encoders_for

    check = check_corpus(chosen.folder, skip_bad=chosen.skip_bad)
    print(check)
    print(encoders_for("images", check.picture_sizes))
    print(encoders_for("speech", Counter()))
    print(encoders_for("text", check.words))
    if not check.ok:
        raise InputError(f"{chosen.folder}: not usable as it is; mend what is listed")


def _corpus_import(chosen: Namespace) -> None:
    from cmdlab.corpora import import_corpus

    imported = import_corpus(
        chosen.source,
        chosen.folder,
        side=chosen.size,
        seed=chosen.seed,
        skip_bad=chosen.skip_bad,
        workers=chosen.workers,
    )
    print(imported)
    if not imported.ok:
        raise InputError(f"{chosen.source}: not imported; mend what is listed or pass --skip-bad")


def _train(chosen: Namespace) -> None:
    from cmdlab.encoders import Encoder
    from cmdlab.experiment import pick_device, run_experiment
    from cmdlab.retrieval import is_first_process, joined

    parameters = _given(chosen)
    for name in parameters:
        if name in inspect.signature(run_experiment).parameters:
            raise InputError(
                f"-p {name} is no parameter of the training; `cmdlab train --help` has the options"
            )
    with joined(pick_device(chosen.device)) as device:
        result = run_experiment(
            chosen.corpus,
            chosen.output,
            speech_encoder=Encoder(
                chosen.speech_encoder, chosen.speech_weights, tuple(chosen.speech_layers)
            ),
            image_encoder=Encoder(chosen.image_encoder, chosen.image_weights),
            online=chosen.online,
            snr_db=chosen.snr_db,
            test_corpus=chosen.test_corpus,
            device=device,
            skip_bad=chosen.skip_bad,
            **parameters,
        )
        if is_first_process():
            print(json.dumps(result["metrics"], indent=2))


def _sweep(chosen: Namespace) -> None:
    from cmdlab.sweeps import choose_engine, run_sweep

    engine = choose_engine(
        chosen.engine,
        address=chosen.address,
        gpus_per_cell=chosen.gpus_per_cell,
        partition=chosen.partition,
    )
    done = run_sweep(
        chosen.file,
        runs=chosen.runs,
        workers=chosen.workers,
        smoke=chosen.smoke,
        overrides=_given(chosen),
        engine=engine,
    )
    print(f"{done.listing}: {done.done} run, {done.resumed} kept from before, {done.failed} failed")
    done.refuse_failures()


def _index(chosen: Namespace) -> None:
    from cmdlab.search import index_pictures

    pictures = Path(os.path.abspath(chosen.pictures))
    index = chosen.output or pictures.with_name(f"{pictures.name}.index")
    open_model = partial(_retriever, chosen, chosen.model)
    print(index_pictures(chosen.pictures, index, chosen.model, open_model))


def _search(chosen: Namespace) -> None:
    from cmdlab.search import heard, recorded, spoken

    asked = [chosen.query is not None, chosen.say is not None, chosen.record is not None]
    if sum(asked) != 1:
        raise InputError("say what to search for: one of QUERY.wav, --say TEXT, --record SECONDS")
    index, retriever = _open_index(chosen)
    if chosen.query is not None:
        vector = retriever.embed_speech(*heard(chosen.query))
    elif chosen.say is not None:
        vector = retriever.embed_speech(*spoken(chosen.say))
    else:
        ready = partial(print, f"recording for {chosen.record} s: speak now", file=sys.stderr)
        vector = retriever.embed_speech(*recorded(chosen.record, ready))
    matches = index.nearest(vector, chosen.k)
    paths = [str(index.pictures / match.path) for match in matches]
    if chosen.json:
        found = [
            {"rank": match.rank, "score": match.score, "path": path}
            for match, path in zip(matches, paths, strict=True)
        ]
        print(json.dumps(found, indent=1))
    else:
        for match, path in zip(matches, paths, strict=True):
            print(f"{match.rank:3}  {match.score:+.4f}  {_on_one_line(path)}")


def _serve(chosen: Namespace) -> None:
    from cmdlab.search import serve_page

    serve_page(*_open_index(chosen), port=chosen.port)


def _worth(chosen: Namespace) -> None:
    from cmdlab.search import Index, write_worth

    if chosen.queries is None:
        if chosen.corpus:
            raise InputError("--corpus: says which of the pairs to ask; give them by --queries")
        index, retriever = Index(chosen.index), None
    else:
        index, retriever = _open_index(chosen)
    write_worth(
        index,
        retriever,
        chosen.output,
        queries=chosen.queries,
        corpus=chosen.corpus,
        seconds_per_picture=chosen.seconds_per_picture,
        price=chosen.price,
        currency=chosen.currency,
    )
    if not is_standard_output(chosen.output):
        print(chosen.output)


def _open_index(chosen: Namespace) -> tuple[Any, Any]:
    """The index and the model that made it."""
    from cmdlab.search import Index, model_identity

    index = Index(chosen.index)
    model = chosen.model or index.model
    try:
        identity = model_identity(model)
    except InputError as error:
        if chosen.model:
            raise
        raise InputError(f"{error}; if it was moved, say where to by --model") from error
    if identity != index.identity:
        raise InputError(
            f"{model}: is not the model that made {chosen.index}; name that one by --model, or "
            "make the index again"
        )
    return index, _retriever(chosen, model)


def _retriever(chosen: Namespace, model: str) -> Any:
    from cmdlab.experiment import pick_device
    from cmdlab.search import Retriever

    return Retriever(
        model,
        device=pick_device(chosen.device),
        speech_weights=chosen.speech_weights,
        image_weights=chosen.image_weights,
    )


def _on_one_line(path: str) -> str:
    """A path with its control characters escaped: a name may hold a line's end, or colour a
    terminal."""
    return "".join(c if c >= " " and c != "\x7f" else f"\\x{ord(c):02x}" for c in path)


def _report(chosen: Namespace) -> None:
    from cmdlab.reporting import publish, write_kernel_report, write_report

    if all(path.suffix == ".csv" for path in chosen.runs):
        write_kernel_report(chosen.runs, chosen.output)
    elif chosen.keep:
        publish(chosen.runs, chosen.keep, chosen.output)
    else:
        write_report(chosen.runs, chosen.output)
    if not is_standard_output(chosen.output):
        print(chosen.output)


def _bench(chosen: Namespace) -> int:
    import importlib

    import cmdlab_kernels

    folder = Path(cmdlab_kernels.__path__[0]).parent / "benchmarks"
    if not (folder / "bench.py").is_file():
        raise InputError(
            f"{folder}: no such folder; the benchmarks come with a clone, run it there"
        )
    sys.path.insert(0, str(folder))
    run_benchmarks = importlib.import_module("bench").run_benchmarks
    try:
        right = run_benchmarks(
            chosen.device,
            quick=chosen.quick,
            operations=chosen.operations,
            output=chosen.output,
            write=write_file,
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    return 0 if right else 1


def _profile(_: Namespace) -> None:
    from cmdlab.profiling import profile_study

    profile_study()


def _evaluate(chosen: Namespace) -> None:
    from cmdlab.evaluation import evaluate_file

    print(json.dumps(evaluate_file(chosen.file, impl=chosen.impl), indent=2, allow_nan=False))


def _encode(chosen: Namespace) -> None:
    from cmdlab.search import encode_files, encode_pairs

    if bool(chosen.files) == bool(chosen.pairs):
        raise InputError("give either FILES or --pairs FILE.csv")
    retriever = _retriever(chosen, chosen.model)
    if chosen.pairs:
        encode_pairs(retriever, chosen.pairs, chosen.output)
    else:
        encode_files(retriever, chosen.files, chosen.output)


def _module_make(chosen: Namespace) -> None:
    from cmdlab.search import make_module

    make_module(chosen.run_folder, chosen.folder)
    print(chosen.folder)


def _module_push(chosen: Namespace) -> None:
    from cmdlab.search import push_module

    print(push_module(chosen.folder, chosen.repository, private=chosen.private))


def _module_pull(chosen: Namespace) -> None:
    from cmdlab.search import pull_module

    pull_module(chosen.repository, chosen.folder, revision=chosen.revision)
    print(chosen.folder)


class _Parser(ArgumentParser):
    below: Callable[[], str] | None = None  # what the help ends with

    def format_help(self) -> str:
        return super().format_help() + (self.below() if self.below else "")

    def error(self, message: str) -> NoReturn:
        """A refusal in one line, as everywhere, where argparse would print its usage too."""
        self.exit(2, f"cmdlab: {message}; see {self.prog} --help\n")


def _parameters() -> str:
    """The list of what `-p` takes. It loads torch, so it is made when the help is asked for."""
    from cmdlab.retrieval import Denoising, Training, parameters_of

    found = parameters_of([Training, Denoising])
    settings = [f"{one.name}={one.default}" for one in found]
    width = max(map(len, settings))
    lines = [f"  {a:{width}}  {one.line}" for a, one in zip(settings, found, strict=True)]
    return "\n".join(["\nparameters for -p, with their defaults:", *lines, ""])


def _parser() -> ArgumentParser:
    parser = _Parser(
        prog="cmdlab",
        description="Cross-Modal Denoising for speech-image retrieval: corpora, training, sweeps, "
        "reports.",
        epilog="Start with `cmdlab study --smoke`. `cmdlab COMMAND --help` tells what a command "
        "does, gives an example, and says where its output goes. A refusal exits with 2 and one "
        "line that says what to mend.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    study = _command(
        commands,
        "study",
        _study,
        "the whole study: make the corpus, train both arms, write the report",
        """
        Make the SpokenScenes corpus, compute the frozen encoders' features, train with and without
        Cross-Modal Denoising, and write one HTML report. It can be stopped at any moment; the same
        command goes on where it was, and finished runs are never repeated.

        example: cmdlab study --smoke
        output:  FOLDER, with the report in it; its path is printed at the end
        """,
    )
    study.add_argument("--smoke", action="store_true", help="shrink everything, to see it work")
    study.add_argument("--folder", type=Path, default=Path("study"), help="default: %(default)s")

    corpus = commands.add_parser(
        "corpus", help="make, vary, check or import a corpus of spoken captions"
    )
    kinds = corpus.add_subparsers(metavar="make|vary|check|import", required=True)
    make = _command(
        kinds,
        "make",
        _corpus_make,
        "generate SpokenScenes: drawn scenes, captions spoken by espeak-ng",
        """
        Generate SpokenScenes in SpokenCOCO's layout, with the ground truth beside it. The same seed
        gives the same bytes, whatever the number of workers.

        example: cmdlab corpus make data/default --preset default
        output:  DIR; `smoke` takes seconds, `default` has 1,000 test images, `large` is the size of
                 SpokenCOCO; in `twins` every image has another that shows the same things in the
                 same places, and differs in what belongs to what; `study` is a small one of twins
        """,
    )
    make.add_argument("folder", type=Path, metavar="DIR")
    presets = ["smoke", "study", "default", "twins", "large"]
    make.add_argument("--preset", choices=presets, required=True)
    make.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    make.add_argument(
        "--workers", type=_positive, default=os.cpu_count(), help="default: all cores"
    )
    vary = _command(
        kinds,
        "vary",
        _corpus_vary,
        "tell or show the scenes of a generated corpus in another way",
        """
        Make another corpus of the scenes of SpokenScenes. `scans` puts what a simulated range
        finder hears in the place of speech: train on it with --speech-encoder tiny-scan. `sketches`
        holds the test pictures alone, drawn by another hand, with their speech: test a model on
        them with --test-corpus. The same source gives the same bytes.

        example: cmdlab corpus vary study/scenes study/scans --as scans
        output:  DIR
        """,
    )
    vary.add_argument("source", type=Path, metavar="CORPUS")
    vary.add_argument("folder", type=Path, metavar="DIR")
    vary.add_argument("--as", dest="kind", choices=["scans", "sketches"], required=True)
    check = _command(
        kinds,
        "check",
        _corpus_check,
        "say what is wrong with a corpus, and where",
        """
        Check layout, counts, ids, sound and image files of SpokenScenes, SpokenCOCO, Flickr8k Audio
        or Places Audio, and say which encoders take it. Without --skip-bad a corpus with any bad
        entry is refused; with it the bad entries are listed and left out. What is only warned of,
        as silent recordings and files that two splits hold, stays in.

        example: cmdlab corpus check data/default
        output:  the findings, on standard output
        """,
    )
    check.add_argument("folder", type=Path, metavar="DIR")
    check.add_argument("--skip-bad", action="store_true", help="list bad entries and go on")
    import_ = _command(
        kinds,
        "import",
        _corpus_import,
        "make a corpus of own recordings and pictures, or of a hub's parquet parts",
        """
        Make a corpus in SpokenCOCO's layout. PAIRS is a CSV file with the columns audio and image
        and, at will, text, speaker and split (train, val or test), its paths relative to its own
        folder; or a folder of parquet parts, as hubs give Flickr8k Audio and SpokenCOCO out. Any
        sound that libsndfile reads becomes 16 kHz mono, any picture that Pillow reads upright RGB.
        Pictures are split by a seed where PAIRS does not say how, near-duplicates together. It can
        be stopped at any moment; the same command goes on where it was. Sources are only read.

        example: cmdlab corpus import recordings/pairs.csv data/mine --size 64
        output:  DIR, and on standard output what was made, left out, or is to be mended
        """,
    )
    import_.add_argument("source", type=Path, metavar="PAIRS")
    import_.add_argument("folder", type=Path, metavar="DIR")
    import_.add_argument(
        "--size",
        type=_positive,
        metavar="N",
        help="squares of N pixels, cut from the middle: 64 for the tiny encoders; default: whole "
        "pictures of at most 1,024 pixels a side",
    )
    import_.add_argument("--seed", type=int, default=1, help="of the splits; default: %(default)s")
    import_.add_argument("--skip-bad", action="store_true", help="list bad entries and go on")
    import_.add_argument("--workers", type=_positive, default=None, help="default: all cores")

    train = _command(
        commands,
        "train",
        _train,
        "train one model",
        """
        Train one retrieval model on a corpus and evaluate it. Stopped, it goes on from its last
        checkpoint when the same command is given again.

        Started as `torchrun --nproc-per-node 8 -m cmdlab train ...`, its processes train the model
        together, on a GPU each or on CPUs: the same run as that of one process, to rounding,
        whatever their number. All machines must share the folders.

        example: cmdlab train --corpus data/default --output runs/mine -p weight=1.0 -p seed=3
        output:  the folder given by --output: model/, ranks.npz, voices.npz and result.json; the
                 metrics are printed as JSON
        """,
    )
    train.add_argument("--corpus", type=Path, required=True, metavar="DIR")
    train.add_argument("--output", type=Path, required=True, metavar="DIR")
    for kind, name in (("speech", "hubert-large"), ("image", "clip-vit-l-14")):
        train.add_argument(
            f"--{kind}-encoder",
            default=f"tiny-{kind}",
            metavar="NAME",
            help=f"the frozen {kind} encoder, e.g. {name}; default: %(default)s",
        )
        train.add_argument(
            f"--{kind}-weights",
            default="",
            metavar="PATH",
            help="a file or folder of its weights; default: those that its library downloads",
        )
    train.add_argument(
        "--speech-layers",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="the states of the speech encoder that are kept, from 0; default: all",
    )
    train.add_argument(
        "--online", action="store_true", help="encode speech at each step, and store none of it"
    )
    train.add_argument(
        "--snr-db",
        type=float,
        metavar="DB",
        help="of the noise that speech is heard in; default: 10 to 30 dB for generated corpora, "
        "none for people's speech",
    )
    train.add_argument(
        "--test-corpus",
        type=Path,
        metavar="DIR",
        help="whose test split is read in place of the corpus' own",
    )
    train.add_argument("--device", default="auto", help="default: a GPU where there is one")
    train.add_argument(
        "--skip-bad",
        action="store_true",
        help="list what cannot be read and train without it; every file is read first",
    )
    _add_parameters(train, "change a parameter from its default, see below")
    train.below = _parameters

    sweep = _command(
        commands,
        "sweep",
        _sweep,
        "run every cell of a sweep file that has not been run",
        """
        Run a notebook once for each arm and seed of a sweep file. It can be killed at any moment:
        the same command runs only what is missing. A failed cell keeps its traceback, and the
        sweep goes on.

        Cells run on this machine, or with --engine on many: as tasks of a Ray cluster, or as Slurm
        jobs. --runs, the working folder and the corpus are then folders that all nodes share, under
        the same paths, and cmdlab is installed alike on each; records say on what each cell ran.
        Two sweeps may share --runs where locks (flock) reach over machines, as on NFS 4; where they
        do not, as on Lustre with localflock, run one sweep at a time. `sbatch` heeds its SBATCH_...
        variables, as SBATCH_ACCOUNT and SBATCH_TIMELIMIT (a day if not set).

        example: cmdlab sweep notebooks/sweeps/study.yaml --workers 2
                 cmdlab sweep notebooks/sweeps/study.yaml --engine ray --address head:6379
                 cmdlab sweep notebooks/sweeps/study.yaml --engine slurm --partition gpu
        output:  one folder a cell under --runs, with its executed notebook and record.json
        """,
    )
    sweep.add_argument("file", type=Path, metavar="FILE", help="a YAML sweep file")
    sweep.add_argument("--smoke", action="store_true", help="shrink every cell to seconds")
    _add_parameters(sweep, "replace a parameter of every cell, as corpus=/data/flickr8k")
    sweep.add_argument(
        "--workers",
        type=_positive,
        default=None,
        help="how many cells at once; default: one a GPU, or as the cores allow; on a cluster as "
        "its scheduler gives, 256 at most",
    )
    sweep.add_argument(
        "--runs", type=Path, default=Path("runs"), metavar="DIR", help="default: %(default)s"
    )
    sweep.add_argument(
        "--engine",
        default="local",
        help="where cells run: local, ray or slurm; default: %(default)s",
    )
    sweep.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of the Ray cluster; default: RAY_ADDRESS, else the one on this machine, else a new "
        "one on this machine alone",
    )
    sweep.add_argument(
        "--gpus-per-cell",
        type=_share,
        metavar="GPUS",
        help="on a cluster; with Ray also a fraction, so that cells share a GPU and its memory; "
        "default: 1, with Ray 0 where no node has one",
    )
    sweep.add_argument("--partition", metavar="NAME", help="of Slurm; default: the cluster's")

    index = _command(
        commands,
        "index",
        _index,
        "make or update the index of a folder of pictures, to search in by speech",
        """
        Embed every picture below a folder that is new or has changed; moved and renamed ones are
        known by their content, deleted ones forgotten. Hidden and system files are left out.
        Pictures that cannot be read are listed, and the others go on. It can be killed at any
        moment; the same command goes on where it was. Pictures are only read.

        example: cmdlab index holiday --model runs/mine/model
        output:  the index, a folder beside the pictures' (holiday.index) unless -o names another,
                 and on standard output what was done
        """,
    )
    index.add_argument("pictures", type=Path, metavar="PICTURES")
    index.add_argument(
        "--model", required=True, help="a trained model's folder, or the name of one that ships"
    )
    index.add_argument("-o", "--output", type=Path, metavar="INDEX")
    _add_frozen_encoders(index)

    search = _command(
        commands,
        "search",
        _search,
        "find the pictures that a spoken description fits best",
        """
        Search an index by a recording, by a text that espeak-ng speaks first, or by what the
        microphone hears. Scores are dot products of unit vectors. No picture is opened.

        example: cmdlab search holiday.index query.wav -k 5
                 cmdlab search holiday.index --say "a red circle left of a star"
        output:  rank, score and path of each picture, or with --json a list of the three; in JSON
                 a byte that is no UTF-8 is a surrogate, which Python's os.fsencode turns back
        """,
    )
    search.add_argument("index", type=Path, metavar="INDEX")
    search.add_argument("query", type=Path, nargs="?", metavar="QUERY.wav", help="any sound file")
    search.add_argument("--say", metavar="TEXT", help="spoken by espeak-ng, then searched for")
    search.add_argument("--record", type=_positive, metavar="SECONDS", help="from the microphone")
    search.add_argument("-k", type=_positive, default=12, help="pictures; default: %(default)s")
    search.add_argument("--json", action="store_true", help="print JSON")
    search.add_argument("--model", help="where the index's model lies now, if it was moved")
    _add_frozen_encoders(search)

    serve = _command(
        commands,
        "serve",
        _serve,
        "a page on this machine: speak or type, and see the pictures that fit best",
        """
        Serve a page for the browser on this machine, at the loopback address alone. Record a
        sentence, drop a sound file or type a text, which espeak-ng speaks; look at the pictures
        that fit best and where in them each word fits. Nothing is fetched from elsewhere, and
        nothing leaves the machine. What is said on the page of its answers is noted in
        INDEX/verdicts.jsonl, from which `cmdlab worth` reckons. Ctrl-C ends it.

        example: cmdlab serve holiday.index
        output:  the page's address, on standard error
        """,
    )
    serve.add_argument("index", type=Path, metavar="INDEX")
    serve.add_argument("--port", type=_port, default=7860, help="default: %(default)s; 0: any")
    serve.add_argument("--model", help="where the index's model lies now, if it was moved")
    _add_frozen_encoders(serve)

    worth = _command(
        commands,
        "worth",
        _worth,
        "one HTML sheet: how soon the search finds own pictures, and the time that it saves",
        """
        Draw a sheet from own pairs of a recording and its picture, or without --queries from what
        was said on the page: how many are found at once and on one screen, with intervals; the
        pictures looked at before the right one; the time saved against leafing through; and the
        cost of an hour of training. Pairs are a CSV file as `cmdlab corpus import` takes it, with
        the columns audio and image; its pictures are in the index. Pairs that were trained with are
        found more easily than others: --corpus asks those of the corpus' test split alone.

        example: cmdlab worth holiday.index --queries pairs.csv --corpus data/mine -o worth.html
        output:  the file given by -o, which opens offline in any browser
        """,
    )
    worth.add_argument("index", type=Path, metavar="INDEX")
    worth.add_argument("--queries", type=Path, metavar="PAIRS.csv", help="default: the page's log")
    worth.add_argument(
        "--corpus", type=Path, metavar="DIR", help="imported from the pairs: ask its test split"
    )
    worth.add_argument(
        "--seconds-per-picture",
        type=_share,
        default=1.0,
        metavar="S",
        help="that a look at one takes; default: %(default)s",
    )
    worth.add_argument("--price", type=_share, help="of an hour of training on one GPU")
    worth.add_argument("--currency", default="EUR", help="of the price; default: %(default)s")
    worth.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")
    worth.add_argument("--model", help="where the index's model lies now, if it was moved")
    _add_frozen_encoders(worth)

    report = _command(
        commands,
        "report",
        _report,
        "draw one HTML report from the records of runs",
        """
        Draw a report from records alone; neither a corpus nor a GPU is needed. Failed and missing
        runs are counted in it. From CSV files of `cmdlab bench` the report on the kernels is drawn.

        example: cmdlab report reports/ablation -o ablation.html
        output:  the file given by -o, which opens offline in any browser; with --keep also a folder
                 with the records alone, small enough to be published beside it
        """,
    )
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUNS",
        help="a folder of runs, a sweep's listing (RUNS/sweeps/NAME.json), one run's folder, or "
        "CSV files of `cmdlab bench`",
    )
    report.add_argument("--keep", type=Path, metavar="DIR", help="keep the records there")
    report.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.html")

    bench = _command(
        commands,
        "bench",
        _bench,
        "time the kernels, each after a check of its correctness",
        """
        Time each operation against its alternatives and the ceilings that the machine reaches in
        the same run. The correctness gate runs first; what fails it gets no speed, and the exit
        status is 1.

        example: cmdlab bench retrieval_ranks --device cpu --quick
        output:  a table on standard output, and one long CSV, from which `cmdlab report` draws
        """,
    )
    bench.add_argument(
        "operations",
        nargs="*",
        metavar="OPERATION",
        help="retrieval_ranks, denoising_attention, info_nce, nearest; default: all",
    )
    bench.add_argument("--device", choices=["cpu", "cuda"], default=None, help="default: the GPU")
    bench.add_argument("--quick", action="store_true", help="small shapes only")
    bench.add_argument(
        "-o",
        "--output",
        type=Path,
        default=None,
        metavar="FILE.csv",
        help="default: reports/kernels/, the GPU's or processor's kind and the operations chosen; "
        "none with --quick",
    )

    _command(
        commands,
        "profile",
        _profile,
        "where the study's time goes on this machine",
        """
        Run each stage of the study on a small corpus, alone and on one core: making the corpus,
        speaking, the frozen encoders, a step of training without and with denoising, evaluation,
        examples. It takes about a minute.

        example: cmdlab profile
        output:  each stage's time and the functions that it went into, on standard output
        """,
    )

    evaluate = _command(
        commands,
        "evaluate",
        _evaluate,
        "retrieval metrics for the embeddings of any system",
        """
        Recall at 1, 5 and 10, median rank and MRR in both directions. Scores are plain dot
        products; ties count against the system.

        The file needs the keys speech [N, D], image [M, D], speech_image_id [N] and image_id [M];
        ids are integers or strings. Save it with
        numpy.savez("mine.npz", speech=..., image=..., speech_image_id=..., image_id=...)

        example: cmdlab evaluate mine.npz
        output:  one JSON object on standard output
        """,
    )
    evaluate.add_argument("file", type=Path, metavar="FILE.npz")
    evaluate.add_argument(
        "--impl", default="auto", help="how the ranks are computed, e.g. reference; default: auto"
    )

    encode = _command(
        commands,
        "encode",
        _encode,
        "vectors of own recordings and pictures, by a trained model",
        """
        Turn recordings and pictures of any kind and size into vectors of one space, in which the
        dot product says how well two fit. With --pairs, a CSV file with the columns audio and image
        as for `cmdlab corpus import`, the file is what `cmdlab evaluate` takes. With FILES alone
        nothing tells what belongs together: speech_id and image_id hold their paths then.

        example: cmdlab encode --model runs/mine/model --pairs own/pairs.csv -o own.npz
        output:  the file given by -o, with speech [N, D] and image [M, D] in it
        """,
    )
    encode.add_argument("files", type=Path, nargs="*", metavar="FILES")
    encode.add_argument("--pairs", type=Path, metavar="FILE.csv")
    encode.add_argument(
        "--model", required=True, metavar="MODEL", help="a module's name, or a folder as RUN/model"
    )
    encode.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.npz")
    _add_frozen_encoders(encode)

    module = commands.add_parser("module", help="hand on a trained model, by a folder or a hub")
    ways = module.add_subparsers(metavar="make|push|pull", required=True)
    made = _command(
        ways,
        "make",
        _module_make,
        "write a run's model with its card",
        """
        Write the model of a finished run as three files: weights, sizes, and a card with data,
        recipe, metrics with intervals, cost and limits, all from the run's own files.

        example: cmdlab module make runs/mine modules/my-pictures
        output:  DIR, by whose name the module is known
        """,
    )
    made.add_argument("run_folder", type=Path, metavar="RUN")
    made.add_argument("folder", type=Path, metavar="DIR")
    push = _command(
        ways,
        "push",
        _module_push,
        "upload a module to the Hugging Face hub",
        """
        Upload a module's three files as one commit, by the hub's own client, under the name that
        `hf auth login` has asked for.

        example: cmdlab module push modules/my-pictures someone/my-pictures
        output:  its address there, on standard output
        """,
    )
    push.add_argument("folder", type=Path, metavar="DIR")
    push.add_argument("repository", metavar="OWNER/NAME")
    push.add_argument("--private", action="store_true", help="if the repository is made by this")
    pull = _command(
        ways,
        "pull",
        _module_pull,
        "download a module from the Hugging Face hub",
        """
        Download a module's three files, and keep them once they prove to be a model. Nothing that
        is downloaded is run.

        example: cmdlab module pull someone/my-pictures modules/my-pictures
        output:  DIR
        """,
    )
    pull.add_argument("repository", metavar="OWNER/NAME")
    pull.add_argument("folder", type=Path, metavar="DIR")
    pull.add_argument("--revision", metavar="COMMIT", help="default: the newest")
    return parser


def _add_frozen_encoders(command: _Parser) -> None:
    for kind in ("speech", "image"):
        command.add_argument(
            f"--{kind}-weights",
            default="",
            metavar="PATH",
            help=f"the {kind} encoder's weights, where they were given in training too",
        )
    command.add_argument("--device", default="auto", help="default: a GPU where there is one")


def _command(
    commands: Any, name: str, run: Callable[[Namespace], int | None], summary: str, text: str
) -> _Parser:
    """A command with its one-line summary, and a help text that keeps its line breaks."""
    parser: _Parser = commands.add_parser(
        name,
        help=summary,
        description="\n".join(line.removeprefix(" " * 8) for line in text.strip("\n").split("\n")),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _given(chosen: Namespace) -> dict[str, Any]:
    """What `-p` gave, by name. Raises InputError for a name that is given twice."""
    parameters: dict[str, Any] = {}
    for name, value in chosen.parameters:
        if name in parameters:
            raise InputError(f"-p {name} is given twice; give it once")
        parameters[name] = value
    return parameters


def _add_parameters(parser: ArgumentParser, text: str) -> None:
    parser.add_argument(
        "-p",
        dest="parameters",
        type=_parameter,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"{text}; may be repeated",
    )


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() else -1
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 to 65535")
    return number


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return number


def _parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE; JSON values (a number, true, null) are read as such, others as text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
