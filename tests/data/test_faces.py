"""Drawn faces show the expression they are given, and the boxes of their parts are in the right places."""

import numpy as np
from PIL import Image

from senticlip.data import faces
from senticlip.data.scenes import Scene


def test_mouth_corners_follow_the_expression():
    rng = np.random.default_rng(0)
    person = faces.Person.random(rng)
    for mouth in (1.0, -1.0):
        pen = faces._Pen(Image.new("RGB", (200, 200)), faces.Pose(0.5, 0.5, 0.4), person.width)
        upper = faces._draw_mouth(pen, person, faces.Expression(mouth=mouth))[:13, 1]  # y in pixels, downwards
        assert (upper[[0, -1]] < upper[6]).all() == (mouth > 0)


def test_boxes_are_in_the_places_they_name():
    rng = np.random.default_rng(0)
    person, scene = faces.Person.random(rng), Scene.random(rng)._replace(cover=None)
    boxes = faces.draw(person, scene, faces.Pose(0.5, 0.5, 0.4), faces.Expression(), (160, 120), rng).boxes
    assert boxes["brow_left"][2] < 0.5 < boxes["brow_right"][0]
    assert boxes["brow_left"][3] < boxes["mouth"][1]
