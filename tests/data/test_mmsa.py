"""Feature files: what is read from them, what is refused, and how much memory it takes."""

from __future__ import annotations

import copyreg
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from senticlip.data import unpickle
from senticlip.data.mmsa import feature_clips, feature_file, read_features, write_features
from senticlip.structures import Clip, UserError

STEPS = {"text": (6, 5), "audio": (9, 3), "vision": (7, 4)}


def feature_data(rows=4, seed=0, **sizes):
    """The content of a small feature file in MMSA's format."""
    random = np.random.default_rng(seed)
    data = {}
    for split in ("train", "valid", "test"):
        part = {
            "id": [f"video_0001$_${split}{i}" for i in range(rows)],
            "raw_text": np.array([f"第{i}句话" for i in range(rows)]),
            "annotations": ["Neutral"] * rows,
            "text_bert": np.zeros((rows, 3, 6), np.float32),
        }
        part["text_bert"][:, 1, :4] = 1
        for name, (steps, width) in {**STEPS, **sizes}.items():
            part[name] = random.normal(size=(rows, steps, width)).astype(np.float32)
        for name in ("audio", "vision"):
            part[f"{name}_lengths"] = [int(n) for n in random.integers(1, 8, rows)]
        for target in ("", "_T", "_A", "_V"):
            part[f"regression_labels{target}"] = random.integers(-5, 6, rows) / 5
        data[split] = part
    return data


def save(path, data, protocol=4):
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_protocol_round_trips(tmp_path, protocol):
    data = {
        "big": np.arange(70_000, dtype=np.float32).reshape(7, 100, 100),
        "fortran": np.asfortranarray(np.arange(40_000.0).reshape(200, 200)),
        "small": np.array([[1, 2], [3, 4]], dtype=">i4"),
        "words": np.array(["爱", "b"], dtype=object),
        "fixed": np.array(["正面", "x"]),
        "number": np.float64(0.5),
        "plain": [1, 2.5, None, True, "文", {"a": (1, 2)}],
    }
    loaded = unpickle.load(save(tmp_path / "a.pkl", data, protocol))
    for key in ("big", "fortran", "small", "fixed"):
        np.testing.assert_array_equal(loaded[key], data[key])
    assert list(loaded["words"]) == ["爱", "b"]
    assert loaded["number"] == 0.5
    assert loaded["plain"] == [1, 2.5, None, True, "文", {"a": [1, 2]}]


class Evil:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "bad",
    [
        Evil(os.system, "touch {}"),
        Evil(eval, "open({!r}, 'w')"),
        Evil(np.save, "{}", 1),
        Evil(np.memmap, "{}", "u1", "w+", 0, 4),
        np.ma.array([1.0]),
        {1, 2},
        np.zeros(3, dtype=[("a", "f4")]),
        copyreg._reconstructor,
    ],
    ids=lambda b: type(b).__name__,
)
def test_other_objects_are_refused_and_not_executed(tmp_path, bad, protocol):
    marker = tmp_path / "ran"
    if isinstance(bad, Evil):
        function, arguments = bad.call
        bad = Evil(function, *[a.format(marker) if isinstance(a, str) else a for a in arguments])
    path = save(tmp_path / "evil.pkl", {"train": [bad]}, protocol)
    with pytest.raises(
        UserError, match=r"evil\.pkl: contains .* only arrays, numbers, strings, lists and dicts"
    ) as error:
        unpickle.load(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_other_opcodes_are_refused(tmp_path):
    for i, code in enumerate([b"Pother\n.", b"\x82\x01.", b"(i__main__\nX\n.", b"\x80\x02c__builtin__\neval\n."]):
        path = tmp_path / f"{i}.pkl"
        path.write_bytes(code)
        with pytest.raises(UserError):
            unpickle.load(path)


def test_build_opcode_cannot_modify_functions(tmp_path):
    """BUILD may set the state of data only: applied to a function, it would replace its default arguments."""
    state = b"N}X\x0c\x00\x00\x00__defaults__X\x01\x00\x00\x00F\x85s\x86b."
    (tmp_path / "f.pkl").write_bytes(b"\x80\x02cnumpy.core.numeric\n_frombuffer\n" + state)
    with pytest.raises(UserError, match="contains a state of a function"):
        unpickle.load(tmp_path / "f.pkl")
    assert unpickle._from_buffer.__defaults__ == ("C",)


def test_exponentially_nested_values_are_refused(tmp_path):
    """Sixty lists, each holding the previous one twice, are small in a file but astronomically long as text."""
    nested: list = ["a"]
    for _ in range(60):
        nested = [nested, nested]
    for key, message in (("id", "id, row 0: expected text or a number"), ("regression_labels", "a number for each")):
        part = {"id": ["a"], "regression_labels": [0.0], key: [nested]}
        empty = {"id": [], "regression_labels": []}
        (tmp_path / "f.pkl").write_bytes(pickle.dumps({"train": part, "valid": empty, "test": empty}))
        with pytest.raises(UserError, match=message):
            feature_clips(tmp_path / "f.pkl")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"regression_labels": [np.zeros(1_000_000, np.float32)] * 100}, "labels: expected a number for each clip"),
        ({"regression_labels": np.zeros((4_000_000, 2), np.int8)}, "train: 1 ids, but 8000000 regression_labels"),
        ({"id": ["$_$" + "a" * 1_000_000] * 100}, "id: more text than the file itself"),
        ({"raw_text": [b"a" * 60_000] * 2500}, "raw_text: more text than the file itself"),
    ],
)
def test_values_referenced_many_times_are_not_copied_each_time(tmp_path, part, message):
    empty = {"id": [], "regression_labels": []}
    part = {"id": ["a"], "regression_labels": [0.0], **part}
    path = save(tmp_path / "f.pkl", {"train": part, "valid": empty, "test": empty})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            feature_clips(path)
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_label_may_be_array_of_one_element(tmp_path):
    data = feature_data(rows=2)
    data["train"]["regression_labels"] = [np.array([0.5]), [np.float32(-1)]]
    data["valid"]["regression_labels"] = np.array([[0.25], [1]])
    clips = feature_clips(save(tmp_path / "f.pkl", data))
    assert [clip.labels["M"] for clip in clips[:4]] == [0.5, -1, 0.25, 1]


def test_truncated_file_is_rejected(tmp_path):
    complete = pickle.dumps(feature_data(rows=40, audio=(50, 20)), protocol=4)
    for share in (0.0, 0.01, 0.3, 0.7, 0.99):
        path = tmp_path / "cut.pkl"
        path.write_bytes(complete[: int(share * len(complete))])
        with pytest.raises(UserError, match="not a complete pickle"):
            unpickle.load(path)
    (tmp_path / "text.pkl").write_text("not a pickle")
    with pytest.raises(UserError, match="not a complete pickle"):
        unpickle.load(tmp_path / "text.pkl")
    with pytest.raises(UserError, match="cannot be read"):
        unpickle.load(tmp_path / "none.pkl")


def test_clips_and_rows_match_the_file(tmp_path):
    data = feature_data()
    data["valid"]["vision"][1, :2] = 0  # OpenFace saw no face in the first two frames
    data["valid"]["vision_lengths"][1] = 5
    data["test"]["vision_lengths"][0] = 0
    features = read_features(save(tmp_path / "f.pkl", data), tmp_path / "cache")
    assert features.widths == {"text": 5, "audio": 3, "vision": 4}
    assert [clip.split for clip in features.clips] == ["train"] * 4 + ["valid"] * 4 + ["test"] * 4
    clip = features.clips[5]
    assert (clip.id, clip.text, clip.row) == ("video_0001/valid1", "第1句话", 1)
    assert clip.labels == {
        target: data["valid"]["regression_labels" + suffix][1]
        for target, suffix in (("M", ""), ("T", "_T"), ("A", "_A"), ("V", "_V"))
    }
    values, mask = features.rows["vision"].gather(np.array([5, 8, 0]))
    assert mask.sum(1).tolist() == [3, 0, data["train"]["vision_lengths"][0]]
    np.testing.assert_array_equal(values[0, :3], data["valid"]["vision"][1, 2:5])
    values, mask = features.rows["text"].gather(np.array([11]))
    assert mask.sum() == 4
    np.testing.assert_array_equal(values[0], data["test"]["text"][3, :4])


def test_second_read_uses_the_cache(tmp_path, monkeypatch):
    path = save(tmp_path / "f.pkl", feature_data())
    read_features(path, tmp_path / "cache")
    monkeypatch.setattr("senticlip.data.mmsa._checked_row", None)
    assert len(read_features(path, tmp_path / "cache").rows["audio"]) == 12


def changed_data(change):
    data = feature_data()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("valid"), "the keys train, valid and test"),
        (lambda d: d["test"].pop("audio"), "test: the key 'audio' is missing; it has id, raw_text"),
        (lambda d: d["train"].pop("id"), "train: the key 'id' is missing"),
        (lambda d: d["train"].pop("regression_labels"), "'regression_labels' is missing"),
        (lambda d: d["train"].update(text=d["train"]["text"][:3]), r"train, text: shape \(3, 6, 5\), expected 4 rows"),
        (lambda d: d["train"].update(text=d["train"]["text"][..., 0]), r"train, text: shape \(4, 6\)"),
        (lambda d: d["train"].update(text=["a"] * 4), "train, text: expected a numeric array"),
        (lambda d: d["test"].update(audio=d["test"]["audio"][..., :2]), "audio: widths differ: train 3"),
        (lambda d: d["test"].update(audio_lengths=[1, 2]), "test: 4 ids, but 2 audio_lengths"),
        (lambda d: d["test"].update(audio_lengths=[9, 99, 9, 9]), "audio_lengths, row 1: length 99, .* 9 steps"),
        (lambda d: d["test"].update(audio_lengths=[9, np.nan, 9, 9]), "audio_lengths, row 1: length nan"),
        (lambda d: d["test"].update(audio_lengths=["a"] * 4), "audio_lengths: expected a number for each clip"),
        (lambda d: d["test"].update(audio_lengths=[[1], [1, 2], [1], [1]]), "audio_lengths: expected a number"),
        (lambda d: d["train"].update(regression_labels=["good"] * 4), "regression_labels: expected a number"),
        (lambda d: d["train"].update(regression_labels=[[1], [1, 2], [1], [1]]), "regression_labels: expected a num"),
        (lambda d: d["train"].update(regression_labels_T={"a": 1}), "regression_labels_T: expected a number"),
        (lambda d: d["train"].update(id=4), "train, id: expected a list, not int"),
        (lambda d: d["train"].update(id="abcd"), "train, id: expected a list, not str"),
        (lambda d: d["train"].update(raw_text=4), "train, raw_text: expected a list, not int"),
        (lambda d: d["train"].update(text_bert=d["train"]["text_bert"][:, 0]), r"text_bert: shape \(4, 6\), expected"),
        (lambda d: d["train"].update(text_bert=d["train"]["text_bert"][:, :1]), r"text_bert: shape \(4, 1, 6\)"),
        (lambda d: d["train"].update(text_bert="abc"), "text_bert: str, expected a numeric array of 4 rows"),
        (
            lambda d: d["train"].update(regression_labels=np.full(4, -3.0)),
            "row 0: -3 is not between -1 and 1 .MOSI and MOSEI",
        ),
        (lambda d: d["valid"]["regression_labels_T"].__setitem__(2, np.nan), "valid, regression_labels_T, row 2: nan"),
        (
            lambda d: d["valid"]["regression_labels"].__setitem__(1, 1.4),
            r"regression_labels, row 1: 1\.4 is not between -1",
        ),
        (lambda d: d["valid"]["audio"].__setitem__((1, 0, 2), np.inf), "valid, audio, row 1, step 0, column 2: inf"),
        (lambda d: d["valid"]["vision"].__setitem__((3, 0, 1), np.nan), "valid, vision, row 3, step 0, column 1: nan"),
        (lambda d: d["valid"].update(raw_text=["x"]), "4 ids, but 1 raw_text"),
    ],
)
def test_malformed_file_gives_one_line_error(tmp_path, change, message):
    path = save(tmp_path / "wrong.pkl", changed_data(change))
    with pytest.raises(UserError, match=message) as error:
        read_features(path, tmp_path / "cache")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_file_without_clips_is_rejected(tmp_path):
    write_features(tmp_path / "f.pkl", feature_data(rows=0))
    with pytest.raises(UserError, match=r"f\.pkl: has no clips"):
        read_features(tmp_path / "f.pkl", tmp_path)


def test_written_file_can_be_read_back(tmp_path):
    data = feature_data()
    write_features(tmp_path / "ours.pkl", data)
    features = read_features(tmp_path / "ours.pkl", tmp_path / "cache")
    np.testing.assert_array_equal(features.rows["text"].gather(np.array([0]))[0][0], data["train"]["text"][0, :4])
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_large_file_takes_little_memory(tmp_path):
    """Converting and gathering 400 MB of arrays takes less than 150 MB of anonymous memory, not counting imports."""
    script = """
import pickle, re, sys
import numpy as np
from pathlib import Path
from senticlip.data.mmsa import read_features

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, top = anonymous(), 0.0
from senticlip.data import mmsa
checked_row = mmsa._checked_row
def measuring(*args):
    global top
    top = max(top, anonymous())
    return checked_row(*args)
mmsa._checked_row = measuring
features = read_features(sys.argv[1], Path(sys.argv[2]))
for start in range(0, len(features.clips), 32):
    for store in features.rows.values():
        store.gather(np.arange(start, min(start + 32, len(features.clips))))
    top = max(top, anonymous())
print(top - before)
"""
    if not os.path.exists("/proc/self/status"):
        return
    path = tmp_path / "large.pkl"
    part = {
        "id": [str(i) for i in range(400)],
        "regression_labels": np.zeros(400),
        "text": np.ones((400, 39, 768), np.float32),
        "audio": np.ones((400, 400, 33), np.float32),
        "vision": np.ones((400, 55, 709), np.float32),
    }
    small = {key: value[:1] for key, value in part.items()}
    with path.open("wb") as file:
        pickle.dump({"train": part, "valid": small, "test": small}, file, protocol=4)
    del part
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "cache")], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 150


def test_usual_file_name_is_preferred_over_others(tmp_path):
    folder = tmp_path / "Processed"
    folder.mkdir()
    (folder / "readme.txt").touch()
    (folder / "aligned_50.PKL").touch()
    assert feature_file(tmp_path) == folder / "aligned_50.PKL"
    (folder / "mine.pkl").touch()
    with pytest.raises(UserError, match=r"unaligned_39\.pkl, but there are 2$"):
        feature_file(tmp_path)
    (folder / "unaligned_39.pkl").touch()
    assert feature_file(tmp_path) == folder / "unaligned_39.pkl"


def test_duplicate_ids_are_made_unique(tmp_path):
    data = feature_data(rows=2)
    data["train"]["id"], data["valid"]["id"], data["test"]["id"] = ["0", "1"], ["1", "0"], ["0", "x"]
    features = read_features(save(tmp_path / "f.pkl", data), tmp_path / "cache", ("audio",))
    assert [clip.id for clip in features.clips] == ["0#train0", "1#train1", "1#valid0", "0#valid1", "0#test0", "x"]
    assert features.choose("audio", features.clips[::-1]).keys == features.rows["audio"].keys[::-1]


def test_ids_match_without_leading_zeros_unless_ambiguous(tmp_path):
    data = feature_data(rows=2)
    data["train"]["id"], data["valid"]["id"] = ["v$_$0001", "film$_$12.05"], ["film$_$12.5", "V$_$2"]
    data["test"]["id"] = ["film$_$7", "film$_$07"]
    features = read_features(save(tmp_path / "f.pkl", data), tmp_path / "cache", ("audio",))
    wanted = [Clip(name) for name in ("v/1", "film/12.05", "film/12.5", "v/0002", "none")]
    assert features.choose("audio", wanted).keys == [*features.rows["audio"].keys[:4], ""]
    assert features.choose("audio", [Clip("film/012.5")]).keys == [features.rows["audio"].keys[2]]
    with pytest.raises(UserError, match=r"film/007 matches film/7 and film/07 — write the id"):
        features.choose("audio", [Clip("film/007")])
    with pytest.raises(UserError, match=r"has none of the clips, such as none; its first is v/0001$"):
        features.choose("audio", [Clip("none")])


def test_missing_numeric_and_very_long_texts(tmp_path):
    data = feature_data()
    long = "很长的话" * 20_000
    data["valid"]["raw_text"] = ["", 7, "好", "好"]  # a text of digits may have become a number
    data["test"]["raw_text"] = [None, float("nan"), long, "a" * 70_000]
    for protocol in (3, 5):
        clips = read_features(save(tmp_path / "f.pkl", data, protocol), tmp_path / "cache", ("audio",)).clips
        assert [clip.text for clip in clips[4:6]] == [None, "7"]
        assert [clip.text for clip in clips[-4:]] == [None, None, long, "a" * 70_000]


def test_ids_and_texts_may_be_bytes(tmp_path):
    data = feature_data()
    for kind in (list, np.array):
        data["train"]["id"] = kind([f"视频$_${i}".encode() for i in range(4)])
        data["train"]["raw_text"] = kind([f"第{i}句话".encode() for i in range(4)])
        first = feature_clips(save(tmp_path / "f.pkl", data))[0]
        assert (first.id, first.text) == ("视频/0", "第0句话")


def test_minus_infinity_in_audio_becomes_0_with_one_warning(tmp_path, capsys):
    data = feature_data(audio=(9, 3))
    for split, i in (("train", 0), ("train", 1), ("test", 0)):
        data[split]["audio"][i, 0, 1] = -np.inf
    values = read_features(save(tmp_path / "f.pkl", data), tmp_path / "cache").rows["audio"].gather(np.arange(12))[0]
    output = capsys.readouterr().err
    assert output.count("-inf") == output.count("3 audio values are -inf") == 1
    assert (values[[0, 1, 8], 0, 1] == 0).all()
    np.testing.assert_allclose(values[0, 0, [0, 2]], data["train"]["audio"][0, 0, [0, 2]])
    data["train"]["vision"][0, 0, 1] = -np.inf
    with pytest.raises(UserError, match="train, vision, row 0, step 0, column 1: -inf"):
        read_features(save(tmp_path / "g.pkl", data), tmp_path / "cache")


def test_zero_frames_are_dropped_from_vision_but_kept_in_audio(tmp_path):
    data = feature_data()
    for name in ("audio", "vision"):
        data["train"][name][0, :2], data["train"][f"{name}_lengths"][0] = 0, 5
    features = read_features(save(tmp_path / "f.pkl", data), tmp_path / "cache")
    lengths = {name: int(rows.gather(np.array([0]))[1].sum()) for name, rows in features.rows.items()}
    assert lengths == {"text": 4, "audio": 5, "vision": 3}
