"""Captions of what is visible in a drawn frame.

No caption names a sentiment: models must learn what a raised corner of the mouth means.
"""

from __future__ import annotations

from senticlip.data.faces import Expression, Person, Pose
from senticlip.data.scenes import Scene


def describe(person: Person | None, scene: Scene, pose: Pose, expression: Expression) -> dict[str, str]:
    """What is visible, in words, by facet (``mouth``, ``brows``, ``hair``, ``scene``, …)."""
    words = {"scene": f"{scene.color}色的{scene.background}", "light": "光线暗" if scene.light < 0.8 else "光线亮"}
    if person is None:
        return {"mouth": "没有人脸", **words}
    mouth_cover = scene.cover if scene.cover not in (None, "贴纸") else None
    corners = "嘴角上扬" if expression.mouth > 0.3 else "嘴角下垂" if expression.mouth < -0.3 else "嘴角平直"
    words["mouth"] = f"{mouth_cover}挡住嘴" if mouth_cover else corners
    if not mouth_cover:
        words["lips"] = "嘴张大" if expression.open > 0.55 else "嘴微张" if expression.open > 0.2 else "嘴闭着"
    words["brows"] = (
        "眉毛内端压低" if expression.tilt < -0.35 else "眉毛内端上抬" if expression.tilt > 0.35
        else "眉毛高抬" if expression.lift > 0.5 else "眉毛放松"
    )  # fmt: skip
    words["eyes"] = (
        "眼睛闭着"
        if expression.lids < 0.15
        else "眼睛弯弯"
        if expression.bend > 0.4
        else "眼睛半闭"
        if expression.lids < 0.6
        else "眼睛睁开"
    )
    column = "左" if pose.x < 0.4 else "右" if pose.x > 0.6 else "中"
    row = "上" if pose.y < 0.42 else "下" if pose.y > 0.58 else "中"
    words["place"] = "脸在正中" if column + row == "中中" else f"脸在{column}{row}"
    words["size"] = "脸很大" if pose.size > 0.4 else "脸很小" if pose.size < 0.29 else "脸不大"
    words["turn"] = "头正" if abs(pose.roll) < 0.12 else "头向右歪" if pose.roll > 0 else "头向左歪"
    words["hair"] = person.style if person.style == "光头" else person.hair[:1] + "色" + person.style
    words["clothes"] = f"{person.clothes}色衣服"
    words["glasses"] = "戴眼镜" if person.glasses else "没戴眼镜"
    words["beard"] = "有胡子" if person.beard else "没有胡子"
    words["sticker"] = "贴纸挡住眉毛" if scene.cover == "贴纸" else "眉毛没被挡住"
    return words
