"""A trained model is handed on with its card, through a folder or a hub."""

import json
import shutil
from pathlib import Path

import pytest

from cmdlab.cli import main
from cmdlab.errors import InputError
from cmdlab.evaluation import RankTable, interval
from cmdlab.retrieval import RetrievalModel
from cmdlab.search import Retriever, make_module, model_identity, pull_module, push_module
from cmdlab.shipped import MODULES

FILES = {"model.safetensors", "model.json", "MODEL_CARD.md"}


@pytest.fixture(scope="module")
def module(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("modules") / "small-patches"
    make_module(run, folder)
    return folder


def test_a_module_is_the_runs_model(run, module):
    assert {path.name for path in module.iterdir()} == FILES
    own, made = (RetrievalModel.from_pretrained(one) for one in (run / "model", module))
    assert own.encoders == made.encoders
    assert all(value.equal(made.state_dict()[name]) for name, value in own.state_dict().items())
    assert sum(path.stat().st_size for path in module.iterdir()) < 2_000_000


def test_the_card_says_what_the_runs_files_say(run, module):
    card = (module / "MODEL_CARD.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert "# small-patches" in card
    found = interval([RankTable.load(run / "ranks.npz")], "speech_to_image/R@1")
    assert found.mean == pytest.approx(result["metrics"]["test"]["speech_to_image"]["R@1"])
    assert f"| {found.mean:.1f} ({found.low:.1f}–{found.high:.1f}) |" in card
    for said in (
        result["corpus"]["content_hash"],
        result["encoders"]["speech"]["sha256"],
        "20 pictures and 100 spoken captions",
        "| `steps` | `40` |",
        "| `image_head` | `patches` |",
        "by a contrastive loss alone",
        "a synthesiser's voices",
        f"{result['cost']['inference_parameters']:,} parameters",
    ):
        assert said in card
    assert "corruption" not in card  # it was trained without


def test_a_card_is_text_whatever_the_run_calls_itself(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    result = json.loads(path.read_text())
    result["corpus"]["name"] = "own`|\n<script>alert(1)</script>"
    path.write_text(json.dumps(result))
    make_module(tmp_path / "run", tmp_path / "own")
    card = (tmp_path / "own" / "MODEL_CARD.md").read_text()
    assert "`own<script>alert(1)</script>`" in card  # within a code span


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda run: (run / "result.json").unlink(), "there is no such file"),
        (lambda run: (run / "settings.json").write_text("[]"), "holds no recipe"),
        (lambda run: (run / "ranks.npz").write_bytes(b"PK"), "not an npz file"),
        (lambda run: RetrievalModel(shape_of(run)).save_pretrained(run / "model"), "does not say"),
    ],
)
def test_an_unfinished_run_makes_no_module(run, tmp_path, spoil, reason):
    shutil.copytree(run, tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(InputError, match=reason):
        make_module(tmp_path / "run", tmp_path / "own")
    assert not (tmp_path / "own").exists()


def shape_of(run):
    return RetrievalModel.from_pretrained(run / "model").shape


def test_modules_that_ship_are_loaded_by_name(module, monkeypatch, tmp_path):
    monkeypatch.setattr("cmdlab.shipped.MODULES", module.parent)
    monkeypatch.chdir(tmp_path)
    Path("small-patches").mkdir()  # is not what the name means
    assert Retriever("small-patches").dimension == 256
    assert model_identity("small-patches") == model_identity(module)
    with pytest.raises(InputError, match="holds no retrieval model"):
        RetrievalModel.from_pretrained("./small-patches")
    with pytest.raises(InputError, match=r"none of it: is neither .* \(small-patches\)"):
        RetrievalModel.from_pretrained("none of it")


def test_what_ships_is_small_and_fits_the_encoders_here():
    for folder in MODULES.glob("*"):
        assert {path.name for path in folder.iterdir()} == FILES
        assert sum(path.stat().st_size for path in folder.iterdir()) < 2_000_000
        Retriever(folder.name)


class Hub:
    """Stands where the hub's servers would: a folder, and what of its client is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[tuple[str, bool]] = []

    def create_repo(self, _client, repo_id, *, private, exist_ok):
        assert exist_ok
        self.made.append((repo_id, private))

    def create_commit(self, client, repo_id, operations, *, commit_message):
        assert commit_message
        for operation in operations:
            target = self.folder / repo_id / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                target.write_bytes(content.read())
        return type("Commit", (), {"repo_url": f"https://hub/{repo_id}"})

    def download(self, repo_id, filename, *, revision, local_dir):
        from huggingface_hub.errors import LocalEntryNotFoundError

        source = self.folder / repo_id / filename
        if not source.exists():
            raise LocalEntryNotFoundError("there is no network")
        return shutil.copy(source, Path(local_dir) / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    client = pytest.importorskip("huggingface_hub", reason="huggingface_hub is an extra")
    hub = Hub(tmp_path / "hub")
    api = client.HfApi
    monkeypatch.setattr(api, "create_repo", lambda *a, **k: hub.create_repo(*a, **k))
    monkeypatch.setattr(api, "create_commit", lambda *a, **k: hub.create_commit(*a, **k))
    monkeypatch.setattr(client, "hf_hub_download", hub.download)
    return hub


def test_what_is_pushed_can_be_pulled(module, hub, tmp_path):
    assert push_module(module, "someone/small", private=True) == "https://hub/someone/small"
    assert hub.made == [("someone/small", True)]
    there = hub.folder / "someone" / "small"
    assert {path.name for path in there.iterdir()} == {
        "model.safetensors",
        "model.json",
        "README.md",
    }
    pull_module("someone/small", tmp_path / "pulled")
    for name in FILES:
        assert (tmp_path / "pulled" / name).read_bytes() == (module / name).read_bytes()
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == FILES


def test_what_is_no_model_is_not_pulled(module, hub, tmp_path):
    push_module(module, "someone/small")
    (hub.folder / "someone" / "small" / "model.safetensors").write_bytes(b"pickled, perhaps")
    with pytest.raises(InputError, match="holds no retrieval model"):
        pull_module("someone/small", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_the_hubs_refusal_is_one_line(module, hub, tmp_path, capsys):
    assert main(["module", "pull", "someone/none", str(tmp_path / "pulled")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("cmdlab: someone/none: the hub refuses (there is no network)")
    assert said.count("\n") == 1


def test_a_model_without_a_card_is_not_pushed(run, hub):
    with pytest.raises(InputError, match=r"holds no MODEL_CARD\.md"):
        push_module(run / "model", "someone/small")
