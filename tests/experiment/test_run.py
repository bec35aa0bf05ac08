"""An experiment from a corpus to a run's folder, and what its files hold."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdlab.corpora import load_corpus, make_variant, read_foils, read_image
from cmdlab.corpora.speaking import TEST_ONLY_VOICES
from cmdlab.encoders import IMAGE, TEXT, Encoder
from cmdlab.errors import InputError
from cmdlab.evaluation import Voices
from cmdlab.evaluation.ranks import RankTable, retrieval_metrics
from cmdlab.experiment.examples import write_examples
from cmdlab.experiment.run import (
    inference_cost,
    measure,
    open_data,
    pick_device,
    retrieval_cost,
    run_experiment,
)
from cmdlab.records.provenance import collect_provenance
from cmdlab.records.records import SCHEMA, read_result, write_record
from cmdlab.reporting.examples import map_blocks, queries_html, read_examples
from cmdlab.reporting.study import read_study
from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.dense import Dense
from cmdlab.retrieval.matching import Matching
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.training import Training, rank, train
from cmdlab.search import Retriever

RECIPE = {"steps": 6, "batch_size": 32, "warm_up": 2, "validate_every": 3, "seed": 2}
CMD = {"weight": 1.0, "direction": "both", "rate": 0.5}


@pytest.fixture(scope="module")
def runs(smoke_corpus, smoke_data, tmp_path_factory) -> dict[str, Path]:
    """Both arms, trained for six steps."""
    folder = tmp_path_factory.mktemp("runs")
    for arm, recipe in (("contrastive", {}), ("cmd", CMD)):
        run_experiment(smoke_corpus, folder / arm, device="cpu", **RECIPE, **recipe)
    return {"contrastive": folder / "contrastive", "cmd": folder / "cmd"}


@pytest.mark.parametrize("arm", ["contrastive", "cmd"])
def test_a_run_leaves_a_valid_result(runs, arm, smoke_data):
    assert {path.name for path in runs[arm].iterdir()} >= {"ranks.npz", "model", "result.json"}
    assert not (runs[arm] / "checkpoint.pt").exists()
    result = read_result(runs[arm] / "result.json")
    assert result["corpus"]["gallery"] == 20
    assert result["corpus"]["captions"] == 100
    assert result["corpus"]["content_hash"] == smoke_data.test.corpus.content_hash
    assert result["cost"]["steps"] == 6
    assert result["determinism"] == {"seed": 2, "threads": 1, "deterministic_algorithms": True}
    assert [point["step"] for point in result["learning_curve"]] == [1, 3, 6]
    assert result["alignment"]["foil"]["pairs"] == len(smoke_data.foils)
    pointing = result["alignment"]["pointing"]
    assert 0 <= pointing["hits"] <= pointing["words"] > 100
    assert 0 < pointing["chance"] < 0.3


def test_ranks_and_model_are_those_of_the_result(runs, smoke_data):
    result = json.loads((runs["cmd"] / "result.json").read_text())
    table = RankTable.load(runs["cmd"] / "ranks.npz")
    assert retrieval_metrics(table) == result["metrics"]["test"]
    model = RetrievalModel.from_pretrained(runs["cmd"] / "model").eval()
    assert retrieval_metrics(rank(model, smoke_data.test)) == result["metrics"]["test"]
    assert retrieval_metrics(rank(model, smoke_data.validation)) == result["metrics"]["validation"]


def test_a_run_keeps_who_spoke_and_who_was_heard(runs, smoke_data):
    voices = Voices.load(runs["cmd"] / "voices.npz")
    captions = smoke_data.test.corpus.captions
    assert voices.names[voices.of_caption].tolist() == [one.speaker for one in captions]
    heard = {one.speaker for one in smoke_data.train.corpus.captions}
    assert {str(name) for name in voices.names[voices.heard]} <= heard
    assert {str(name) for name in voices.names[~voices.heard]} == set(TEST_ONLY_VOICES)


def test_no_system_is_above_the_ceilings(runs):
    result = json.loads((runs["cmd"] / "result.json").read_text())
    ceiling = result["ceiling"]["speech_to_image"]
    assert ceiling["R@1"] > 80
    assert result["text_ceiling"]["speech_to_image"]["R@1"] <= ceiling["R@1"]
    # The shipped image and text towers know the world: by chance it would be 5.
    assert result["text_ceiling"]["speech_to_image"]["R@1"] > 25


def test_the_text_ceiling_has_a_foil_test_of_its_own(runs, smoke_corpus):
    """Counted anew, one caption at a time."""
    test = load_corpus(smoke_corpus, "test")
    captions = {caption.id: caption for caption in test.captions}
    images = {image.id: image for image in test.images}
    text, eye, wins = TEXT.open(), IMAGE.open(), 0
    foils = read_foils(test)
    for foil, of in zip(foils.corpus.captions, foils.of, strict=True):
        both = text(text.tokenise([captions[of].text, foil.text]))
        picture = torch.tensor(read_image(images[foil.image_id].path))[None]
        own, other = both @ eye(picture)[1][0]
        wins += int(own > other)
    result = json.loads((runs["cmd"] / "result.json").read_text())
    assert result["text_ceiling"]["foil"] == {"wins": wins, "ties": 0, "pairs": len(foils.of)}


def test_cmd_costs_nothing_at_retrieval(runs):
    plain, cmd = (
        json.loads((runs[arm] / "result.json").read_text())["cost"]
        for arm in ("contrastive", "cmd")
    )
    for name in ("inference_parameters", "inference_flops"):
        assert plain[name] == cmd[name] > 0
    assert plain["denoiser_parameters"] == 0
    assert cmd["trainable_parameters"] == cmd["inference_parameters"] + cmd["denoiser_parameters"]
    assert plain["trainable_parameters"] == plain["inference_parameters"]


@pytest.mark.parametrize("method", ["matching", "queue", "dense"])
def test_a_competitor_is_measured_as_it_ranks(runs, smoke_corpus, smoke_data, tmp_path, method):
    run_experiment(smoke_corpus, tmp_path, device="cpu", method=method, rerank=12, **RECIPE)
    result = read_result(tmp_path / "result.json")
    assert retrieval_metrics(RankTable.load(tmp_path / "ranks.npz")) == result["metrics"]["test"]
    plain = json.loads((runs["contrastive"] / "result.json").read_text())
    cost, usual = result["cost"], plain["cost"]
    at_retrieval = method != "queue"
    # What is exported, and what alignment is measured in, are embeddings that rank by themselves.
    assert (tmp_path / "model").exists() != at_retrieval
    assert (result["alignment"] is None) == at_retrieval
    for name in ("retrieval_flops_per_query", "inference_parameters"):
        assert (cost[name] > usual[name]) == at_retrieval
    assert cost["inference_flops"] == usual["inference_flops"]
    assert cost["retrieval_ms_per_query"] > 0
    own = 0 if method == "queue" else cost["inference_parameters"] - usual["inference_parameters"]
    assert cost["trainable_parameters"] == usual["trainable_parameters"] + own
    assert cost["denoiser_parameters"] == 0


def test_the_examples_of_a_competitor_are_in_its_own_order(smoke_data, tmp_path):
    training = Training(method="matching", rerank=12, **RECIPE)
    trained = train(training, smoke_data.train, smoke_data.validation)
    measure(smoke_data, trained, training, tmp_path)
    write_examples(smoke_data, trained.model, tmp_path, trained.ranker)
    row = {caption.id: i for i, caption in enumerate(smoke_data.test.corpus.captions)}
    ranks = RankTable.load(tmp_path / "ranks.npz").ranks("speech_to_image")
    for query in json.loads((tmp_path / "examples.json").read_text())["queries"]:
        assert query["rank"] == ranks[row[query["caption_id"]]]
        assert [answer["correct"] for answer in query["top"]].count(True) == (query["rank"] <= 5)
        assert "maps" not in query
        assert query["words"] == []


def test_what_a_query_costs_is_counted(toy_features):
    features = toy_features(images=6)
    torch.manual_seed(0)
    shape = Shape(2, 16, 12, 8)
    model = RetrievalModel(shape).eval()
    frames = int(features.speech.lengths.median())
    images, patches, width = 6, 4, 16

    def flops(ranker=None):
        return retrieval_cost(model, features, ranker)["retrieval_flops_per_query"]

    assert flops() == 2 * images * 8
    assert flops(Dense(shape)) == 2 * images * patches * frames * 2
    attention = 2 * frames * patches * width + frames * width * width
    pair = 2 * (attention + frames * width + width * width + width)
    assert flops(Matching(shape, 3)) == flops() + 3 * pair


def test_flops_are_those_of_the_matrix_products(toy_features):
    features = toy_features(images=6)
    median = int(features.speech.lengths.median())
    model = RetrievalModel(Shape(2, 16, 12, 8)).eval()
    n, width = median, 16
    products = 4 * n * width * width + 2 * n * n * width + 8 * n * width * width + width * 8
    importance = n * width
    layers = 2 * median * width  # the weighted sum of two layers
    found = inference_cost(model, features)
    assert found["inference_flops"] == 2 * (products + importance + layers)
    assert found["inference_ms"] > 0


def test_a_run_that_was_stopped_goes_on(runs, smoke_corpus, smoke_data, tmp_path):
    weight = CMD["weight"]
    denoising = Denoising(direction="both", rate=0.5)
    training = Training(denoising=denoising, weight=weight, **RECIPE)
    train(
        training,
        smoke_data.train,
        smoke_data.validation,
        checkpoint=tmp_path / "checkpoint.pt",
        stop_after=4,
    )
    resumed = run_experiment(smoke_corpus, tmp_path, device="cpu", **RECIPE, **CMD)
    whole = json.loads((runs["cmd"] / "result.json").read_text())
    for key in ("metrics", "learning_curve", "alignment", "corpus", "encoders"):
        assert resumed[key] == whole[key]
    for file in ("ranks.npz", "model/model.safetensors"):
        assert (tmp_path / file).read_bytes() == (runs["cmd"] / file).read_bytes()


def test_with_perfect_hearing_the_same_heads_learn_from_the_words(smoke_corpus, tmp_path):
    words = Encoder("tiny-words")
    run_experiment(
        *(smoke_corpus, tmp_path / "run"),
        **{"speech_encoder": words, "features": tmp_path / "features", "device": "cpu"},
        **RECIPE | CMD | {"steps": 60, "learning_rate": 1e-2, "weight": 0.1},
    )
    data = open_data(smoke_corpus, speech_encoder=words, features=tmp_path / "features")
    counted = [len(caption.text.split()) for caption in data.test.corpus.captions]
    assert data.test.speech.lengths.tolist() == counted
    result = read_result(tmp_path / "run" / "result.json")
    assert result["encoders"]["speech"]["name"] == "tiny-words"
    assert result["metrics"]["test"]["mean_R@1"] > 15  # 5 by chance
    assert result["alignment"]["foil"]["pairs"] == len(data.foils)
    model = RetrievalModel.from_pretrained(tmp_path / "run" / "model")
    write_examples(data, model, tmp_path / "run")
    queries = json.loads((tmp_path / "run" / "examples.json").read_text())["queries"]
    assert all(len(query["maps"]["values"]) == len(query["words"]) for query in queries)
    with pytest.raises(InputError, match="reads words and hears no sound"):
        Retriever(tmp_path / "run" / "model")
    with pytest.raises(InputError, match="tiny-words has no weights"):
        Encoder("tiny-words", "mine.safetensors").open()


def test_a_range_finder_takes_the_place_of_speech(smoke_corpus, tmp_path):
    make_variant(smoke_corpus, tmp_path / "scans", "scans")
    result = run_experiment(
        *(tmp_path / "scans", tmp_path / "run"),
        **{"speech_encoder": Encoder("tiny-scan"), "device": "cpu"},
        **RECIPE | {"steps": 60, "learning_rate": 1e-2, "weight": 0.1},
    )
    learnt = [point["contrastive"] for point in result["learning_curve"]]
    assert learnt[-1] < 0.85 * learnt[0]  # by heart: forty scenes are few
    assert result["alignment"] is result["text_ceiling"] is None
    assert read_result(tmp_path / "run" / "result.json")["corpus"]["name"] == "RangeScans"


def test_a_model_is_tested_on_pictures_of_another_hand(smoke_corpus, tmp_path):
    make_variant(smoke_corpus, tmp_path / "sketches", "sketches")
    own, other = (
        run_experiment(
            *(smoke_corpus, tmp_path / name),
            **{"test_corpus": corpus, "features": tmp_path / "features", "device": "cpu"},
            **RECIPE,
        )
        for name, corpus in (("own", None), ("other", tmp_path / "sketches"))
    )
    assert own["metrics"]["validation"] == other["metrics"]["validation"]
    assert own["metrics"]["test"] != other["metrics"]["test"]
    assert other["corpus"]["name"] == "SketchedScenes"
    captions = [
        open_data(
            smoke_corpus, test_corpus=corpus, features=tmp_path / "features"
        ).test.speech.tokens([3])[0]
        for corpus in (None, tmp_path / "sketches")
    ]
    assert torch.equal(*captions)  # heard alike: the hand is all that differs


def test_speech_can_be_heard_in_more_noise(smoke_corpus, tmp_path):
    clean, noisy = (
        open_data(smoke_corpus, snr_db=snr_db, features=tmp_path / "features").test.speech
        for snr_db in (60.0, -5.0)
    )
    assert torch.equal(clean.lengths, noisy.lengths)
    assert not torch.equal(clean.tokens([0])[0], noisy.tokens([0])[0])
    with pytest.raises(InputError, match="snr_db: nan is not finite"):
        open_data(smoke_corpus, snr_db=float("nan"))


def test_words_kept_out_of_training_are_told_of_apart(smoke_corpus, smoke_data, tmp_path):
    result = run_experiment(
        smoke_corpus, tmp_path / "run", device="cpu", **RECIPE, without_words="red scarlet"
    )
    texts = [caption.text.split() for caption in smoke_data.test.corpus.captions]
    new = np.array([bool({"red", "scarlet"} & set(text)) for text in texts])
    found = RankTable.load(tmp_path / "run" / "ranks.npz").ranks("speech_to_image") == 1
    for name, rows in (("new", new), ("known", ~new)):
        assert result["new_words"][name]["captions"] == rows.sum() > 0
        assert result["new_words"][name]["R@1"] == pytest.approx(100 * found[rows].mean())
    assert read_result(tmp_path / "run" / "result.json")["new_words"] == result["new_words"]


def test_the_report_reads_the_examples(runs, smoke_data):
    for number, (arm, folder) in enumerate(runs.items()):
        write_examples(smoke_data, RetrievalModel.from_pretrained(folder / "model"), folder)
        sweep = {"schema": SCHEMA, "id": f"{number:016x}", "sweep": "s", "arm": arm, "seed": 2}
        provenance = collect_provenance() | {"notebook_sha256": "0" * 64, "started": "2025-01-01"}
        how = {"status": "ok", "parameters": RECIPE, "wall_seconds": 1.0, "provenance": provenance}
        write_record(folder, read_result(folder / "result.json") | sweep | how)
    study = read_study(list(runs.values()))
    examples = read_examples(study)
    folder = examples.run.folder
    assert (len(examples.random), len(examples.failures), examples.left_out) == (8, 8, 0)
    assert len(map_blocks(examples)) > 0
    assert queries_html(study, examples, examples.random).count("<audio") == 8
    ranks = RankTable.load(folder / "ranks.npz").ranks("speech_to_image")
    row = {caption.id: i for i, caption in enumerate(smoke_data.test.corpus.captions)}
    for query in [*examples.random, *examples.failures]:
        index = row[query["caption_id"]]
        assert query["rank"] == ranks[index]
        assert [answer["correct"] for answer in query["top"]].count(True) == (query["rank"] <= 5)
        scores = [answer["score"] for answer in query["top"]]
        assert scores == sorted(scores, reverse=True)
        assert " ".join(word["word"] for word in query["words"]) == query["text"]
    failures = [query["rank"] for query in examples.failures]
    assert failures == sorted(failures, reverse=True)
    shown = {query["caption_id"] for query in [*examples.random, *examples.failures]}
    assert len(shown) == 16


def test_the_same_random_examples_for_every_arm(runs, smoke_data):
    chosen = []
    for folder in runs.values():
        write_examples(smoke_data, RetrievalModel.from_pretrained(folder / "model"), folder)
        queries = json.loads((folder / "examples.json").read_text())["queries"]
        chosen.append([q["caption_id"] for q in queries if q["kind"] == "random"])
    assert chosen[0] == chosen[1]


def test_an_unknown_name_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(InputError, match=r"no parameter 'noise_rate'.*; there are .*weight"):
        run_experiment(tmp_path / "none", tmp_path / "run", noise_rate=0.3)
    with pytest.raises(InputError, match="no parameter 'denoising'"):
        run_experiment(tmp_path / "none", tmp_path / "run", denoising=Denoising())
    with pytest.raises(InputError, match="image_head: 'none' is none of global, patches"):
        run_experiment(tmp_path / "none", tmp_path / "run", image_head="none")
    with pytest.raises(InputError, match="direction: 'text'"):
        run_experiment(tmp_path / "none", tmp_path / "run", direction="text")
    with pytest.raises(InputError, match="steps: '300' is no int"):
        run_experiment(tmp_path / "none", tmp_path / "run", steps="300")
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_overwritten(runs, smoke_corpus):
    before = {path: path.stat().st_mtime_ns for path in runs["cmd"].rglob("*")}
    with pytest.raises(InputError, match="cmd: holds a finished run; choose another folder"):
        run_experiment(smoke_corpus, runs["cmd"], device="cpu", **RECIPE, **CMD)
    assert {path: path.stat().st_mtime_ns for path in runs["cmd"].rglob("*")} == before


def test_bad_entries_can_be_left_out_of_a_run(smoke_corpus, smoke_data, tmp_path, capsys):
    corpus = shutil.copytree(smoke_corpus, tmp_path / "corpus")
    (corpus / "corpus.json").unlink()  # files on disk, as a downloaded corpus has them
    captions = json.loads((corpus / "SpokenCOCO_train.json").read_text())["data"][0]["captions"]
    missing, broken = (corpus / caption["wav"] for caption in captions[:2])
    missing.unlink()
    broken.write_bytes(b"no sound")
    foils = (corpus / "ground_truth" / "test_foils.jsonl").read_text().splitlines()
    (corpus / json.loads(foils[0])["wav"]).write_bytes(b"no sound")
    with pytest.raises(InputError, match="there is no file"):
        open_data(corpus)
    data = open_data(corpus, skip_bad=True)
    whole = len(load_corpus(smoke_corpus, "train").captions)
    assert len(data.train.speech) == len(data.train.corpus.captions) == whole - 2
    assert len(data.foils) == len(data.caption_of_foil) == len(smoke_data.foils) - 1
    told = capsys.readouterr().err
    assert all(path.name in told for path in (missing, broken))


def test_the_features_of_a_corpus_given_as_a_dot_lie_beside_it(smoke_corpus, monkeypatch):
    monkeypatch.chdir(smoke_corpus)
    open_data(Path())
    assert not (smoke_corpus / ".features").exists()


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    with pytest.raises(InputError, match="device: cuda:1 is not there"):
        pick_device("cuda:1")
    with pytest.raises(InputError, match="device: 'gpu' is none of auto, cpu, cuda"):
        pick_device("gpu")
