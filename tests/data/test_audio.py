"""Sound: waveforms of generated files, and log-mel of tones of known frequency."""

from __future__ import annotations

import io
import math
import tracemalloc
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from av.stream import Disposition
from tests.tiny import write_clip
from transformers.audio_utils import mel_filter_bank, spectrogram

from senticlip.data import audio
from senticlip.data.audio import (
    RATE,
    AudioReader,
    audio_end,
    audio_start,
    audio_store,
    log_mel,
    mel_filters,
    read_audio,
)
from senticlip.structures import Clip, UserError


def tone(frequency, seconds, rate=RATE):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype(np.float32)


def write_wav(path, sound, rate):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((sound * 32767).astype("<i2").tobytes())
    return path


def test_read_audio_resamples_whole_file_and_segment(tmp_path):
    path = write_wav(tmp_path / "a.wav", np.concatenate([tone(440, 1, 44100), tone(1760, 1, 44100)]), 44100)
    sound = read_audio(path)
    assert len(sound) == pytest.approx(2 * RATE, abs=50)
    assert np.abs(np.fft.rfft(sound[:RATE])).argmax() == pytest.approx(440, abs=1)
    piece = read_audio(path, 1.25, 1.75)
    assert len(piece) == pytest.approx(RATE / 2, abs=50)
    assert 2 * np.abs(np.fft.rfft(piece)).argmax() == pytest.approx(1760, abs=4)


def test_log_mel_of_tone_peaks_in_its_band():
    filters = mel_filters(33)
    frequencies = np.fft.rfftfreq(640, 1 / RATE)
    for frequency in (200, 1000, 4000):
        mel = log_mel(tone(frequency, 0.5))
        expected = filters[:, np.abs(frequencies - frequency).argmin()].argmax()
        assert abs(int(mel[5].argmax()) - int(expected)) <= 1
    assert mel.shape == (1 + (8000 - 640) // 320, 33)
    assert mel.dtype == np.float32


def test_log_mel_matches_transformers():
    sound = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    bank = mel_filter_bank(321, 33, 20.0, RATE / 2, RATE, norm=None, mel_scale="htk")
    power = spectrogram(sound, np.hanning(640), 640, 320, power=2.0, center=False, mel_filters=bank, mel_floor=0.0)
    np.testing.assert_allclose(log_mel(sound), np.log(power.T + 1e-6), atol=1e-3)


def test_log_mel_of_short_and_silent_sounds():
    assert log_mel(np.zeros(0, np.float32)).shape == (0, 33)
    assert log_mel(np.zeros(10, np.float32)).shape == (1, 33)
    assert np.isfinite(log_mel(np.zeros(3200, np.float32))).all()


@pytest.mark.parametrize("average", [1, 3, 5, 1000])
def test_each_step_is_the_mean_of_its_frames(average):
    sound = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    frames, steps = log_mel(sound), log_mel(sound, average=average)
    means = [frames[i : i + average].mean(0) for i in range(0, len(frames), average)]
    np.testing.assert_allclose(steps, np.stack(means), rtol=1e-5)
    assert steps.dtype == np.float32


def test_mel_filters_cover_the_spectrum_without_gaps():
    filters = mel_filters(33)
    assert filters.shape == (33, 321)
    assert (filters >= 0).all()
    assert (filters.max(1) > 0).all()
    assert (filters[:, 2:-1].sum(0) > 0).all()


def test_unreadable_file_and_clip_without_video(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"a\.mp4: its sound cannot be read"):
        read_audio(tmp_path / "a.mp4")
    path = write_wav(tmp_path / "b.wav", tone(300, 0.3), RATE)
    values, mask = audio_store([Clip("a"), Clip("b", path)], 33, tmp_path / "cache").gather(np.array([0, 1]))
    assert mask.sum(1).tolist() == [0, 1 + (4800 - 640) // 320]
    assert values.shape[2] == 33


def test_very_low_sample_rate_is_rejected(tmp_path):
    """At such a rate, a file of 32 kB lasts for hours."""
    for rate in (1, 999):
        path = write_wav(tmp_path / "a.wav", np.zeros(16000, np.float32), rate)
        with pytest.raises(UserError, match=rf"a\.wav: its sound cannot be read \({rate} samples a second\)"):
            read_audio(path)
    assert len(read_audio(write_wav(tmp_path / "a.wav", np.zeros(3000, np.float32), 1000))) == 3 * RATE


def test_file_whose_timestamps_do_not_start_at_0(tmp_path):
    path = tmp_path / "off.ts"
    with av.open(str(path), "w", options={"output_ts_offset": "1000"}) as file:
        stream = file.add_stream("mp2", rate=RATE, layout="mono")
        sound = np.concatenate([tone(440, 1), tone(1760, 1), tone(440, 1)])
        frame = av.AudioFrame.from_ndarray((sound * 20000).astype("<i2")[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in (*stream.encode(frame), *stream.encode()):
            file.mux(packet)
    with av.open(str(path)) as file:
        assert file.start_time > 900e6
    piece = read_audio(path, 1.25, 1.75)
    assert len(piece) == RATE // 2
    assert 2 * np.abs(np.fft.rfft(piece)).argmax() == pytest.approx(1760, abs=8)


def write_tones(path, codec, layouts=("mono",), seconds=10):
    """Tones of 400, 500, 600 … Hz, one second each; the channel layout may change midway, as in TV recordings."""
    sound = (np.concatenate([tone(400 + 100 * i, 1) for i in range(seconds)]) * 20000).astype("<i2")
    parts = []
    for i, layout in enumerate(layouts):
        part = np.array_split(sound, len(layouts))[i]
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=path.suffix[1:].replace("ts", "mpegts").replace("mpg", "mpeg")) as file:
            stream = file.add_stream(codec, rate=RATE, layout=layout)
            channels = 1 if layout == "mono" else 2
            frame = av.AudioFrame.from_ndarray(part.repeat(channels)[None], format="s16", layout=layout)
            frame.sample_rate, frame.pts = RATE, 0
            for packet in (*stream.encode(frame), *stream.encode()):
                file.mux(packet)
        parts.append(buffer.getvalue())
    path.write_bytes(b"".join(parts))
    return path


def pitch(sound):
    return np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)


def test_segment_of_mpeg_program_stream(tmp_path):
    """In this format, the first packet after a seek is incomplete."""
    path = write_tones(tmp_path / "a.mpg", "mp2")
    piece = read_audio(path, 5.25, 5.75)
    assert len(piece) == RATE // 2
    assert pitch(piece) == pytest.approx(900, abs=20)


@pytest.mark.parametrize("name", ["a.flv", "a.ts", "a.mp4"])
def test_sound_that_starts_before_the_video(tmp_path, name):
    """A seek in the video track would find no keyframe that early, and fail or go too far."""
    path, codec = tmp_path / name, "libmp3lame" if name == "a.flv" else "aac"
    rate = 22050 if name == "a.flv" else RATE
    with av.open(str(path), "w") as file:
        voice, video = file.add_stream(codec, rate=rate, layout="mono"), file.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for i in range(8):
            part = (tone(400 + 100 * i, 0.5, rate) * 0.5).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(part[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, i * len(part)
            file.mux(voice.encode(frame))
            if i >= 5:
                image = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), "rgb24")
                image.pts, image.time_base = round(i * 0.5 * 25), Fraction(1, 25)
                file.mux(video.encode(image))
        file.mux([*voice.encode(None), *video.encode(None)])
    with AudioReader(path) as reader:
        for start in (0.1, 1.0, 1.5):
            for piece in (reader.read(start, start + 0.4), read_audio(path, start, start + 0.4)):
                assert pitch(piece) == pytest.approx(400 + 100 * int((start + 0.2) / 0.5), abs=60), start


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mpg", "mp2"), ("a.wav", "pcm_s16le"), ("a.avi", "mp3")]
)
def test_open_reader_gives_same_segments_in_any_order(tmp_path, name, codec):
    path = write_tones(tmp_path / name, codec)
    pieces = [(None, None), (3.5, 4.25), (8.0, 12.0), (0.0, 1.0), (3.5, 4.25), (11.0, 12.0), (None, 2.0), (9.9, None)]
    with AudioReader(path) as reader:
        for piece in pieces:
            sound = reader.read(*piece)  # AAC starts slightly differently after a seek to 0
            np.testing.assert_allclose(sound, read_audio(path, *piece), atol=3e-3, err_msg=str(piece))
        assert len(reader.read(0.05, 1.05)) == pytest.approx(RATE, abs=20)
    assert len(read_audio(path, 0.05, 1.05)) == pytest.approx(RATE, abs=20)
    assert [len(read_audio(path, *piece)) for piece in pieces[1:4]] == [
        0.75 * RATE,
        pytest.approx(2 * RATE, abs=2000),
        RATE,
    ]


def test_sound_that_starts_late_ends_with_the_segment(tmp_path):
    path = write_clip(tmp_path / "a.mkv", 90, 1, 3.0)
    with av.open(str(path)) as video, av.open(str(tmp_path / "b.mkv"), "w") as file:
        copy, voice = file.add_stream_from_template(video.streams.video[0]), file.add_stream("pcm_s16le", rate=RATE)
        for packet in video.demux(video=0):
            if packet.dts is not None:
                packet.stream = copy
                file.mux(packet)
        for i, part in enumerate(np.split((tone(500, 2) * 20000).astype("<i2"), 20)):
            frame = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, round((0.7 + 0.1 * i) * RATE)
            file.mux(voice.encode(frame))
    assert audio_start(tmp_path / "b.mkv") == pytest.approx(0.7, abs=1e-3)
    assert audio_start(path) == 0
    seconds = {(0.0, 1.0): 0.3, (None, 1.0): 0.3, (0.5, 1.0): 0.3, (0.1, 0.5): 0.0, (1.0, 2.0): 1.0, (None, None): 2.0}
    for piece, duration in seconds.items():
        assert len(read_audio(tmp_path / "b.mkv", *piece)) == pytest.approx(duration * RATE, abs=RATE // 100), piece


@pytest.mark.parametrize("channels", [1, 2])
def test_mono_and_stereo_are_equally_loud(tmp_path, channels):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.repeat((tone(500, 1) * 20000).astype("<i2"), channels).tobytes())
    sound = read_audio(path)
    np.testing.assert_allclose(sound, tone(500, 1) * 20000 / 32768, atol=2e-4)


def test_segment_that_starts_in_a_gap_and_filled_gaps(tmp_path):
    """500 Hz for three seconds, a gap of three seconds, then 1000 Hz for four."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        voice = file.add_stream("pcm_s16le", rate=RATE)
        for i in (*range(30), *range(60, 100)):
            part = (tone(500 if i < 30 else 1000, 0.1) * 20000).astype("<i2")
            frame = av.AudioFrame.from_ndarray(part[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, i * RATE // 10
            file.mux(voice.encode(frame))
        file.mux(voice.encode(None))
    for piece, seconds in (((4.0, 6.5), 0.5), ((5.0, 9.0), 3.0), ((6.2, 6.7), 0.5)):
        sound = read_audio(path, *piece)
        assert len(sound) == pytest.approx(seconds * RATE, abs=RATE // 50), piece
        assert pitch(sound) == pytest.approx(1000, abs=5)
    joined, filled = read_audio(path), read_audio(path, gaps=True)
    assert (len(joined), len(filled)) == (7 * RATE, 10 * RATE)
    np.testing.assert_array_equal(filled, np.insert(joined, 3 * RATE, np.zeros(3 * RATE)))
    assert audio_end(path) == pytest.approx(10, abs=0.01)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "aac"), ("a.mpg", "mp2"), ("a.ts", "mp2"), ("a.wav", "pcm_s16le"), ("a.avi", "mp3")]
)
def test_continuous_sound_has_no_gaps_and_a_known_end(tmp_path, name, codec):
    path = write_tones(tmp_path / name, codec)
    np.testing.assert_array_equal(read_audio(path, gaps=True), read_audio(path))
    assert audio_end(path) == pytest.approx(10, abs=0.15)


def test_at_most_so_many_seconds_are_read(tmp_path):
    path = write_tones(tmp_path / "a.wav", "pcm_s16le")
    for piece in ((None, None), (1.0, None), (1.0, 9.0)):
        begin = round((piece[0] or 0) * RATE)
        sound = read_audio(path, *piece, max_seconds=2.5)
        np.testing.assert_array_equal(sound, read_audio(path, begin / RATE, begin / RATE + 2.5))
        assert len(sound) == 2.5 * RATE
    assert len(read_audio(path, 1.0, 2.0)) == RATE
    assert len(read_audio(path, max_seconds=math.inf)) == 10 * RATE


def test_log_mel_of_long_sound_is_computed_in_chunks(monkeypatch):
    sound = np.random.default_rng(0).normal(0, 0.1, 7 * RATE + 11).astype(np.float32)
    expected = log_mel(sound, average=4)
    monkeypatch.setattr(audio, "CHUNK_FRAMES", 100)
    np.testing.assert_allclose(log_mel(sound, average=4), expected, atol=1e-5)
    long = np.zeros(120 * RATE, np.float32)
    tracemalloc.start()
    log_mel(long)
    assert tracemalloc.get_traced_memory()[1] < 6 << 20  # the spectrum of all frames takes 15 MB
    tracemalloc.stop()


def test_damaged_packets_lose_only_their_own_sound(tmp_path):
    path = write_tones(tmp_path / "a.ts", "mp2")
    intact_length, data = len(read_audio(path)), bytearray(path.read_bytes())
    for offset in range(len(data) // 4 // 188 * 188, len(data) // 4 // 188 * 188 + 188 * 3, 188):
        data[offset + 4 : offset + 188] = b"\xff" * 184
    path.write_bytes(data)
    assert intact_length - RATE // 2 < len(read_audio(path)) <= intact_length


@pytest.mark.parametrize("default", [0, 1])
def test_default_audio_track_is_read(tmp_path, default):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        tracks = [file.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        for i, track in enumerate(tracks):
            track.disposition = Disposition.default if i == default else Disposition(0)
        for second, i in ((0, 0), (1, 0), (1, 1), (2, 1)):  # the second track starts a second late
            frame = av.AudioFrame.from_ndarray((tone(500 + 300 * i, 1) * 20000).astype("<i2")[None], "s16", "mono")
            frame.sample_rate, frame.pts = RATE, second * RATE
            file.mux(tracks[i].encode(frame))
    assert audio_start(path) == pytest.approx(default, abs=1e-3)
    for piece in ((None, None), (1.2, 1.8)):
        assert pitch(read_audio(path, *piece)) == pytest.approx(500 + 300 * default, abs=5), piece


@pytest.mark.parametrize("layouts", [("mono", "stereo"), ("stereo", "mono", "stereo")])
def test_channel_layout_may_change_within_a_file(tmp_path, layouts):
    path = write_tones(tmp_path / "a.ts", "mp2", layouts, 6)
    assert len(read_audio(path)) == pytest.approx(6 * RATE, abs=RATE // 4)
