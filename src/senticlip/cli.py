"""The command line: one function per verb, with heavy imports inside; errors in one line."""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from senticlip import runtime
from senticlip.arguments import fail, join_text_option, parser
from senticlip.files import terminable
from senticlip.structures import SURFACE, UsageError, UserError

INTERRUPTED = {
    **dict.fromkeys(("train", "analyze"), "interrupted — rerun with --resume to continue"),
    **dict.fromkeys(("bulk", "reproduce"), "interrupted — rerun the same command to continue"),
}
"""Messages on Ctrl-C, SIGTERM or SIGHUP, for verbs whose work can be continued."""


def main(arguments: list[str] | None = None) -> None:
    """Run ``senticlip VERB …``; exit 0, 1 for bad data, 2 for wrong use, 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    options = parser().parse_args(join_text_option(sys.argv[1:] if arguments is None else arguments))
    try:
        with terminable():
            result = VERBS[options.verb](options)
        if options.json and runtime.first_process():
            # on an ASCII terminal, backslashreplace would print \xNN, which is not JSON
            is_utf8 = (sys.stdout.encoding or "utf-8").lower() in ("utf-8", "utf8")
            print(json.dumps(result, ensure_ascii=not is_utf8), flush=True)
    except KeyboardInterrupt:
        fail(INTERRUPTED.get(options.verb, "interrupted"), 130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, UserError):
            fail(str(error), error.code)
        fail(f"{type(error).__name__}: {error} — run with --debug", 1)
    sys.exit(1 if isinstance(result, dict) and result.get("problems") else 0)


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some options as keyword arguments."""
    return {name: getattr(options, name) for name in names}


def say(options: argparse.Namespace, text: str) -> None:
    """Print for people: to stderr with ``--json``, since stdout is then for the JSON object only."""
    if runtime.first_process():
        print(text, file=sys.stderr if options.json else sys.stdout, flush=True)


def demo(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip demo``."""
    runtime.setup()
    if options.pretrain:
        from senticlip.pretrain import pretrain

        return pretrain(seed=options.seed, show=lambda line: say(options, line))
    from senticlip.tables import load_preset

    config = load_preset("tiny", [f"seed={options.seed}", *options.set])
    from senticlip.demo import demo as run

    result = run(options.out, config, sound=options.sound)
    scores = f"accuracy {result['accuracy']:.3f}, macro-F1 {result['macro_f1']:.3f}"
    say(options, f"on test: {scores}; open {result['report']}")
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
    return report._asdict()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip train``."""
    from senticlip.tables import load_experiment

    config = load_experiment(options.configs, options.set)
    from senticlip.train import train as run

    result = run(config, **given(options, "data", "out", "seed", "resume", "device"))
    scores = ", ".join(f"{name} {value:.4f}" for name, value in result["valid"].items())
    say(options, f"best epoch {result['best_epoch']} (valid: {scores}); {result['seconds']:.0f} s; {options.out}")
    return {name: result[name] for name in ("best_epoch", "valid", "seconds")}


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip evaluate RUN …``: one run; two runs and their difference; or more, as seeds of one experiment."""
    from senticlip.evaluate import compare
    from senticlip.evaluate import evaluate as run

    kwargs = given(options, "data", "split", "device", "target", "precision")
    if len(options.runs) > 2:
        return _evaluate_several(options, [run(folder, **kwargs) for folder in options.runs])
    if len(options.runs) == 2:
        result = compare(*options.runs, **kwargs)
        _say_comparison(options, result)
        return result
    result = run(options.runs[0], **kwargs)
    _say_disagreement(options, result.get("disagreement"), f"{options.precision} vs. fp32", "generated clips")
    low, high = result["interval"]
    say(
        options,
        f"accuracy {result['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), n {result['n']} ({options.split})",
    )
    names = {"macro-F1": "macro_f1", "weighted F1": "weighted_f1", "Acc-2": "acc_2", "F1-2": "f1_2"}
    say(options, ", ".join(f"{name} {result[key]:.4f}" for name, key in names.items()))
    if "mae" in result:
        names = {"MAE": "mae", "Corr": "corr", "Acc-3": "acc_3", "Acc-5": "acc_5"}
        say(options, "score: " + ", ".join(f"{name} {result[key]:.4f}" for name, key in names.items()))
    if equal := result.get("equal_weights"):
        say(options, "with equal weights: accuracy {accuracy:.4f}, macro-F1 {macro_f1:.4f}".format(**equal))
    for name, row in result["per_class"].items():
        shares = "  ".join(f"{key} {row[key]:.3f}" for key in ("precision", "recall", "f1"))
        say(options, f"{name:>9}  {shares}  support {row['support']}")
    if "predictions" in result:
        say(options, f"predictions: {result['predictions']}")
    return result


def _evaluate_several(options: argparse.Namespace, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Each run, and the mean and standard deviation over all of them."""
    from senticlip.checkpoint import read_metrics
    from senticlip.data.sims import read_clips
    from senticlip.results import spread

    if len({result["target"] for result in results}) > 1:
        raise UsageError("RUN: the runs were trained on different labels — choose one with --target")
    scores = spread(results)
    _say_runs(options, results)
    configs = [read_metrics(Path(run)).get("experiment", {}) for run in options.runs]
    experiments = [config | {"seed": 0} for config in configs]
    if any(experiment != experiments[0] for experiment in experiments):
        say(options, "these runs are different experiments, not seeds of one")
    splits = [
        read_clips(options.data, options.split, config["protocol"], config["seed"]) for config in configs if config
    ]
    if len({tuple(clip.id for clip in clips) for clips in splits}) > 1:
        say(options, "each run drew its own split: the spread below includes that")
    names = {"accuracy": "accuracy", "macro-F1": "macro_f1", "weighted F1": "weighted_f1"}
    parts = [f"{name} {scores[key]['mean']:.4f} ± {scores[key]['std']:.4f}" for name, key in names.items()]
    say(options, f"mean ± standard deviation of {len(results)} runs: {', '.join(parts)}")
    return {"runs": dict(zip(options.runs, results, strict=True)), "scores": scores}


def _say_runs(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """A line for each run."""
    width = max(map(len, options.runs))
    for run, scores in zip(options.runs, results, strict=True):
        say(options, f"{run:<{width}}  accuracy {scores['accuracy']:.4f}, macro-F1 {scores['macro_f1']:.4f}")


def _say_comparison(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Two runs and their difference."""
    _say_runs(options, [result["a"], result["b"]])
    say(options, f"first minus second, on the same {result['a']['n']} clips, 95 % interval:")
    for name, key in (("accuracy", "accuracy"), ("macro-F1", "macro_f1")):
        gap = result["difference"][key]
        say(options, "{} {difference:+.4f} ({low:+.4f} to {high:+.4f}), p {p:.4f}".format(name, **gap))


def reproduce(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip reproduce``."""
    if options.seeds < 1:
        raise UsageError(f"--seeds {options.seeds}: must be at least 1")
    from senticlip.reproduce import reproduce as run

    tables = None if options.tables is None else [n for part in options.tables.split(",") if (n := part.strip())]
    kwargs = given(options, "data", "out", "preset", "seeds", "protocol", "keep", "device")
    result = run(tables=tables, overrides=options.set, **kwargs)
    say(options, f"open {result['report']}")
    return result


def features(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip features``."""
    runtime.setup()
    from senticlip.features import features as run
    from senticlip.tables import load_preset

    if options.trained and options.set:
        raise UsageError("--set: with --run, the RUN's own config applies — leave out --set or --run")
    config = load_preset(options.preset, options.set)
    if options.preset == "tiny" and not options.trained:
        say(options, "the demo's encoders know only drawn faces and made-up lines; for others, use --run or --preset")
    result = run(config=config, run=options.trained, **given(options, "data", "out", "protocol", "device"))
    say(options, f"{result['clips']} clips; {result['file']}")
    return result


def predict(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip predict``."""
    import senticlip
    from senticlip.occlusion import unread_text
    from senticlip.sources import clip_modalities

    predictor = senticlip.load(options.model, device=options.device, precision=options.precision)
    prediction = predictor(options.video, text=options.text)
    result = prediction.to_json()
    result |= {"disagreement": predictor.disagreement} if predictor.disagreement else {}
    _say_disagreement(options, predictor.disagreement, f"{options.precision} vs. fp32", "generated clips")
    parts = [f"{label} {p:.3f}" for label, p in prediction.probabilities.items()]
    parts += [] if prediction.score is None else [f"score {prediction.score:+.3f}"]
    say(options, "  ".join([prediction.label, *parts]))
    readable = " and ".join(SURFACE[name] for name in clip_modalities(predictor.model))
    for kind, is_ignored in (
        ("video", options.video and readable == "text"),
        ("text", options.text and "text" not in readable),
    ):
        if is_ignored:
            say(options, f"the {kind} is ignored: this model reads only {readable}")
    if ignored := unread_text(predictor, options.text):
        max_tokens = predictor.config.text.max_length
        say(
            options, f"the last {len(ignored)} characters of the text are ignored: this model reads {max_tokens} tokens"
        )
        result |= {"unread": len(ignored)}
    for name, probabilities in prediction.modalities.items():
        values = "  ".join(f"{k} {p:.3f}" for k, p in probabilities.items())
        say(options, f"{name:>6} alone:  {values}  (weight {prediction.weights[name]:.2f})")
    return result


def export(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip export``."""
    from senticlip.export import export as run

    result = run(options.run_folder, **given(options, "out", "int8", "data", "split"))
    pair = f"{Path(options.out).name} vs. {options.run_folder}"
    _say_disagreement(options, result.get("disagreement"), pair, f"clips of {options.data}, {options.split}")
    say(options, f"{result['file']}: {result['bytes'] / 1e6:.1f} MB")
    return result


def _say_disagreement(
    options: argparse.Namespace, disagreement: dict[str, float] | None, pair: str, clips: str
) -> None:
    """How much a reduced precision or an exported file changes, if measured."""
    if disagreement:
        flips, largest = round(disagreement["flips"] * disagreement["n"]), disagreement["max_difference"]
        say(options, f"{pair} on {disagreement['n']} {clips}: {flips} labels change, largest difference {largest:.2g}")


def analyze(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip analyze``."""
    from senticlip.analyze import analyze as run
    from senticlip.progress import counter

    started = time.monotonic()
    kwargs = given(options, *vars(options).keys() - {"verb", "json", "debug", "model", "video"})
    with counter("lines") as progress:
        errors = [row["error"] for row in run(options.model, options.video, **kwargs, progress=progress)]
    html, failed = str(Path(options.out) / "timeline.html"), [error for error in errors if error is not None]
    say(options, f"{len(errors)} segments; open {html}")
    if failed:
        say(options, f"{len(failed)} have no answer (see the column error), the first: {failed[0]}")
    seconds = round(time.monotonic() - started, 2)
    return {"segments": len(errors), "failed": len(failed), "seconds": seconds, "html": html}


def explain(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip explain RUN VIDEO`` and ``senticlip explain RUN --data DIR``."""
    if options.data is None:
        from senticlip.explain import explain as run

        result = run(options.model, **given(options, "video", "text", "out", "method", "device"))
    else:
        if options.video is not None or options.text is not None:
            raise UsageError("explain takes VIDEO and --text, or --data, but not both")
        from senticlip.explain_set import explain_set

        result = explain_set(options.model, **given(options, "data", "out", "split", "worst", "method", "device"))
    say(options, f"open {result['html']}")
    return result


def bulk(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip bulk``."""
    from senticlip.bulk import bulk as run
    from senticlip.progress import counter

    started, done, failed, first = time.monotonic(), 0, 0, None
    kwargs = given(options, "out", "address", "workers", "device", "precision", "retry")
    with counter("rows") as progress:
        for row in run(options.model, options.manifest, **kwargs, progress=progress):
            done, failed = done + (row["error"] is None), failed + (row["error"] is not None)
            first = first or row["error"]
    say(options, f"{done} done, {failed} failed; {options.out}")
    if failed:
        say(options, f"--retry tries them again; see the column error, the first: {first}")
    return {"done": done, "failed": failed, "seconds": round(time.monotonic() - started, 2)}


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """``senticlip serve``."""
    from senticlip.serve import serve as run

    def ready(url: str) -> None:
        say(options, f"open {url} (Ctrl-C to stop)")

    kwargs = given(options, "host", "port", "limit", "device", "precision")
    return {"url": run(options.model, ready=ready, **kwargs)}


VERBS = {
    "demo": demo,
    "data": data_check,
    "train": train,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "features": features,
    "predict": predict,
    "bulk": bulk,
    "export": export,
    "analyze": analyze,
    "explain": explain,
    "serve": serve,
}
