"""Faces are drawn as they are told to be."""

import numpy as np
from PIL import Image

from senticlip.data import faces
from senticlip.data.scenes import Scene


def test_a_smile_is_drawn_as_one():
    random = np.random.default_rng(0)
    who = faces.Person.random(random)
    for mouth in (1.0, -1.0):
        pen = faces._Pen(Image.new("RGB", (200, 200)), faces.Pose(0.5, 0.5, 0.4), who.width)
        upper = faces._mouth(pen, who, faces.Expression(mouth=mouth))[:13, 1]  # pixels from above
        assert (upper[[0, -1]] < upper[6]).all() == (mouth > 0)


def test_boxes_are_where_they_are_called():
    random = np.random.default_rng(0)
    who, scene = faces.Person.random(random), Scene.random(random)._replace(cover=None)
    boxes = faces.draw(who, scene, faces.Pose(0.5, 0.5, 0.4), faces.Expression(), (160, 120), random).boxes
    assert boxes["brow_left"][2] < 0.5 < boxes["brow_right"][0]
    assert boxes["brow_left"][3] < boxes["mouth"][1]
