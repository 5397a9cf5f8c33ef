"""MMSA's own TFN, LMF, MulT and Self-MM trained on our feature files: test Acc-3 and macro F1, to compare with ours.

The features are those that our peers read: text and video by a run's fine-tuned encoders (audio is one step of zeros).
Self-MM reads them instead of its own BERT's. One file per seed: the first is trained with seed 0, and so on.

    senticlip features DATA --run RUN --out features0.pkl
    PYTHONPATH=src mmsa/bin/python benchmarks/mmsa_accuracy.py features0.pkl [features1.pkl …] [--models tfn,lmf]

(environment: see mmsa_parity.py). Hyperparameters are MMSA's for CH-SIMS; the best epoch is chosen on valid.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from mmsa_parity import settings
from senticlip.data.unpickle import load
from senticlip.metrics import classification, score_class

METRICS = ("accuracy", "macro_f1")


def without_sound(path: Path, folder: Path) -> Path:
    """The same file with one silent step as each clip's audio."""
    data = load(path)
    for part in data.values():
        rows = len(part["id"])
        part |= {"audio": np.zeros((rows, 1, 1), np.float32), "audio_lengths": [1] * rows}
    target = folder / "silent.pkl"
    target.write_bytes(pickle.dumps(data, protocol=4))
    return target


def run(name: str, path: Path, folder: Path, seed: int) -> dict[str, float]:
    """Train one of MMSA's models by its own trainer; returns the test metrics of its best epoch."""
    torch.cuda.set_device = lambda *_: None
    original_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    from MMSA.data_loader import MMDataLoader
    from MMSA.models import AMIO
    from MMSA.trains import ATIO
    from MMSA.utils import setup_seed

    sys.modules["MMSA.trains.singleTask.MULT"].ReduceLROnPlateau = lambda *a, verbose=None, **k: original_scheduler(
        *a, **k
    )
    paths = {"featurePath": str(path), "custom_feature": None, "feature_T": "", "feature_A": "", "feature_V": ""}
    best = folder / "model.pth"
    args = settings(name, **paths, dataset_name="sims", cur_seed=seed, model_save_path=str(best))
    if name == "self_mm":  # the file's states replace its BERT's output
        sys.modules["MMSA.models.multiTask.SELF_MM"].BertTextEncoder = lambda **_: torch.nn.Identity()
        args.update(use_bert=False)
    setup_seed(seed)
    loader = MMDataLoader(args, 0)
    args.update(train_samples=len(loader["train"].dataset))
    if name == "self_mm":
        args.update(text_out=args["feature_dims"][0])
    model, trainer = AMIO(args), ATIO().getTrain(args)
    trainer.do_train(model, loader)
    model.load_state_dict(torch.load(best, weights_only=True))
    result = trainer.do_test(model, loader["test"], mode="TEST", return_sample_results=True)
    truth, score = (np.asarray(result[key]).ravel() for key in ("Labels", "SResults"))
    return classification(np.sign(truth).astype(int) + 1, score_class(score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", type=Path, nargs="+")
    parser.add_argument("--models", default="tfn,lmf,mult,self_mm")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models.split(","):
            results = []
            for seed, features in enumerate(options.features):
                results.append(run(name, without_sound(features, Path(folder)), Path(folder), seed))
                print(
                    f"{name} {features}: " + ", ".join(f"{m} {100 * results[-1][m]:.2f}" for m in METRICS), flush=True
                )
            parts = []
            for metric in METRICS:
                values = [100 * result[metric] for result in results]
                parts.append(f"{metric} {np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}")
            print(f"MMSA's {name:7} " + ", ".join(parts) + f" ({len(results)} seeds)", flush=True)


if __name__ == "__main__":
    main()
