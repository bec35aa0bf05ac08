"""The command line as a user meets it: JSON on standard output, one line for every refusal."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmdlab.cli import main

COMMANDS = [
    ["study"],
    ["corpus", "make"],
    ["corpus", "check"],
    ["corpus", "import"],
    ["train"],
    ["sweep"],
    ["index"],
    ["search"],
    ["report"],
    ["bench"],
    ["evaluate"],
    ["encode"],
    ["module", "make"],
    ["module", "push"],
    ["module", "pull"],
    ["serve"],
    ["worth"],
]


def embeddings(**changes):
    """Six captions of three images, all found; with some entries changed, or left out if None."""
    arrays = {
        "speech": np.eye(3, dtype=np.float32)[[0, 0, 1, 1, 2, 2]],
        "image": np.eye(3, dtype=np.float32),
        "speech_image_id": np.array([7, 7, 8, 8, 9, 9]),
        "image_id": np.array([7, 8, 9]),
    }
    return {key: array for key, array in (arrays | changes).items() if array is not None}


def with_value(array, value):
    array = array.copy()
    array[1, 2] = value
    return array


def refusal(arguments, capsys):
    """The line on standard error of a command that must exit with 2 and print nothing else."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("cmdlab: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_the_installed_command_prints_one_json_object(tmp_path):
    np.savez(tmp_path / "mine.npz", **embeddings())
    command = [Path(sys.executable).with_name("cmdlab"), "evaluate", tmp_path / "mine.npz"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    printed = json.loads(run.stdout)
    assert list(printed) == ["speech_to_image", "image_to_speech", "mean_R@1"]
    for direction, queries, gallery in (("speech_to_image", 6, 3), ("image_to_speech", 3, 6)):
        assert printed[direction] == {
            "R@1": 100,
            "R@5": 100,
            "R@10": 100,
            "optimistic_R@1": 100,
            "median_rank": 1,
            "MRR": 1,
            "queries": queries,
            "gallery": gallery,
        }
    assert printed["mean_R@1"] == 100
    assert run.stderr == ""


BAD_EMBEDDINGS = {
    "NaN": ({"speech": with_value(embeddings()["speech"], np.nan)}, "speech: 1 of 6 rows.* row 1"),
    "infinity": ({"image": with_value(embeddings()["image"], np.inf)}, "image: 1 of 3 rows"),
    "vector": ({"speech": np.ones(6)}, r"speech has shape \[6\]"),
    "cube": ({"image": np.ones((3, 3, 1))}, r"image has shape \[3, 3, 1\]"),
    "two spaces": ({"image": np.eye(3, 4)}, "speech has 3 dimensions and image 4"),
    "no captions": (
        {"speech": np.ones((0, 3)), "speech_image_id": np.ones(0, int)},
        r"speech has shape \[0, 3\]",
    ),
    "no dimensions": ({"speech": np.ones((6, 0)), "image": np.ones((3, 0))}, r"\[6, 0\]"),
    "complex": ({"speech": np.ones((6, 3), complex)}, "speech holds complex128"),
    "text": ({"speech": np.full((6, 3), "1")}, "speech holds <U1"),
    "too few ids": ({"speech_image_id": np.array([7, 8, 9])}, r"speech_image_id has shape \[3\]"),
    "id column": ({"image_id": np.array([[7], [8], [9]])}, r"image_id has shape \[3, 1\]"),
    "float ids": ({"image_id": np.array([7.0, 8.0, 9.0])}, "image_id holds float64"),
    "unlike ids": ({"image_id": np.array(["7", "8", "9"])}, "both must be integers"),
    "huge id": (
        {"image_id": np.array([7, 8, 2**64 - 1], np.uint64)},
        "image_id holds 18446744073709551615",
    ),
    "caption without image": (
        {"speech_image_id": np.array([7, 7, 8, 8, 9, 5])},
        "speech_image_id: 1 captions have no image, the first is of 5",
    ),
    "image without caption": (
        {"speech_image_id": np.array([7, 7, 8, 8, 8, 8])},
        "image_id: 1 images have no caption, the first is 9",
    ),
    "repeated image without caption": (
        {"image_id": np.array([7, 8, 7])},
        "speech_image_id: 2 captions have no image, the first is of 9",
    ),
    "missing key": ({"image_id": None}, "image_id is missing"),
    "overflow": ({"speech": np.full((6, 3), 1e200), "image": np.full((3, 3), 1e200)}, "finite"),
    "no characters": (
        {"image_id": np.array([7, 8, 2**31 - 1], "<u4").view("<U1")},
        "image_id cannot be read",
    ),
    "pickle": ({"speech": np.array([[None] * 3] * 6)}, "speech cannot be read .*pickle"),
}


@pytest.mark.parametrize(("changes", "line"), BAD_EMBEDDINGS.values(), ids=BAD_EMBEDDINGS)
def test_evaluate_refuses_bad_embeddings(tmp_path, capsys, changes, line):
    np.savez(tmp_path / "bad.npz", **embeddings(**changes))
    message = refusal(["evaluate", tmp_path / "bad.npz"], capsys)
    assert message.startswith(f"cmdlab: {tmp_path / 'bad.npz'}: ")
    assert re.search(line, message)


def cut_in_half(path):
    np.savez(path, **embeddings())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_flipped_byte(path):
    np.savez_compressed(path, **embeddings())
    with zipfile.ZipFile(path) as file:
        start = file.getinfo("speech.npy").header_offset
    content = bytearray(path.read_bytes())
    content[start + 70] ^= 0xFF  # inside the compressed array
    path.write_bytes(content)


def with_a_text_for_an_array(path):
    with zipfile.ZipFile(path, "w") as file:
        for key in embeddings():
            file.writestr(key, "no array")


def claiming_more_than_memory(path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 1000000), }"
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    with zipfile.ZipFile(path, "w") as file:
        for key in embeddings():
            file.writestr(
                f"{key}.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            )


def marked_as_encrypted(path):
    np.savez(path, **embeddings())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    content[6] |= 1  # the flag, in the first entry's header and in the directory
    content[start + 8] |= 1
    path.write_bytes(content)


def compressed_by_a_method_of_the_future(path):
    np.savez(path, **embeddings())
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        start = file.start_dir
    content[8] = content[start + 10] = 97
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("speech,image\n1,2\n"),
        lambda path: path.write_bytes(np.lib.format.magic(1, 0)),
        cut_in_half,
        with_a_flipped_byte,
        with_a_text_for_an_array,
        claiming_more_than_memory,
        marked_as_encrypted,
        compressed_by_a_method_of_the_future,
    ],
    ids=[
        *("none", "folder", "empty", "text", "npy", "cut", "flipped", "no array", "enormous"),
        *("encrypted", "compressed"),
    ],
)
def test_evaluate_refuses_a_file_that_is_no_sound_npz(tmp_path, capsys, write):
    path = tmp_path / "bad.npz"
    write(path)
    assert refusal(["evaluate", path], capsys).startswith(f"cmdlab: {path}: ")


def shell(line, **variables):
    """What a line of bash does in which `cmdlab` is `python -m cmdlab`."""
    command = f'set -o pipefail; cmdlab() {{ "{sys.executable}" -m cmdlab "$@"; }}; {line}'
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)


def test_embeddings_are_read_from_a_pipe(tmp_path):
    np.savez(tmp_path / "mine.npz", **embeddings())
    run = shell('cmdlab evaluate <(cat "$FILE")', FILE=tmp_path / "mine.npz")
    assert (run.returncode, run.stderr) == (0, "")
    assert json.loads(run.stdout)["mean_R@1"] == 100


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('cmdlab evaluate "$FILE" > /dev/full', "No space left on device"),
        ("cmdlab corpus check --help > /dev/full", "No space left on device"),
        ('cmdlab evaluate "$FILE" | (exec 0<&-; sleep 0.1)', "Broken pipe"),
        ('cmdlab evaluate "$FILE" >&-', "is closed"),
    ],
)
def test_output_that_cannot_be_written_is_one_line(tmp_path, line, reason):
    np.savez(tmp_path / "mine.npz", **embeddings())
    run = shell(line, FILE=tmp_path / "mine.npz")
    assert run.returncode == 2
    assert run.stderr.startswith("cmdlab: standard output ")
    assert reason in run.stderr
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("module", ["cmdlab", "cmdlab.cli"])
def test_the_module_is_the_command(module, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", module, "evaluate", tmp_path / "missing.npz"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr == f"cmdlab: {tmp_path / 'missing.npz'}: no such file; mend the path\n"


@pytest.mark.parametrize("place", ["| cat", '> "$PAGE"; cat "$PAGE"'])
def test_a_report_to_standard_output_is_the_page_alone(tmp_path, place):
    runs = Path(__file__).parents[1] / "reports" / "study"
    line = f'cmdlab report "$RUNS" -o /dev/stdout {place}'
    run = shell(line, RUNS=runs, PAGE=tmp_path / "page.html")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("<!DOCTYPE html>")
    assert run.stdout.rstrip().endswith("</html>")


def test_a_missing_file_is_said_to_be_missing(tmp_path, capsys):
    assert "no such file" in refusal(["evaluate", tmp_path / "nothere.npz"], capsys)


def test_evaluate_never_unpickles(tmp_path, capsys):
    class Mine:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "opened"),))

    speech = np.empty((6, 3), object)
    speech[:] = Mine()
    np.savez(tmp_path / "bad.npz", **embeddings(speech=speech))
    refusal(["evaluate", tmp_path / "bad.npz"], capsys)
    assert not (tmp_path / "opened").exists()


def test_an_unknown_implementation_is_refused(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", **embeddings())
    message = refusal(["evaluate", tmp_path / "mine.npz", "--impl", "magic"], capsys)
    assert "'magic'" in message
    assert "reference" in message


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_gives_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "\noutput:  " in text
    [example] = [line for line in text.splitlines() if line.startswith("example: ")]
    words = example.removeprefix("example: cmdlab ").split()
    assert words[: len(command)] == command
    # Asked for help at its end, the example is read up to there and not run.
    with pytest.raises(SystemExit) as exit:
        main([*words, "--help"])
    assert exit.value.code == 0


def test_the_help_of_train_lists_every_parameter(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    lines = {line.split("=")[0].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert "weight=0.0 " in lines["weight"]
    assert lines["weight"].endswith("weight of the denoising loss; 0 is contrastive training alone")
    assert lines["direction"].split()[0] == "direction=image"
    assert lines["direction"].endswith(": image, speech, both")
    assert lines.keys() >= {"seed", "steps", "batch_size", "learning_rate", "rate", "depth"}


def test_an_unknown_parameter_is_told_the_nearest_known_one(capsys):
    arguments = ["train", "--corpus", "none", "--output", "run", "-p", "wieght=1"]
    message = refusal(arguments, capsys)
    assert "no parameter 'wieght' (did you mean 'weight'?); there are batch_size" in message


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "cmdlab --help"),
        (["retrain"], "cmdlab --help"),
        (["evaluate"], "cmdlab evaluate --help"),
        (["corpus"], "cmdlab corpus --help"),
        (["corpus", "make", "data", "--preset", "tiny"], "cmdlab corpus make --help"),
        (["sweep", "study.yaml", "--workers", "0"], "cmdlab sweep --help"),
        (["train", "--corpus", "a", "--output", "b", "-p", "weight"], "cmdlab train --help"),
    ],
)
def test_a_wrong_command_line_is_one_line_that_points_to_the_help(arguments, hint, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("cmdlab: ")
    assert line.endswith(f"see {hint}\n")
    assert line.count("\n") == 1


def test_a_parameter_given_twice_is_refused(capsys):
    arguments = ["train", "--corpus", "a", "--output", "b", "-p", "seed=1", "-p", "seed=2"]
    assert "-p seed is given twice" in refusal(arguments, capsys)


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--corpus", "none", "--output", "run", "-p", "seed=9223372036854775808"],
        ["train", "--corpus", "none", "--output", "run", "-p", "seed=-1"],
        ["corpus", "make", "corpus", "--preset", "smoke", "--seed", "-1"],
        ["corpus", "make", "corpus", "--preset", "smoke", "--seed", str(2**64)],
    ],
    ids=" ".join,
)
def test_a_seed_of_more_than_63_bits_is_refused_before_anything_is_done(
    arguments, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "seed" in refusal(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["device", "corpus", "features", "run_folder", "skip_bad"])
def test_an_option_given_as_a_parameter_is_refused(name, capsys):
    arguments = ["train", "--corpus", "a", "--output", "b", "-p", f"{name}=cpu"]
    assert f"-p {name} is no parameter" in refusal(arguments, capsys)


def test_a_folder_without_a_corpus_is_refused(tmp_path, capsys):
    assert str(tmp_path) in refusal(["corpus", "check", tmp_path], capsys)


@pytest.mark.parametrize(
    ("name", "encoding", "printed"),
    [("日本".encode(), "ascii", r"\u65e5\u672c"), (b"caf\xe9", "utf-8", r"caf\udce9")],
)
def test_any_folder_name_can_be_printed_on_any_terminal(
    smoke_corpus, tmp_path, name, encoding, printed
):
    folder = tmp_path / os.fsdecode(name)
    folder.symlink_to(smoke_corpus)
    command = [Path(sys.executable).with_name("cmdlab"), "corpus", "check"]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    run = subprocess.run([*command, folder], capture_output=True, env=environment, check=True)
    lines = run.stdout.decode().splitlines()
    assert lines[0] == f"SpokenScenes in {tmp_path}/{printed}"
    assert "usable, 0 entries left out" in lines
    run = subprocess.run([*command, folder / "no"], capture_output=True, env=environment)
    assert run.returncode == 2
    assert run.stderr.decode().startswith(f"cmdlab: {tmp_path}/{printed}/no: is not a folder")


def test_the_check_says_which_encoders_take_the_corpus(smoke_corpus, tmp_path, capsys):
    folder = tmp_path / "mine"
    shutil.copytree(smoke_corpus, folder)
    (folder / "corpus.json").unlink()  # no generated corpus any more
    release = folder / "SpokenCOCO_train.json"
    entries = json.loads(release.read_text())
    Image.new("RGB", (206, 219)).save(folder / entries["data"][0]["image"])
    entries["data"][1]["captions"][0]["text"] = "an octopus and another octopus"
    release.write_text(json.dumps(entries))
    assert main(["corpus", "check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "usable, 0 entries left out"
    assert lines[-3].startswith("encoders for its images: clip-vit-b-32, ")
    assert lines[-3].endswith(
        "; tiny-image, tiny-bindings take 64 × 64 pixels, and 1 of 80 are others, mostly 206 × 219"
    )
    assert lines[-2].startswith("encoders for its speech: tiny-speech, hubert-base, hubert-large")
    assert lines[-1].startswith("encoders for its text: none; tiny-words, tiny-text, tiny-b")
    assert lines[-1].endswith("are others, mostly 'octopus'")


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupted(path, *, impl):
        raise KeyboardInterrupt

    monkeypatch.setattr("cmdlab.evaluation.evaluate_file", interrupted)
    assert main(["evaluate", "my file.npz"]) == 130
    line = capsys.readouterr().err
    assert line.endswith("go on with: cmdlab evaluate 'my file.npz'\n")
    assert line.count("\n") == 1
