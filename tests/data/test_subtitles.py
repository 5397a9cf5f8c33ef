"""Subtitles: whatever stands on the screen becomes lines of what is said, in order and apart."""

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
from senticlip.data.tracks import _texts, embedded
from senticlip.structures import UsageError, UserError

SRT = "1\n00:00:01,000 --> 00:00:02,500\n今天我真的很高兴\n\n2\n00:00:03,000 --> 00:00:04,000\n你不要再说了，好不好？\n"
LINES = [Line(1.0, 2.5, "今天我真的很高兴"), Line(3.0, 4.0, "你不要再说了，好不好？")]
HEAD = (
    "[Script Info]\nScriptType: v4.00+\n\n[V4+ Styles]\nFormat: Name, Fontname, Fontsize\nStyle: Default,Arial,20\n\n"
    "[Events]\nFormat: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text\n"
)


def write(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def ass(*events: tuple[str, str, str], style="Default", kind="Dialogue") -> str:
    return HEAD + "".join(f"{kind}: 0,{start},{end},{style},,0,0,0,,{text}\n" for start, end, text in events)


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
    said = SRT.partition("今")[0] + text
    assert guess_text(said.encode("gbk"), Path("a")) == said


def test_other_encodings_fall_to_the_normalizer(tmp_path):
    text = "1\n00:00:01,000 --> 00:00:02,500\nCafé déjà vu, l'été à Genève, où êtes-vous allés hier?\n"
    assert "été" in read(write(tmp_path, "a.srt", text, "cp1252"))[0].text


def test_srt_tags_positions_and_marks(tmp_path):
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


def test_two_languages_and_two_speakers():
    assert merge([Cue(0, 2, ["你好"]), Cue(0, 2, ["Hello"])]) == [Line(0.0, 2.0, "你好 Hello")]
    assert merge([Cue(0, 3, ["你来吗"]), Cue(1.5, 4, ["不来"])]) == [Line(0.0, 4.0, "你来吗不来")]


def test_a_title_that_stays_does_not_swallow_the_film():
    cues = [Cue(0, 3600, ["字幕组"])] + [Cue(t, t + 2, [f"第{t}句"]) for t in range(5, 3000, 5)]
    lines = merge(cues)
    assert len(lines) == len(cues)
    assert lines[0] == Line(0.0, 5.0, "字幕组")


def test_a_title_that_begins_with_a_line_or_in_it_takes_nothing_from_it():
    with_it = [Cue(1, 3, ["我真的很高兴"]), Cue(1, 60, ["字幕组制作"]), Cue(5, 7, ["我非常难过"])]
    wanted = [Line(1, 3, "我真的很高兴"), Line(3, 5, "字幕组制作"), Line(5, 7, "我非常难过")]
    assert merge(with_it) == wanted
    assert merge([with_it[1], with_it[0], with_it[2]]) == wanted
    in_it = [Cue(1, 3.5, ["见到你"]), Cue(1.5, 40, ["第一章"]), Cue(1.5, 40, ["第一章"]), Cue(5, 7, ["难过"])]
    assert merge(in_it) == [Line(1, 3.5, "见到你"), Line(3.5, 5, "第一章"), Line(5, 7, "难过")]
    assert merge([*in_it[:2], Cue(3.2, 5, ["是吗"])]) == [Line(1, 3.2, "见到你"), Line(3.2, 5, "是吗")]


def test_a_sign_does_not_swallow_the_lines_under_it():
    lines = [Cue(2, 4, ["我真的很高兴"]), Cue(4.5, 6, ["我非常难过"]), Cue(6.5, 8.5, ["没什么"])]
    wanted = [Line(cue.start, cue.end, cue.rows[0]) for cue in lines]
    assert merge([Cue(1, 10, ["医院"]), *lines]) == [Line(1, 2, "医院"), *wanted]
    assert merge([Cue(2, 10, ["医院"]), *lines]) == [wanted[0], Line(4, 4.5, "医院"), *wanted[1:]]


def test_what_is_no_sign():
    """Translations in parts, a sign in motion under a line, one interjection, slow karaoke."""
    parts = [Cue(1, 3, ["it"]), Cue(3, 5, ["is"]), Cue(5, 8, ["long"])]
    assert merge([Cue(1, 8, ["很长"]), *parts]) == [Line(1, 8, "很长 it is long")]
    spelled = [Cue(0, 1, ["wo"]), Cue(1, 2, ["ai"]), Cue(2, 3, ["ni"]), Cue(3, 5, ["men"])]
    for written in ([Cue(0, 5, ["我爱你们"]), *spelled], [spelled[0], Cue(0, 5, ["我爱你们"]), *spelled[1:]]):
        assert [{*line.text.split()} for line in merge(written)] == [{"我爱你们", "wo", "ai", "ni", "men"}]
    moves = [Cue(2 + i / 25, 2 + (i + 1) / 25, ["牌"]) for i in range(50)]
    assert merge([Cue(1, 6, ["对白"]), *moves]) == [Line(1, 6, "对白牌")]
    assert merge([Cue(1, 6, ["对白"]), Cue(3, 4, ["啊"])]) == [Line(1, 6, "对白啊")]
    syllables = [Cue(1 + i, 2 + i, ["我爱你们"[i]]) for i in range(4)]
    assert merge([Cue(1, 5, ["我爱你们"]), *syllables]) == [Line(1, 5, "我爱你们")]


def test_a_karaoke_line_that_grows():
    cues = [Cue(1, 1.5, ["我"]), Cue(1.5, 2, ["我爱"]), Cue(2, 4, ["我爱你"])]
    assert merge(cues) == [Line(1.0, 4.0, "我爱你")]


def test_an_answer_that_begins_with_the_same_word():
    cues = [Cue(0, 2, ["妈"]), Cue(2, 5, ["妈妈你听我说"])]
    assert merge(cues) == [Line(0, 2, "妈"), Line(2, 5, "妈妈你听我说")]


def test_captions_as_youtube_writes_them(tmp_path):
    """Rows of one space are no empty rows, and words with two times in them no row of times."""
    (tmp_path / "a.vtt").write_text(
        "WEBVTT\nKind: captions\n\n00:00:00.080 --> 00:00:02.389 align:start position:0%\n \n"
        "大家<00:00:00.400><c>好</c><00:00:00.800><c>今天</c>\n\n00:00:02.389 --> 00:00:02.399\n大家好今天\n \n\n"
        "00:00:02.399 --> 00:00:05.000\n大家好今天\n我们<00:00:03.000><c>讲</c><00:00:03.600><c>历史</c>\n\n"
        "NOTE 说明\n\n00:00:05.000 --> 00:00:05.010\n我们讲历史\n \n",
        encoding="utf-8",
    )
    assert read(tmp_path / "a.vtt") == [Line(0.08, 2.399, "大家好今天"), Line(2.399, 5.01, "我们讲历史")]


def test_times_are_only_in_rows_of_times(tmp_path):
    (tmp_path / "a.srt").write_text(
        "1\n00:00:01 --> 00:00:02\n从 08:00:00.0 到 09:00:00.0 上班\n\n"
        "2\n00:00:03,000-->00:00:04,5\n第一行\n\n第二行\n",
        encoding="utf-8",
    )
    wanted = [Line(1.0, 2.0, "从 08:00:00.0 到 09:00:00.0 上班"), Line(3.0, 4.5, "第一行第二行")]
    assert read(tmp_path / "a.srt") == wanted


@pytest.mark.parametrize("numbered", [True, False])
def test_a_last_row_that_is_a_number(tmp_path, numbered):
    times = ["00:00:01.000 --> 00:00:02.000", "00:00:03.000 --> 00:00:04.000"]
    blocks = [
        f"{f'{i}{chr(10)}' if numbered else ''}{time}\n他今年\n{age}"
        for i, (time, age) in enumerate(zip(times, (42, 7), strict=True), 1)
    ]
    (tmp_path / "a.vtt").write_text("\n\n".join(["WEBVTT", *blocks]) + "\n", encoding="utf-8")
    wanted = ["他今年 42", "他今年 7"]
    assert [line.text for line in read(tmp_path / "a.vtt")] == wanted
    (tmp_path / "a.srt").write_text("\n\n".join(blocks).replace(".000", ",000") + "\n", encoding="utf-8")
    assert [line.text for line in read(tmp_path / "a.srt")] == wanted


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
def test_lines_are_in_order_apart_and_said(cues, shift):
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
def test_thousands_on_the_screen_together_take_seconds(cues):
    begun = process_time()
    assert len(merge(cues)) == 1
    assert process_time() - begun < 10


def test_a_row_of_dashes_is_read_in_no_time(tmp_path):
    begun = process_time()
    assert read(write(tmp_path, "a.srt", f"{SRT}1:1:{'-' * 300_000}\n"))[0] == LINES[0]
    assert process_time() - begun < 10


def test_an_emoji_of_several_stays_one():
    assert clean("\u200b一家\ufeff👨\u200d👩\u200d👧\u200f") == "一家👨\u200d👩\u200d👧"
    assert clean("\u200d\u200b") == ""


def test_shift(tmp_path):
    path = write(tmp_path, "a.srt", SRT)
    assert [line.start for line in read(path, shift=1.5)] == [2.5, 4.5]
    assert read(path, shift=-2.0) == [Line(0.0, 0.5, LINES[0].text), Line(1.0, 2.0, LINES[1].text)]
    assert read(path, shift=-10.0) == []


def test_times_that_are_none_of_a_film(tmp_path):
    """pysubs2 reads 100:00:01 as 00:00:01, and what was moved to before 0 as after it."""
    path = tmp_path / "a.srt"
    path.write_text("1\n-00:00:02,500 --> 00:00:02,000\n你好\n\n2\n-00:00:04,000 --> -00:00:03,000\n没人听见\n")
    assert read(path) == [Line(0.0, 2.0, "你好")]
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\n你好\n\n2\n100:00:01,000 --> 100:00:02,000\n再见\n")
    with pytest.raises(UserError, match=r"a\.srt, row 6: 100:00:01,000 is not a time in a film"):
        read(path)


def test_times_with_a_colon_before_milliseconds(tmp_path):
    assert read(write(tmp_path, "a.srt", SRT.replace(",", ":"))) == LINES
    assert read(write(tmp_path, "a.srt", SRT.replace("00:00:03,000", "00:00:03:000"))) == LINES


def test_timings_of_other_hands(tmp_path):
    """.NET's seven digits, a space that does not break, and words that have an arrow."""
    for time in ("00:00:01,000", "00:00:01.0000000"):
        assert read(write(tmp_path, "a.srt", SRT.replace("00:00:01,000", time))) == LINES
    assert read(write(tmp_path, "a.srt", re.sub("(?m)^(.*-->.*)$", "\\1\u00a0", SRT))) == LINES
    assert read(write(tmp_path, "a.srt", "1\n00:00:01,000 --> 00:00:02,000\n8:30 --> 9\n")) == [
        Line(1.0, 2.0, "8:30 --> 9")
    ]


def test_japanese_is_no_gbk(tmp_path):
    words = "彼女は東京大学で日本語を勉強しています。とても楽しいです。"
    srt = "".join(f"{i}\n00:00:0{i},000 --> 00:00:0{i},900\n{words}\n\n" for i in range(1, 7))
    assert words in read(write(tmp_path, "a.srt", srt, "euc_jp"))[0].text


@pytest.mark.parametrize("time", ["00:00:03:12", "00:00:03;12", "00: 00: 03, 000", "0:00:003,0"])
def test_what_looks_like_a_timing_and_is_none_is_refused(tmp_path, time):
    """Its words would go to the line before it."""
    with pytest.raises(
        UserError, match=rf"a\.srt, row 6: {time} --> 00:00:04,000 is not a timing — write 00:00:01,000"
    ):
        read(write(tmp_path, "a.srt", SRT.replace("00:00:03,000", time)))
    with pytest.raises(UserError, match=r"a\.srt, row 2: .* is not a timing"):  # no other is one
        read(write(tmp_path, "a.srt", f"1\n{time} --> {time}\n你好\n"))


@pytest.mark.parametrize("arrow", ["->", "–>", "—>", "→", "-->"])
def test_another_arrow_and_wide_colons_are_no_timing(tmp_path, arrow):
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
    pictures: str = "",
    late: int = 0,
    kinds: tuple[Disposition, ...] = (),
    titles: tuple[str, ...] = (),
) -> Path:
    """A short film with subtitle tracks, copied in from .srt files, and one of pictures in the language ``pictures``.

    ``late``: where its clock begins, seconds; ``kinds`` and ``titles``: of the tracks.
    """
    with av.open(str(path), "w") as out:
        video = out.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sources = [av.open(str(write(path.parent, f"{language}.srt", text))) for language, text in tracks]
        streams = [out.add_stream_from_template(source.streams.subtitles[0]) for source in sources]
        for stream, (language, _) in zip(streams, tracks, strict=True):
            stream.metadata["language"] = language
        for stream, kind in zip(streams, kinds, strict=bool(kinds)):
            stream.disposition = kind
        for stream, title in zip(streams, titles, strict=bool(titles)):
            stream.metadata["title"] = title
        if pictures:
            pgs = out.add_mux_stream("hdmv_pgs_subtitle")
            pgs.metadata["language"] = pictures
        for i in range(50):
            picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
            picture.pts, picture.time_base = i + 10 * late, Fraction(1, 10)
            out.mux(video.encode(picture))
        out.mux(video.encode())
        for source, stream in zip(sources, streams, strict=True):
            for packet in source.demux():
                if packet.size:
                    packet.pts += int(late / packet.time_base)
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
    ("kinds", "chosen"),
    [
        ((Disposition(0), Disposition.forced, Disposition.default), 2),
        ((Disposition(0), Disposition.forced | Disposition.default, Disposition(0)), 2),
        ((Disposition.default, Disposition(0), Disposition.default), 2),
        ((Disposition.default, Disposition(0), Disposition(0)), 1),
        ((Disposition.default, Disposition.forced, Disposition.forced), 1),
    ],
)
def test_the_track_with_all_that_is_said(tmp_path, kinds, chosen):
    words = ("Hello", "出口", "你好")
    tracks = [
        (language, SRT.replace("今天我真的很高兴", word))
        for language, word in zip(("eng", "chi", "chi"), words, strict=True)
    ]
    path = film(tmp_path / "film.mkv", tracks, kinds=kinds)
    assert embedded(path)[0].text == words[chosen]
    assert embedded(path, track=0)[0].text == "Hello"


def test_embedded_times_are_a_players(tmp_path):
    path = film(tmp_path / "late.mkv", [("chi", SRT)], late=7)
    with av.open(str(path)) as container:
        assert container.start_time == 7_000_000
    assert embedded(path) == LINES


def test_tracks_of_pictures_are_passed_over(tmp_path):
    told = []
    path = film(tmp_path / "both.mkv", [("eng", SRT)], pictures="chi")
    assert embedded(path, tell=told.append) == LINES
    assert [line.split(" — ")[0] for line in told] == [
        f"{path}: using subtitle track 0, not a Chinese one: those are images, not text"
    ]
    path = film(tmp_path / "pictures.mkv", [], pictures="chi")
    assert embedded(path, tell=told.append) == []
    assert told[1:] == [f"{path}: its subtitles are images, not text — give them as a file: --subtitles F.srt"]
    for tracks, pictures in (([("chi", SRT)], "chi"), ([("eng", SRT)], "eng"), ([("eng", SRT)], ""), ([], "")):
        embedded(film(tmp_path / "other.mkv", tracks, pictures), tell=told.append)
    assert len(told) == 2


@pytest.mark.parametrize("title", ["简体中文", "繁體", "CHS&JPN", "chs_eng", "zh-Hans", "国语", "Mandarin (PRC)"])
def test_a_title_tells_a_chinese_track(tmp_path, title):
    tracks = [("eng", SRT.replace("今天我真的很高兴", "Hello")), ("und", SRT)]
    path = film(tmp_path / "film.mkv", tracks, kinds=(Disposition.default, Disposition(0)), titles=("Full", title))
    assert embedded(path) == LINES


def test_what_a_vtt_holds_beside_its_lines_is_not_said(tmp_path):
    text = (
        "WEBVTT - 片名\r\nKind: captions\r\n\r\nSTYLE\r\n::cue { color: red }\r\n\r\nintro-1\r\n"
        "00:01.000 --> 00:02.000\r\n你好\r\n\r\nNOTE 这里要改\r\n\r\n0b6c-11/12-0\r\n"
        "00:00:03.000 --> 00:00:04.000 align:start\r\n再见\r\n真的\r\n\r\nNOTE\r\n完\r\n"
    )
    wanted = [Line(1.0, 2.0, "你好"), Line(3.0, 4.0, "再见真的")]
    assert read(write(tmp_path, "a.vtt", text)) == wanted
    assert read(write(tmp_path, "b.srt", text.replace("\r\n", "\n"))) == wanted  # the wrong name, as often


def test_a_damaged_byte_is_no_other_encoding(tmp_path):
    data = bytearray((SRT * 6).encode())
    data[data.index("真".encode())] = 0xFF
    assert guess_text(bytes(data), tmp_path).count("今天我真的很高兴") == 5


def test_odd_files_are_read_or_said(tmp_path):
    bare = ass(("0:00:01.00", "0:00:02.00", "你好")).partition("\n\n")[2].partition("\n\n")[2]
    assert bare.startswith("[Events]")
    assert read(write(tmp_path, "a.ass", bare)) == [Line(1.0, 2.0, "你好")]
    for text in ('{"info": 1, "events": [3]}', '[{"start": 1}]'):
        with pytest.raises(UserError, match=r"a\.srt: not"):
            read(write(tmp_path, "a.srt", text))


def test_tracks_without_a_decoder_are_passed_over(tmp_path):
    """As DVB teletext is in a recording of television: FFmpeg knows its name, and nothing here reads it."""
    path = film(tmp_path / "film.mkv", [("chi", SRT), ("eng", SRT)])
    data = path.read_bytes()
    assert data.count(b"S_TEXT/UTF8") == 2
    path.write_bytes(data.replace(b"S_TEXT/UTF8", b"S_TEXT/KATE", 1))
    assert embedded(path) == LINES
    with pytest.raises(UserError, match="no decoder for subtitle track 0 — give a file"):
        embedded(path, track=0)


def test_line_ends_of_every_machine(tmp_path):
    for end in ("\r", "\r\n", "\r\r\n"):
        assert read(write(tmp_path, "a.srt", SRT.replace("\n", end))) == LINES


def test_ass_with_columns_of_its_own(tmp_path, recwarn):
    columns = "Format: Start, End, Style, Text"
    text = HEAD.replace("Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text", columns)
    said = "Comment: 0:00:00.00,0:00:01.00,Default,不说\nDialogue: 0:00:01.00,0:00:02.50,Default,好, 真好\n"
    assert read(write(tmp_path, "a.ass", text + said)) == [Line(1.0, 2.5, "好, 真好")]
    assert not recwarn.list


def test_chinese_encodings_are_told_by_their_frequent_characters(tmp_path, monkeypatch):
    monkeypatch.setattr("charset_normalizer.from_bytes", None)
    for text, encoding in (("今天我真的很高兴", "gbk"), ("今天我真的很高興", "big5")):
        assert guess_text(text.encode(encoding), tmp_path) == text


def test_a_track_is_told_by_its_number_among_all_of_the_film():
    """Which is what ``--track`` takes."""

    def stream(language, properties):
        context = SimpleNamespace(codec=SimpleNamespace(properties=properties))
        return SimpleNamespace(language=language, metadata={}, disposition=Disposition(0), codec_context=context)

    told = []
    pictures, words = stream("chi", Properties.BITMAP_SUB), stream("eng", Properties.TEXT_SUB)
    assert _texts([pictures, words], told.append) == [words]
    assert told[0].startswith("using subtitle track 1, not a Chinese one")


def test_how_long_two_lines_must_be_together_to_be_one():
    apart = [Line(0, 2, "你来吗"), Line(2, 5, "不来")]
    assert merge([Cue(0, 3, ["你来吗"]), Cue(2, 5, ["不来"])]) == apart  # a third of each
    assert merge([Cue(0, 11, ["第一章"]), Cue(4, 14, ["第二章"])]) == [Line(0, 4, "第一章"), Line(4, 14, "第二章")]
    again = [Line(0, 1, "好"), Line(1.3, 2, "好")]  # a caption that rolls on makes no pause
    assert merge([Cue(0, 1, ["好"]), Cue(1.3, 2, ["好"])]) == again
