"""Subtitle files and tracks become spoken lines, in order and without overlap."""

import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import av
import numpy as np
import pytest
from av.codec.codec import Properties
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

from senticlip.data.subtitles import Cue, Line, clean, guess_text, merge, read
from senticlip.data.tracks import _text_tracks, embedded
from senticlip.structures import UsageError, UserError

SRT = "1\n00:00:01,000 --> 00:00:02,500\n今天我真的很高兴\n\n2\n00:00:03,000 --> 00:00:04,000\n你不要再说了，好不好？\n"
LINES = [Line(1.0, 2.5, "今天我真的很高兴"), Line(3.0, 4.0, "你不要再说了，好不好？")]
ASS_HEADER = (
    "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize\nStyle: Default,Arial,20\n\n"
    "[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def ass(*events: tuple[str, str, str], style="Default", kind="Dialogue") -> str:
    return ASS_HEADER + "".join(f"{kind}: 0,{start},{end},{style},,0,0,0,,{text}\n" for start, end, text in events)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-16-le", "utf-16-be"])
def test_encodings(tmp_path, encoding):
    assert read(write(tmp_path, "a.srt", SRT, encoding)) == LINES


def test_big5_is_not_taken_for_gbk(tmp_path):
    traditional = SRT.replace("今天我真的很高兴", "今天我真的很高興").replace("你不要再说了", "你不要再說了")
    assert [line.text for line in read(write(tmp_path, "a.srt", traditional, "big5"))] == [
        "今天我真的很高興",
        "你不要再說了，好不好？",
    ]


@given(
    st.text(
        "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里",
        min_size=12,
    )
)
def test_gbk_is_not_taken_for_big5(text):
    assert guess_text(SRT.replace("今天我真的很高兴", text).encode("gbk"), Path("a")).count(text) == 1


@pytest.mark.parametrize("text", ["今天", "你好", "不对", "好"])
def test_a_few_gbk_characters_are_not_taken_for_big5(text):
    srt = SRT.partition("今")[0] + text
    assert guess_text(srt.encode("gbk"), Path("a")) == srt


def test_other_encodings_are_guessed_by_charset_normalizer(tmp_path):
    text = "1\n00:00:01,000 --> 00:00:02,500\nCafé déjà vu, l'été à Genève, où êtes-vous allés hier?\n"
    assert "été" in read(write(tmp_path, "a.srt", text, "cp1252"))[0].text


def test_srt_tags_positions_and_music_marks(tmp_path):
    text = (
        "1\n00:00:01,000 --> 00:00:02,000 X1:10 X2:20 Y1:1 Y2:2\n"
        '<i>你好</i> <font color="#fff">世</font>\n{\\an8}界\n\n'
        "2\n00:00:03,000 --> 00:00:04,000\n♪ 啦啦 ♪\n\n3\n00:00:05,000 --> 00:00:06,000\n【音乐】\n\n"
        "4\n00:00:07,000 --> 00:00:08,000\n[激昂的音乐] ♫\n\n5\n00:00:09,000 --> 00:00:10,000\n- (Laughter) 走吧\n\n"
        "6\n00:00:12,000 --> 00:00:11,000\n倒着\n\n7\n00:00:13,000 --> 00:00:14,000\n...\n"
    )
    assert read(write(tmp_path, "a.srt", text)) == [
        Line(1.0, 2.0, "你好 世界"),
        Line(3.0, 4.0, "啦啦"),
        Line(9.0, 10.0, "走吧"),
    ]


def test_vtt(tmp_path):
    text = (
        "WEBVTT\n\nSTYLE\n::cue { color: red }\n\nNOTE a remark\n\nintro\n"
        "00:01.000 --> 00:02.000 align:start position:0%\n"
        "<v 王小明>你好<00:00:01.500><c.yellow>世界</c> &amp; 朋友\n\n01:00:00.000 --> 01:00:02.000\n再见\n"
    )
    assert read(write(tmp_path, "a.vtt", text)) == [Line(1.0, 2.0, "你好世界 & 朋友"), Line(3600.0, 3602.0, "再见")]


def test_rolling_captions(tmp_path):
    text = (
        "WEBVTT\n\n00:00:00.000 --> 00:00:02.000\n大家好\n\n00:00:02.000 --> 00:00:04.000\n大家好\n今天讲历史\n\n"
        "00:00:04.000 --> 00:00:06.000\n今天讲历史\n先看这里\n"
    )
    lines = read(write(tmp_path, "a.vtt", text))
    assert "".join(line.text for line in lines) == "大家好今天讲历史先看这里"
    assert (lines[0].start, lines[-1].end) == (0.0, 6.0)


def test_ass_styles_drawings_comments_karaoke_and_layers(tmp_path):
    events = [
        ("0:00:01.00", "0:00:03.00", r"{\pos(10,20)\c&HFFFFFF&}你{\b1}好{\b0}\N世界"),
        ("0:00:01.00", "0:00:03.00", r"{\blur4}你好\N世界"),
        ("0:00:02.00", "0:00:03.00", r"{\p1}m 0 0 l 100 0 100 100{\p0}"),
        ("0:00:05.00", "0:00:08.00", r"{\k50}我{\k50}爱{\k100}你"),
        ("0:00:10.00", "0:00:12.00", r"{\move(1,2,3,4)}天"),
        ("0:00:10.20", "0:00:12.00", r"{\t(0,100,\fscx120)}空"),
        ("0:00:10.40", "0:00:12.00", "海"),
    ]
    text = ass(*events) + "Comment: 0,0:00:20.00,0:00:21.00,Default,,0,0,0,,注释\n"
    assert read(write(tmp_path, "a.ass", text)) == [
        Line(1.0, 3.0, "你好世界"),
        Line(5.0, 8.0, "我爱你"),
        Line(10.0, 12.0, "天空海"),
    ]


def test_simultaneous_languages_and_speakers_are_joined():
    assert merge([Cue(0, 2, ["你好"]), Cue(0, 2, ["Hello"])]) == [Line(0.0, 2.0, "你好 Hello")]
    assert merge([Cue(0, 3, ["你来吗"]), Cue(1.5, 4, ["不来"])]) == [Line(0.0, 4.0, "你来吗不来")]


def test_long_title_does_not_swallow_lines():
    cues = [Cue(0, 3600, ["字幕组"])] + [Cue(t, t + 2, [f"第{t}句"]) for t in range(5, 3000, 5)]
    lines = merge(cues)
    assert len(lines) == len(cues)
    assert lines[0] == Line(0.0, 5.0, "字幕组")


def test_title_yields_to_line_it_overlaps():
    starts_with_line = [Cue(1, 3, ["我真的很高兴"]), Cue(1, 60, ["字幕组制作"]), Cue(5, 7, ["我非常难过"])]
    expected = [Line(1, 3, "我真的很高兴"), Line(3, 5, "字幕组制作"), Line(5, 7, "我非常难过")]
    assert merge(starts_with_line) == expected
    assert merge([starts_with_line[1], starts_with_line[0], starts_with_line[2]]) == expected
    starts_in_line = [Cue(1, 3.5, ["见到你"]), Cue(1.5, 40, ["第一章"]), Cue(1.5, 40, ["第一章"]), Cue(5, 7, ["难过"])]
    assert merge(starts_in_line) == [Line(1, 3.5, "见到你"), Line(3.5, 5, "第一章"), Line(5, 7, "难过")]
    assert merge([*starts_in_line[:2], Cue(3.2, 5, ["是吗"])]) == [Line(1, 3.2, "见到你"), Line(3.2, 5, "是吗")]


def test_sign_does_not_swallow_lines():
    lines = [Cue(2, 4, ["我真的很高兴"]), Cue(4.5, 6, ["我非常难过"]), Cue(6.5, 8.5, ["没什么"])]
    expected = [Line(cue.start, cue.end, cue.rows[0]) for cue in lines]
    assert merge([Cue(1, 10, ["医院"]), *lines]) == [Line(1, 2, "医院"), *expected]
    assert merge([Cue(2, 10, ["医院"]), *lines]) == [expected[0], Line(4, 4.5, "医院"), *expected[1:]]


def test_cues_not_mistaken_for_signs():
    """Translations in parts, a moving sign during a line, a single interjection, slow karaoke."""
    parts = [Cue(1, 3, ["it"]), Cue(3, 5, ["is"]), Cue(5, 8, ["long"])]
    assert merge([Cue(1, 8, ["很长"]), *parts]) == [Line(1, 8, "很长 it is long")]
    pinyin = [Cue(0, 1, ["wo"]), Cue(1, 2, ["ai"]), Cue(2, 3, ["ni"]), Cue(3, 5, ["men"])]
    for cues in ([Cue(0, 5, ["我爱你们"]), *pinyin], [pinyin[0], Cue(0, 5, ["我爱你们"]), *pinyin[1:]]):
        assert [{*line.text.split()} for line in merge(cues)] == [{"我爱你们", "wo", "ai", "ni", "men"}]
    moving_sign = [Cue(2 + i / 25, 2 + (i + 1) / 25, ["牌"]) for i in range(50)]
    assert merge([Cue(1, 6, ["对白"]), *moving_sign]) == [Line(1, 6, "对白牌")]
    assert merge([Cue(1, 6, ["对白"]), Cue(3, 4, ["啊"])]) == [Line(1, 6, "对白啊")]
    syllables = [Cue(1 + i, 2 + i, ["我爱你们"[i]]) for i in range(4)]
    assert merge([Cue(1, 5, ["我爱你们"]), *syllables]) == [Line(1, 5, "我爱你们")]


def test_growing_karaoke_line():
    cues = [Cue(1, 1.5, ["我"]), Cue(1.5, 2, ["我爱"]), Cue(2, 4, ["我爱你"])]
    assert merge(cues) == [Line(1.0, 4.0, "我爱你")]


def test_reply_that_begins_with_the_same_word():
    cues = [Cue(0, 2, ["妈"]), Cue(2, 5, ["妈妈你听我说"])]
    assert merge(cues) == [Line(0, 2, "妈"), Line(2, 5, "妈妈你听我说")]


def test_youtube_captions(tmp_path):
    """Rows of a single space are not empty rows, and rows of words with inline times are not timings."""
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\nKind: captions\n\n00:00:00.080 --> 00:00:02.389 align:start position:0%\n \n"
        "大家<00:00:00.400><c>好</c><00:00:00.800><c>今天</c>\n\n00:00:02.389 --> 00:00:02.399\n大家好今天\n \n\n"
        "00:00:02.399 --> 00:00:05.000\n大家好今天\n我们<00:00:03.000><c>讲</c><00:00:03.600><c>历史</c>\n\n"
        "NOTE 说明\n\n00:00:05.000 --> 00:00:05.010\n我们讲历史\n \n",
        encoding="utf-8",
    )
    assert read(tmp_path / "a.vtt") == [Line(0.08, 2.399, "大家好今天"), Line(2.399, 5.01, "我们讲历史")]


def test_times_in_text_are_text(tmp_path):
    (tmp_path / "a.srt").write_text(
        "1\n00:00:01 --> 00:00:02\n从 08:00:00.0 到 09:00:00.0 上班\n\n"
        "2\n00:00:03,000-->00:00:04,5\n第一行\n\n第二行\n",
        encoding="utf-8",
    )
    expected = [Line(1.0, 2.0, "从 08:00:00.0 到 09:00:00.0 上班"), Line(3.0, 4.5, "第一行第二行")]
    assert read(tmp_path / "a.srt") == expected


@pytest.mark.parametrize("numbered", [True, False])
def test_last_row_is_a_number(tmp_path, numbered):
    times = ["00:00:01.000 --> 00:00:02.000", "00:00:03.000 --> 00:00:04.000"]
    blocks = [
        f"{f'{i}{chr(10)}' if numbered else ''}{time}\n他今年\n{age}"
        for i, (time, age) in enumerate(zip(times, (42, 7), strict=True), 1)
    ]
    (tmp_path / "a.vtt").write_text("\n\n".join(["WEBVTT", *blocks]) + "\n", encoding="utf-8")
    expected = ["他今年 42", "他今年 7"]
    assert [line.text for line in read(tmp_path / "a.vtt")] == expected
    (tmp_path / "a.srt").write_text("\n\n".join(blocks).replace(".000", ",000") + "\n", encoding="utf-8")
    assert [line.text for line in read(tmp_path / "a.srt")] == expected


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(0, 60, allow_nan=False),
            st.floats(-1, 16, allow_nan=False),
            st.lists(st.text("好坏a ♪"), max_size=3),
        ),
        max_size=20,
    ),
    st.floats(-30, 30, allow_nan=False),
)
def test_merged_lines_are_ordered_disjoint_and_clean(cues, shift):
    lines = merge([Cue(start, start + length, rows) for start, length, rows in cues], shift)
    for line in lines:
        assert 0 <= line.start < line.end
        assert line.text == clean(line.text)
        assert "♪" not in line.text
    assert all(a.end <= b.start + 0.0015 for a, b in pairwise(lines))


@pytest.mark.parametrize(
    "cues",
    [
        [Cue(0, 2, [f"第{i}句话"]) for i in range(12000)],
        [Cue(i / 3000, 9 - i / 3000, [f"第{i}句话"]) for i in range(12000)],
        [Cue(0, 2, [f"{name}{i}" for i in range(60000)]) for name in "ab"],
        [Cue(0, 9, ["好" * 100_000]), *(Cue(0, 9, [f"第{i}句话"]) for i in range(12000))],
    ],
    ids=["at one time", "one in another", "rows", "a long one"],
)
def test_thousands_of_simultaneous_cues_take_seconds(cues):
    started = process_time()
    assert len(merge(cues)) == 1
    assert process_time() - started < 10


def test_long_row_of_dashes_takes_seconds(tmp_path):
    started = process_time()
    assert read(write(tmp_path, "a.srt", f"{SRT}1:1:{'-' * 300_000}\n"))[0] == LINES[0]
    assert process_time() - started < 10


def test_composed_emoji_is_preserved():
    assert clean("\u200b一家\ufeff👨\u200d👩\u200d👧\u200f") == "一家👨\u200d👩\u200d👧"
    assert clean("\u200d\u200b") == ""


def test_shift(tmp_path):
    path = write(tmp_path, "a.srt", SRT)
    assert [line.start for line in read(path, shift=1.5)] == [2.5, 4.5]
    assert read(path, shift=-2.0) == [Line(0.0, 0.5, LINES[0].text), Line(1.0, 2.0, LINES[1].text)]
    assert read(path, shift=-10.0) == []


def test_negative_and_three_digit_hours(tmp_path):
    """pysubs2 would read 100:00:01 as 00:00:01, and negative times as positive."""
    path = tmp_path / "a.srt"
    path.write_text("1\n-00:00:02,500 --> 00:00:02,000\n你好\n\n2\n-00:00:04,000 --> -00:00:03,000\n没人听见\n")
    assert read(path) == [Line(0.0, 2.0, "你好")]
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\n你好\n\n2\n100:00:01,000 --> 100:00:02,000\n再见\n")
    with pytest.raises(UserError, match=r"a\.srt, row 6: 100:00:01,000 is not a time in a film"):
        read(path)


def test_times_with_a_colon_before_milliseconds(tmp_path):
    assert read(write(tmp_path, "a.srt", SRT.replace(",", ":"))) == LINES
    assert read(write(tmp_path, "a.srt", SRT.replace("00:00:03,000", "00:00:03:000"))) == LINES


def test_unusual_timings(tmp_path):
    """.NET's seven digits, a non-breaking space, and text that contains an arrow."""
    for time in ("00:00:01,000", "00:00:01.0000000"):
        assert read(write(tmp_path, "a.srt", SRT.replace("00:00:01,000", time))) == LINES
    assert read(write(tmp_path, "a.srt", re.sub("(?m)^(.*-->.*)$", "\\1\u00a0", SRT))) == LINES
    assert read(write(tmp_path, "a.srt", "1\n00:00:01,000 --> 00:00:02,000\n8:30 --> 9\n")) == [
        Line(1.0, 2.0, "8:30 --> 9")
    ]


def test_japanese_is_not_taken_for_gbk(tmp_path):
    words = "彼女は東京大学で日本語を勉強しています。とても楽しいです。"
    srt = "".join(f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\n{words}\n\n" for i in range(1, 7))
    assert words in read(write(tmp_path, "a.srt", srt, "euc_jp"))[0].text


@pytest.mark.parametrize("time", ["00:00:03:12", "00:00:03;12", "00: 00: 03, 000", "0:00:003,0"])
def test_malformed_timings_are_rejected(tmp_path, time):
    """Otherwise, its text would be added to the line before."""
    with pytest.raises(
        UserError, match=rf"a\.srt, row 6: {time} --> 00:00:04,000 is not a timing — write 00:00:01,000"
    ):
        read(write(tmp_path, "a.srt", SRT.replace("00:00:03,000", time)))
    with pytest.raises(UserError, match=r"a\.srt, row 2: .* is not a timing"):  # also if no timing in the file is valid
        read(write(tmp_path, "a.srt", f"1\n{time} --> {time}\n你好\n"))


@pytest.mark.parametrize("arrow", ["->", "–>", "—>", "→", "-->"])
def test_other_arrows_and_fullwidth_colons_are_rejected(tmp_path, arrow):
    time = "00：00：03，000" if arrow == "-->" else "00:00:03,000"
    with pytest.raises(UserError, match=rf"a\.srt, row 6: {time} {arrow} 00:00:04,000 is not a timing"):
        read(write(tmp_path, "a.srt", SRT.replace("00:00:03,000 -->", f"{time} {arrow}")))


def test_bad_files(tmp_path):
    with pytest.raises(UsageError, match="no such subtitle file"):
        read(tmp_path / "none.srt")
    with pytest.raises(UsageError, match=r"choose one of \.srt"):
        read(write(tmp_path, "a.doc", "x"))
    for text in ("hello\nworld\n", "{}", "\x01\x02"):
        with pytest.raises(UserError) as error:
            read(write(tmp_path, "a.srt", text))
        assert "\n" not in str(error.value)
    assert read(write(tmp_path, "a.srt", "")) == []


def film(
    path: Path,
    tracks: list[tuple[str, str]],
    image_language: str = "",
    clock_start: int = 0,
    dispositions: tuple[Disposition, ...] = (),
    titles: tuple[str, ...] = (),
) -> Path:
    """A short film with subtitle tracks.

    ``tracks``: language and SRT text of each; ``image_language``: that of a track of images, if there is to be one;
    ``clock_start``: seconds; ``dispositions`` and ``titles``: of the tracks.
    """
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sources = [av.open(str(write(path.parent, f"{language}.srt", text))) for language, text in tracks]
        streams = [out.add_stream_from_template(source.streams.subtitles[0]) for source in sources]
        for stream, (language, _) in zip(streams, tracks, strict=True):
            stream.metadata["language"] = language
        for stream, disposition in zip(streams, dispositions, strict=bool(dispositions)):
            stream.disposition = disposition
        for stream, title in zip(streams, titles, strict=bool(titles)):
            stream.metadata["title"] = title
        if image_language:
            images = out.add_mux_stream("hdmv_pgs_subtitle")
            images.metadata["language"] = image_language
        for i in range(50):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = i + 10 * clock_start, Fraction(1, 10)
            out.mux(video.encode(picture))
        out.mux(video.encode())
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux():
                if packet.size:
                    packet.pts += int(clock_start / packet.time_base)
                    packet.dts = packet.pts
                    packet.stream = stream
                    out.mux(packet)
            source.close()
    return path


def test_embedded_tracks(tmp_path):
    english = [Line(1.0, 2.5, "I am so happy")]
    path = film(tmp_path / "film.mkv", [("eng", SRT[: SRT.index("今")] + "I am <b>so</b> happy\n"), ("chi", SRT)])
    assert embedded(path) == LINES
    assert embedded(path, track=0) == english
    assert embedded(path, shift=1)[0].start == 2.0
    with pytest.raises(UsageError, match="no subtitle track 2 — there are 0 to 1"):
        embedded(path, track=2)
    assert embedded(film(tmp_path / "silent.mkv", [])) == []
    with pytest.raises(UserError, match="cannot be opened"):
        embedded(tmp_path / "none.mkv")


@pytest.mark.parametrize(
    ("dispositions", "chosen"),
    [
        ((Disposition(0), Disposition.forced, Disposition.default), 2),
        ((Disposition(0), Disposition.forced | Disposition.default, Disposition(0)), 2),
        ((Disposition.default, Disposition(0), Disposition.default), 2),
        ((Disposition.default, Disposition(0), Disposition(0)), 1),
        ((Disposition.default, Disposition.forced, Disposition.forced), 1),
    ],
)
def test_default_choice_of_track(tmp_path, dispositions, chosen):
    words = ("Hello", "出口", "你好")
    tracks = [
        (language, SRT.replace("今天我真的很高兴", word))
        for language, word in zip(("eng", "chi", "chi"), words, strict=True)
    ]
    path = film(tmp_path / "film.mkv", tracks, dispositions=dispositions)
    assert embedded(path)[0].text == words[chosen]
    assert embedded(path, track=0)[0].text == "Hello"


def test_embedded_times_are_on_players_clock(tmp_path):
    path = film(tmp_path / "late.mkv", [("chi", SRT)], clock_start=7)
    with av.open(str(path)) as container:
        assert container.start_time == 7_000_000
    assert embedded(path) == LINES


def test_image_tracks_are_skipped(tmp_path):
    messages = []
    path = film(tmp_path / "both.mkv", [("eng", SRT)], image_language="chi")
    assert embedded(path, tell=messages.append) == LINES
    assert [line.split(" — ")[0] for line in messages] == [
        f"{path}: using subtitle track 0, not a Chinese one: those are images, not text"
    ]
    path = film(tmp_path / "pictures.mkv", [], image_language="chi")
    assert embedded(path, tell=messages.append) == []
    assert messages[1:] == [f"{path}: its subtitles are images, not text — give them as a file: --subtitles F.srt"]
    for tracks, image_language in (([("chi", SRT)], "chi"), ([("eng", SRT)], "eng"), ([("eng", SRT)], ""), ([], "")):
        embedded(film(tmp_path / "other.mkv", tracks, image_language), tell=messages.append)
    assert len(messages) == 2


@pytest.mark.parametrize("title", ["简体中文", "繁體", "CHS&JPN", "chs_eng", "zh-Hans", "国语", "Mandarin (PRC)"])
def test_chinese_track_is_recognized_by_title(tmp_path, title):
    tracks = [("eng", SRT.replace("今天我真的很高兴", "Hello")), ("und", SRT)]
    path = film(
        tmp_path / "film.mkv", tracks, dispositions=(Disposition.default, Disposition(0)), titles=("Full", title)
    )
    assert embedded(path) == LINES


def test_vtt_metadata_is_ignored(tmp_path):
    text = (
        "WEBVTT - 片名\r\nKind: captions\r\n\r\nSTYLE\r\n::cue { color: red }\r\n\r\nintro-1\r\n"
        "00:01.000 --> 00:02.000\r\n你好\r\n\r\nNOTE 这里要改\r\n\r\n0b6c-11/12-0\r\n"
        "00:00:03.000 --> 00:00:04.000 align:start\r\n再见\r\n真的\r\n\r\nNOTE\r\n完\r\n"
    )
    expected = [Line(1.0, 2.0, "你好"), Line(3.0, 4.0, "再见真的")]
    assert read(write(tmp_path, "a.vtt", text)) == expected
    assert read(write(tmp_path, "b.srt", text.replace("\r\n", "\n"))) == expected  # a wrong suffix, as is common


def test_damaged_byte_does_not_change_encoding(tmp_path):
    data = bytearray((SRT * 6).encode())
    data[data.index("真".encode())] = 0xFF
    assert guess_text(bytes(data), tmp_path).count("今天我真的很高兴") == 5


def test_ass_without_styles_and_json_without_cues(tmp_path):
    bare = ass(("0:00:01.00", "0:00:02.00", "你好")).partition("\n\n")[2].partition("\n\n")[2]
    assert bare.startswith("[Events]")
    assert read(write(tmp_path, "a.ass", bare)) == [Line(1.0, 2.0, "你好")]
    for text in ('{"info": 1, "events": [3]}', '[{"start": 1}]'):
        with pytest.raises(UserError, match=r"a\.srt: not"):
            read(write(tmp_path, "a.srt", text))


def test_tracks_without_decoder_are_skipped(tmp_path):
    """Such as DVB teletext in a television recording: FFmpeg knows its name, but there is no decoder here."""
    path = film(tmp_path / "film.mkv", [("chi", SRT), ("eng", SRT)])
    data = path.read_bytes()
    assert data.count(b"S_TEXT/UTF8") == 2
    path.write_bytes(data.replace(b"S_TEXT/UTF8", b"S_TEXT/KATE", 1))
    assert embedded(path) == LINES
    with pytest.raises(UserError, match="no decoder for subtitle track 0 — give a file"):
        embedded(path, track=0)


def test_line_endings(tmp_path):
    for end in ("\r", "\r\n", "\r\r\n"):
        assert read(write(tmp_path, "a.srt", SRT.replace("\n", end))) == LINES


def test_ass_with_custom_columns(tmp_path, recwarn):
    fields = "Format: Start, End, Style, Text"
    text = ASS_HEADER.replace("Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text", fields)
    events = "Comment: 0:00:00.00,0:00:01.00,Default,不说\nDialogue: 0:00:01.00,0:00:02.50,Default,好, 真好\n"
    assert read(write(tmp_path, "a.ass", text + events)) == [Line(1.0, 2.5, "好, 真好")]
    assert not recwarn.list


def test_chinese_encodings_need_no_charset_normalizer(tmp_path, monkeypatch):
    monkeypatch.setattr("charset_normalizer.from_bytes", None)
    for text, encoding in (("今天我真的很高兴", "gbk"), ("今天我真的很高興", "big5")):
        assert guess_text(text.encode(encoding), tmp_path) == text


def test_reported_track_number_counts_image_tracks():
    """It is the number that ``--track`` expects."""

    def stream(language, properties):
        context = SimpleNamespace(codec=SimpleNamespace(properties=properties))
        return SimpleNamespace(language=language, metadata={}, disposition=Disposition(0), codec_context=context)

    messages = []
    images, words = stream("chi", Properties.BITMAP_SUB), stream("eng", Properties.TEXT_SUB)
    assert _text_tracks([images, words], messages.append) == [words]
    assert messages[0].startswith("using subtitle track 1, not a Chinese one")


def test_overlap_needed_to_merge_lines():
    separate = [Line(0, 2, "你来吗"), Line(2, 5, "不来")]
    assert merge([Cue(0, 3, ["你来吗"]), Cue(2, 5, ["不来"])]) == separate  # a third of each
    assert merge([Cue(0, 11, ["第一章"]), Cue(4, 14, ["第二章"])]) == [Line(0, 4, "第一章"), Line(4, 14, "第二章")]
    pause_kept = [Line(0, 1, "好"), Line(1.3, 2, "好")]  # only captions without a pause between them roll
    assert merge([Cue(0, 1, ["好"]), Cue(1.3, 2, ["好"])]) == pause_kept
