"""The made data set: what it says of its own clips is so, and no split knows what another one shows."""

from collections import Counter

import pytest

from senticlip.data import made
from senticlip.data.lines import clauses
from senticlip.data.sims import read_clips
from senticlip.structures import polarity

SPLITS = {"train": 100, "valid": 50, "test": 100}


def test_what_is_said_is_what_it_is_scored():
    said = {clause.words: clause.score for clause in clauses()}
    assert len(said) == len(clauses())  # no clause means two things
    good = {"真好": 0.8, "特别精彩": 1.0, "挺舒服的": 0.4, "并不无聊": 0.4, "一点也不差": 0.8}
    bad = {
        "真差": -0.8,
        "太难受了": -1.0,
        "一点也不好": -0.8,
        "谈不上靠谱": -0.4,
        "呵呵，可真好": -0.8,
        "精彩个鬼啊": -1.0,
    }
    assert {words: said[words] for words in good | bad} == good | bad
    assert said["昨天在三楼看到的"] == 0


def test_no_split_shares_a_person_a_place_or_a_phrase_with_another():
    plans = made.plan(SPLITS, 3)
    assert Counter(plan.split for plan in plans) == SPLITS
    assert plans == made.plan(SPLITS, 3) != made.plan(SPLITS, 4)
    for of in (
        lambda plan: plan.video_id,
        lambda plan: plan.person,
        lambda plan: plan.backdrop,
        lambda plan: plan.line.phrases[0],
        lambda plan: plan.line.phrases[1],
    ):
        shown = [{of(plan) for plan in plans if plan.split == split} for split in SPLITS]
        assert sum(map(len, shown)) == len(set.union(*shown))


def test_the_face_has_the_last_word_and_shares_are_those_of_the_table():
    plans = [plan for plan in made.plan(SPLITS, 3) if plan.split == "test"]
    assert all(plan.joint == (plan.vision or plan.line.score) for plan in plans)
    signs = Counter((polarity(plan.line.score) - 1, polarity(plan.vision) - 1) for plan in plans)
    assert signs == {cell: round(100 * share) for cell, share in made.JOINT.items()}
    kinds = Counter(plan.kind for plan in plans)
    assert kinds == {"agree": 22, "words": 26, "face": 22, "conflict": 12, "neutral": 18}
    assert made.best(plans) == {"text": 0.66, "video": 0.74, "fused": 1.0}
    for n in (7, 13, 41):  # a share of a clip is given to those that lack most
        some = made._quota(n)
        assert sum(some.values()) == n
        more = {cell: count - made.JOINT[cell] * n for cell, count in some.items()}
        assert all(abs(gap) < 1 for gap in more.values())
        assert max(more.values()) - min(more.values()) <= 1 + 1e-9  # none got one who lacked less than another


def test_the_folder_is_what_was_planned_and_is_made_once(tmp_path):
    splits, told = {"train": 3, "valid": 2, "test": 2}, []

    def make(**options):
        told.clear()
        return made.make(tmp_path / "d", 1, splits=splits, workers=1, progress=lambda *n: told.append(n), **options)

    truth = make()
    assert told[-1] == (7, 7)
    plans = made.plan(splits, 1)
    for clip, plan in zip(read_clips(tmp_path / "d"), plans, strict=True):
        assert (clip.id, clip.text, clip.split) == (f"{plan.video_id}/{plan.clip_id}", plan.line.text, plan.split)
        wanted = {"M": plan.joint, "T": plan.line.score, "A": plan.audio, "V": plan.vision}
        assert clip.labels == pytest.approx(wanted)
        assert truth["clips"][clip.id]["kind"] == plan.kind
    assert make() == truth == made.read_truth(tmp_path / "d")
    assert told == []
    assert make(sound=True)["spec"]["sound"]
    assert told[-1] == (7, 7)
