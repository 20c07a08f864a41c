"""A picture of a battle, of SMAX or StarCraft II: who is whose, how healthy, and attacks whom.

Ours are blue, enemies orange. A bar over each unit is its health, a line leads to what it attacks,
a cross marks where one fell, and the top line says what stands where and, at last, who won.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, TOP = 480, 40  # pixels of the map, and of the line above it
SMALLEST = 9  # pixels, the least radius of a unit
BACKGROUND, GRID, INK, GREY = "#f4f4f0", "#e3e3dc", "#222222", "#a8a8a0"
OURS, ENEMIES = "#1f5fbf", "#e07b00"
HEALTH = ((0.5, "#2ca02c"), (0.25, "#d4a800"), (0.0, "#d62728"))  # more than this share: colour


class Unit(NamedTuple):
    """What a picture shows of a unit in a battle; lengths as on the map."""

    x: float
    y: float
    radius: float
    health: float  # share of its full health, 0: dead
    ours: bool
    name: str  # a letter for its type
    target: int | None  # index of the unit that it attacks now


def units_of_smax(env, state) -> list[Unit]:
    """Every unit in a state of JaxMARL's environment, arrays of one episode; ours first."""
    ours, place, kind = env.num_allies, state.unit_positions, state.unit_types
    health = state.unit_health / np.asarray(env.unit_type_health)[kind]
    reach = np.asarray(env.unit_type_attack_ranges)[kind]
    radius = np.asarray(env.unit_type_radiuses)[kind]
    attacks = state.prev_attack_actions - env.num_movement_actions  # 0: the first of the others
    units = []
    for i, attack in enumerate(attacks):
        target = attack + ours if i < ours else ours - 1 - attack
        shoots = attack >= 0 and np.linalg.norm(place[i] - place[target]) < reach[i]
        left = float(health[i]) if state.unit_alive[i] else 0.0
        at = (float(place[i, 0]), float(place[i, 1]), float(radius[i]))
        name = env.unit_type_shorthands[kind[i]]
        units.append(Unit(*at, left, i < ours, name, int(target) if shoots else None))
    return units


def living_of_smax(env, state: np.ndarray) -> list[Unit]:
    """The units of a global state (S,), also of an imagined one; without health they are dead."""
    size, units = len(env.own_features), []
    count = env.num_allies + env.num_enemies
    for i, x in enumerate(state[: count * size].reshape(count, size)):
        kind, left = int(x[4:].argmax()), float(x[0].clip(0, 1))  # after position and cooldown
        at = (float(x[1]), float(x[2]), float(env.unit_type_radiuses[kind]))
        name = env.unit_type_shorthands[kind]
        units += [Unit(*at, left, i < env.num_allies, name, None)] if left > 0.01 else []
    return units


def film(scenes: list[list[list[Unit]]]) -> list[list[np.ndarray]]:
    """Pictures of sequences of moments, all of the same part of the map."""
    view = view_of([unit for scene in scenes for units in scene for unit in units])
    return [[draw(units, view, k, False) for k, units in enumerate(scene)] for scene in scenes]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font."""
    return ImageFont.load_default(size)


def view_of(units: list[Unit]) -> tuple[float, float, float]:
    """The square of the map (left, bottom, side) that shows all these units."""
    if not units:
        return 0, 0, 32
    xs, ys = [u.x for u in units], [u.y for u in units]
    side = 4 + max(max(xs) - min(xs), max(ys) - min(ys))
    return (min(xs) + max(xs) - side) / 2, (min(ys) + max(ys) - side) / 2, side


def draw(units: list[Unit], view: tuple[float, float, float], step: int, ended: bool):
    """The picture (TOP+SIDE,SIDE,3) uint8 of one moment.

    Args:
        units: of both sides, the dead too.
        view: the square of the map that is shown: left, bottom, side, in the units' lengths.
        step: steps played so far. ended: the episode is over.
    """
    image = Image.new("RGB", (SIDE, SIDE + TOP), BACKGROUND)
    pen, (left, bottom, side) = ImageDraw.Draw(image), view
    scale = SIDE / side

    def place(unit: Unit) -> tuple[float, float]:  # y points upwards on the map
        return (unit.x - left) * scale, TOP + SIDE - (unit.y - bottom) * scale

    for k in range(-4, int(side) + 5, 4):
        x, y = (k - left % 4) * scale, TOP + SIDE - (k - bottom % 4) * scale
        pen.line((x, TOP, x, TOP + SIDE), GRID)
        pen.line((0, y, SIDE, y), GRID)
    for unit in units:
        if unit.health <= 0:
            (x, y), r = place(unit), SMALLEST / 2
            pen.line((x - r, y - r, x + r, y + r), GREY, 2)
            pen.line((x - r, y + r, x + r, y - r), GREY, 2)
    for unit in units:
        if unit.health > 0 and unit.target is not None:
            pen.line((*place(unit), *place(units[unit.target])), OURS if unit.ours else ENEMIES, 2)
    for unit in units:
        if unit.health > 0:
            draw_unit(pen, unit, *place(unit), max(SMALLEST, unit.radius * scale))
    draw_line(pen, units, step, ended)
    return np.asarray(image)


def draw_unit(pen: ImageDraw.ImageDraw, unit: Unit, x: float, y: float, r: float) -> None:
    """A living unit: a disc with the letter of its type, and its health above."""
    pen.ellipse((x - r, y - r, x + r, y + r), OURS if unit.ours else ENEMIES, INK)
    pen.text((x, y), unit.name, "white", font(13), anchor="mm")
    colour = next(colour for least, colour in HEALTH if unit.health > least)
    left, top, right = x - r - 2, y - r - 8, x + r + 2
    pen.rectangle((left, top, right, top + 5), "white", INK)
    pen.rectangle((left + 1, top + 1, left + 1 + (right - left - 2) * unit.health, top + 4), colour)


def draw_line(pen: ImageDraw.ImageDraw, units: list[Unit], step: int, ended: bool) -> None:
    """The top line: both sides' living units, the step, and the outcome once it is known."""
    pen.rectangle((0, 0, SIDE, TOP - 1), "white")
    alive = {ours: sum(u.health > 0 for u in units if u.ours == ours) for ours in (True, False)}
    for x, ours, name in ((12, True, "ours"), (112, False, "enemies")):
        pen.ellipse((x, 13, x + 14, 27), OURS if ours else ENEMIES, INK)
        pen.text((x + 20, TOP / 2), f"{name} {alive[ours]}", INK, font(15), anchor="lm")
    pen.text((250, TOP / 2), f"step {step}", INK, font(15), anchor="lm")
    if ended:
        won, lost = not alive[False] and alive[True], not alive[True]
        text, colour = ("WON", "#2ca02c") if won else ("LOST" if lost else "TIME IS UP", "#d62728")
        pen.text((SIDE - 12, TOP / 2), text, colour, font(22), anchor="rm")
