"""MMSA's own TFN, LMF and MulT trained on a feature file of ours: test Acc-3 and macro F1, to set beside our peers'.

The features are those that our peers read: a run's fine-tuned encoders, text and video (the sound is one step of zero).

    senticlip features DATA --run RUN --out features.pkl
    PYTHONPATH=src mmsa/bin/python benchmarks/mmsa_accuracy.py features.pkl [--seeds 3] [--models tfn,lmf,mult]

(environment: see mmsa_parity.py). The hyperparameters are its own for CH-SIMS; it chooses the epoch on valid.
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


def without_sound(path: Path, folder: Path) -> Path:
    """The same file with one silent step for each clip."""
    data = load(path)
    for part in data.values():
        rows = len(part["id"])
        part |= {"audio": np.zeros((rows, 1, 1), np.float32), "audio_lengths": [1] * rows}
    target = folder / "silent.pkl"
    target.write_bytes(pickle.dumps(data, protocol=4))
    return target


def run(name: str, path: Path, folder: Path, seed: int) -> dict[str, float]:
    """Train one of MMSA's models by its own trainer; test metrics of its best epoch."""
    torch.cuda.set_device = lambda *_: None
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    from MMSA.data_loader import MMDataLoader
    from MMSA.models import AMIO
    from MMSA.trains import ATIO
    from MMSA.utils import setup_seed

    sys.modules["MMSA.trains.singleTask.MULT"].ReduceLROnPlateau = lambda *a, verbose=None, **k: plateau(*a, **k)
    more = {"featurePath": str(path), "custom_feature": None, "feature_T": "", "feature_A": "", "feature_V": ""}
    best = folder / "model.pth"
    args = settings(name, **more, dataset_name="sims", cur_seed=seed, model_save_path=str(best))
    setup_seed(seed)
    loader = MMDataLoader(args, 0)
    model, trainer = AMIO(args), ATIO().getTrain(args)
    trainer.do_train(model, loader)
    model.load_state_dict(torch.load(best, weights_only=True))
    found = trainer.do_test(model, loader["test"], mode="TEST", return_sample_results=True)
    truth, score = (np.asarray(found[key]).ravel() for key in ("Labels", "SResults"))
    return classification(np.sign(truth).astype(int) + 1, score_class(score))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="tfn,lmf,mult")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = without_sound(options.features, Path(folder))
        for name in options.models.split(","):
            found = [run(name, path, Path(folder), seed) for seed in range(options.seeds)]
            told = []
            for metric in ("accuracy", "macro_f1"):
                values = [100 * result[metric] for result in found]
                told.append(f"{metric} {np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.2f}")
            print(f"MMSA's {name:5} " + ", ".join(told) + f" ({len(found)} seeds)", flush=True)


if __name__ == "__main__":
    main()
