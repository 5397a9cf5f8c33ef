"""Chinese lines from a small grammar with negation, irony and neutral talk: a few hundred phrases, split disjointly.

A line is a topic and a clause. Topics and clauses are the phrases: each belongs to one split only. The words they are
made of are shared, or nothing could be learned: 一点也不 + 靠谱 may be in test where train has 一点也不 + 舒服 and
很 + 靠谱.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

from numpy.random import Generator

T = TypeVar("T")

GOOD = ("好", "精彩", "舒服", "靠谱")
BAD = ("差", "无聊", "难受", "离谱")
VERY = (
    ("真{}", 0.8),
    ("很{}", 0.6),
    ("特别{}", 1.0),
    ("确实{}", 0.6),
    ("太{}了", 1.0),
    ("越来越{}", 0.6),
    ("挺{}的", 0.4),
)
NOT = (("一点也不{}", 0.8), ("并不{}", 0.4), ("谈不上{}", 0.4))
IRONY = (("呵呵，可真{}", 0.8), ("{}个鬼啊", 1.0), ("还好意思说{}", 0.8))
PLACES = ("在三楼", "在路口", "在桌上", "在学校", "在隔壁", "在网上", "在车里", "在门口")
FACTS = ("昨天{}看到的", "今天{}拍的", "上午{}换的", "下午{}拿的", "周一{}订的", "刚才{}放的", "去年{}借的")
_TOPICS = (
    "这家店 那部电影 今天的课 这次旅行 新来的老师 楼下的面馆 他的方案 "
    "这个手机 昨晚的演出 你送的礼物 周末的聚会 新出的游戏 公司的食堂 她的发言 "
    "这本小说 那场比赛 这辆车 酒店的房间 小区的物业 客服的回答 地铁的早班 "
    "我的新室友 路边的小吃 这件外套 那首歌 医院的流程 晚上的直播 他做的菜 "
    "公园的花 老板的安排 这款耳机 学校的操场 网上的课程 爸爸的车位 那个展览 "
    "这条路线 邻居的小狗 理发的师傅 航班的餐食 这个软件 社团的活动 新装的空调 "
    "姐姐的婚礼 那家书店 送货的小哥 年会的节目 这部剧 实习的单位"
)
TOPICS = tuple(_TOPICS.split())
OPENERS = ("", "", "我说，", "你看，", "说起来，", "嗯，", "其实")


class Line(NamedTuple):
    """A line's text, its polarity as a CH-SIMS score, its kind (plain, negation, irony, neutral) and its phrases."""

    text: str
    score: float
    kind: str
    phrases: tuple[str, str]


class _Clause(NamedTuple):
    words: str
    score: float
    kind: str


def clauses() -> list[_Clause]:
    """All clauses of the grammar: negation flips the score, irony makes praise negative, places and facts are 0."""
    result = []
    for sign, words in ((1, GOOD), (-1, BAD)):
        for word in words:
            result += [_Clause(form.format(word), sign * score, "plain") for form, score in VERY]
            result += [_Clause(form.format(word), -sign * score, "negation") for form, score in NOT]
    result += [_Clause(form.format(word), -score, "irony") for word in GOOD for form, score in IRONY]
    result += [_Clause(form.format(place), 0.0, "neutral") for form in FACTS for place in PLACES]
    return result


class Grammar:
    """The phrases of each split, and lines made of them.

    Args:
        shares: split → share of the phrases; the same for each kind and sign of clauses.
        rng: assigns the phrases to the splits.
    """

    def __init__(self, shares: dict[str, float], rng: Generator) -> None:
        self.topics: dict[str, list[str]] = _divide([str(t) for t in rng.permutation(TOPICS)], shares)
        self.clauses: dict[str, list[_Clause]] = {split: [] for split in shares}
        all_clauses = clauses()
        for group in sorted({(c.kind, c.score > 0) for c in all_clauses}):
            members = [c for c in all_clauses if (c.kind, c.score > 0) == group]
            mixed = [members[i] for i in rng.permutation(len(members))]
            for split, part in _divide(mixed, shares).items():
                self.clauses[split] += part

    def line(self, split: str, sign: int, rng: Generator) -> Line:
        """A random line of this split whose polarity has this sign."""
        group = [c for c in self.clauses[split] if (c.score > 0) - (c.score < 0) == sign]
        clause = group[rng.integers(len(group))]
        topic = self.topics[split][rng.integers(len(self.topics[split]))]
        opener = OPENERS[rng.integers(len(OPENERS))]
        pause = "，" if clause.kind == "irony" else ""
        return Line(opener + topic + pause + clause.words, clause.score, clause.kind, (topic, clause.words))


def _divide(items: list[T], shares: dict[str, float]) -> dict[str, list[T]]:
    """Cut a list into consecutive parts by shares; the last part takes what is left."""
    parts, start = {}, 0
    for position, (split, share) in enumerate(shares.items()):
        end = len(items) if position == len(shares) - 1 else start + max(1, round(share * len(items)))
        parts[split], start = items[start:end], end
    return parts
