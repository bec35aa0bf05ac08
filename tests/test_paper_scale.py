"""Flickr8k Audio and SpokenCOCO as they are on disk, through the real architectures, end to end.

The encoders are HuBERT and CLIP in their own files, shrunk by their own configuration classes and
at random weights; photographs have odd sizes and modes, and every sentence is spoken.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    HubertConfig,
    HubertModel,
    Wav2Vec2FeatureExtractor,
)

from cmdlab.cli import main
from cmdlab.corpora import SAMPLE_RATE, Utterance, speak
from cmdlab.records import load_records

SPLITS = ("train",) * 5 + ("val", "val", "test", "test")  # of the images
CAPTIONS = 2
MODES = ("RGB", "L", "CMYK")  # a JPEG has one of them
SIZES = ((206, 219), (640, 480), (33, 90), (500, 334))
VOICES = ("en-us+m3", "en+f5", "en-gb-scotland+Michael")
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "train.ipynb"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Image.Image, list[np.ndarray]]]:
    """Each image with its captions' samples."""
    things = ("dog", "child", "boat", "red car", "player", "bird", "horse", "man", "woman")
    spoken = [
        speech.samples
        for speech in speak(
            Utterance(f"a {thing} is {place}", VOICES[(i + n) % 3])
            for i, thing in enumerate(things)
            for n, place in enumerate(("near the water", "in front of a house"))
        )
    ]
    pictures = []
    for i in range(len(things)):
        blocks = np.random.default_rng(i).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        pictures.append(Image.fromarray(blocks).resize(SIZES[i % 4]).convert(MODES[i % 3]))
    return [(one, spoken[CAPTIONS * i : CAPTIONS * (i + 1)]) for i, one in enumerate(pictures)]


def flickr8k_audio(root: Path, media) -> Path:
    lines: dict[str, list[str]] = {f"Flickr_8k.{name}Images.txt": [] for name in _LISTS.values()}
    lines |= {"flickr_audio/wav2capt.txt": [], "flickr_audio/wav2spk.txt": []}
    lines["Flickr8k.token.txt"] = []
    (root / "flickr_audio" / "wavs").mkdir(parents=True)
    (root / "Flicker8k_Dataset").mkdir()
    for i, (picture, captions) in enumerate(media):
        stem = f"{1000 + i}_{i:08x}"
        picture.save(root / "Flicker8k_Dataset" / f"{stem}.jpg")
        lines[f"Flickr_8k.{_LISTS[SPLITS[i]]}Images.txt"].append(f"{stem}.jpg")
        for n, samples in enumerate(captions):
            wav = f"{stem}_{n}.wav"
            soundfile.write(root / "flickr_audio" / "wavs" / wav, samples, SAMPLE_RATE)
            lines["flickr_audio/wav2capt.txt"].append(f"{wav} {stem}.jpg #{n}")
            lines["flickr_audio/wav2spk.txt"].append(f"{wav} {n}")
            lines["Flickr8k.token.txt"].append(f"{stem}.jpg#{n}\tA caption , number {n} .")
    for name, content in lines.items():
        (root / name).write_text("\n".join(content) + "\n")
    return root


_LISTS = {"train": "train", "val": "dev", "test": "test"}


def spoken_coco(root: Path, media) -> Path:
    listed, data = [], []
    for i, (picture, captions) in enumerate(media):
        name, spoken = f"COCO_train2014_{i:012d}.jpg", []
        (root / "train2014").mkdir(parents=True, exist_ok=True)
        (root / "wavs" / "train" / "0").mkdir(parents=True, exist_ok=True)
        picture.save(root / "train2014" / name)
        for n, samples in enumerate(captions):
            uttid = f"speaker{n}-{i}_{n}"
            wav = f"wavs/train/0/{uttid}.wav"
            soundfile.write(root / wav, samples, SAMPLE_RATE)
            caption = {"uttid": uttid, "speaker": f"speaker{n}", "text": "A CAPTION", "wav": wav}
            spoken.append(caption)
        data.append({"image": f"train2014/{name}", "captions": spoken})
        listed.append({"filepath": "train2014", "filename": name, "split": SPLITS[i]})
    (root / "SpokenCOCO_train.json").write_text(json.dumps({"data": data}))
    (root / "SpokenCOCO_val.json").write_text(json.dumps({"data": []}))
    (root / "dataset_coco.json").write_text(json.dumps({"images": listed}))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a large HuBERT and of a CLIP, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("weights")
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    hubert = HubertConfig(
        hidden_size=32,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        **sizes,
    )
    HubertModel(hubert).save_pretrained(folder / "hubert")
    Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "hubert")
    vision = {"hidden_size": 32, "image_size": 32, "patch_size": 8, "hidden_act": "quick_gelu"}
    text = {"hidden_size": 16, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    clip = CLIPConfig(vision_config=vision | sizes, text_config=text | sizes, projection_dim=24)
    CLIPModel(clip).save_pretrained(folder / "clip")
    return {"speech_weights": str(folder / "hubert"), "image_weights": str(folder / "clip")}


@pytest.mark.parametrize("layout", [flickr8k_audio, spoken_coco])
def test_from_check_to_report(layout, media, weights, tmp_path, capfd):
    corpus = layout(tmp_path / "corpus", media)
    assert main(["corpus", "check", str(corpus)]) == 0
    assert "encoders for its images: clip-vit-b-32" in capfd.readouterr().out
    sweep = tmp_path / "recipe.yaml"
    plan = {
        "notebook": str(NOTEBOOK),
        "baseline": "contrastive",
        "fixed": {
            **{"corpus": str(corpus), "features": str(tmp_path / "features"), "batch_size": 6},
            **{"speech_encoder": "hubert-large", "image_encoder": "clip-vit-l-14", **weights},
        },
        "seeds": [1],
        "arms": {
            "contrastive": {"online": True},
            "cmd-image": {"weight": 1.0, "corruption": "swap", "target": "tokens"},
        },
    }
    sweep.write_text(yaml.safe_dump(plan))
    assert main(["sweep", str(sweep), "--smoke", "--runs", str(tmp_path / "runs")]) == 0
    listing = tmp_path / "runs" / "sweeps" / "recipe-smoke.json"
    runs = load_records([listing])
    records = [run.record for run in runs.done]
    assert (len(records), runs.failed, runs.missing) == (2, (), ())
    for record in records:
        assert record["encoders"]["speech"]["name"] == "hubert-large"
        assert record["metrics"]["test"]["speech_to_image"]["queries"] == 2 * CAPTIONS
        assert 0 <= record["metrics"]["test"]["mean_R@1"] <= 100
    shapes = [json.loads((run.folder / "model" / "model.json").read_text()) for run in runs.done]
    assert [shape["speech_layers"] for shape in shapes] == [3, 3]
    assert [shape["embedding"] for shape in shapes] == [24, 24]
    assert len(list((tmp_path / "features").glob("hubert-large-*"))) == 3  # of the second arm
    assert main(["report", str(listing), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "hubert-large" in page
    assert "cmd-image" in page
