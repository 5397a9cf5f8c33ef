"""What may stand behind ``senticlip``: the verbs and their options. argparse only; ``cli.py`` does the work."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from senticlip import __version__

DATA = "a CH-SIMS folder, or a .csv with path, text, label (-1 to 1, or words), and optionally split"
TRAINED = "a folder that senticlip train wrote"
RUN = f"{TRAINED}, or an ONNX file that senticlip export wrote"
MANIFEST = ".csv, .jsonl or .parquet: id, path, text or subtitles, and optionally start and end (seconds)"


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, and out."""
    print(f"senticlip: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Tells wrong use in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit 2."""
        fail(f"{message} — see {self.prog} --help", 2)


def folder(name: str) -> str:
    """The argument of an option that names a folder to write into: it can be made where it is said to be."""
    if not name.strip():
        raise argparse.ArgumentTypeError("no name was given — is a variable of the shell unset?")
    for place in (Path(name), *Path(name).parents):
        if os.path.exists(place) and not os.path.isdir(place):  # Path's raise where a name is too long
            raise argparse.ArgumentTypeError(f"{place} is a file, no folder")
    return name


def file(name: str) -> str:
    """The argument of an option that names a file to write."""
    if name.strip() and os.path.isdir(name):
        raise argparse.ArgumentTypeError(f"{name} is a folder, no file")
    folder(name and str(Path(name).parent))
    return name


def joined(arguments: list[str]) -> list[str]:
    """``--text -你好`` as ``--text=-你好``, as lines of subtitles begin: argparse would take it for an option."""
    whole: list[str] = []
    for word in arguments:
        if whole and whole[-1] == "--text" and re.match("-[^-]", word):
            whole[-1] += f"={word}"
        else:
            whole.append(word)
    return whole


def parser() -> argparse.ArgumentParser:
    """All verbs; ``options.verb`` says which one it is."""
    top = Parser(prog="senticlip", description="Sentiment of video clips: CLIP-CA-MSA")
    top.add_argument("--version", action="version", version=f"senticlip {__version__}")
    verbs = Verbs(top)
    _to_learn(verbs)
    _to_report(verbs)
    _to_answer(verbs)
    _to_show(verbs)
    for name in ("evaluate", "predict", "analyze", "bulk", "serve"):
        verbs.known.choices[name].add_argument("--precision", default="fp32", help="fp32, bf16 or int8 (default: fp32)")
    return top


class Verbs:
    """The verbs of a parser, and the options that all of them, or several, have."""

    def __init__(self, top: argparse.ArgumentParser) -> None:
        self.common = Parser(add_help=False)
        self.common.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        self.common.add_argument("--debug", action="store_true", help="show the traceback of an error")
        self.known = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(self, name: str, text: str) -> argparse.ArgumentParser:
        """One more verb."""
        return self.known.add_parser(name, help=text, description=text, parents=[self.common])


def _to_learn(verbs: Verbs) -> None:
    """demo, data check, train."""
    p = verbs.add("demo", "make a data set, train, evaluate, predict, explain: a report in under five minutes")
    p.add_argument("--out", type=folder, default="demo", help="folder (default: demo)")
    p.add_argument("--sound", action="store_true", help="give the clips a voice")
    p.add_argument("--pretrain", action="store_true", help="train the tiny towers that ship with the package, and stop")
    p.add_argument("--seed", type=int, default=0, help="of the clips and the training (default: 0)")
    _set(p, "change a key of the tiny preset")

    data = verbs.known.add_parser("data", help="look at data sets").add_subparsers(dest="action", required=True)
    p = data.add_parser("check", help="list all problems of a data set at once, by row", parents=[verbs.common])
    p.add_argument("data", metavar="DIR", help=DATA)
    p.add_argument("--protocol", default="official", help="official, tenth or video")

    p = verbs.add("train", "train a model; its folder is a complete checkpoint")
    p.add_argument("configs", metavar="CONFIG", nargs="+", help="a YAML file, as in experiments/; others on top of it")
    _data(p)
    p.add_argument("--out", type=folder, required=True, metavar="RUN", help="folder to write")
    p.add_argument("--seed", type=int, help="instead of the config's")
    p.add_argument("--resume", action="store_true", help="go on where a killed training stopped")
    _set(p, "change a config key")
    _device(p)


def _set(p: argparse.ArgumentParser, text: str) -> None:
    told = f"{text} (docs/configuration.md), as in --set train.epochs=5; once for each key"
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=told)


def _data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", required=True, metavar="DIR", help=DATA)


def _device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", help="cpu, cuda, cuda:N (default: a GPU if there is one)")


def _to_report(verbs: Verbs) -> None:
    """evaluate, reproduce, features."""
    p = verbs.add("evaluate", "metrics of a run on a split; of two runs, their difference; of more, mean ± std")
    p.add_argument("runs", metavar="RUN", nargs="+", help=f"{TRAINED}; two, or more")
    _data(p)
    p.add_argument("--split", default="test", help="train, valid, test or all (default: test)")
    p.add_argument("--target", help="compare with label M, T, A or V instead of the one trained for")
    _device(p)

    p = verbs.add("reproduce", "the paper's tables from experiments × seeds: one report beside its numbers")
    _data(p)
    p.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="runs, report; the same command continues a killed one"
    )
    p.add_argument("--preset", default="paper", help="size of the encoders: tiny, small or paper")
    p.add_argument("--tables", metavar="1,5", help="which of the eight (default: all)")
    p.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    p.add_argument("--protocol", help="official split, a random tenth, or by source video (default: the preset's)")
    p.add_argument("--keep", action="store_true", help="keep all weights, not only metrics and predictions")
    _set(p, "change a config key of the preset")
    _device(p)

    p = verbs.add("features", "clips → an MMSA-style feature file (text, audio, vision)")
    p.add_argument("data", metavar="DIR", help=DATA)
    p.add_argument("--out", type=file, required=True, metavar="F", help="file to write, as MMSA's .pkl")
    p.add_argument("--preset", default="tiny", help="whose encoders: tiny (ships with the package), small or paper")
    p.add_argument("--run", dest="trained", metavar="RUN", help="the encoders of a trained run instead")
    p.add_argument("--protocol", help="official, tenth or video (default: RUN's, or official)")
    _set(p, "change a config key of the preset")
    _device(p)


def _to_answer(verbs: Verbs) -> None:
    """predict, bulk, export."""
    p = verbs.add("predict", "the sentiment of one clip; the video or --text may be left out")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("video", metavar="VIDEO", nargs="?", help="a clip")
    p.add_argument("--text", help="what is said in it")
    _device(p)

    p = verbs.add("bulk", "an archive of videos → Parquet; the same command goes on after a kill")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("manifest", metavar="MANIFEST", help=MANIFEST)
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--address", help="of a Ray cluster (default: this machine)")
    p.add_argument("--workers", type=int, help="models at work (default: one per core or GPU)")
    p.add_argument("--retry", action="store_true", help="answer again the parts in which rows failed")
    _device(p)

    p = verbs.add("export", "write a run as one ONNX file")
    p.add_argument("run_folder", metavar="RUN", help=TRAINED)
    p.add_argument("--out", type=file, required=True, metavar="F.onnx", help="file to write")
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--data", metavar="DIR", help="measure on these clips what the file answers differently")
    p.add_argument("--split", default="valid", help="the clips of --data to measure on (default: valid)")


def _to_show(verbs: Verbs) -> None:
    """analyze, explain, serve."""
    p = verbs.add("analyze", "the timeline of a film and its subtitles: Parquet, CSV and a page to look at")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("video", metavar="VIDEO", help="the film")
    p.add_argument("--subtitles", metavar="F", help=".srt, .ass or .vtt (default: the film's own track, else windows)")
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--shift", type=float, default=0.0, help="seconds added to the subtitles' times")
    p.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    p.add_argument("--transcribe", action="store_true", help="let faster-whisper write the lines (extra: asr)")
    p.add_argument("--asr-model", default="small", help="its size or folder (default: small)")
    p.add_argument("--cut", default="windows", help="without any words: windows or shots")
    p.add_argument("--seconds", type=float, default=5.0, help="about how long a window is (default: 5)")
    p.add_argument(
        "--track", type=int, help="which of the film's own subtitle tracks, from 0 (default: the Chinese one)"
    )
    _device(p)

    p = verbs.add("explain", "why this answer: a page with heat maps, attention, and the answer without each part")
    p.add_argument("model", metavar="RUN", help=TRAINED)
    p.add_argument("video", metavar="VIDEO", nargs="?", help="a clip")
    p.add_argument("--text", help="what is said in it")
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--method", help="ablation-cam (default), grad-cam or rollout")
    p.add_argument("--data", metavar="DIR", help="explain the worst errors on a data set instead of one clip")
    p.add_argument("--split", default="test", help="of --data (default: test)")
    p.add_argument("--worst", type=int, default=20, help="how many errors of --data (default: 20)")
    _device(p)

    p = verbs.add("serve", "answer over HTTP, with a page to try the model on a clip")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    p.add_argument("--limit", type=float, default=200.0, help="largest upload, MiB (default: 200)")
    _device(p)
