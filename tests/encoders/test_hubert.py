"""HuBERT and WavLM against transformers and torchaudio, state by state, on tiny random weights."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
)

from cmdlab.corpora import Caption, Corpus
from cmdlab.encoders import Encoder, Hearing, OnlineSpeech, encode, hubert, open_stores
from cmdlab.encoders.hubert import CHECKPOINTS, SpeechEncoder, open_hubert
from cmdlab.errors import InputError

CONVOLUTIONS = [(16, 10, 5), (16, 3, 2), (16, 2, 2)]  # channels, kernel, stride
SHORTEST = 30  # samples that one token is made of
TOLERANCE = 1e-4


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, no weight at its first value: a norm's would hide that it is missing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval().requires_grad_(False)


def hugging_face_model(name: str, *, ctc: bool = False, **changed: object) -> PreTrainedModel:
    large, wavlm = CHECKPOINTS[name].large, CHECKPOINTS[name].family == "wavlm"
    channels, kernels, strides = zip(*CONVOLUTIONS, strict=True)
    sizes = {
        "feat_extract_norm": "layer" if large else "group",
        "do_stable_layer_norm": large,
        "conv_bias": large,
        "conv_dim": channels,
        "conv_kernel": kernels,
        "conv_stride": strides,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4,
        "vocab_size": 5,
    } | changed
    torch.manual_seed(0)
    if wavlm:
        config = WavLMConfig(num_buckets=16, max_bucket_distance=40, **sizes)
        return shaken(WavLMForCTC(config) if ctc else WavLMModel(config))  # type: ignore[return-value]
    config = HubertConfig(**sizes)
    return shaken(HubertForCTC(config) if ctc else HubertModel(config))  # type: ignore[return-value]


def torchaudio_model(name: str) -> torchaudio.models.Wav2Vec2Model:
    large, wavlm = CHECKPOINTS[name].large, CHECKPOINTS[name].family == "wavlm"
    build = torchaudio.models.wavlm_model if wavlm else torchaudio.models.wav2vec2_model
    buckets = {"encoder_num_buckets": 16, "encoder_max_distance": 40} if wavlm else {}
    torch.manual_seed(0)
    return shaken(
        build(
            extractor_mode="layer_norm" if large else "group_norm",
            extractor_conv_layer_config=CONVOLUTIONS,
            extractor_conv_bias=False,
            encoder_embed_dim=32,
            encoder_projection_dropout=0.1,
            encoder_pos_conv_kernel=8,
            encoder_pos_conv_groups=4,
            encoder_num_layers=3,
            encoder_num_heads=4,
            encoder_attention_dropout=0.1,
            encoder_ff_interm_features=48,
            encoder_ff_interm_dropout=0.1,
            encoder_dropout=0.1,
            encoder_layer_norm_first=large,
            encoder_layer_drop=0.1,
            aux_num_out=None,
            **buckets,
        )
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """By name, a folder as transformers saves a model of that name's kind."""
    root = tmp_path_factory.mktemp("folders")
    for name in CHECKPOINTS:
        hugging_face_model(name).save_pretrained(root / name)
    return {name: root / name for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def encoders(folders) -> dict[str, SpeechEncoder]:
    return {name: open_hubert(name, str(folder)) for name, folder in folders.items()}


@pytest.fixture
def copy_of(folders, tmp_path) -> Callable[[str], Path]:
    """A folder of that name that a test may spoil."""

    def copied(name: str) -> Path:
        for file in folders[name].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        return tmp_path

    return copied


@pytest.fixture
def shrunk(monkeypatch) -> None:
    """torchaudio's architectures, made tiny."""
    for name, checkpoint in CHECKPOINTS.items():
        monkeypatch.setattr(
            torchaudio.models, checkpoint.architecture, lambda name=name: torchaudio_model(name)
        )


def speech(*lengths: int) -> list[Tensor]:
    """Clips that are neither centred nor of unit variance, each louder than the one before."""
    generator = torch.Generator().manual_seed(1)
    return [
        0.02 * (i + 1) * (torch.randn(length, generator=generator) + 0.5)
        for i, length in enumerate(lengths)
    ]


def alone(encoder: SpeechEncoder, clip: Tensor) -> Tensor:
    states, tokens = encoder(clip[None], torch.tensor([len(clip)]))
    assert tokens.tolist() == [states.shape[2]]
    return states[0]


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_state_is_that_of_transformers(name, normalised, copy_of):
    folder = copy_of(name)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=normalised)
    extractor.save_pretrained(folder)
    encoder = open_hubert(name, str(folder))
    theirs = hugging_face_model(name)
    for clip in speech(SHORTEST, 500, 1601):
        inputs = extractor(clip.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
        output = theirs(inputs, output_hidden_states=True)
        # Since its version 5 the last of transformers' states lacks the final layer norm.
        expected = [*output.hidden_states[:-1], output.last_hidden_state]
        ours = alone(encoder, clip)
        assert len(ours) == len(expected) == 4
        for state, wanted in zip(ours, expected, strict=True):
            assert torch.allclose(state, wanted[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("before_torch_2_1", [True, False])
def test_every_state_is_that_of_torchaudio(name, before_torch_2_1, shrunk, tmp_path):
    theirs = torchaudio_model(name)
    tensors = theirs.state_dict()
    if before_torch_2_1:
        for old, new in (("g", "original0"), ("v", "original1")):
            at = "encoder.transformer.pos_conv_embed.conv"
            tensors[f"{at}.weight_{old}"] = tensors.pop(f"{at}.parametrizations.weight.{new}")
    torch.save(tensors, tmp_path / "weights.pth")
    encoder = open_hubert(name, str(tmp_path / "weights.pth"))
    (clip,) = speech(900)
    inputs = clip[None]
    if CHECKPOINTS[name].large:
        inputs = nn.functional.layer_norm(inputs, inputs.shape)  # as its pipeline does
    expected = [*theirs.extract_features(inputs)[0][:-1], theirs(inputs)[0]]
    ours = alone(encoder, clip)
    assert len(ours) == len(expected) + 1  # and what the first layer takes
    for state, wanted in zip(ours[1:], expected, strict=True):
        assert torch.allclose(state, wanted[0], atol=TOLERANCE)


@pytest.mark.parametrize("name", CHECKPOINTS)
@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.integers(SHORTEST, 700), min_size=1, max_size=5))
def test_a_clip_does_not_feel_its_batch(name, lengths, encoders):
    encoder = encoders[name]
    clips = speech(*lengths)
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=math.nan)
    states, tokens = encoder(padded, torch.tensor(lengths))
    for clip, state, count in zip(clips, states, tokens.tolist(), strict=True):
        assert torch.allclose(state[:, :count], alone(encoder, clip), atol=TOLERANCE)
        assert not state[:, count:].any()


@pytest.mark.parametrize(
    ("name", "layers", "width"),
    [
        ("hubert-base", 13, 768),
        ("hubert-large", 25, 1024),
        ("wavlm-base-plus", 13, 768),
        ("wavlm-large", 25, 1024),
    ],
)
def test_the_published_sizes(name, layers, width):
    with torch.device("meta"):
        model = getattr(torchaudio.models, CHECKPOINTS[name].architecture)()
    encoder = SpeechEncoder(model, name, None)
    about = encoder.description
    assert (about.kind, about.layers, about.width) == ("speech", layers, width)
    assert about.tokens_per_second == 50
    assert about.shortest == 400
    assert not encoder.training
    assert not any(weight.requires_grad for weight in encoder.parameters())


@pytest.mark.parametrize("name", ["hubert-base", "wavlm-large"])
def test_the_encoder_within_a_ctc_model(name, folders, tmp_path):
    wrapper = hugging_face_model(name, ctc=True)
    wrapper.save_pretrained(tmp_path)
    assert any(key.startswith("lm_head.") for key in load_file(tmp_path / "model.safetensors"))
    encoder = open_hubert(name, str(tmp_path))
    (clip,) = speech(800)
    inputs = clip[None]
    if CHECKPOINTS[name].large:
        inputs = nn.functional.layer_norm(inputs, inputs.shape, eps=1e-7)
    expected = wrapper.base_model(inputs).last_hidden_state[0]
    assert torch.allclose(alone(encoder, clip)[-1], expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bfloat16_comes_near(name, folders):
    encoder = open_hubert(name, str(folders[name]))
    clips = speech(900, 700)
    padded = nn.utils.rnn.pad_sequence(clips, batch_first=True)
    lengths = torch.tensor([900, 700])
    exact, tokens = encoder(padded, lengths)
    near, same = encoder.to(torch.bfloat16)(padded, lengths)
    assert near.dtype == torch.bfloat16
    assert tokens.tolist() == same.tolist()
    assert (near - exact).norm() < 0.05 * exact.norm()


def test_a_clip_without_a_token_is_refused(encoders):
    encoder = encoders["hubert-base"]
    with pytest.raises(InputError, match="29 samples, and hubert-base takes 30 or more"):
        encoder(torch.zeros(2, 100), torch.tensor([100, SHORTEST - 1]))


def test_a_recording_without_a_token_is_refused_by_its_name(folders, tmp_path):
    encoder = Encoder("hubert-base", str(folders["hubert-base"]))
    hearing = Hearing(snr_db=None, reverberation=False)
    file = tmp_path / "blip.wav"
    captions = []
    for samples, audio in ((SHORTEST, tmp_path / "short.wav"), (SHORTEST - 1, file)):
        soundfile.write(audio, torch.full((samples,), 0.1).numpy(), 16_000)
        captions.append(Caption(audio.name, "image", audio, "", ""))
    corpus = Corpus("two", tmp_path, "train", (), tuple(captions), "0" * 64)
    message = rf"{file}: lasts 1\.81 ms, and hubert-base takes 1\.88 ms or more; replace it or"
    assert len(encode(encoder, captions[:1], hearing)[0].tokens) == 1
    with pytest.raises(InputError, match=message):
        encode(encoder, captions, hearing)
    with pytest.raises(InputError, match=message):  # as on a GPU
        open_stores([(corpus, encoder)], tmp_path, hearing=hearing, workers=1, device="cpu:0")
    with pytest.raises(InputError, match=message):
        OnlineSpeech(corpus, encoder, hearing, "cpu").tokens([0, 1])


@pytest.mark.parametrize(
    ("given", "asked", "reason"),
    [
        ("hubert-base", "hubert-large", "is that of a base model"),
        ("wavlm-large", "wavlm-base-plus", "is that of a large model"),
        ("wavlm-base-plus", "hubert-base", "model_type 'wavlm'"),
        ("hubert-large", "wavlm-large", "model_type 'hubert'"),
    ],
)
def test_a_folder_of_another_model_is_refused(given, asked, reason, folders):
    with pytest.raises(InputError, match=reason):
        open_hubert(asked, str(folders[given]))


def test_a_file_of_another_model_is_refused(shrunk, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    save_file(torchaudio_model("hubert-base").state_dict(), path)
    for other in ("hubert-large", "wavlm-base-plus"):
        with pytest.raises(InputError, match=f"no weights of {other}: they have"):
            open_hubert(other, path)


def test_a_file_of_another_size_is_refused(tmp_path):
    save_file(torchaudio_model("hubert-base").state_dict(), tmp_path / "tiny.safetensors")
    with pytest.raises(InputError, match="they have"):
        open_hubert("hubert-base", str(tmp_path / "tiny.safetensors"))


def test_hugging_face_s_file_without_its_folder_is_refused(folders, shrunk):
    with pytest.raises(InputError, match=r"need its folder, with config\.json"):
        open_hubert("hubert-base", str(folders["hubert-base"] / "model.safetensors"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_that_do_not_fit_their_configuration_are_refused(name, copy_of):
    folder = copy_of(name)
    whole = load_file(folder / "model.safetensors")
    key = "encoder.layers.1.attention.k_proj.weight"
    spoilt: list[tuple[dict[str, Tensor], str]] = [
        ({k: v for k, v in whole.items() if k != key}, "they have no"),
        ({**whole, "encoder.layers.9.new": torch.ones(2)}, "which it has not"),
        ({**whole, "encoder.layer_norm.weight": torch.ones(31)}, r"in shape \[31\], not \[32\]"),
        ({**whole, key: torch.tensor(1.0)}, "they have"),
        ({**whole, "encoder.layer_norm.weight": torch.ones(32).int()}, "no floating point"),
    ]
    for tensors, reason in spoilt:
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=reason):
            open_hubert(name, str(folder))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm True"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06"),
        ({"num_attention_heads": 5}, "sizes make no model"),
        ({"hidden_size": "32"}, "sizes make no model"),
        ({"conv_kernel": [10]}, "sizes make no model"),
        ({"feat_extract_norm": "batch"}, "sizes make no model"),
        ({"num_hidden_layers": 2}, "which it has not"),
        ({"num_hidden_layers": 4}, "they have no"),
    ],
)
def test_a_configuration_that_is_not_supported_is_refused(changed, reason, copy_of):
    folder = copy_of("hubert-base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(InputError, match=reason):
        open_hubert("hubert-base", str(folder))


def test_a_configuration_without_a_size_is_refused(copy_of):
    folder = copy_of("hubert-base")
    config = json.loads((folder / "config.json").read_text())
    del config["conv_stride"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="has no 'conv_stride'"):
        open_hubert("hubert-base", str(folder))


def test_another_sampling_rate_is_refused(copy_of):
    folder = copy_of("hubert-base")
    Wav2Vec2FeatureExtractor(sampling_rate=8_000).save_pretrained(folder)
    with pytest.raises(InputError, match="sampling_rate 8000"):
        open_hubert("hubert-base", str(folder))


def test_a_folder_without_preprocessing_normalises_as_the_name_was_trained(copy_of):
    for name in ("hubert-base", "wavlm-large"):
        encoder = open_hubert(name, str(copy_of(name)))
        (clip,) = speech(400)
        same = torch.allclose(alone(encoder, clip), alone(encoder, 2 * clip), atol=1e-3)
        assert same == CHECKPOINTS[name].large


def test_what_torchaudio_has_fetched_is_used(shrunk, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(
        torchaudio_model("wavlm-large").state_dict(), tmp_path / "checkpoints" / "wavlm_large.pth"
    )
    assert open_hubert("wavlm-large", "").description.layers == 4


def test_no_network_names_the_way_round(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(hubert, "DOWNLOADS", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match=r"hubert_fairseq_base_ls960\.pth cannot be fetched"):
        open_hubert("hubert-base", "")
    assert list((tmp_path / "checkpoints").iterdir()) == []
