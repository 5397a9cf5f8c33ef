"""Training time of TFN, LMF, MulT and Self-MM: MMSA's own code against ours, in one run.

Same hyperparameters (MMSA's for CH-SIMS), same generated features (39×768, 400×33, 55×709; lengths as in CH-SIMS: on
average a third of the longest), one thread, fp32, each in its own process. Timed are MMSA's own epoch loop
(``do_train`` on its own loader) and ours (the same batches, loss and optimizer step as ``senticlip train``). For
Self-MM, both have a frozen text encoder: MMSA recomputes its BERT (a small one here), ours reads cached states.

    PYTHONPATH=src mmsa/bin/python benchmarks/mmsa_speed.py [--rows 256] [--models tfn,lmf,mult,self_mm]

(environment: see mmsa_parity.py). Prints CPU seconds per epoch of 1368 rows and the ratio theirs / ours.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

DIMS = {"text": 768, "audio": 33, "vision": 709}
STEPS = {"text": 39, "audio": 400, "vision": 55}
EPOCH = 1368


def make(folder, rows):
    """One feature file for both."""
    random = np.random.default_rng(0)
    data = {}
    for split, count in (("train", rows), ("valid", 16), ("test", 16)):
        relative_length = np.clip(random.gamma(4, 1 / 12, count), 0.08, 1.0)  # of the longest clip: mean 1/3
        relative_length[0] = 1.0
        part = {"id": [f"{split}{i}" for i in range(count)], "raw_text": ["话"] * count}
        for name, steps in STEPS.items():
            lengths = np.maximum((relative_length * steps).astype(int), 5)
            values = random.normal(size=(count, steps, DIMS[name])).astype(np.float32)
            values[np.arange(steps) >= lengths[:, None]] = 0
            part |= {name: values, f"{name}_lengths": lengths.tolist()}
        ids = random.integers(5, 100, (count, 39))
        real = np.arange(39) < np.array(part["text_lengths"])[:, None]
        part["text_bert"] = np.stack([ids * real, real, np.zeros_like(ids)], 1).astype(np.float32)
        for target in ("", "_T", "_A", "_V"):
            part[f"regression_labels{target}"] = (random.integers(-5, 6, count) / 5).astype(np.float32)
        data[split] = part
    path = Path(folder) / "features.pkl"
    path.write_bytes(pickle.dumps(data, protocol=4))
    return path


class Stop(Exception):
    """Raised when MMSA's first epoch is over and its validation would begin."""


def theirs(name, path, folder):
    """CPU seconds of MMSA's first epoch (including its loader's workers)."""
    import resource

    torch.cuda.set_device = lambda *_: None
    original_scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
    from MMSA.data_loader import MMDataLoader
    from MMSA.models import AMIO
    from MMSA.trains import ATIO

    from mmsa_parity import settings, tiny_bert

    # by sys.modules, since the package's attribute of this name is the class in the module
    sys.modules["MMSA.trains.singleTask.MULT"].ReduceLROnPlateau = lambda *a, verbose=None, **k: original_scheduler(
        *a, **k
    )
    paths = {"featurePath": str(path), "custom_feature": None, "feature_T": "", "feature_A": "", "feature_V": ""}
    args = settings(name, **paths, dataset_name="sims", cur_seed=1, model_save_path=str(Path(folder) / "m.pth"))
    args["train_samples"] = len(pickle.loads(Path(path).read_bytes())["train"]["id"])
    if name == "self_mm":
        args.update(use_finetune=False, pretrained=tiny_bert(Path(folder) / "bert"))
    loader = MMDataLoader(args, 4)  # MMSA_run's own default
    model, trainer = AMIO(args), ATIO().getTrain(args)

    def stop(*_, **__):
        raise Stop

    trainer.do_test = stop

    def cpu_seconds():
        return sum(resource.getrusage(who)[0] + resource.getrusage(who)[1] for who in (0, -1))

    started = cpu_seconds()
    try:
        trainer.do_train(model, loader)
    except Stop:
        return cpu_seconds() - started
    raise RuntimeError("MMSA's epoch did not end where it was expected to")


def our_epoch(name, path, folder):
    """CPU seconds of our first epoch: gathering batches, forward, loss, backward, fused AdamW."""
    from senticlip.config import load
    from senticlip.data.loader import ClipSet, to_batch
    from senticlip.data.mmsa import read_features
    from senticlip.models import MODELS

    root = Path(__file__).parent.parent / "experiments" / "peers"
    config = load(root / f"{name}.yaml", ["modalities=[text,vision,audio]"])
    features = read_features(path, Path(folder) / "cache")
    train_indices = np.array([i for i, clip in enumerate(features.clips) if clip.split == "train"])
    data = ClipSet(
        [features.clips[i] for i in train_indices],
        {n: features.choose(n, [features.clips[i] for i in train_indices]) for n in DIMS},
    )
    torch.manual_seed(0)
    network = MODELS[name](config, DIMS).train()
    if hasattr(network, "prepare"):
        network.prepare(data)
    train = config.train
    groups = network.param_groups(config) if hasattr(network, "param_groups") else network.parameters()
    optimizer = torch.optim.AdamW(groups, lr=train.lr, weight_decay=train.weight_decay, fused=True)
    started = time.process_time()
    batches = torch.randperm(len(data)).split(train.batch_size)
    for i, rows in enumerate(batches, 1):
        batch = to_batch(data.__getitems__(rows.tolist()))
        loss, _ = network.loss(network(batch), batch)
        (loss / train.accumulation).backward()
        if i % train.accumulation == 0 or i == len(batches):
            optimizer.step()
            optimizer.zero_grad()
    return time.process_time() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--models", default="tfn,lmf,mult,self_mm")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "MODEL", "FILE"), help="used by the run itself")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.one:
            who, name, path = options.one
            print(json.dumps({"theirs": theirs, "ours": our_epoch}[who](name, path, folder)))
            return
        path, ratios = make(folder, options.rows), []
        print(f"CPU seconds per epoch, scaled from {options.rows} rows to {EPOCH}; torch {torch.__version__}, 1 thread")
        for name in options.models.split(","):
            seconds = {}
            for who in ("theirs", "ours"):
                command = [sys.executable, __file__, "--one", who, name, str(path)]
                process = subprocess.run(command, capture_output=True, text=True, check=False)
                if process.returncode:
                    sys.exit(process.stderr)
                seconds[who] = float(process.stdout.strip().splitlines()[-1]) * EPOCH / options.rows
            ratios.append(seconds["theirs"] / seconds["ours"])
            print(f"{name:8} MMSA {seconds['theirs']:8.1f}   ours {seconds['ours']:8.1f}   ratio {ratios[-1]:5.1f}×")
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"geometric mean {mean:.1f}×, least {min(ratios):.1f}×")


if __name__ == "__main__":
    main()
