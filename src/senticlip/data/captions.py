"""Captions of what is visible in a drawn frame.

No caption names a sentiment: models must learn what a raised corner of the mouth means.
"""

from __future__ import annotations

from senticlip.data.faces import Expression, Person, Pose
from senticlip.data.scenes import Scene


def describe(who: Person | None, scene: Scene, pose: Pose, look: Expression) -> dict[str, str]:
    """What is visible, in words, by facet (``mouth``, ``brows``, ``hair``, ``scene``, …)."""
    words = {"scene": f"{scene.color}色的{scene.background}", "light": "光线暗" if scene.light < 0.8 else "光线亮"}
    if who is None:
        return {"mouth": "没有人脸", **words}
    hidden = scene.cover if scene.cover not in (None, "贴纸") else None
    corners = "嘴角上扬" if look.mouth > 0.3 else "嘴角下垂" if look.mouth < -0.3 else "嘴角平直"
    words["mouth"] = f"{hidden}挡住嘴" if hidden else corners
    if not hidden:
        words["lips"] = "嘴张大" if look.open > 0.55 else "嘴微张" if look.open > 0.2 else "嘴闭着"
    words["brows"] = (
        "眉毛内端压低" if look.tilt < -0.35 else "眉毛内端上抬" if look.tilt > 0.35
        else "眉毛高抬" if look.lift > 0.5 else "眉毛放松"
    )  # fmt: skip
    words["eyes"] = (
        "眼睛闭着"
        if look.lids < 0.15
        else "眼睛弯弯"
        if look.bend > 0.4
        else "眼睛半闭"
        if look.lids < 0.6
        else "眼睛睁开"
    )
    column = "左" if pose.x < 0.4 else "右" if pose.x > 0.6 else "中"
    row = "上" if pose.y < 0.42 else "下" if pose.y > 0.58 else "中"
    words["place"] = "脸在正中" if column + row == "中中" else f"脸在{column}{row}"
    words["size"] = "脸很大" if pose.size > 0.4 else "脸很小" if pose.size < 0.29 else "脸不大"
    words["turn"] = "头正" if abs(pose.roll) < 0.12 else "头向右歪" if pose.roll > 0 else "头向左歪"
    words["hair"] = who.style if who.style == "光头" else who.hair[:1] + "色" + who.style
    words["clothes"] = f"{who.clothes}色衣服"
    words["glasses"] = "戴眼镜" if who.glasses else "没戴眼镜"
    words["beard"] = "有胡子" if who.beard else "没有胡子"
    words["sticker"] = "贴纸挡住眉毛" if scene.cover == "贴纸" else "眉毛没被挡住"
    return words
