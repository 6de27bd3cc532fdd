"""Draws street scenes with label and instance maps in the folder layout of Cityscapes: the project's default data.

    python tools/streets.py datasets/streets --train 320 --val 64

A scene is a street in perspective, seen by a pinhole camera at the height of a driver: sky, buildings, walls, fences
and trees on both sides, sidewalks, poles with lights and signs, people and vehicles, painted from far to near. All 19
classes that Cityscapes evaluates occur often enough to be learned. Light, haze, texture and noise vary between scenes.
The same seed gives the same bytes. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from functools import partial
from multiprocessing import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch import OneLineParser, UsageError, available_cpus, exit_status  # isort: skip

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

# Cityscapes label ids
EGO, STATIC, ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE = 1, 4, 7, 8, 11, 12, 13, 17
LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER = 19, 20, 21, 22, 23, 24, 25
CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE = 26, 27, 28, 31, 32, 33

# Strength of the grain of each class, in grey levels: leaves are rough, sky and paint are smooth.
GRAIN = {
    ROAD: 7,
    SIDEWALK: 9,
    BUILDING: 8,
    WALL: 12,
    FENCE: 9,
    VEGETATION: 26,
    TERRAIN: 17,
    SKY: 2,
    PERSON: 7,
    RIDER: 7,
}
DEFAULT_GRAIN = 4
CAMERA_HEIGHT_M = 1.5
FAR_M = 120.0
Colour = tuple[int, int, int]
Range = tuple[float, float]


class Scene:
    """An image, its label ids and its instance ids, drawn together. Points are in metres, seen from the camera."""

    def __init__(self, height: int, width: int, rng: np.random.Generator):
        self.height, self.width, self.rng = height, width, rng
        self.focal = 0.75 * width
        self.centre_x = width * rng.uniform(0.4, 0.6)
        self.horizon = height * rng.uniform(0.36, 0.48)
        self.image = Image.new("RGB", (width, height))
        self.labels = Image.new("L", (width, height), SKY)
        self.instances = Image.new("I", (width, height), SKY)
        self.draws = [ImageDraw.Draw(plane) for plane in (self.image, self.labels, self.instances)]
        self.counts: dict[int, int] = {}

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Pixel of the point x metres to the right, y above the ground, z ahead."""
        return self.centre_x + self.focal * x / z, self.horizon + self.focal * (CAMERA_HEIGHT_M - y) / z

    def new_instance(self, label: int) -> int:
        """The instance id of the next object of a class: label id x 1000 + number, as in Cityscapes."""
        self.counts[label] = self.counts.get(label, -1) + 1
        return label * 1000 + self.counts[label]

    def shape(
        self, kind: str, points: list[tuple[float, float]], colour: Colour, label: int, instance: int = 0
    ) -> None:
        """A polygon, or the ellipse in the box of two points, in pixels. Label 0 paints only the image."""
        fills = (colour, label, instance or label)
        for draw, fill in zip(self.draws if label else self.draws[:1], fills):
            if kind == "polygon":
                draw.polygon(points, fill=fill)
            else:
                (x0, y0), (x1, y1) = points
                draw.ellipse([min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)], fill=fill)

    def quad(self, corners: list[tuple[float, float, float]], colour: Colour, label: int, instance: int = 0) -> None:
        """A polygon given by its corners in metres."""
        self.shape("polygon", [self.project(*corner) for corner in corners], colour, label, instance)

    def front(self, z: float, points: list[Range], colour: Colour, label: int, instance: int = 0) -> None:
        """A polygon that faces the camera, by (x, y)."""
        self.quad([(x, y, z) for x, y in points], colour, label, instance)

    def face(
        self, x: float, y: float, z: float, width: float, height: float, colour: Colour, label: int, instance: int = 0
    ) -> None:
        """A rectangle that faces the camera; (x, y) is the middle of its lower edge."""
        left, right = x - width / 2, x + width / 2
        self.front(z, [(left, y), (right, y), (right, y + height), (left, y + height)], colour, label, instance)

    def wall(self, x: float, y: Range, z: Range, colour: Colour, label: int, instance: int = 0) -> None:
        """An upright rectangle along the street, from y[0] to y[1] above the ground and z[0] to z[1] ahead."""
        corners = [(x, y[0], z[0]), (x, y[0], z[1]), (x, y[1], z[1]), (x, y[1], z[0])]
        self.quad(corners, colour, label, instance)

    def ground(self, x: Range, z: Range, colour: Colour, label: int) -> None:
        """A rectangle on the ground, from x[0] to x[1] to the right and z[0] to z[1] ahead."""
        self.quad([(x[0], 0, z[0]), (x[1], 0, z[0]), (x[1], 0, z[1]), (x[0], 0, z[1])], colour, label)

    def disc(
        self, x: float, y: float, z: float, width: float, height: float, colour: Colour, label: int, instance: int = 0
    ):
        """An upright ellipse that faces the camera; (x, y) is its centre."""
        box = [self.project(x - width / 2, y + height / 2, z), self.project(x + width / 2, y - height / 2, z)]
        self.shape("ellipse", box, colour, label, instance)


def shade(colour, factor: float) -> Colour:
    """The colour, lighter or darker."""
    return tuple(int(np.clip(v * factor, 0, 255)) for v in colour)


def vary(rng: np.random.Generator, colour, amount: float = 18) -> Colour:
    """A similar colour."""
    return tuple(int(np.clip(v + d, 0, 255)) for v, d in zip(colour, rng.normal(0, amount, 3)))


def pick(rng: np.random.Generator, options):
    """One of the options."""
    return options[int(rng.integers(len(options)))]


# ---------------------------------------------------------------------------------------------- ground and street sides


def draw_sky(scene: Scene) -> None:
    """A vertical gradient with clouds."""
    rng = scene.rng
    top = np.array(
        pick(rng, [(70, 120, 200), (120, 150, 190), (165, 170, 178), (95, 115, 150), (190, 170, 160)]), float
    )
    ramp = np.linspace(0, 1, scene.height)[:, None, None] ** 0.8
    pixels = np.broadcast_to(top * (1 - ramp) + np.array([225, 228, 232]) * ramp, (scene.height, scene.width, 3))
    scene.image.paste(Image.fromarray(pixels.astype(np.uint8)))
    for _ in range(int(rng.integers(0, 7))):
        x, y = rng.uniform(0, scene.width), rng.uniform(0, scene.horizon)
        w, h = rng.uniform(0.05, 0.3) * scene.width, rng.uniform(0.01, 0.05) * scene.height
        scene.shape("ellipse", [(x - w, y - h), (x + w, y + h)], vary(rng, (226, 228, 232), 6), 0)


def draw_ground(scene: Scene, road_m: float, walk_m: float) -> None:
    """Terrain or paving up to the horizon, sidewalks with a kerb, the road with its markings; half widths in metres."""
    rng = scene.rng
    depth = (0.8, 400)
    grass = vary(rng, pick(rng, [(88, 118, 52), (120, 125, 70), (105, 92, 62)]))
    paving = vary(rng, (150, 142, 138), 10)
    asphalt = vary(rng, pick(rng, [(84, 84, 88), (104, 102, 100), (70, 72, 78)]), 6)
    for side in (-1, 1):
        if rng.random() < 0.6:
            scene.ground((side * walk_m, side * 90.0), depth, grass, TERRAIN)
        else:
            scene.ground((side * walk_m, side * 90.0), depth, shade(paving, 0.9), SIDEWALK)
        scene.ground((side * road_m, side * walk_m), depth, paving, SIDEWALK)
    scene.ground((-road_m, road_m), depth, asphalt, ROAD)
    for side in (-1, 1):  # kerb
        scene.ground((side * road_m, side * (road_m + 0.18)), depth, shade(paving, 1.2), SIDEWALK)
    white = vary(rng, (205, 205, 200), 12)
    if rng.random() < 0.8:
        z = rng.uniform(1, 4)
        while z < 70:
            scene.ground((-0.08, 0.08), (z, z + 2.5), white, 0)
            z += 6
    if rng.random() < 0.2:  # pedestrian crossing
        z = rng.uniform(7, 16)
        for x in np.arange(-road_m + 0.4, road_m - 0.4, 1.0):
            scene.ground((x, x + 0.5), (z, z + 3), white, 0)
    for _ in range(int(rng.integers(0, 5))):  # shadows and patches
        x, z = rng.uniform(-road_m, road_m), rng.uniform(4, 30)
        w, d = rng.uniform(0.5, 2.5), rng.uniform(1, 4)
        scene.ground((x, x + w), (z, z + d), shade(asphalt, rng.uniform(0.7, 1.1)), 0)


def draw_building(scene: Scene, x: float, z0: float, z1: float, facing: bool) -> None:
    """A facade along the street from z0 to z1, with rows of windows; `facing` adds the wall that faces the camera."""
    rng = scene.rng
    height = rng.uniform(5, 18)
    colour = vary(
        rng,
        pick(rng, [(150, 120, 100), (170, 160, 145), (120, 118, 122), (140, 90, 75), (195, 185, 160), (95, 100, 112)]),
    )
    glass = vary(rng, pick(rng, [(50, 58, 72), (90, 105, 120), (38, 38, 42)]), 8)
    if facing:
        scene.quad([(x, 0, z0), (x * 4, 0, z0), (x * 4, height, z0), (x, height, z0)], shade(colour, 0.75), BUILDING)
    scene.wall(x, (0, height), (z0, z1), colour, BUILDING)
    floor, gap = rng.uniform(2.6, 3.4), rng.uniform(1.8, 3.5)
    for y in np.arange(rng.uniform(0.6, 1.2), height - 2, floor):
        for z in np.arange(z0 + 0.6, z1 - 1.0, gap):
            scene.wall(x, (y, y + 1.5), (z, z + 1.0), glass, BUILDING)


def draw_barrier(scene: Scene, x: float, z0: float, z1: float, label: int) -> None:
    """A wall of stones or a fence of bars along the street."""
    rng = scene.rng
    if label == WALL:
        height, colour = (
            rng.uniform(1.8, 3.2),
            vary(rng, pick(rng, [(128, 120, 112), (150, 140, 120), (110, 105, 115)])),
        )
        scene.wall(x, (0, height), (z0, z1), colour, WALL)
        for y in np.arange(0.3, height, 0.4):  # courses of stone
            scene.wall(x, (y, y + 0.06), (z0, z1), shade(colour, 0.7), WALL)
        scene.wall(x, (height, height + 0.15), (z0, z1), shade(colour, 1.25), WALL)
        return
    height, colour = rng.uniform(1.2, 2.0), vary(rng, pick(rng, [(105, 78, 55), (60, 66, 62), (175, 172, 165)]))
    scene.wall(x, (0, height), (z0, z1), shade(colour, 0.5), FENCE)
    for z in np.arange(z0, z1, 0.5):
        scene.wall(x, (0, height), (z, z + 0.22), colour, FENCE)
    for y in (0.25, height - 0.2):
        scene.wall(x, (y, y + 0.15), (z0, z1), shade(colour, 1.2), FENCE)


def draw_foliage(scene: Scene, x: float, y: float, z: float, radius: float) -> None:
    """A cloud of leaves around a point."""
    rng = scene.rng
    base = vary(rng, pick(rng, [(62, 92, 40), (80, 108, 52), (48, 76, 44), (108, 112, 50)]), 8)
    scene.disc(x, y, z, 1.5 * radius, 1.5 * radius, shade(base, 0.8), VEGETATION)
    for _ in range(14):
        angle, distance, size = (
            rng.uniform(0, 2 * np.pi),
            radius * rng.uniform(0.2, 0.75),
            radius * rng.uniform(0.45, 0.9),
        )
        dx, dy = distance * np.cos(angle), distance * np.sin(angle)
        scene.disc(
            x + dx, y + dy, z, size, size, shade(base, 0.9 + 0.35 * dy / radius + rng.uniform(-0.1, 0.15)), VEGETATION
        )


def draw_side(scene: Scene, x: float) -> None:
    """One side of the street from far to near: buildings, walls, fences and hedges."""
    rng = scene.rng
    z = FAR_M
    previous = "gap"
    while z > 3:
        z0 = z - rng.uniform(0.16, 0.34) * z - 1.5
        kind = pick(rng, ["building"] * 4 + ["wall"] * 2 + ["fence"] * 2 + ["hedge", "gap"])
        if kind == "building":
            draw_building(scene, x, max(z0, 1.0), z, facing=previous != "building" or rng.random() < 0.5)
        elif kind in ("wall", "fence"):
            draw_barrier(scene, x, max(z0, 1.0), z, WALL if kind == "wall" else FENCE)
        elif kind == "hedge":
            for zh in np.linspace(z, max(z0, 2.0), 5):
                draw_foliage(scene, x * 1.12, rng.uniform(0.8, 1.6), zh, rng.uniform(1.2, 2.2))
        previous, z = kind, z0


# -------------------------------------------------------------------------------------------------------------- objects


def draw_tree(scene: Scene, x: float, z: float) -> None:
    """A trunk with a crown."""
    rng = scene.rng
    trunk = rng.uniform(2.0, 3.2)
    scene.face(x, 0, z, 0.35, trunk + 0.6, vary(rng, (78, 62, 50), 8), VEGETATION)
    draw_foliage(scene, x, trunk + 1.4, z, rng.uniform(1.5, 2.6))


def draw_pole(scene: Scene, x: float, z: float, kind: str) -> None:
    """A pole with a street lamp, a traffic light or a sign."""
    rng = scene.rng
    grey = vary(rng, pick(rng, [(120, 122, 122), (75, 78, 80), (160, 160, 158)]), 6)
    height = {"lamp": 6.0, "light": 3.4, "sign": 2.8}[kind] * rng.uniform(0.9, 1.15)
    scene.face(x, 0, z, 0.24, height, grey, POLE)
    if kind == "lamp":
        arm = -np.sign(x) * 1.3
        scene.front(z, [(x, height), (x + arm, height), (x + arm, height + 0.16), (x, height + 0.16)], grey, POLE)
    elif kind == "light":
        scene.face(x, height - 0.9, z - 0.02, 0.62, 1.5, (22, 24, 24), LIGHT)
        lit = int(rng.integers(3))
        for i, colour in enumerate([(235, 40, 30), (250, 180, 40), (40, 220, 110)]):
            lamp = colour if i == lit else shade(colour, 0.25)
            scene.disc(x, height + 0.36 - 0.46 * i, z - 0.03, 0.4, 0.4, lamp, LIGHT)
    else:
        draw_sign(scene, x, height, z)


def draw_sign(scene: Scene, x: float, y: float, z: float) -> None:
    """A round, square or triangular traffic sign around a point."""
    rng = scene.rng
    size = rng.uniform(0.8, 1.1)
    form = pick(rng, ["disc", "square", "triangle"])
    red, blue, yellow = (
        ((200, 30, 35), (240, 240, 235)),
        ((30, 70, 170), (40, 90, 200)),
        ((225, 200, 40), (240, 220, 60)),
    )
    rim, field = pick(rng, [red, blue, yellow])
    if form == "disc":
        scene.disc(x, y, z - 0.02, size, size, rim, SIGN)
        scene.disc(x, y, z - 0.02, 0.7 * size, 0.7 * size, field, SIGN)
    elif form == "square":
        scene.face(x, y - size / 2, z - 0.02, size, size, rim, SIGN)
        scene.face(x, y - size / 2 + 0.1, z - 0.02, size - 0.2, size - 0.2, field, SIGN)
    else:
        for s, colour in ((size, rim), (0.6 * size, field)):
            scene.front(z, [(x - 0.6 * s, y - 0.5 * s), (x + 0.6 * s, y - 0.5 * s), (x, y + 0.6 * s)], colour, SIGN)


class Thing:
    """An object with its own instance id; x and z in metres are relative to where it stands."""

    def __init__(self, scene: Scene, x: float, z: float, label: int):
        self.scene, self.x, self.z, self.label = scene, x, z, label
        self.instance = scene.new_instance(label)

    def front(self, points: list[Range], colour: Colour, z: float = 0.0) -> None:
        """A polygon that faces the camera, by (x, y)."""
        points = [(self.x + x, y) for x, y in points]
        self.scene.front(self.z + z, points, colour, self.label, self.instance)

    def face(self, x: float, y: float, width: float, height: float, colour: Colour, z: float = 0.0) -> None:
        """A rectangle that faces the camera; (x, y) is the middle of its lower edge."""
        self.scene.face(self.x + x, y, self.z + z, width, height, colour, self.label, self.instance)

    def disc(self, x: float, y: float, width: float, height: float, colour: Colour, z: float = 0.0) -> None:
        """An ellipse that faces the camera; (x, y) is its centre."""
        self.scene.disc(self.x + x, y, self.z + z, width, height, colour, self.label, self.instance)

    def wall(self, x: float, y: Range, z: Range, colour: Colour) -> None:
        """A rectangle along the street."""
        self.scene.wall(self.x + x, y, (self.z + z[0], self.z + z[1]), colour, self.label, self.instance)


def draw_figure(scene: Scene, x: float, z: float, label: int, base: float = 0.0) -> None:
    """A pedestrian, or a rider who sits at the height `base`."""
    rng = scene.rng
    thing = Thing(scene, x, z, label)
    size = rng.uniform(0.88, 1.08)
    skin = vary(rng, pick(rng, [(215, 170, 145), (150, 105, 80), (95, 66, 52)]), 6)
    coats = [(160, 40, 40), (40, 60, 120), (35, 35, 40), (190, 180, 165), (60, 110, 80), (200, 150, 50)]
    coat = vary(rng, pick(rng, coats))
    trousers = vary(rng, pick(rng, [(40, 44, 62), (30, 30, 32), (110, 95, 75)]), 8)
    hips = 0.85 * size if label == PERSON else base
    if label == PERSON:
        stride = rng.uniform(0.05, 0.25)
        for foot in (-stride, stride):
            thing.front([(-0.1, hips), (0.1, hips), (foot + 0.09, 0), (foot - 0.09, 0)], trousers)
    else:
        thing.front([(-0.16, hips), (0.16, hips), (0.2, hips - 0.45), (-0.12, hips - 0.45)], trousers)
    top = hips + 0.62 * size  # of the shoulders
    thing.front([(-0.2, hips - 0.05), (0.2, hips - 0.05), (0.25, top), (-0.25, top)], coat)
    for side in (-1, 1):
        arm = [(side * 0.2, top), (side * 0.3, top), (side * 0.38, hips), (side * 0.28, hips)]
        thing.front(arm, shade(coat, 0.8))
    thing.disc(0, top + 0.17, 0.26, 0.32, skin)
    hair = (40, 32, 28) if label == PERSON else vary(rng, pick(rng, [(220, 220, 220), (200, 40, 40), (30, 30, 30)]), 5)
    thing.disc(0, top + 0.26, 0.28, 0.2, hair)


def draw_two_wheeler(scene: Scene, x: float, z: float, label: int, ridden: bool) -> None:
    """A bicycle or a motorcycle seen from the side, with or without its rider."""
    rng = scene.rng
    thing = Thing(scene, x, z, label)
    paint = vary(rng, pick(rng, [(200, 40, 40), (40, 80, 190), (30, 30, 34), (220, 200, 60), (90, 160, 120)]))
    if label == MOTORCYCLE:
        wheel, half, hub, hub_colour = 0.66, 0.72, 0.45, (110, 110, 112)
    else:
        wheel, half, hub, hub_colour = 0.7, 0.55, 0.8, (128, 124, 120)
    for middle in (-half, half):
        thing.disc(middle, wheel / 2, wheel, wheel, (24, 24, 26))
        thing.disc(middle, wheel / 2, wheel * hub, wheel * hub, hub_colour)
    if label == MOTORCYCLE:
        thing.front([(-0.75, 0.75), (-0.5, 0.3), (0.45, 0.3), (0.6, 0.75), (0.35, 1.0), (-0.3, 0.85)], paint)
        thing.front([(-0.7, 0.78), (-0.05, 0.78), (-0.05, 0.92), (-0.7, 0.92)], (20, 20, 22))  # seat
        thing.front([(0.42, 0.9), (0.62, 0.5), (0.72, 0.5), (0.5, 1.15)], (150, 150, 152))  # fork
    else:
        thing.front([(-0.5, 0.35), (-0.18, 0.85), (0.42, 0.85), (0.02, 0.35)], paint)
        thing.front([(0.38, 0.9), (0.48, 0.4), (0.58, 0.4), (0.46, 1.08), (0.3, 1.08)], paint)
        thing.front([(-0.32, 0.9), (-0.08, 0.9), (-0.08, 1.0), (-0.32, 1.0)], (30, 26, 24))
    if ridden:
        draw_figure(scene, x - 0.1, z - 0.05, RIDER, base=0.95)


SIZES_M = {
    CAR: (1.8, 1.45, 4.2),
    TRUCK: (2.5, 3.3, 8.0),
    BUS: (2.5, 3.0, 11.0),
    TRAIN: (2.6, 3.5, 26.0),
}  # w, h, length
GREYS = [(28, 28, 30), (205, 205, 205), (110, 114, 118)]
PAINTS = {
    CAR: [(170, 25, 30), (30, 50, 120), *GREYS, (60, 96, 70), (230, 228, 220)],
    TRUCK: [(190, 185, 175), (205, 200, 200), (130, 140, 120), (170, 120, 70)],
    BUS: [(225, 190, 40), (200, 60, 40), (215, 120, 30)],
    TRAIN: [(190, 30, 40), (40, 110, 90), (30, 90, 150)],
}
LOW_M = 0.22  # between the ground and the body of a vehicle


def draw_vehicle(scene: Scene, x: float, z: float, label: int) -> None:
    """A car, truck, bus or tram: a box along the street with windows, lights and wheels."""
    rng = scene.rng
    thing = Thing(scene, x, z, label)
    size = width, height, length = [v * rng.uniform(0.93, 1.07) for v in SIZES_M[label]]
    paint = vary(rng, pick(rng, PAINTS[label]), 12)
    glass = vary(rng, (44, 54, 66), 8)
    scene.ground((x - width / 2, x + width / 2), (z - 0.4, z + length), (38, 38, 40), 0)  # shadow
    back = rng.random() < 0.5
    lamp = (190, 24, 24) if back else (245, 240, 215)
    body = 0.58 * height if label == CAR else height
    inner = -np.sign(x) * width / 2  # the visible side is the one towards the middle of the street
    thing.wall(inner, (LOW_M, body), (0, length), shade(paint, 0.8))
    draw_side_details(thing, inner, size, paint, glass)
    if label == CAR:
        draw_cabin(thing, size, body, paint, glass)
    thing.face(0, LOW_M, width, body - LOW_M, paint)
    draw_front_details(thing, size, back, paint, glass)
    for side in (-1, 1):
        thing.disc(side * 0.38 * width, LOW_M + 0.45, 0.3, 0.22, lamp, -0.02)
        thing.face(side * 0.4 * width, 0, 0.24, 0.3, (18, 18, 20), -0.01)


def draw_cabin(car: Thing, size: list[float], body: float, paint: Colour, glass: Colour) -> None:
    """Side windows, roof and rear or front window of a car, above the body."""
    width, height, length = size
    x = car.x - np.sign(car.x) * 0.4 * width  # the cabin is narrower than the body
    side = [(body - 0.12, 0), (body - 0.12, 0.85 * length), (height, 0.7 * length), (height, 0.1)]
    car.scene.quad([(x, y, car.z + z) for y, z in side], shade(glass, 0.9), car.label, car.instance)
    low, high = 0.45 * width, 0.36 * width
    car.front([(-low, body), (low, body), (high, height), (-high, height)], shade(paint, 0.9), 0.1)
    low, high = 0.39 * width, 0.32 * width
    car.front([(-low, body), (low, body), (high, height - 0.08), (-high, height - 0.08)], glass)


def draw_side_details(thing: Thing, x: float, size: list[float], paint: Colour, glass: Colour) -> None:
    """Windows, doors and wheels on the side of a vehicle."""
    _, height, length = size
    if thing.label == TRUCK:
        thing.wall(x, (1.0, height), (0, 0.78 * length), shade(paint, 0.9))
        thing.wall(x, (LOW_M, 0.8 * height), (0.8 * length, length), (70, 84, 130))
    elif thing.label == BUS:
        thing.wall(x, (0.5 * height, 0.85 * height), (0.3, length - 0.3), glass)
        for z in np.arange(1, 8) * length / 8:
            thing.wall(x, (0.5 * height, 0.85 * height), (z, z + 0.15), shade(paint, 0.7))
    elif thing.label == TRAIN:
        thing.wall(x, (0.42 * height, 0.8 * height), (0, length), (226, 226, 222))
        for i in range(12):
            thing.wall(x, (0.5 * height, 0.76 * height), ((i + 0.2) * length / 12, (i + 0.8) * length / 12), glass)
    wheels = {CAR: (0.18, 0.8), TRUCK: (0.12, 0.25, 0.88), BUS: (0.2, 0.8), TRAIN: ()}[thing.label]
    radius = 0.3 if thing.label == CAR else 0.475
    for z in (position * length for position in wheels):
        thing.wall(x, (0, 2 * radius), (z - radius, z + radius), (20, 20, 22))


def draw_front_details(thing: Thing, size: list[float], back: bool, paint: Colour, glass: Colour) -> None:
    """What is on the front or back of a vehicle, without its lights."""
    width, height, _ = size
    if thing.label == CAR:
        thing.face(0, LOW_M, width, 0.18, (34, 34, 36), -0.01)
    elif thing.label == TRUCK and back:  # two doors
        thing.face(0, 1.0, 0.94 * width, height - 1.1, shade(paint, 1.1), -0.01)
        thing.face(0, 1.0, 0.06, height - 1.1, shade(paint, 0.5), -0.01)
        thing.face(0, LOW_M, width, 0.6, (36, 36, 38), -0.01)
    elif thing.label == TRUCK:
        thing.face(0, LOW_M, width, 0.75 * height, (70, 84, 130), -0.01)
        thing.face(0, 0.48 * height, 0.88 * width, 0.24 * height, glass, -0.02)
    elif thing.label == BUS:
        thing.face(0, 0.36 * height, 0.9 * width, 0.44 * height, glass, -0.01)
        thing.face(0, 0.86 * height, 0.7 * width, 0.09 * height, (250, 170, 40), -0.01)
    else:
        thing.face(0, 0.42 * height, 0.94 * width, 0.38 * height, (226, 226, 222), -0.01)
        thing.face(0, 0.45 * height, 0.7 * width, 0.32 * height, glass, -0.02)


# ------------------------------------------------------------------------------------------------------------ the scene


def place_objects(scene: Scene, road_m: float, walk_m: float) -> None:
    """Places objects at random, and draws them from far to near."""
    rng = scene.rng
    placed = []  # (z, function that draws it)

    def place(z: float, draw, *args) -> None:
        placed.append((z, partial(draw, scene, *args)))

    def depth(near: float, far: float) -> float:
        """More objects near the camera, where they are large."""
        return float(np.exp(rng.uniform(np.log(near), np.log(far))))

    for side in (-1, 1):
        kerb, walk = side * (road_m + 0.5), walk_m - road_m
        for _ in range(int(rng.integers(1, 5))):
            z = depth(4, 45)
            place(z, draw_pole, kerb, z, pick(rng, ["lamp", "light", "light", "sign", "sign"]))
        for _ in range(int(rng.integers(0, 4))):
            z = depth(7, 60)
            place(z, draw_tree, side * (walk_m + rng.uniform(0.2, 2)), z)
        for _ in range(int(rng.integers(0, 5))):
            z = depth(4, 30)
            place(z, draw_figure, side * (road_m + rng.uniform(0.2, 0.9) * walk), z, PERSON)
        if rng.random() < 0.5:
            z = depth(4, 14)
            place(
                z,
                draw_two_wheeler,
                side * (road_m + rng.uniform(0.3, 0.8) * walk),
                z,
                pick(rng, [BICYCLE, MOTORCYCLE]),
                False,
            )
        z = depth(5, 12)
        for _ in range(int(rng.integers(0, 4))):  # parked cars
            place(z, draw_vehicle, side * (road_m - 1.1), z, CAR)
            z += rng.uniform(5.5, 12)
        lane = side * 0.28 * road_m
        if rng.random() < 0.75:
            z, label = depth(7, 26), pick(rng, [CAR, TRUCK, BUS, TRAIN, TRUCK, BUS, TRAIN])
            place(z, draw_vehicle, lane, z, label)
        if rng.random() < 0.6:
            z = depth(4.5, 14)
            place(z, draw_two_wheeler, lane + rng.uniform(-0.8, 0.8), z, pick(rng, [BICYCLE, MOTORCYCLE]), True)
    if rng.random() < 0.3:  # someone crosses
        z = depth(5, 18)
        place(z, draw_figure, rng.uniform(-road_m, road_m), z, PERSON)
    if rng.random() < 0.2:  # a bin, of a class that is not evaluated
        z, x = depth(5, 15), (walk_m - 0.6) * pick(rng, [-1, 1])
        place(z, Scene.face, x, 0, z, 0.6, 1.1, (60, 70, 60), STATIC)
    for _, draw in sorted(placed, key=lambda item: -item[0]):
        draw()


def finish(scene: Scene) -> np.ndarray:
    """Adds haze, grain, blur and light: (H, W, 3) uint8."""
    rng = scene.rng
    labels = np.array(scene.labels)
    pixels = np.array(scene.image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))).astype(np.float32)
    rows = np.arange(scene.height, dtype=np.float32)[:, None, None]
    haze = rng.uniform(0, 0.35) * np.exp(-np.abs(rows - scene.horizon) / (0.12 * scene.height))
    pixels += (np.array([205, 208, 212], np.float32) - pixels) * haze
    grain = np.full(256, DEFAULT_GRAIN, np.float32)
    for label, strength in GRAIN.items():
        grain[label] = strength
    fine = rng.standard_normal((scene.height, scene.width), np.float32)
    coarse = rng.standard_normal((scene.height // 4 + 1, scene.width // 4 + 1), np.float32)
    coarse = np.array(Image.fromarray(coarse).resize((scene.width, scene.height), Image.Resampling.BILINEAR))
    pixels += ((0.6 * fine + coarse) * grain[labels])[..., None]
    pixels += rng.normal(0, rng.uniform(1, 5), pixels.shape)
    pixels = 255 * (np.clip(pixels, 0, 255) / 255) ** rng.uniform(0.8, 1.3)
    pixels *= rng.uniform(0.65, 1.15) * rng.normal(1, 0.04, 3)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def draw_scene(height: int, width: int, key: tuple[int, ...]) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Draws the scene that `key` seeds: image ("RGB"), label ids ("L"), instance ids ("I;16")."""
    rng = np.random.default_rng(key)
    scene = Scene(height, width, rng)
    draw_sky(scene)
    road_m = rng.uniform(3.6, 6.0)
    walk_m = road_m + rng.uniform(1.8, 3.5)
    draw_ground(scene, road_m, walk_m)
    for x in np.linspace(-60, 60, 13):  # a line of trees or houses on the horizon
        if rng.random() < 0.7:
            draw_foliage(scene, x, 2, FAR_M, rng.uniform(5, 9))
    for side in (-1, 1):
        draw_side(scene, side * (walk_m + rng.uniform(1.0, 6)))
    place_objects(scene, road_m, walk_m)
    if rng.random() < 0.3:  # the bonnet of the camera car
        top = height * rng.uniform(0.9, 0.96)
        bonnet = [(0.1 * width, height), (0.25 * width, top), (0.75 * width, top), (0.9 * width, height)]
        scene.shape("polygon", bonnet, vary(rng, (50, 52, 56), 6), EGO)
    image = Image.fromarray(finish(scene))
    return image, scene.labels, Image.fromarray(np.array(scene.instances).astype(np.uint16))


def write_scene(job: tuple[Path, str, int, int, tuple[int, ...]]) -> None:
    """Draws one scene and writes its three files."""
    root, split, height, width, key = job
    city, number = "street", key[-1]
    image, labels, instances = draw_scene(height, width, key)
    name = f"{city}_{number:06d}_000019"
    image.save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", compress_level=1)
    labels.save(root / "gtFine" / split / city / f"{name}_gtFine_labelIds.png")
    instances.save(root / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png")


def write_dataset(root: Path, counts: dict[str, int], height: int, width: int, seed: int, processes: int = 1) -> None:
    """Writes `counts[split]` scenes for each split; no two scenes are the same.

    Raises UsageError if `root` exists.
    """
    if root.exists():
        raise UsageError(f"{root} exists; remove it, or give another folder")
    temporary = root.with_name(f"{root.name}.tmp{os.getpid()}")  # renamed when complete
    try:
        for kind in ("leftImg8bit", "gtFine"):
            for split in counts:
                (temporary / kind / split / "street").mkdir(parents=True)
        jobs = [
            (temporary, split, height, width, (seed, number, i))
            for number, (split, count) in enumerate(counts.items())
            for i in range(count)
        ]
        with Pool(processes) as pool:
            list(
                tqdm(
                    pool.imap_unordered(write_scene, jobs),
                    "drawing",
                    len(jobs),
                    unit="scene",
                    leave=False,
                    disable=None,
                )
            )
        temporary.rename(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of tools/streets.py."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder to write")
    parser.add_argument("--train", type=int, default=320, metavar="N", help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=64, metavar="N", help="validation scenes (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"), help="pixels (default: 256 512)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draws as the command line says."""
    args = get_args_parser().parse_args(argv)
    counts = {"train": args.train, "val": args.val}
    write_dataset(args.root, counts, *args.size, args.seed, processes=available_cpus())
    print(json.dumps({"out": str(args.root), **counts, "size": args.size, "seed": args.seed}))


if __name__ == "__main__":
    sys.exit(exit_status(main))
