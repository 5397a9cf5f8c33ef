"""Soft targets of a training set: what a model says of clips that it has not been trained on (train.distill)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import TrainingArguments

from senticlip.checkpoint import CHECKPOINTS, as_probabilities, calibrate, outputs
from senticlip.data.loader import ClipSet
from senticlip.files import write_text
from senticlip.fit import fit
from senticlip.models.base import SentimentModel
from senticlip.progress import console
from senticlip.structures import LABELS, UserError

FOLDS = 2
ANSWERS = "answers.json"


def soft_targets(
    model: SentimentModel,
    training: ClipSet,
    valid: ClipSet,
    arguments: Callable[[Path], TrainingArguments],
    folder: Path,
    resume: bool,
) -> np.ndarray:
    """Out-of-fold probabilities of the training rows, N×C: each row's by a copy of ``model`` trained without its fold.

    A fine-tuned encoder knows its training clips by heart, wrong labels and all; one that has not seen a clip says how
    sure one can be of it (self-distillation: Furlanello et al. 2018; the folds as in stacking: Wolpert 1992).

    Args:
        model: not trained yet; it stays as it is.
        training: N rows.
        valid: chooses each copy's epoch, and calibrates it.
        arguments: of the Trainer, for the folder of a fold's checkpoints.
        folder: keeps each fold's answers and checkpoints until the training has ended.
        resume: go on with a fold that was killed, and keep those that were finished.

    Raises:
        UserError: a training set of one clip.
    """
    if len(training) < FOLDS:
        raise UserError(f"train.distill: {len(training)} training clip — give more clips, or leave it out")
    fold_of = np.random.default_rng(model.experiment.seed).permutation(len(training)) % FOLDS
    found = np.zeros((len(training), len(LABELS)), np.float32)
    for fold in range(FOLDS):
        place, held = folder / f"fold-{fold}", np.flatnonzero(fold_of == fold)
        if not (resume and (place / ANSWERS).is_file()):
            learner, options = copy.deepcopy(model), arguments(place / CHECKPOINTS)
            if options.process_index == 0:
                console.print(f"without fold {fold + 1} of {FOLDS}:", highlight=False)
            fit(learner, training.subset(np.flatnonzero(fold_of != fold)), valid, options, resume)
            calibrate(learner, valid)
            said = as_probabilities(outputs(learner, training.subset(held)))
            assert said is not None
            with options.main_process_first():  # the others read what it has written
                if options.process_index == 0:
                    write_text(place / ANSWERS, json.dumps(said.tolist()))
        found[held] = json.loads((place / ANSWERS).read_text(encoding="utf-8"))
    return found
