"""A step that processes share, or that is computed by chunks, is the step computed at once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cmdlab_kernels.info_nce import info_nce
from torch import Tensor, nn

from cmdlab.encoders import Features
from cmdlab.errors import InputError
from cmdlab.retrieval.denoising import Denoising
from cmdlab.retrieval.losses import Batch, encode, make_denoisers, training_losses
from cmdlab.retrieval.model import RetrievalModel, Shape
from cmdlab.retrieval.parallel import (
    backward_in_shares,
    is_first_process,
    joined,
    process_count,
    rows_of_process,
)
from cmdlab.retrieval.training import Trained, Training, train

SHAPE = Shape(speech_layers=2, speech_width=16, image_width=12, embedding=8)
IDS = [3, 5, 3, 8, 5, 3, 0, 1, 2, 4, 6, 8, 7]  # 13 captions, some of one image
ROOT = Path(__file__).parents[2]
POINTS = {
    "contrastive": None,
    "mask": Denoising("both"),
    "swap": Denoising("both", "swap", 0.5),
    "swap, once": Denoising("both", "swap", 0.5, "tokens", depth=1),
    "gaussian": Denoising("both", "gaussian", 0.5, loss="cosine"),
    "shuffle, other": Denoising("both", "shuffle", 0.5, context="other"),
    "mask, InfoNCE": Denoising("both", "mask", 0.5, "tokens", "info_nce"),
    "nothing, other's target": Denoising("both", "none", 0.5, "tokens", target_of="other"),
    "swap, no context": Denoising("both", "swap", 0.5, context="none", gradient="corrupted"),
    "mask, InfoNCE, other's target": Denoising(
        *("both", "mask", 0.5, "tokens", "info_nce"), target_of="other", gradient="attended"
    ),
    "swap, InfoNCE, other": Denoising("both", "swap", 0.2, "pooled", "info_nce", context="other"),
}
TEN = Training(
    steps=10, batch_size=13, warm_up=3, validate_every=5, learning_rate=3e-3, weight=0.7, seed=3
)
RUNS = {
    "contrastive": replace(TEN, weight=0.0),
    "mask": replace(TEN, denoising=POINTS["mask"]),
    "swap": replace(TEN, denoising=POINTS["swap"], image_head="patches"),
    "InfoNCE": replace(TEN, denoising=POINTS["swap, InfoNCE, other"]),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


Step = tuple[list[Tensor], dict[str, Tensor]]  # the losses, and the gradients that there are


def make_modules(point: Denoising | None, image_head: str) -> tuple[RetrievalModel, nn.ModuleDict]:
    """In float64, which tells another order of sums from another sum."""
    torch.manual_seed(0)
    shape = replace(SHAPE, image_head=image_head)
    model = RetrievalModel(shape)
    denoisers = make_denoisers(point, shape, 4) if point else nn.ModuleDict()
    return model.double(), denoisers.double()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(7)
    image_id = torch.tensor(IDS)
    pictures = nn.functional.normalize(torch.randn(9, 8, generator=generator), dim=-1)
    patches = torch.randn(9, 4, 12, generator=generator)
    lengths = torch.randint(1, 7, (len(IDS),), generator=generator)
    states = torch.randn(2, int(lengths.sum()), 16, generator=generator)
    return Batch(
        states.double(),
        lengths,
        patches[image_id].double(),
        pictures[image_id].double(),
        image_id,
    )


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    spoken = batch.states.split(batch.lengths.tolist(), 1)
    states = torch.cat([spoken[row] for row in rows.tolist()], 1)
    return Batch(states, *(tensor[rows] for tensor in batch[1:]))


def outcome(losses: Any, *modules: nn.Module) -> Step:
    named = [pair for module in modules for pair in module.named_parameters()]
    return (
        [value.detach() for value in losses if value is not None],
        {name: value.grad for name, value in named if value.grad is not None},
    )


def at_once(point: Denoising | None, image_head: str) -> Step:
    model, denoisers = make_modules(point, image_head)
    generator = torch.Generator().manual_seed(5)
    losses = training_losses(model, denoisers, make_batch(), 0.7, generator)
    losses.total.backward()
    return outcome(losses, model, denoisers)


def in_shares(point: Denoising | None, image_head: str, chunk: int) -> Step:
    model, denoisers = make_modules(point, image_head)
    generator = torch.Generator().manual_seed(5)
    own = rows_of(make_batch(), rows_of_process(len(IDS), denoisers))
    losses = backward_in_shares(model, denoisers, own, len(IDS), 0.7, generator, chunk=chunk)
    return outcome(losses, model, denoisers)


def assert_same_step(found: Step, expected: Step) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


each_point = pytest.mark.parametrize("point", POINTS)
each_head = pytest.mark.parametrize("image_head", ["global", "patches"])


@each_head
@each_point
@pytest.mark.parametrize("chunk", [1, 4, 5, 99])
def test_chunks_have_the_losses_and_gradients_of_the_batch(point, image_head, chunk):
    found = in_shares(POINTS[point], image_head, chunk)
    assert_same_step(found, at_once(POINTS[point], image_head))
    assert found[1]["log_scale"] != 0


def test_dropout_is_the_same_in_both_passes():
    """Against the graph of all chunks, kept, each from the random state that is its own."""
    found = []
    for cached in (True, False):
        model, _ = make_modules(None, "global")
        model.speech_head.norm = nn.Sequential(model.speech_head.norm, nn.Dropout(0.4))
        batch, generator = make_batch(), torch.Generator().manual_seed(5)
        if cached:
            losses = backward_in_shares(
                model, nn.ModuleDict(), batch, len(IDS), 0.0, generator, chunk=5
            )
        else:
            speech = []
            for rows in torch.arange(len(IDS)).split(5):
                torch.manual_seed(5 + int(rows[0]))
                speech.append(encode(model, rows_of(batch, rows)).speech)
            losses = [info_nce(torch.cat(speech), batch.embedding, batch.image_id, model.scale)] * 2
            losses[0].backward()
        found.append(outcome(losses, model))
    torch.testing.assert_close(*(gradients for _, gradients in found))
    assert found[0][0][0].item() == pytest.approx(found[1][0][0].item())


def test_chunks_keep_a_fraction_for_the_backward_pass():
    """Bytes that the graph holds at once; four equal chunks of a batch of 64 captions."""

    class Held:
        bytes = most = 0

        def __init__(self, tensor: Tensor) -> None:
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            Held.bytes += self.size
            Held.most = max(Held.most, Held.bytes)

        def __del__(self) -> None:
            Held.bytes -= self.size

    most = []
    for chunk in (0, 16):
        Held.bytes = Held.most = 0
        model, denoisers = make_modules(POINTS["mask"], "global")
        batch = rows_of(make_batch(), torch.arange(64) % len(IDS))
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            backward_in_shares(
                *(model, denoisers, batch, 64, 0.7, torch.Generator().manual_seed(5)), chunk=chunk
            )
        most.append(Held.most)
    assert most[1] < most[0] / 3


def work(
    rank: int,
    processes: int,
    port: int,
    folder: Path,
    features: Features,
    validation: Features,
    begun: Path | None,
) -> None:
    """What each of several processes does, in the environment that torchrun gives it."""
    torch.set_num_threads(1)
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
    }
    with joined("cpu") as device:
        done: dict[str, Any] = {
            f"{name}, {chunk}": in_shares(point, head_of(name), chunk)
            for name, point in POINTS.items()
            for chunk in (0, 2)
        }
        for name, training in RUNS.items():
            trained = train(training, features, validation, device=device)
            done[f"run, {name}"] = weights_of(trained)
            done[f"curve, {name}"] = trained.curve
        path = folder / "checkpoint.pt"
        if begun is None:
            train(RUNS["swap"], features, validation, checkpoint=path, stop_after=7)
        else:
            if is_first_process():
                shutil.copy(begun, path)
            torch.distributed.barrier()
            trained = train(RUNS["swap"], features, validation, checkpoint=path)
            done["continued"] = weights_of(trained)
        for name, training, checkpoint in (
            ("too small", replace(TEN, batch_size=1), None),
            ("own folders", RUNS["swap"], path if is_first_process() else folder / "none.pt"),
        ):
            with pytest.raises(InputError) as refusal:
                train(training, features, validation, checkpoint=checkpoint)
            done[name] = str(refusal.value)
        done["processes"] = process_count()
    torch.save(done, folder / f"{rank}.pt")


def weights_of(trained: Trained) -> dict[str, Tensor]:
    """All but two biases below a softmax, which does not feel them: their gradient is rounding
    alone, to which Adam gives the length of a step."""
    weights = {**trained.model.state_dict(), **trained.denoisers.state_dict()}
    weights.pop("image_head.importance.bias", None)
    query, _, value = weights.pop("speech_head.transformer.self_attn.in_proj_bias").chunk(3)
    return weights | {"query bias": query, "value bias": value}


def head_of(point: str) -> str:
    return "patches" if "swap" in point else "global"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def splits(toy_features) -> tuple[Features, Features]:
    return toy_features(images=20, seed=0), toy_features(images=9, seed=1)


@pytest.fixture(scope="module")
def launched(splits, tmp_path_factory) -> dict[int, Path]:
    """Two processes, and three that continue what the two began."""
    folders = {count: tmp_path_factory.mktemp(f"of{count}") for count in (2, 3)}
    begun = folders[2] / "checkpoint.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[2])  # they import this file by pytest's name
        for processes, continued in ((2, None), (3, begun)):
            arguments = (processes, free_port(), folders[processes], *splits, continued)
            torch.multiprocessing.spawn(work, arguments, processes)
    return folders


def results(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("[0-9].pt"))]


pytestmark = pytest.mark.xdist_group("several processes")
of_processes = pytest.mark.parametrize("processes", [2, 3])


@of_processes
def test_every_process_has_the_losses_and_gradients_of_the_batch(launched, processes):
    found = results(launched[processes])
    assert [one["processes"] for one in found] == [processes] * processes
    for name, point in POINTS.items():
        expected = at_once(point, head_of(name))
        for one in found:
            for chunk in (0, 2):
                assert_same_step(one[f"{name}, {chunk}"], expected)


@of_processes
@pytest.mark.parametrize("name", RUNS)
def test_ten_steps_of_several_processes_are_those_of_one(launched, splits, processes, name):
    expected = train(RUNS[name], *splits)
    found = results(launched[processes])
    for one in found:
        torch.testing.assert_close(one[f"run, {name}"], weights_of(expected), rtol=1e-3, atol=1e-4)
        assert all(
            torch.equal(one[f"run, {name}"][key], value)
            for key, value in found[0][f"run, {name}"].items()
        )
    for point, same in zip(found[0][f"curve, {name}"], expected.curve, strict=True):
        assert point.keys() == same.keys()
        assert point["step"] == same["step"]
        assert point["loss"] == pytest.approx(same["loss"], rel=1e-4)
    validated = [
        [point["validation_mean_R@1"] is not None for point in one[f"curve, {name}"]].count(True)
        for one in found
    ]
    assert validated == [2] + [0] * (processes - 1)  # once, by the first


def test_what_two_processes_began_one_or_three_continue(launched, splits, tmp_path):
    shutil.copy(launched[2] / "checkpoint.pt", tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 5
    expected = weights_of(train(RUNS["swap"], *splits))
    continued = train(RUNS["swap"], *splits, checkpoint=tmp_path / "checkpoint.pt")
    for found in (
        weights_of(continued),
        *(one["continued"] for one in results(launched[3])),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@of_processes
def test_processes_that_cannot_share_a_run_are_refused(launched, processes):
    for one in results(launched[processes]):
        assert one["too small"] == f"batch_size: 1 captions are too few for {processes} processes"
        assert one["own folders"].endswith("put it in a folder that all share")


def test_a_gpu_by_number_is_refused_under_torchrun(monkeypatch):
    with joined("cuda:1") as device:
        assert device == "cuda:1"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(InputError, match="say cuda, not cuda:1"), joined("cuda:1"):
        pass
    assert process_count() == 1


def test_torchrun_trains_one_model(smoke_corpus, smoke_data, tmp_path):
    """From the command line; what is printed is printed once."""
    recipe = {"steps": 4, "batch_size": 13, "weight": 1.0, "direction": "both", "seed": 2}
    command = ["-m", "cmdlab", "train", "--device", "cpu", "--corpus", str(smoke_corpus)]
    command += [part for name, value in recipe.items() for part in ("-p", f"{name}={value}")]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    printed = [
        subprocess.run(
            [sys.executable, *launcher, *command, "--output", str(tmp_path / name)],
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
        for name, launcher in (("one", []), ("two", torchrun))
    ]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")]
    assert [json.loads(one) for one in printed] == [one["metrics"] for one in results]
    curves = [[point["loss"] for point in one["learning_curve"]] for one in results]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    files = [{file.name for file in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]
