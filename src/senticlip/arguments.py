"""The verbs of ``senticlip`` and their options. Only argparse; ``cli.py`` does the work."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from senticlip import __version__

DATA = "a CH-SIMS folder, or a .csv with path, text, label (-1 to 1, or words), and optionally split"
TRAINED = "a folder written by senticlip train"
RUN = f"{TRAINED}, or an ONNX file written by senticlip export"
MANIFEST = ".csv, .jsonl or .parquet: id, path, text or subtitles, and optionally start and end (seconds)"


def fail(message: str, code: int) -> NoReturn:
    """Print one line to stderr and exit."""
    print(f"senticlip: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """Reports wrong use in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit 2."""
        fail(f"{message} — see {self.prog} --help", 2)


def folder(name: str) -> str:
    """The argument of an option that names a folder to write to: refused if a file is in the way."""
    if not name.strip():
        raise argparse.ArgumentTypeError("no name given — is a shell variable unset?")
    for path in (Path(name), *Path(name).parents):
        if os.path.exists(path) and not os.path.isdir(path):  # Path's methods raise if a name is too long
            raise argparse.ArgumentTypeError(f"{path} is a file, not a folder")
    return name


def file(name: str) -> str:
    """The argument of an option that names a file to write."""
    if name.strip() and os.path.isdir(name):
        raise argparse.ArgumentTypeError(f"{name} is a folder, not a file")
    folder(name and str(Path(name).parent))
    return name


def join_text_option(arguments: list[str]) -> list[str]:
    """``--text -你好`` as ``--text=-你好``: argparse would take such a text for an option; subtitles often begin so."""
    result: list[str] = []
    for word in arguments:
        if result and result[-1] == "--text" and re.match("-[^-]", word):
            result[-1] += f"={word}"
        else:
            result.append(word)
    return result


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; ``options.verb`` is the chosen one."""
    top = Parser(prog="senticlip", description="Sentiment analysis of video clips with CLIP-CA-MSA")
    top.add_argument("--version", action="version", version=f"senticlip {__version__}")
    verbs = Verbs(top)
    _add_demo_data_train(verbs)
    _add_evaluate_reproduce_features(verbs)
    _add_predict_bulk_export(verbs)
    _add_analyze_explain_serve(verbs)
    for name in ("evaluate", "predict", "analyze", "bulk", "serve"):
        verbs.subparsers.choices[name].add_argument(
            "--precision", default="fp32", help="fp32, bf16 or int8 (default: fp32)"
        )
    return top


class Verbs:
    """The verbs of a parser, and the options they have in common."""

    def __init__(self, top: argparse.ArgumentParser) -> None:
        self.common = Parser(add_help=False)
        self.common.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
        self.common.add_argument("--debug", action="store_true", help="show the traceback on an error")
        self.subparsers = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(self, name: str, text: str) -> argparse.ArgumentParser:
        """Add a verb."""
        return self.subparsers.add_parser(name, help=text, description=text, parents=[self.common])


def _add_demo_data_train(verbs: Verbs) -> None:
    """demo, data check, train."""
    p = verbs.add("demo", "make a data set, train, evaluate, predict and explain: a report in under five minutes")
    p.add_argument("--out", type=folder, default="demo", help="folder to write (default: demo)")
    p.add_argument("--sound", action="store_true", help="give the clips a voice")
    p.add_argument("--pretrain", action="store_true", help="train the tiny encoders of the package, then stop")
    p.add_argument("--seed", type=int, default=0, help="random seed for the clips and the training (default: 0)")
    _add_set(p, "override a key of the tiny preset")

    data = verbs.subparsers.add_parser("data", help="inspect a data set").add_subparsers(dest="action", required=True)
    p = data.add_parser("check", help="list every problem of a data set, row by row", parents=[verbs.common])
    p.add_argument("data", metavar="DIR", help=DATA)
    p.add_argument("--protocol", default="official", help="official, tenth or video (default: official)")

    p = verbs.add("train", "train a model; the folder it writes is a complete checkpoint")
    p.add_argument("configs", metavar="CONFIG", nargs="+", help="YAML file, as in experiments/; later ones override it")
    _add_data(p)
    p.add_argument("--out", type=folder, required=True, metavar="RUN", help="folder to write")
    p.add_argument("--seed", type=int, help="overrides the config's seed")
    p.add_argument("--resume", action="store_true", help="continue a training run that was killed")
    _add_set(p, "override a config key")
    _add_device(p)


def _add_set(p: argparse.ArgumentParser, text: str) -> None:
    help_text = f"{text} (docs/configuration.md), as in --set train.epochs=5; repeat for more keys"
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=help_text)


def _add_data(p: argparse.ArgumentParser) -> None:
    p.add_argument("--data", required=True, metavar="DIR", help=DATA)


def _add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def _add_evaluate_reproduce_features(verbs: Verbs) -> None:
    """evaluate, reproduce, features."""
    p = verbs.add("evaluate", "measure a RUN on a split; with two RUNs, also their difference; with more, mean ± std")
    p.add_argument("runs", metavar="RUN", nargs="+", help="one or more folders written by senticlip train")
    _add_data(p)
    p.add_argument("--split", default="test", help="train, valid, test or all (default: test)")
    p.add_argument("--target", help="score against label M, T, A or V instead of the one it was trained on")
    _add_device(p)

    p = verbs.add("reproduce", "rerun the paper's tables over several seeds and report our numbers next to the paper's")
    _add_data(p)
    p.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="folder for runs and report; rerun to continue"
    )
    p.add_argument("--preset", default="paper", help="size of the encoders: tiny, small or paper (default: paper)")
    p.add_argument("--tables", metavar="1,5", help="which of the eight tables (default: all)")
    p.add_argument("--seeds", type=int, default=5, help="number of seeds per row (default: 5)")
    p.add_argument("--protocol", help="official, tenth (random) or video (by source video); default: the preset's")
    p.add_argument("--keep", action="store_true", help="keep all weights, not only metrics and predictions")
    _add_set(p, "override a key of the preset")
    _add_device(p)

    p = verbs.add("features", "extract features from clips into an MMSA-style file (text, audio, vision)")
    p.add_argument("data", metavar="DIR", help=DATA)
    p.add_argument("--out", type=file, required=True, metavar="F", help="file to write, a .pkl as MMSA's")
    p.add_argument("--preset", default="tiny", help="encoders to use: tiny (default; in the package), small or paper")
    p.add_argument("--run", dest="trained", metavar="RUN", help="use the encoders of a trained RUN instead")
    p.add_argument("--protocol", help="official, tenth or video (default: RUN's, or official)")
    _add_set(p, "override a key of the preset")
    _add_device(p)


def _add_predict_bulk_export(verbs: Verbs) -> None:
    """predict, bulk, export."""
    p = verbs.add("predict", "predict the sentiment of one clip; either the video or --text may be left out")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("video", metavar="VIDEO", nargs="?", help="a clip")
    p.add_argument("--text", help="the words spoken in it")
    _add_device(p)

    p = verbs.add("bulk", "process an archive of videos into Parquet; after a kill, the same command continues")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("manifest", metavar="MANIFEST", help=MANIFEST)
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--address", help="address of a running Ray cluster (default: this machine)")
    p.add_argument("--workers", type=int, help="number of worker processes (default: one per core or GPU)")
    p.add_argument("--retry", action="store_true", help="redo the parts in which rows failed")
    _add_device(p)

    p = verbs.add("export", "export a RUN as one ONNX file")
    p.add_argument("run_folder", metavar="RUN", help=TRAINED)
    p.add_argument("--out", type=file, required=True, metavar="F.onnx", help="file to write")
    p.add_argument("--int8", action="store_true", help="quantize the weights to int8")
    p.add_argument("--data", metavar="DIR", help="measure on these clips how often the exported file's answers differ")
    p.add_argument("--split", default="valid", help="split of --data to measure on (default: valid)")


def _add_analyze_explain_serve(verbs: Verbs) -> None:
    """analyze, explain, serve."""
    p = verbs.add("analyze", "analyze a film line by line: a timeline as Parquet, CSV and a web page")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("video", metavar="VIDEO", help="the film")
    p.add_argument("--subtitles", metavar="F", help=".srt, .ass or .vtt file (default: the film's track, else windows)")
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--shift", type=float, default=0.0, help="seconds to add to the subtitle times")
    p.add_argument("--resume", action="store_true", help="continue where a killed run stopped")
    p.add_argument("--transcribe", action="store_true", help="transcribe the speech with faster-whisper (extra: asr)")
    p.add_argument("--asr-model", default="small", help="faster-whisper model size or folder (default: small)")
    p.add_argument("--cut", default="windows", help="how to cut a film without subtitles: windows (default) or shots")
    p.add_argument("--seconds", type=float, default=5.0, help="approximate window length in seconds (default: 5)")
    p.add_argument(
        "--track", type=int, help="which of the film's subtitle tracks to use, from 0 (default: the Chinese one)"
    )
    _add_device(p)

    p = verbs.add("explain", "explain an answer: a page with heat maps, attention, and the answer without each part")
    p.add_argument("model", metavar="RUN", help=TRAINED)
    p.add_argument("video", metavar="VIDEO", nargs="?", help="a clip")
    p.add_argument("--text", help="the words spoken in it")
    p.add_argument("--out", type=folder, required=True, metavar="DIR", help="folder to write")
    p.add_argument("--method", help="ablation-cam (default), grad-cam or rollout")
    p.add_argument("--data", metavar="DIR", help="explain the worst errors on a data set instead of one clip")
    p.add_argument("--split", default="test", help="split of --data to explain (default: test)")
    p.add_argument("--worst", type=int, default=20, help="number of errors to explain (default: 20)")
    _add_device(p)

    p = verbs.add("serve", "serve the model over HTTP, with a page to try it on a clip")
    p.add_argument("model", metavar="RUN", help=RUN)
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0 picks a free one (default: 8000)")
    p.add_argument("--limit", type=float, default=200.0, help="largest upload in MiB (default: 200)")
    _add_device(p)
