"""The command line: one verb, one function; heavy imports inside them, errors in one line."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from senticlip import __version__, runtime
from senticlip.structures import UsageError, UserError


def main(arguments: list[str] | None = None) -> None:
    """Run ``senticlip VERB …``; exit 0, 1 for bad data, 2 for wrong use, 130 when interrupted."""
    options = parser().parse_args(arguments)
    try:
        result = options.run(options)
        if options.json and runtime.first_process():
            print(json.dumps(result, ensure_ascii=False), flush=True)
    except KeyboardInterrupt:
        fail("interrupted; --resume goes on where there is one", 130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, UserError):
            fail(str(error), error.code)
        fail(f"{type(error).__name__}: {error} — run with --debug", 1)
    sys.exit(1 if isinstance(result, dict) and result.get("problems") else 0)


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
    for place in (Path(name), *Path(name).parents):
        if place.exists() and not place.is_dir():
            raise argparse.ArgumentTypeError(f"{place} is a file, no folder")
    return name


def file(name: str) -> str:
    """The argument of an option that names a file to write."""
    if Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name} is a folder, no file")
    folder(str(Path(name).parent))
    return name


def say(options: argparse.Namespace, text: str) -> None:
    """Tell a person; with ``--json`` stdout stays the object's."""
    if runtime.first_process():
        print(text, file=sys.stderr if options.json else sys.stdout)


def parser() -> argparse.ArgumentParser:
    """All verbs."""
    top = Parser(prog="senticlip", description="Sentiment of video clips: CLIP-CA-MSA")
    top.add_argument("--version", action="version", version=f"senticlip {__version__}")
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object as the last line of stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(run=run)
        return sub

    p = verb("demo", demo, "make a data set, train, evaluate, predict, explain: a report in under five minutes")
    p.add_argument("--out", type=folder, default="demo", help="folder (default: demo)")
    p.add_argument("--sound", action="store_true", help="give the clips a voice")
    p.add_argument("--pretrain", action="store_true", help="train the tiny towers that ship with the package, and stop")
    p.add_argument("--seed", type=int, default=0, help="of the clips and the training (default: 0)")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the tiny preset")

    data = verbs.add_parser("data", help="look at data sets").add_subparsers(dest="action", required=True)
    p = data.add_parser("check", help="list all problems of a data set at once, by row", parents=[common])
    p.set_defaults(run=data_check)
    p.add_argument("data", metavar="DIR")
    p.add_argument("--protocol", default="official", help="official, tenth or video")

    p = verb("train", train, "train a model; its folder is a complete checkpoint")
    p.add_argument("config", metavar="CONFIG", help="a YAML file, as in experiments/")
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--out", type=folder, required=True, metavar="RUN")
    p.add_argument("--seed", type=int)
    p.add_argument("--resume", action="store_true", help="go on where a killed training stopped")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a config key")
    p.add_argument("--device", help="cpu, cuda, cuda:N (default: a GPU if there is one)")

    p = verb("evaluate", evaluate, "metrics of a run on a split; of two runs, their difference")
    p.add_argument("runs", metavar="RUN", nargs="+")
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument("--split", default="test")
    p.add_argument("--target", help="compare with label M, T, A or V instead of the one trained for")
    p.add_argument("--device")

    p = verb("reproduce", reproduce, "the paper's tables from experiments × seeds: one report beside its numbers")
    p.add_argument("--data", required=True, metavar="DIR")
    p.add_argument(
        "--out", type=folder, required=True, metavar="DIR", help="runs, report; a killed one is gone on with"
    )
    p.add_argument("--preset", default="paper", help="size of the encoders: tiny, small or paper")
    p.add_argument("--tables", metavar="1,5", help="which of the eight (default: all)")
    p.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    p.add_argument("--protocol", default="official", help="official split, a random tenth, or by source video")
    p.add_argument("--keep", action="store_true", help="keep all weights, not only metrics and predictions")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a config key of the preset")
    p.add_argument("--device")

    p = verb("features", features, "clips → an MMSA-style feature file (text, audio, vision)")
    p.add_argument("data", metavar="DIR")
    p.add_argument("--out", type=file, required=True, metavar="F")
    p.add_argument("--preset", default="tiny", help="whose encoders: tiny (ships with the package), small or paper")
    p.add_argument("--run", dest="trained", metavar="RUN", help="the encoders of a trained run instead")
    p.add_argument("--protocol", default="official", help="official, tenth or video")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a config key of the preset")
    p.add_argument("--device")

    p = verb("predict", predict, "the sentiment of one clip; the video or --text may be left out")
    p.add_argument("model", metavar="RUN")
    p.add_argument("video", metavar="VIDEO", nargs="?")
    p.add_argument("--text")
    p.add_argument("--device")

    p = verb("export", export, "write a run as one ONNX file")
    p.add_argument("run_folder", metavar="RUN")
    p.add_argument("--out", type=file, required=True, metavar="F.onnx")
    p.add_argument("--int8", action="store_true", help="weights as int8")
    p.add_argument("--data", metavar="DIR", help="measure on these clips what the file answers differently")
    p.add_argument("--split", default="valid", help="the clips of --data to measure on (default: valid)")

    p = verb("analyze", analyze, "the timeline of a film and its subtitles: Parquet, CSV and a page to look at")
    p.add_argument("model", metavar="RUN")
    p.add_argument("video", metavar="VIDEO")
    p.add_argument("--subtitles", metavar="F", help=".srt, .ass or .vtt (default: the film's own track, else windows)")
    p.add_argument("--out", type=folder, required=True, metavar="DIR")
    p.add_argument("--shift", type=float, default=0.0, help="seconds added to the subtitles' times")
    p.add_argument("--resume", action="store_true", help="go on where a killed run stopped")
    p.add_argument("--transcribe", action="store_true", help="let faster-whisper write the lines (extra: asr)")
    p.add_argument("--asr-model", default="small", help="its size or folder (default: small)")
    p.add_argument("--cut", default="windows", help="without any words: windows or shots")
    p.add_argument("--seconds", type=float, default=5.0, help="length of a window (default: 5)")
    p.add_argument("--track", type=int, help="which of the film's own subtitle tracks, from 0")
    p.add_argument("--device")

    p = verb("explain", explain, "why this answer: a page with heat maps, attention and what it hangs on")
    p.add_argument("model", metavar="RUN")
    p.add_argument("video", metavar="VIDEO", nargs="?")
    p.add_argument("--text")
    p.add_argument("--out", type=folder, required=True, metavar="DIR")
    p.add_argument("--method", help="ablation-cam (default), grad-cam or rollout")
    p.add_argument("--data", metavar="DIR", help="explain the worst errors on a data set instead of one clip")
    p.add_argument("--split", default="test", help="of --data (default: test)")
    p.add_argument("--worst", type=int, default=20, help="how many errors of --data (default: 20)")
    p.add_argument("--device")

    p = verb("bulk", bulk, "an archive of videos → Parquet; the same command goes on after a kill")
    p.add_argument("model", metavar="RUN")
    p.add_argument("manifest", metavar="MANIFEST", help=".csv, .jsonl or .parquet: id, path, text or subtitles")
    p.add_argument("--out", type=folder, required=True, metavar="DIR")
    p.add_argument("--address", help="of a Ray cluster (default: this machine)")
    p.add_argument("--workers", type=int, help="models at work (default: one per core or GPU)")
    p.add_argument("--device")

    for name in ("evaluate", "predict", "analyze", "bulk"):
        verbs.choices[name].add_argument("--precision", default="fp32", help="fp32, bf16 or int8 (default: fp32)")
    return top


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip demo``."""
    if options.pretrain:
        from senticlip.pretrain import pretrain

        return pretrain(seed=options.seed, show=lambda line: say(options, line))
    from senticlip.tables import load_preset

    config = load_preset("tiny", [f"seed={options.seed}", *options.set])
    from senticlip.demo import demo as run

    result = run(options.out, config, sound=options.sound)
    say(options, f"accuracy {result['accuracy']:.3f}, macro-F1 {result['macro_f1']:.3f}; open {result['report']}")
    return result


def data_check(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip data check``."""
    from senticlip.data.sims import check

    report = check(options.data, protocol=options.protocol)
    for kind, lines in (("problem", report.problems), ("warning", report.warnings)):
        for line in lines:
            say(options, f"{kind}: {line}")
    for split, counts in report.splits.items():
        say(options, f"{split}: {sum(counts.values())} clips ({', '.join(f'{k} {n}' for k, n in counts.items())})")
    say(options, f"{report.clips} clips, {len(report.problems)} problems, {len(report.warnings)} warnings")
    return report.to_json()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip train``."""
    from senticlip import config as configs

    config = configs.load(options.config, options.set)
    runtime.setup()
    from senticlip.train import train as run

    result = run(config, options.data, options.out, options.seed, options.resume, options.device)
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result["valid"].items())
    say(options, f"best epoch {result['best_epoch']} (valid: {scores}); {result['seconds']:.0f} s; {options.out}")
    return {name: result[name] for name in ("best_epoch", "valid", "seconds")}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip evaluate RUN`` and ``senticlip evaluate RUN_A RUN_B``."""
    from senticlip import evaluate as room

    if len(options.runs) > 2:
        raise UsageError(f"evaluate takes one RUN or two, not {len(options.runs)}")
    how = (options.data, options.split, options.device, options.target, options.precision)
    if len(options.runs) == 2:
        result = room.compare(options.runs[0], options.runs[1], *how)
        say(options, json.dumps(result["difference"], indent=1))
        return result
    result = room.evaluate(options.runs[0], *how)
    _say_disagreement(options, result.get("disagreement"))
    low, high = result["interval"]
    say(options, f"accuracy {result['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), n {result['n']}")
    say(options, f"macro-F1 {result['macro_f1']:.4f}, weighted F1 {result['weighted_f1']:.4f}")
    for name, row in result["per_class"].items():
        say(options, f"{name:>9}  " + "  ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return result


def reproduce(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip reproduce``."""
    if options.seeds < 1:
        raise UsageError(f"--seeds {options.seeds}: must be at least 1")
    runtime.setup()
    from senticlip.reproduce import reproduce as run

    tables = [number.strip() for number in options.tables.split(",")] if options.tables else None
    names = ("data", "out", "preset", "seeds", "protocol", "keep", "device")
    result = run(tables=tables, overrides=options.set, **{name: getattr(options, name) for name in names})
    say(options, f"open {result['report']}")
    return result


def features(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip features``."""
    runtime.setup()
    from senticlip.features import features as run
    from senticlip.tables import load_preset

    config = load_preset(options.preset, options.set)
    result = run(options.data, options.out, config, options.protocol, options.device, options.trained)
    say(options, f"{result['clips']} clips; {result['file']}")
    return result


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip predict``."""
    import senticlip

    predictor = senticlip.load(options.model, device=options.device, precision=options.precision)
    prediction = predictor(options.video, text=options.text)
    result = {name: value for name, value in prediction._asdict().items() if value is not None}
    result |= {"disagreement": predictor.disagreement} if predictor.disagreement else {}
    _say_disagreement(options, predictor.disagreement)
    say(options, prediction.label + "  " + "  ".join(f"{k} {p:.3f}" for k, p in prediction.probabilities.items()))
    for name, probabilities in prediction.modalities.items():
        shown = "  ".join(f"{k} {p:.3f}" for k, p in probabilities.items())
        say(options, f"{name:>6} alone says  {shown}  (weight {prediction.weights[name]:.2f})")
    return result


def export(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip export``."""
    from senticlip.export import export as run

    result = run(options.run_folder, options.out, options.int8, options.data, options.split)
    _say_disagreement(options, result.get("disagreement"))
    say(options, f"{result['file']}: {result['bytes'] / 1e6:.1f} MB")
    return result


def _say_disagreement(options: argparse.Namespace, said: dict[str, float] | None) -> None:
    """What a reduced precision changes, if it was measured."""
    if said:
        say(options, f"label flips {said['flips']:.4f}, largest difference {said['max_difference']:.2e}, n {said['n']}")


def analyze(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip analyze``."""
    from senticlip.analyze import analyze as run

    began = time.monotonic()
    names = vars(options).keys() - {"verb", "run", "json", "debug", "model", "video"}
    segments = sum(1 for _ in run(options.model, options.video, **{name: getattr(options, name) for name in names}))
    html = str(Path(options.out) / "timeline.html")
    say(options, f"{segments} segments; open {html}")
    return {"segments": segments, "seconds": round(time.monotonic() - began, 2), "html": html}


def explain(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip explain RUN VIDEO`` and ``senticlip explain RUN --data DIR``."""
    if options.data is None:
        from senticlip.explain import explain as run

        result = run(options.model, options.video, options.text, options.out, options.method, options.device)
    else:
        if options.video is not None or options.text is not None:
            raise UsageError("explain takes a VIDEO and --text, or --data, not both")
        from senticlip.explain_set import explain_set

        names = ("data", "out", "split", "worst", "method", "device")
        result = explain_set(options.model, **{name: getattr(options, name) for name in names})
    say(options, f"open {result['html']}")
    return result


def bulk(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip bulk``."""
    from senticlip.bulk import bulk as run

    began, done, failed = time.monotonic(), 0, 0
    names = ("address", "workers", "device", "precision")
    for row in run(options.model, options.manifest, options.out, **{name: getattr(options, name) for name in names}):
        done, failed = done + (row["error"] is None), failed + (row["error"] is not None)
    say(options, f"{done} done, {failed} failed; {options.out}")
    return {"done": done, "failed": failed, "seconds": round(time.monotonic() - began, 2)}
