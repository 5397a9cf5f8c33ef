import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import f1_score, precision_recall_fscore_support

from senticlip import metrics

classes = st.lists(st.tuples(*[st.integers(0, 2)] * 2), min_size=1, max_size=60)


@given(classes)
@settings(deadline=None, max_examples=60)
def test_classification_agrees_with_scikit_learn(pairs):
    truth, predicted = np.array(pairs).T
    ours = metrics.classification(truth, predicted)
    for average, names in (
        ("macro", ("precision", "recall", "macro_f1")),
        ("weighted", ("weighted_precision", "weighted_recall", "weighted_f1")),
    ):
        theirs = precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)[:3]
        assert [ours[name] for name in names] == pytest.approx(theirs)
    assert ours["accuracy"] == pytest.approx((truth == predicted).mean())
    assert ours["n"] == sum(map(sum, ours["confusion"])) == len(truth)
    assert ours["ece"] is None


def test_per_class_and_confusion_by_hand():
    result = metrics.classification([0, 0, 1, 2], [0, 1, 1, 0])
    assert result["confusion"] == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert result["per_class"]["negative"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert result["per_class"]["positive"]["f1"] == 0


def test_ch_sims_majority_baseline_accuracy():
    truth = np.repeat([0, 1, 2], [248, 69, 140])
    assert metrics.classification(truth, np.zeros(457, int))["accuracy"] == pytest.approx(0.5427, abs=5e-5)


def test_calibration_error_by_hand():
    probabilities = [[0.9, 0.1, 0.0], [0.9, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]]
    result = metrics.calibration_error([0, 1, 1, 2], probabilities)
    # 0.9 twice, one right: |0.5 - 0.9| on half of the rows; 0.5 right: 0.5 on a quarter; 1.0 right: 0
    assert result == pytest.approx(0.5 * 0.4 + 0.25 * 0.5)
    assert metrics.calibration_error([0], [[1 / 3, 1 / 3, 1 / 3]]) == pytest.approx(2 / 3)


def test_calibration_error_uses_fifteen_bins():
    """Predictions are right in every second bin and wrong in the others; other bin widths would average this out."""
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 300)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    right = np.ceil(confidence * 15) % 2 == 0
    truth, gaps = np.where(right, predicted, (predicted + 1) % 3), []
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        gaps.append(abs(right[inside].sum() - confidence[inside].sum()) / 300)
    assert metrics.calibration_error(truth, probabilities) == pytest.approx(sum(gaps))


def test_regression_bins_match_mmsa():
    scores = [-2, -1, -0.7, -0.69, -0.1, -0.09, 0, 0.1, 0.11, 0.7, 0.71, 1, 3]
    assert metrics.score_class(scores).tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    assert metrics.score_class(np.array(scores, np.float32)).tolist() == metrics.score_class(scores).tolist()
    assert metrics.score_class(scores, metrics.ACC_5_BINS).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4]


def test_binary_metrics_of_a_classifier_by_hand():
    probabilities = [[0.5, 0.2, 0.3], [0.3, 0.4, 0.3], [0.1, 0.8, 0.1001], [0.2, 0.1, 0.7], [0.1, 0.6, 0.3]]
    result = metrics.binary([0, 1, 1, 2, 2], probabilities)
    # positive or not, all rows: no, no, no, yes, no; without neutral rows and neutral as an answer: no, yes, yes
    assert result["acc_2"] == pytest.approx(4 / 5)
    assert result["acc_2_nonzero"] == pytest.approx(1)
    truth, predicted = [0, 0, 0, 1, 1], [0, 0, 0, 1, 0]
    assert result["f1_2"] == pytest.approx(f1_score(truth, predicted, average="weighted"))
    assert metrics.binary([0, 2], [[0.4, 0.3, 0.3], [0.4, 0.3, 0.3]])["f1_2_nonzero"] == pytest.approx(1 / 3)


def test_regression_by_hand():
    truth, score = np.array([-1, -0.6, 0, 0, 0.4, 1]), np.array([-1.5, 0.2, -0.05, 0.3, 0.5, 0.9])
    result = metrics.regression(truth, score)
    clipped = np.clip(score, -1, 1)
    assert result["mae"] == pytest.approx(np.abs(truth - clipped).mean())
    assert result["corr"] == pytest.approx(np.corrcoef(truth, clipped)[0, 1])
    assert result["acc_3"] == pytest.approx(4 / 6)
    assert result["acc_2"] == pytest.approx(4 / 6)  # the 0 predicted as 0.3 and the -0.6 predicted as 0.2 are wrong
    assert result["acc_2_nonzero"] == pytest.approx(3 / 4)
    assert result["f1_2"] == pytest.approx(f1_score(truth > 0, score > 0, average="weighted"))
    assert metrics.regression(truth, np.zeros(6))["corr"] == 0


def test_paired_bootstrap_detects_differences_only_where_they_exist():
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 400)
    good = np.where(random.random(400) < 0.8, truth, random.integers(0, 3, 400))
    bad = np.where(random.random(400) < 0.4, truth, random.integers(0, 3, 400))
    result = metrics.paired_bootstrap(truth, good, bad)
    for name, value in result.items():
        assert value["low"] < value["difference"] < value["high"], name
        assert value["low"] > 0
        assert value["p"] == pytest.approx(1 / 4001)  # the smallest possible with 4000 random swaps
    swapped = metrics.paired_bootstrap(truth, bad, good)
    assert swapped["accuracy"]["difference"] == pytest.approx(-result["accuracy"]["difference"])
    same = metrics.paired_bootstrap(truth, good, good)
    assert same["macro_f1"] == {"difference": 0, "low": 0, "high": 0, "p": 1}


@pytest.mark.parametrize(("better", "worse"), [(1, 0), (4, 0), (6, 1), (9, 9), (16, 6)])
def test_paired_bootstrap_p_value_matches_sign_test(better, worse):
    """For accuracy: McNemar's exact test on the clips that only one system gets right."""
    truth = np.ones(60, int)
    first, second = (np.repeat([2, 1, 1], [wrong, 30, 30 - wrong]) for wrong in (worse, better))
    second = second[::-1]
    result = metrics.paired_bootstrap(truth, first, second)["accuracy"]
    exact = binomtest(better, better + worse).pvalue
    assert result["p"] == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5 + 1 / 4000)


def test_pooled_seeds_count_each_clip_once():
    random = np.random.default_rng(1)
    truth, clips = random.integers(0, 3, 100), np.arange(100)
    first, second = random.integers(0, 3, (2, 100))
    single_seed = metrics.paired_bootstrap(truth, first, second)
    copies = [np.tile(values, 5) for values in (truth, first, second)]
    pooled = metrics.paired_bootstrap(*copies, groups=np.tile(clips, 5))
    assert pooled == single_seed
    ungrouped = metrics.paired_bootstrap(*copies)
    assert ungrouped["accuracy"]["high"] - ungrouped["accuracy"]["low"] < 0.6 * (
        single_seed["accuracy"]["high"] - single_seed["accuracy"]["low"]
    )


def test_paired_bootstrap_difference_is_the_mean_over_runs():
    """One seed's system predicts a single class: macro F1 is computed for each seed, not from pooled counts."""
    random = np.random.default_rng(3)
    truth, clips = random.integers(0, 3, 90), np.arange(90)
    good, other = random.integers(0, 3, (2, 90))
    answers = [(truth, good), (np.zeros(90, int), other)]
    first, second = (np.concatenate(column) for column in zip(*answers, strict=True))
    twice, groups, runs = np.tile(truth, 2), np.tile(clips, 2), np.repeat([0, 1], 90)
    result = metrics.paired_bootstrap(twice, first, second, groups, runs)
    for name, value in result.items():
        differences = [
            metrics.classification(truth, a)[name] - metrics.classification(truth, b)[name] for a, b in answers
        ]
        assert value["difference"] == pytest.approx(np.mean(differences)), name
        assert value["low"] < value["difference"] < value["high"], name
    pooled = metrics.paired_bootstrap(twice, first, second, groups)
    assert pooled["accuracy"] == pytest.approx(result["accuracy"])
    assert abs(pooled["macro_f1"]["difference"] - result["macro_f1"]["difference"]) > 0.02


def test_interval_matches_row_by_row_resampling():
    random = np.random.default_rng(2)
    truth, predicted = random.integers(0, 3, (2, 120))
    low, high = metrics.bootstrap_interval(truth, predicted)["macro_f1"]
    rows = random.integers(0, 120, (1000, 120))
    resampled = [f1_score(truth[r], predicted[r], average="macro") for r in rows]
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.015)


def test_intervals_match_normal_approximation_on_many_rows():
    """Half their width is 1.96 standard errors, within 5 %: about twice the error that 4000 resamplings leave."""
    random = np.random.default_rng(4)
    truth, first, second = random.integers(0, 3, (3, 1000))
    differences = (first == truth).astype(float) - (second == truth)
    result = metrics.paired_bootstrap(truth, first, second)["accuracy"]
    low, high = metrics.bootstrap_interval(truth, first)["accuracy"]
    for rows, width in ((differences, result["high"] - result["low"]), (first == truth, high - low)):
        assert width / 2 == pytest.approx(1.96 * np.std(rows) / 1000**0.5, rel=0.05)
