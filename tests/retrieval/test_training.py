"""Training: the same seed the same weights, stopped or not; the arms alike but for their loss."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cmdlab.encoders import SPEECH, Features, Hearing, OnlineSpeech
from cmdlab.errors import InputError
from cmdlab.evaluation import retrieval_metrics
from cmdlab.experiment.run import inference_cost
from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.losses import training_losses
from cmdlab.retrieval.model import RetrievalModel
from cmdlab.retrieval.training import (
    Trained,
    Training,
    _learning_rate,
    embed,
    embed_speech,
    make_batch,
    rank,
    train,
)

CONTRASTIVE = Training(
    seed=3, steps=12, batch_size=8, warm_up=3, validate_every=5, learning_rate=3e-3
)
CMD = replace(CONTRASTIVE, weight=1.0)
ARMS = {
    "contrastive": CONTRASTIVE,
    "cmd": CMD,
    "cmd both, deep": replace(CMD, denoising=Denoising(direction="both", loss="info_nce", depth=2)),
    "patches": replace(CMD, image_head="patches", denoising=Denoising(corruption="gaussian")),
    "cmd by chunks, best": replace(CMD, chunk=3, select="best", denoising=Denoising("speech")),
    "cmd in bfloat16": replace(CMD, precision="bfloat16"),
}


@pytest.fixture(scope="module")
def features(toy_features) -> Features:
    return toy_features(images=20, seed=0)


@pytest.fixture(scope="module")
def validation(toy_features) -> Features:
    return toy_features(images=9, seed=1)


@pytest.fixture(scope="module")
def run(features, validation):
    def run(training: Training, **options: object) -> Trained:
        torch.set_num_threads(1)
        return train(training, features, validation, **options)

    return run


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def assert_same(one: Trained, other: Trained) -> None:
    assert same_weights(one.model, other.model)
    assert same_weights(one.denoisers, other.denoisers)
    assert one.curve == other.curve


@pytest.mark.parametrize("arm", ARMS)
def test_stopped_and_continued_it_ends_as_if_it_had_not_been(run, arm, tmp_path):
    training = ARMS[arm]
    whole = run(training, checkpoint=tmp_path / "whole.pt")
    resumed = tmp_path / "resumed.pt"
    run(training, checkpoint=resumed, stop_after=7)  # kept at step 5
    first = torch.load(resumed, weights_only=True)
    assert first["step"] == 5
    torch.manual_seed(99)  # another process has another history
    assert_same(run(training, checkpoint=resumed), whole)
    states = [
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "resumed")
    ]
    optimisers = [state["optimiser"]["state"] for state in states]
    assert optimisers[0].keys() == optimisers[1].keys()
    for i, state in optimisers[0].items():
        assert all(torch.equal(value, optimisers[1][i][name]) for name, value in state.items())
    assert_same(run(training, checkpoint=resumed), whole)  # nothing is left to do


def test_each_step_hears_crops_of_its_own_and_a_continued_run_the_same(smoke_data, tmp_path):
    seeds = []

    class Heard(OnlineSpeech):
        def tokens(self, items, seed=0):
            seeds.append(seed)
            return super().tokens(items, seed)

    def continued(**options: object) -> Trained:
        corpus = smoke_data.train.corpus
        speech = Heard(corpus, SPEECH, Hearing(), "cpu", crop=8_000)
        features = replace(smoke_data.train, speech=speech)
        trained = train(training, features, smoke_data.validation, **options)
        assert not speech._ahead  # nothing was read in vain
        return trained

    torch.set_num_threads(1)
    training = replace(CONTRASTIVE, steps=4, validate_every=2)
    whole = continued()
    assert len(set(seeds)) == 4
    continued(checkpoint=tmp_path / "resumed.pt", stop_after=3)
    assert_same(continued(checkpoint=tmp_path / "resumed.pt"), whole)


@pytest.mark.parametrize("method", ["matching", "queue", "dense"])
def test_a_competitor_too_goes_on_as_if_it_had_not_been_stopped(run, method, tmp_path):
    training = replace(CONTRASTIVE, method=method, rerank=4)
    whole = run(training)
    run(training, checkpoint=tmp_path / "resumed.pt", stop_after=7)
    torch.manual_seed(99)
    resumed = run(training, checkpoint=tmp_path / "resumed.pt")
    assert_same(resumed, whole)
    assert same_weights(resumed.competitor, whole.competitor)
    assert resumed.validation == whole.validation
    # The first batch met the heads that every arm of the seed starts from.
    if method == "matching":
        assert whole.curve[0]["contrastive"] == run(CONTRASTIVE).curve[0]["contrastive"]


def test_the_seed_decides(run):
    assert_same(run(CMD), run(CMD))
    assert not same_weights(run(CMD).model, run(replace(CMD, seed=4)).model)


def test_a_seed_may_be_a_date_and_each_of_its_bits_counts(run):
    dates = [20261125213000, 20261125213000 + 2**32, 2**63 - 1]
    first, second, last = (run(replace(CMD, seed=seed)) for seed in dates)
    assert_same(first, run(replace(CMD, seed=dates[0])))
    starts = [(one.curve[0]["contrastive"], one.curve[0]["denoising"]) for one in (first, last)]
    assert starts[0][0] != starts[1][0]
    assert starts[0][1] != starts[1][1]
    still = {"steps": 1, "learning_rate": 1e-30, "weight_decay": 0.0}
    heads = [
        run(replace(CONTRASTIVE, seed=seed, **still)).model.speech_head.projection.weight
        for seed in dates[:2]
    ]
    assert not torch.equal(*heads)
    assert first.curve != second.curve


def test_a_small_seed_draws_what_it_drew_for_the_published_records(run, monkeypatch):
    drawn = []

    def losses(model, denoisers, batch, weight, generator):
        drawn.append(generator.initial_seed())
        return training_losses(model, denoisers, batch, weight, generator)

    monkeypatch.setattr("cmdlab.retrieval.training.training_losses", losses)
    still = {"steps": 2, "learning_rate": 1e-30, "weight_decay": 0.0}
    model = run(replace(CONTRASTIVE, seed=25, **still)).model
    assert drawn == [25 * 1_000_003, 25 * 1_000_003 + 1]
    torch.manual_seed(25)
    first = RetrievalModel(model.shape).speech_head.projection.weight
    assert torch.equal(model.speech_head.projection.weight, first)


def test_the_curve_holds_what_a_record_needs(run):
    curve = run(CMD).curve
    assert [point["step"] for point in curve] == [1, 5, 10, 11, 12]
    validated = [point["step"] for point in curve if point["validation_mean_R@1"] is not None]
    assert validated == [5, 10, 12]
    for point in curve:
        total = point["contrastive"] + CMD.weight * point["denoising"]
        assert point["loss"] == pytest.approx(total, rel=1e-5)
        assert 0.01 <= point["temperature"] < 0.1
    assert all(point["denoising"] is None for point in run(CONTRASTIVE).curve)


def test_arms_of_a_seed_start_from_the_same_heads_and_see_the_same_batches(run):
    """Without learning, the contrastive loss of every step is that of heads and batches alone."""
    still = {"learning_rate": 1e-30, "steps": 11, "validate_every": 1}
    curves = [
        [point["contrastive"] for point in run(replace(training, **still)).curve]
        for training in (ARMS["contrastive"], ARMS["cmd"], ARMS["cmd both, deep"])
    ]
    assert curves[0] == curves[1] == curves[2]
    assert len(set(curves[0])) == 11  # batches differ from each other, over the epochs too


def test_epochs_count_instead_of_steps(run):
    two = run(replace(CONTRASTIVE, epochs=2))  # of five batches
    assert two.curve[-1]["step"] == 10
    assert_same(two, run(replace(CONTRASTIVE, steps=10)))


@pytest.mark.parametrize("warm_up", [0, 4])
def test_the_learning_rate_rises_and_falls(warm_up):
    """Against straight lines and half a period of the cosine, drawn by numpy."""
    training = replace(
        CONTRASTIVE, steps=20, warm_up=warm_up, learning_rate=0.5, end_learning_rate=0.1
    )
    found = {
        schedule: [_learning_rate(step, replace(training, schedule=schedule)) for step in range(20)]
        for schedule in ("linear", "cosine", "constant")
    }
    steps = np.arange(20)
    rising = 0.5 * (steps + 1) / max(warm_up, 1)
    past = (steps - warm_up) / (20 - warm_up)
    falling = {
        "linear": np.interp(past, [0, 1], [0.5, 0.1]),
        "cosine": 0.3 + 0.2 * np.cos(np.pi * past),
        "constant": np.full(20, 0.5),
    }
    for schedule, rates in found.items():
        expected = np.where(steps < warm_up, rising, falling[schedule])
        assert rates == pytest.approx(expected.tolist())
    assert _learning_rate(19, replace(CONTRASTIVE, steps=20)) == pytest.approx(3e-3 / 17)


def test_the_best_model_is_the_one_of_the_highest_recall(features, toy_features):
    """Steps too long to come to rest, so the last is not the best; against runs that end there."""
    longer = {"steps": 20, "validate_every": 2, "learning_rate": 0.1, "schedule": "constant"}
    training = replace(CONTRASTIVE, **longer)
    validation = toy_features(images=60, seed=1)
    ends = {
        step: train(training, features, validation, stop_after=step) for step in range(2, 21, 2)
    }
    recalls = {
        step: sum(one.validation[way]["R@10"] for way in ("speech_to_image", "image_to_speech"))
        for step, one in ends.items()
    }
    best = max(recalls, key=recalls.__getitem__)  # the first of equals
    assert recalls[best] > recalls[20]
    chosen = train(replace(training, select="best"), features, validation)
    assert same_weights(chosen.model, ends[best].model)
    assert chosen.validation == ends[best].validation
    assert chosen.validation == retrieval_metrics(rank(chosen.model, validation))
    assert chosen.curve == ends[20].curve


@pytest.mark.parametrize("chunk", [0, 3])
@pytest.mark.parametrize("loss", ["normalised_mse", "info_nce"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("corruption", ["mask", "swap", "gaussian"])
def test_in_bfloat16_the_losses_are_near_those_of_float32(run, corruption, depth, loss, chunk):
    denoising = Denoising("both", corruption, 0.5, "tokens", loss, depth)
    training = replace(CMD, image_head="patches", denoising=denoising, chunk=chunk, steps=6)
    full, half = run(training), run(replace(training, precision="bfloat16"))
    assert {value.dtype for value in half.model.state_dict().values()} == {torch.float32}
    assert not same_weights(full.model, half.model)
    for one, other in zip(full.curve, half.curve, strict=True):
        for name in ("loss", "contrastive", "denoising"):
            assert other[name] == pytest.approx(one[name], rel=0.03, abs=0.01)


def test_a_batch_pairs_each_caption_with_its_image(features):
    batch = make_batch(features, torch.tensor([5, 0, 4]), "cpu")
    assert batch.image_id.tolist() == [2, 0, 2]
    assert batch.states.shape == (2, int(batch.lengths.sum()), 16)
    assert torch.equal(batch.patches[0], batch.patches[2])
    assert torch.equal(batch.patches[0], features.image.patches([2])[0])
    assert torch.equal(batch.embedding, features.image.embeddings[[2, 0, 2]])


@pytest.mark.parametrize("arm", ARMS)
def test_both_losses_are_learnt(run, arm):
    curve = run(replace(ARMS[arm], steps=150, validate_every=150)).curve
    assert curve[-1]["contrastive"] < 0.7 * curve[0]["contrastive"]
    if ARMS[arm].weight:
        values = [point["denoising"] for point in curve]
        assert np.mean(values[-4:]) < 0.95 * np.mean(values[:4])
    assert curve[-1]["validation_mean_R@1"] > 2 * 100 / 9


def test_with_and_without_cmd_a_model_costs_and_gives_the_same(run, validation, tmp_path):
    """Retrieval knows nothing of the denoiser: equal heads are equal models."""
    plain, cmd = run(CONTRASTIVE).model, run(CMD).model
    assert not same_weights(plain, cmd)
    plain.load_state_dict(cmd.state_dict())  # strict: the same names and shapes
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in cmd.parameters())
    costs = [inference_cost(model, validation)["inference_flops"] for model in (plain, cmd)]
    assert costs[0] == costs[1] > 0
    for one, other in zip(*(embed(m, validation, "cpu") for m in (plain, cmd)), strict=True):
        assert torch.equal(one, other)
    for name, model in (("plain", plain), ("cmd", cmd)):
        model.save_pretrained(tmp_path / name)
    for file in ("model.json", "model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "cmd" / file).read_bytes()
    assert b"denois" not in (tmp_path / "cmd" / "model.safetensors").read_bytes()


def test_embeddings_do_not_depend_on_the_batches(run, validation):
    model = run(CONTRASTIVE).model
    speech, image = embed(model, validation, "cpu")
    parts = embed_speech(model, validation.speech, range(18), "cpu", batch_size=4)
    assert torch.allclose(speech, parts, atol=1e-6)
    assert torch.equal(image, validation.image.embeddings)
    assert speech.shape == (18, 8)


def test_a_checkpoint_of_another_run_is_refused(run, toy_features, validation, tmp_path):
    path = tmp_path / "checkpoint.pt"
    run(CMD, checkpoint=path, stop_after=5)
    message = r"checkpoint\.pt: is of a run with other settings or on other features; remove it"
    for other in (CONTRASTIVE, replace(CMD, seed=4), replace(CMD, denoising=Denoising(rate=0.5))):
        with pytest.raises(InputError, match=message):
            run(other, checkpoint=path)
    with pytest.raises(InputError, match=message):
        train(CMD, toy_features(images=20, seed=7), validation, checkpoint=path)


class Malicious:
    """Unpickling it would run what it says."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle", "foreign", "shapes"])
def test_a_damaged_checkpoint_is_refused(run, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    run(CONTRASTIVE, checkpoint=path, stop_after=5)
    state = torch.load(path, weights_only=True)
    if damage == "shapes":
        state["model"]["speech_head.cls"] = torch.zeros(3)
        torch.save(state, path)
    elif damage == "foreign":
        torch.save([1, 2], path)
    elif damage == "pickle":
        torch.save({**state, "curve": Malicious()}, path)
    else:
        content = {"cut": path.read_bytes()[:-999], "empty": b"", "text": b"no checkpoint"}
        path.write_bytes(content[damage])
    with pytest.raises(InputError, match=r"checkpoint\.pt: is no checkpoint") as refusal:
        run(CONTRASTIVE, checkpoint=path)
    assert "\n" not in str(refusal.value)
    assert not Path("touched").exists()


@pytest.mark.parametrize("training", [CONTRASTIVE, CMD])
def test_features_that_are_not_finite_stop_it_at_once(toy_features, validation, training):
    features = toy_features(images=20)
    features.speech._tokens[0] = features.speech._tokens[0].copy()
    features.speech._tokens[0][10, 0, 3] = float("nan")
    with pytest.raises(InputError, match=r"the loss became nan at step \d: lower learning_rate"):
        train(training, features, validation)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"validate_every": 0},
        {"epochs": -1},
        {"images": -1},
        {"chunk": -1},
        {"precision": "float16"},
        {"schedule": "step"},
        {"select": "first"},
        {"hard_negatives": 0.6},
        {"hard_negatives": -0.1},
        {"end_learning_rate": -1e-8},
        {"end_learning_rate": 1.0},
        {"seed": -1},
        {"seed": 2**63},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight": -1.0},
        {"weight": float("nan")},
        {"weight": float("inf")},
        {"gradient_clip": -1.0},
        {"weight_decay": -0.1},
        {"warm_up": -1},
        {"steps": 1.5},
        {"steps": "12"},
        {"seed": True},
        {"learning_rate": "1e-2"},
        {"denoising": {"rate": 0.3}},
        {"method": "queues"},
        {"method": "queue", "weight": 1.0},
        {"method": "dense", "chunk": 4},
        {"method": "matching", "precision": "bfloat16"},
        {"method": "queue", "select": "best"},
        {"rerank": 0},
    ],
)
def test_a_recipe_that_cannot_be_is_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        replace(CONTRASTIVE, **wrong)


def test_the_temperature_stays_above_its_bound(run, monkeypatch):
    monkeypatch.setattr(RetrievalModel, "MAX_SCALE", 10.0)  # the first one is 14.3
    temperatures = [point["temperature"] for point in run(CONTRASTIVE).curve]
    assert min(temperatures) == pytest.approx(0.1)


def test_a_recipe_is_plain_data():
    assert set(asdict(CMD)) == {field.name for field in fields(Training)}
    assert asdict(CMD)["denoising"] == asdict(Denoising())
