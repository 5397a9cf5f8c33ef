"""The generated data set: its clips match its own description, and its splits have nothing in common."""

from collections import Counter

import pytest

from senticlip.data import made
from senticlip.data.lines import clauses
from senticlip.data.sims import read_clips
from senticlip.structures import polarity

SPLITS = {"train": 100, "valid": 50, "test": 100}


def test_clauses_have_expected_scores():
    scores = {clause.words: clause.score for clause in clauses()}
    assert len(scores) == len(clauses())  # no two clauses have the same words
    good = {"真好": 0.8, "特别精彩": 1.0, "挺舒服的": 0.4, "并不无聊": 0.4, "一点也不差": 0.8}
    bad = {
        "真差": -0.8,
        "太难受了": -1.0,
        "一点也不好": -0.8,
        "谈不上靠谱": -0.4,
        "呵呵，可真好": -0.8,
        "精彩个鬼啊": -1.0,
    }
    assert {words: scores[words] for words in good | bad} == good | bad
    assert scores["昨天在三楼看到的"] == 0


def test_splits_share_no_person_background_or_phrase():
    plans = made.plan(SPLITS, 3)
    assert Counter(plan.split for plan in plans) == SPLITS
    assert plans == made.plan(SPLITS, 3) != made.plan(SPLITS, 4)
    for attribute in (
        lambda plan: plan.video_id,
        lambda plan: plan.person,
        lambda plan: plan.backdrop,
        lambda plan: plan.line.phrases[0],
        lambda plan: plan.line.phrases[1],
    ):
        values_by_split = [{attribute(plan) for plan in plans if plan.split == split} for split in SPLITS]
        assert sum(map(len, values_by_split)) == len(set.union(*values_by_split))


def test_face_decides_the_label_and_shares_match_the_table():
    plans = [plan for plan in made.plan(SPLITS, 3) if plan.split == "test"]
    assert all(plan.joint == (plan.vision or plan.line.score) for plan in plans)
    signs = Counter((polarity(plan.line.score) - 1, polarity(plan.vision) - 1) for plan in plans)
    assert signs == {cell: round(100 * share) for cell, share in made.JOINT.items()}
    kinds = Counter(plan.kind for plan in plans)
    assert kinds == {"agree": 22, "words": 26, "face": 22, "conflict": 12, "neutral": 18}
    assert made.best(plans) == {"text": 0.66, "video": 0.74, "fused": 1.0}
    for n in (7, 13, 41):  # fractions of a clip: the largest remainders are rounded up
        counts = made._quota(n)
        assert sum(counts.values()) == n
        excess = {cell: count - made.JOINT[cell] * n for cell, count in counts.items()}
        assert all(abs(gap) < 1 for gap in excess.values())
        assert max(excess.values()) - min(excess.values()) <= 1 + 1e-9  # no smaller remainder was rounded up instead


def test_folder_matches_the_plan_and_is_made_once(tmp_path):
    splits, progress = {"train": 3, "valid": 2, "test": 2}, []

    def make(**options):
        progress.clear()
        return made.make(tmp_path / "d", 1, splits=splits, workers=1, progress=lambda *n: progress.append(n), **options)

    truth = make()
    assert progress[-1] == (7, 7)
    plans = made.plan(splits, 1)
    for clip, plan in zip(read_clips(tmp_path / "d"), plans, strict=True):
        assert (clip.id, clip.text, clip.split) == (f"{plan.video_id}/{plan.clip_id}", plan.line.text, plan.split)
        expected = {"M": plan.joint, "T": plan.line.score, "A": plan.audio, "V": plan.vision}
        assert clip.labels == pytest.approx(expected)
        assert truth["clips"][clip.id]["kind"] == plan.kind
    assert make() == truth == made.read_truth(tmp_path / "d")
    assert progress == []
    assert make(sound=True)["spec"]["sound"]
    assert progress[-1] == (7, 7)
