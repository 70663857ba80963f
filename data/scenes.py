"""Procedural landscapes with captions, the training data of the embedded model.

A scene is painted from back to front: sky, sun or moon, clouds, relief, ground, accent, weather. Colours are float RGB
in [0, 1]; x and y are in [0, 1] with y pointing down. All randomness comes from one generator, so a seed always gives
the same scene.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates

__all__ = [
    "ACCENTS",
    "GROUNDS",
    "RELIEFS",
    "SKIES",
    "Attributes",
    "Scene",
    "caption",
    "draw_attributes",
    "paint",
    "scene",
    "scene_caption",
]

SIZE = 128
PREVIEW = 20  # pixels; nothing else in a scene has this number, or twice as many


Colour = tuple[float, float, float] | np.ndarray


class Sky(NamedTuple):
    """Colours of the horizon, the zenith, the clouds and the light that falls on the land."""

    horizon: Colour
    zenith: Colour
    cloud: Colour
    light: Colour
    haze: float  # how much of the horizon's colour covers distant relief
    weathers: tuple[str, ...]  # possible weathers in the caption; "" is clear


SKIES = {
    "dawn": Sky(
        horizon=(1.00, 0.78, 0.66),
        zenith=(0.60, 0.66, 0.88),
        cloud=(1.00, 0.84, 0.82),
        light=(1.00, 0.86, 0.84),
        haze=0.55,
        weathers=("", "clouds"),
    ),
    "day": Sky(
        horizon=(0.78, 0.89, 0.97),
        zenith=(0.22, 0.48, 0.84),
        cloud=(0.98, 0.98, 0.99),
        light=(1.00, 1.00, 0.98),
        haze=0.40,
        weathers=("", "clouds", "clouds", "snowfall"),
    ),
    "sunset": Sky(
        horizon=(1.00, 0.58, 0.20),
        zenith=(0.46, 0.20, 0.42),
        cloud=(0.92, 0.40, 0.36),
        light=(0.98, 0.70, 0.52),
        haze=0.45,
        weathers=("", "clouds"),
    ),
    "dusk": Sky(
        horizon=(0.66, 0.42, 0.58),
        zenith=(0.13, 0.15, 0.38),
        cloud=(0.42, 0.30, 0.46),
        light=(0.50, 0.46, 0.68),
        haze=0.45,
        weathers=("", "clouds"),
    ),
    "night": Sky(
        horizon=(0.14, 0.19, 0.34),
        zenith=(0.03, 0.04, 0.13),
        cloud=(0.20, 0.22, 0.32),
        light=(0.27, 0.32, 0.46),
        haze=0.40,
        weathers=("", "clouds", "aurora"),
    ),
    "storm": Sky(
        horizon=(0.55, 0.58, 0.58),
        zenith=(0.25, 0.28, 0.31),
        cloud=(0.36, 0.38, 0.41),
        light=(0.56, 0.60, 0.62),
        haze=0.50,
        weathers=("", "rain", "lightning"),
    ),
    "fog": Sky(
        horizon=(0.84, 0.86, 0.86),
        zenith=(0.76, 0.79, 0.81),
        cloud=(0.86, 0.87, 0.88),
        light=(0.84, 0.87, 0.88),
        haze=0.80,
        weathers=("", "snowfall"),
    ),
}
GROUNDS = ("lake", "sea", "forest", "desert", "meadow", "snowfield", "wheat field")
RELIEFS = ("", "snowy mountains", "green hills", "red cliffs", "a volcano")
ACCENTS = ("", "a lone tree", "boulders", "a cabin", "tall grass")
WATER = ("lake", "sea")


@dataclass(frozen=True)
class Attributes:
    """The attributes of a scene; all fields except `sky` and `ground` may be empty."""

    sky: str
    ground: str
    relief: str = ""
    weather: str = ""
    accent: str = ""


@dataclass(frozen=True)
class Scene:
    """A painted scene: uint8 pixels (H, W, 3), its attributes and its caption."""

    pixels: np.ndarray
    attributes: Attributes
    caption: str


def scene(seed: int, size: int = SIZE) -> Scene:
    """The scene with this seed, `size` pixels square (≥ 16); the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    attributes = draw_attributes(rng)
    return Scene(paint(attributes, rng, size), attributes, caption(attributes, rng))


def scene_caption(seed: int, size: int = SIZE) -> str:
    """The caption of `scene(seed, size)`, six times as fast.

    It depends on the state of the generator after the scene is painted, so a preview is, with the same random numbers.
    """
    rng = np.random.default_rng(seed)
    attributes = draw_attributes(rng)
    paint(attributes, _OfPreview(rng, size), PREVIEW)
    return caption(attributes, rng)


def draw_attributes(rng: np.random.Generator) -> Attributes:
    """Attributes drawn uniformly from the compatible combinations (no cabin on water)."""
    sky, ground = str(rng.choice(list(SKIES))), str(rng.choice(GROUNDS))
    accents = ("", "", "boulders", "a sailboat", "tall grass") if ground in WATER else ("", *ACCENTS)
    return Attributes(
        sky=sky,
        ground=ground,
        relief=str(rng.choice(RELIEFS)),
        weather=str(rng.choice(SKIES[sky].weathers)),
        accent=str(rng.choice(accents)),
    )


def caption(attributes: Attributes, rng: np.random.Generator | None = None) -> str:
    """'lake at sunset with snowy mountains, clouds'; with a generator, optional parts are left out at random."""
    a = attributes
    mention = (lambda p: rng.random() < p) if rng else (lambda p: True)
    text = (
        f"{a.ground} in {'a storm' if a.sky == 'storm' else a.sky}"
        if a.sky in ("storm", "fog")
        else f"{a.ground} at {a.sky}"
    )
    if a.relief and mention(0.9):
        text += f" with {a.relief}"
    return ", ".join([text, *(part for part in (a.weather, a.accent) if part and mention(0.8))])


def paint(attributes: Attributes, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """Pixels (size, size, 3), uint8, of a scene with these attributes."""
    return _Painter(attributes, rng, size).paint()


def fractal(rng: np.random.Generator, shape: tuple[int, ...], beta: float) -> np.ndarray:
    """A Gaussian field of zero mean and unit variance with amplitude spectrum |k|^-beta, periodic."""
    k = np.sqrt(sum(f**2 for f in np.meshgrid(*(np.fft.fftfreq(n) * max(shape) for n in shape), indexing="ij")))
    k.flat[0] = np.inf
    spectrum = np.fft.fftn(rng.normal(size=shape)) * k**-beta
    field = np.fft.ifftn(spectrum).real
    return np.asarray(field / field.std())


class _OfPreview(np.random.Generator):
    """Draws all random numbers of a scene of `size` pixels, and gives those that PREVIEW pixels take."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        super().__init__(rng.bit_generator)
        self._size = size

    def normal(self, loc: Any = 0.0, scale: Any = 1.0, size: Any = None) -> Any:
        return _cut(super().normal(loc, scale, self._whole(size)), size)

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        return _cut(super().random(self._whole(size), dtype, out), size)

    def integers(
        self, low: Any, high: Any = None, size: Any = None, dtype: Any = np.int64, endpoint: Any = False
    ) -> Any:
        if high != PREVIEW:
            return super().integers(low, high, size, dtype, endpoint)
        return super().integers(low, self._size, size, dtype, endpoint) % PREVIEW  # places in the picture

    def _whole(self, size: Any) -> Any:
        whole = {PREVIEW: self._size, 2 * PREVIEW: 2 * self._size}
        return None if size is None else [whole.get(n, n) for n in np.atleast_1d(size).tolist()]


def _cut(values: Any, size: Any) -> Any:
    return values if size is None else values[tuple(map(slice, np.atleast_1d(size)))]


class _Painter:
    """The canvas of one scene; each method adds one layer."""

    def __init__(self, attributes: Attributes, rng: np.random.Generator, size: int) -> None:
        self.a, self.rng, self.n = attributes, rng, size
        sky = SKIES[attributes.sky]
        horizon, zenith, cloud, light = (self._vary(colour) for colour in sky[:4])
        self.sky = Sky(horizon=horizon, zenith=zenith, cloud=cloud, light=light, haze=sky.haze, weathers=sky.weathers)
        self.y, self.x = (np.mgrid[:size, :size] + 0.5) / size
        self.horizon = rng.uniform(0.48, 0.66)
        self.sun = np.array([rng.uniform(0.08, 0.92), rng.uniform(0.08, self.horizon - 0.10)])
        self.depth = np.clip((self.y - self.horizon) / (1 - self.horizon), 0, 1)  # 0 at the horizon, 1 at the viewer
        self.image = np.zeros((size, size, 3))

    def paint(self) -> np.ndarray:
        self._paint_sky()
        if self.a.relief:
            getattr(self, "_relief_" + self.a.relief.split()[-1])()
        getattr(self, "_ground_" + self.a.ground.split()[0])()
        if self.a.accent:
            getattr(self, "_accent_" + self.a.accent.split()[-1])()
        self._paint_weather()
        vignette = 1 - 0.10 * ((self.x - 0.5) ** 2 + (self.y - 0.5) ** 2)[..., None]
        grain = self.rng.normal(0, 0.004, (self.n, self.n, 1))
        return np.asarray(np.clip(self.image * vignette + grain, 0, 1) * 255 + 0.5).astype(np.uint8)

    # -- small helpers --------------------------------------------------------------------------------------------

    def _vary(self, colour: Colour, spread: float = 0.03) -> np.ndarray:
        return np.clip(np.asarray(colour, float) + self.rng.normal(0, spread, 3), 0, 1)

    def _field(self, beta: float) -> np.ndarray:
        return fractal(self.rng, (self.n, self.n), beta)

    def _skyline(self, beta: float) -> np.ndarray:
        return fractal(self.rng, (2 * self.n,), beta)[: self.n]

    def _over(self, colour: Colour, alpha: np.ndarray) -> None:
        """Lay a colour (RGB or an image) over the canvas with coverage alpha (H, W) in [0, 1]."""
        self.image += (np.asarray(colour) - self.image) * np.clip(alpha, 0, 1)[..., None]

    def _below(self, height: float | np.ndarray) -> np.ndarray:
        """Antialiased coverage of everything below a skyline at y = height."""
        return np.asarray(np.clip((self.y - height) * self.n, 0, 1))

    def _perspective(self, field: np.ndarray, scale: float, stretch: float = 1.0) -> np.ndarray:
        """A periodic field laid on the ground plane; stretch > 1 lengthens it across the view."""
        distance = 1 / (self.depth + 0.12)
        u, v = (self.x - 0.5) * distance / stretch, distance
        return map_coordinates(field, [v * scale * self.n, u * scale * self.n], order=1, mode="grid-wrap")

    def _lit(self, colour: Colour, shade: np.ndarray) -> np.ndarray:
        """A surface of this colour under the sky's light; shade 1 is full light."""
        return np.asarray(np.asarray(colour) * self.sky.light * np.clip(shade, 0.15, 1.6)[..., None])

    # -- sky ------------------------------------------------------------------------------------------------------

    def _paint_sky(self) -> None:
        rise = np.clip(self.y / self.horizon, 0, 1) ** self.rng.uniform(0.9, 1.6) + 0.03 * self._field(2.2)
        self.image = self.sky.zenith + (np.asarray(self.sky.horizon) - self.sky.zenith) * np.clip(rise, 0, 1)[..., None]
        if self.a.sky in ("night", "dusk"):
            self._paint_stars(90 if self.a.sky == "night" else 14)
        if self.a.sky not in ("storm", "fog", "dusk"):
            self._paint_sun()
        if self.a.weather == "aurora":
            self._paint_aurora()
        if self.a.weather == "clouds" or self.a.sky == "storm":
            self._paint_clouds()
        if self.a.weather == "lightning":
            self._paint_lightning()

    def _paint_stars(self, count: int) -> None:
        stars = np.zeros((self.n, self.n))
        row, column = self.rng.integers(0, self.n, (2, count))
        stars[row, column] = self.rng.uniform(0.8, 4.0, count)
        self._over((0.95, 0.95, 1.0), np.minimum(gaussian_filter(stars, 0.6), 0.95))

    def _paint_sun(self) -> None:
        night = self.a.sky == "night"
        radius = self.rng.uniform(0.035, 0.065)
        colour = self._vary(
            {"night": (0.93, 0.93, 0.88), "sunset": (1.0, 0.88, 0.58)}.get(self.a.sky, (1.0, 0.96, 0.84)), 0.015
        )
        distance = np.hypot(self.x - self.sun[0], self.y - self.sun[1])
        self._over(colour, 0.55 * np.exp(-distance / (0.06 if night else 0.16)))
        maria = 1 - 0.10 * np.clip(self._field(1.6), 0, 1.5) if night else np.ones_like(distance)
        self._over(colour * maria[..., None], (radius - distance) * self.n)

    def _paint_clouds(self) -> None:
        field = fractal(self.rng, (self.n, self.n), 1.75)
        field = map_coordinates(field, [self.y * self.n * 1.6, self.x * self.n * 0.8], order=1, mode="grid-wrap")
        cover = 0.75 if self.a.sky == "storm" else self.rng.uniform(-0.1, 0.25)
        lit = np.clip(0.5 - 2.5 * np.gradient(gaussian_filter(field, 1.5), axis=0), 0, 1)[..., None]
        body = np.asarray(self.sky.cloud) * (0.80 + 0.26 * lit) + 0.012 * self._field(1.4)[..., None]
        self._over(np.clip(body, 0, 1), np.clip((field + (cover if self.a.sky == "storm" else -cover)) * 0.9, 0, 0.92))

    def _paint_aurora(self) -> None:
        fold = 0.45 * self.horizon + 0.09 * self._skyline(1.9)
        for shift, colour in ((0.0, (0.25, 0.95, 0.55)), (-0.10, (0.45, 0.35, 0.85))):
            above = fold + shift * self.rng.uniform(0.6, 1.4) - self.y
            curtain = np.where(above > 0, np.exp(-above / 0.16), np.exp(above / 0.02))
            self._over(colour, 0.62 * curtain * np.clip(0.75 + 0.25 * self._skyline(0.9), 0, 1))

    def _paint_lightning(self) -> None:
        path = self.rng.uniform(0.2, 0.8) + np.cumsum(self.rng.normal(0, 0.012, self.n))
        distance = np.abs(self.x - path[:, None])
        reach = np.clip((self.horizon + 0.02 - self.y) * self.n, 0, 1)
        self._over((0.80, 0.84, 1.0), 0.45 * np.exp(-distance / 0.05) * reach)
        self._over((1.0, 1.0, 0.98), np.clip((0.011 - distance) * self.n, 0, 1) * reach)

    # -- relief ---------------------------------------------------------------------------------------------------

    def _ridge(
        self, height: np.ndarray, colour: Colour, distance: float, roughness: float, snow: float | None = None
    ) -> None:
        """One range with its skyline at y = height; distance 0…1 fades it into the haze."""
        rock = self._field(1.5)
        slope = np.gradient(gaussian_filter(rock, 0.7), axis=1) * np.sign(self.sun[0] - 0.5)
        shade = 0.92 + roughness * (0.10 * rock + 0.55 * slope)
        surface = self._lit(self._vary(colour), shade)
        if snow is not None:
            line = np.clip((height[None] + snow + 0.035 * rock - self.y) * 22, 0, 1)[..., None]
            surface += (self._lit((0.95, 0.97, 1.0), 0.3 + 0.7 * shade) - surface) * line
        haze = self.sky.haze * distance + (0.35 * (distance > 0) if self.a.sky == "fog" else 0)
        self._over(surface + (np.asarray(self.sky.horizon) - surface) * min(haze, 0.85), self._below(height[None]))

    def _peaks(self) -> np.ndarray:
        """A skyline of pointed summits: folded noise has creases where it crosses zero."""
        return np.asarray(1.1 - 2.0 * np.abs(self._skyline(1.9)) + 0.22 * self._skyline(1.25))

    def _range(
        self,
        skyline: Callable[[], np.ndarray],
        colour: Colour,
        rise: float,
        relief: float,
        roughness: float,
        snow: float | None = None,
    ) -> None:
        """Two or three ridges, one behind the other, each with its own skyline drawn by `skyline()`."""
        layers = int(self.rng.integers(2, 4))
        for i in range(layers):
            near = i / (layers - 1)
            crest = self.horizon - rise * (1 - 0.55 * near) * self.rng.uniform(0.7, 1.05)
            height = np.minimum(crest + relief * (1 - 0.4 * near) * skyline(), self.horizon - 0.01)
            self._ridge(height, colour, 1 - 0.6 * near, roughness, snow)

    def _relief_mountains(self) -> None:
        self._range(self._peaks, (0.37, 0.39, 0.45), 0.23, 0.085, 1.0, snow=self.rng.uniform(0.07, 0.13))

    def _relief_hills(self) -> None:
        self._range(lambda: self._skyline(2.3), (0.28, 0.46, 0.22), 0.18, 0.045, 0.6)

    def _relief_cliffs(self) -> None:
        layers = int(self.rng.integers(1, 3))
        for i in range(layers):
            mesa = np.tanh(2.2 * self._skyline(1.7)) * 0.085 + 0.010 * self._skyline(1.0)
            height = np.minimum(self.horizon - (0.17 - 0.06 * i) + mesa, self.horizon - 0.015)
            self._ridge(height, (0.68, 0.34, 0.20), 0.7 - 0.4 * i, 1.0)
            strata = (
                np.sin(self.y * self.n * 0.75 + 1.2 * self._field(2.0))
                * self._below(height[None])
                * self._above_ground()
            )
            self.image *= (1 + 0.07 * strata)[..., None]

    def _relief_volcano(self) -> None:
        self._range(lambda: self._skyline(1.9), (0.30, 0.30, 0.30), 0.10, 0.03, 0.8)
        centre, width, rise = self.rng.uniform(0.25, 0.75), self.rng.uniform(0.24, 0.36), self.rng.uniform(0.28, 0.40)
        off = np.abs((np.arange(self.n) + 0.5) / self.n - centre) / width
        cone = np.maximum(self.horizon - rise * np.exp(-1.9 * off), self.horizon - rise * 0.80) + 0.006 * self._skyline(
            1.2
        )
        self._ridge(np.minimum(cone, self.horizon), (0.33, 0.27, 0.26), 0.3, 0.9)
        smoke = np.exp(
            -(
                ((self.x - centre - 0.25 * (cone.min() - self.y)) / (0.03 + 0.35 * np.clip(cone.min() - self.y, 0, 1)))
                ** 2
            )
        )
        density = (
            smoke * np.clip((cone.min() + 0.01 - self.y) * 12, 0, 1) * np.clip(0.55 + 0.35 * self._field(1.8), 0, 0.9)
        )
        self._over(np.asarray((0.50, 0.47, 0.47)) * (0.3 + 0.7 * np.asarray(self.sky.light)), density)
        if self.a.sky in ("dusk", "night", "storm", "sunset"):
            self._over((1.0, 0.45, 0.12), 0.9 * np.exp(-np.hypot((self.x - centre) / 1.6, self.y - cone.min()) / 0.025))

    # -- ground ---------------------------------------------------------------------------------------------------

    def _above_ground(self) -> np.ndarray:
        return 1 - self._below(self.horizon)

    def _land(self, colour: Colour, shade: np.ndarray) -> None:
        surface = self._lit(self._vary(colour), shade * (0.80 + 0.25 * self.depth))
        surface += (np.asarray(self.sky.horizon) - surface) * (self.sky.haze * 0.7 * (1 - self.depth) ** 4)[..., None]
        self._over(surface, self._below(self.horizon))

    def _mirror(self, ripple: np.ndarray) -> np.ndarray:
        """The picture above the horizon, upside down, its rows displaced by ripple (in units of the height)."""
        rows = np.clip(2 * self.horizon - self.y, 0, 1) * self.n - 0.5
        columns = self.x * self.n - 0.5 + ripple * self.n
        return np.stack(
            [map_coordinates(self.image[..., c], [rows, columns], order=1, mode="mirror") for c in range(3)], -1
        )

    def _ground_lake(self) -> None:
        ripple = self._perspective(self._field(1.3), 0.10, 6.0)
        water = (
            self._mirror(0.012 * ripple * (0.3 + self.depth)) * (0.86 - 0.10 * self.depth + 0.045 * ripple)[..., None]
        )
        self._over(
            water + (self._lit((0.10, 0.20, 0.25), np.ones_like(ripple)) - water) * 0.15, self._below(self.horizon)
        )

    def _ground_sea(self) -> None:
        swell = self._perspective(self._field(1.25), 0.16, 3.5)
        water = (
            self._mirror(0.05 * swell * (0.2 + self.depth)) * 0.30
            + self._lit((0.10, 0.37, 0.46), 0.92 + 0.26 * swell) * 0.72
        )
        glitter = np.exp(-(((self.x - self.sun[0]) / (0.05 + 0.10 * self.depth)) ** 2)) * np.clip(swell - 0.2, 0, 1)
        if self.a.sky not in ("storm", "fog"):
            water += np.asarray(self.sky.horizon) * (0.7 * glitter)[..., None]
        self._over(np.clip(water, 0, 1), self._below(self.horizon))
        self._over(
            self._lit((0.90, 0.94, 0.95), np.ones_like(swell)),
            np.clip((swell - 1.35) * 1.6, 0, 0.75) * (self.depth > 0.02),
        )

    def _ground_desert(self) -> None:
        dunes = self._perspective(self._field(2.1), 0.10, 2.2)
        ripples = np.sin(self._perspective(self._field(2.4), 0.12, 1.6) * 9 + 40 / (self.depth + 0.5))
        slope = np.gradient(dunes, axis=1) * np.sign(self.sun[0] - 0.5) * self.n / 16
        self._land((0.87, 0.68, 0.42), 0.98 + 0.16 * np.tanh(2 * slope) + 0.06 * dunes + 0.05 * ripples * self.depth)

    def _ground_meadow(self) -> None:
        grass = self._perspective(self._field(0.9), 0.22)
        patches = self._perspective(self._field(1.8), 0.12, 2.0)
        self._land((0.36, 0.56, 0.20), 0.90 + 0.13 * grass + 0.13 * patches)
        flower = np.array([(0.90, 0.22, 0.20), (0.95, 0.84, 0.22), (0.93, 0.92, 0.96), (0.66, 0.36, 0.80)])[
            self.rng.integers(4)
        ]
        bloom = np.clip(self._perspective(self._field(0.7), 0.16) + 0.8 * patches - 1.7, 0, 1) * (self.depth > 0.03)
        self._over(self._lit(flower, np.ones_like(bloom)), 1.2 * bloom)

    def _ground_snowfield(self) -> None:
        drifts = self._perspective(self._field(2.0), 0.12, 2.5)
        slope = np.gradient(drifts, axis=0) * self.n / 16
        self._land(
            (0.92, 0.95, 1.0),
            0.98 + 0.09 * np.tanh(slope) + 0.05 * drifts + 0.03 * self._perspective(self._field(0.9), 0.2),
        )

    def _ground_wheat(self) -> None:
        across = (self.x - self.rng.uniform(0.2, 0.8)) / (self.depth + 0.12)
        rows = np.sin(across * self.rng.uniform(16, 24)) * np.clip(self.depth * 4, 0, 1)
        ears = self._perspective(self._field(0.9), 0.22, 0.7)
        self._land(
            (0.84, 0.66, 0.20), 0.94 + 0.17 * rows + 0.12 * ears + 0.08 * self._perspective(self._field(1.9), 0.1)
        )

    def _ground_forest(self) -> None:
        self._land((0.17, 0.27, 0.13), 0.90 + 0.18 * self._perspective(self._field(1.0), 0.2))
        for depth in np.sort(self.rng.uniform(0, 1, self.rng.integers(26, 40)) ** 1.4):
            self._conifer(
                self.rng.uniform(-0.03, 1.03), self.horizon + depth * (1.02 - self.horizon), 0.10 + 0.36 * depth, depth
            )

    # -- accents --------------------------------------------------------------------------------------------------

    def _conifer(self, x: float, foot: float, height: float, depth: float) -> None:
        up = (foot - self.y) / height
        width = (
            height
            * self.rng.uniform(0.17, 0.24)
            * (1 - up)
            * (0.72 + 0.28 * np.abs(np.sin(up * self.rng.uniform(11, 16))))
        )
        inside = np.clip((width - np.abs(self.x - x)) * self.n, 0, 1) * ((up > 0) & (up < 1))
        side = np.clip((self.x - x) / (width + 1e-3), -1, 1) * np.sign(self.sun[0] - x)
        colour = self._lit(self._vary((0.13, 0.30, 0.16)), 0.85 + 0.35 * side + 0.10 * np.sin(up * 45))
        colour += (np.asarray(self.sky.horizon) - colour) * self.sky.haze * 0.6 * (1 - depth) ** 2
        self._over(colour, inside)

    def _foot(self) -> tuple[float, float]:
        """The position (x, y) of an accent's foot."""
        return self.rng.uniform(0.18, 0.82), self.horizon + self.rng.uniform(0.35, 0.65) * (1 - self.horizon)

    def _accent_tree(self) -> None:
        x, foot = self._foot()
        height = self.rng.uniform(0.34, 0.48)
        lean = 0.02 * np.sin((foot - self.y) / height * 3)
        trunk = np.clip(
            (0.016 + 0.02 * np.clip(self.y - foot + height * 0.35, 0, 1) - np.abs(self.x - x - lean)) * self.n, 0, 1
        )
        self._over(
            self._lit((0.30, 0.21, 0.14), np.ones_like(trunk)),
            trunk * (self.y < foot) * (self.y > foot - 0.75 * height),
        )
        leaves = self._field(1.1)
        crown = (
            1 - np.hypot((self.x - x) / 0.62, (self.y - foot + 0.72 * height) / 0.5) / (0.46 * height) + 0.16 * leaves
        )
        light = 0.85 + 0.9 * np.clip(foot - 0.72 * height - self.y, -0.15, 0.15) * 2 + 0.12 * leaves
        leaf = ((0.24, 0.44, 0.17), (0.62, 0.34, 0.12), (0.36, 0.46, 0.15))[self.rng.integers(3)]
        self._over(self._lit(self._vary(leaf), light), crown * 7)

    def _accent_boulders(self) -> None:
        rock = self._field(1.4)
        for _ in range(self.rng.integers(3, 7)):
            depth = self.rng.uniform(0.25, 0.95)
            x, foot, radius = (
                self.rng.uniform(0, 1),
                self.horizon + depth * (1 - self.horizon),
                0.03 + 0.075 * depth * self.rng.uniform(0.6, 1.2),
            )
            rise = (foot - self.y) / radius
            inside = 1 - np.hypot((self.x - x) / (1.35 * radius), rise - 0.25) + 0.10 * rock
            shade = (
                0.62
                + 0.30 * rise
                + 0.16 * rock
                + 0.25 * np.clip((self.x - x) / radius, -1, 1) * np.sign(self.sun[0] - x)
            )
            self._over(
                self._lit((0.52, 0.49, 0.46), shade),
                np.clip(inside * radius * self.n, 0, 1) * np.clip((foot - self.y) * self.n, 0, 1),
            )

    def _accent_cabin(self) -> None:
        x, foot = self._foot()
        half, wall, roof = self.rng.uniform(0.07, 0.11), 0.085, 0.075
        rise, off = foot - self.y, np.abs(self.x - x)
        planks = 0.80 + 0.10 * np.sin(self.y * self.n * 1.6) + 0.05 * self._field(1.2)
        self._over(
            self._lit(self._vary((0.46, 0.28, 0.17)), planks),
            np.clip((half - off) * self.n, 0, 1) * (rise > 0) * (rise < wall),
        )
        slope = (
            np.clip((half * 1.25 * (1 - (rise - wall) / roof) - off) * self.n, 0, 1)
            * (rise >= wall)
            * (rise < wall + roof)
        )
        self._over(self._lit(self._vary((0.40, 0.16, 0.13)), 0.9 + 0.2 * np.sign(self.x - x)), slope)
        lamp = (
            (1.0, 0.80, 0.40)
            if self.a.sky in ("night", "dusk", "storm")
            else self._lit((0.20, 0.24, 0.30), np.ones_like(off))
        )
        window = np.clip((0.016 - np.abs(off - half * 0.5)) * self.n, 0, 1) * np.clip(
            (0.016 - np.abs(rise - 0.048)) * self.n, 0, 1
        )
        self._over(lamp, window)

    def _accent_grass(self) -> None:
        for _ in range(self.rng.integers(50, 80)):
            foot, height = self.rng.uniform(0, 1), self.rng.uniform(0.12, 0.30)
            up = (1.02 - self.y) / height
            bend = self.rng.normal(0, 0.05) * up**2
            blade = np.clip((0.009 * (1 - up) - np.abs(self.x - foot - bend)) * self.n + 0.3, 0, 1) * (up < 1)
            self._over(
                np.asarray(self._vary((0.30, 0.36, 0.13), 0.05)) * self.sky.light * self.rng.uniform(0.6, 1.1), blade
            )

    def _accent_sailboat(self) -> None:
        x, foot = self._foot()
        foot = self.horizon + (foot - self.horizon) * 0.6
        size = self.rng.uniform(0.14, 0.20)
        rise, off = (foot - self.y) / size, (self.x - x) / size
        hull = np.clip((0.42 + 0.35 * rise - np.abs(off)) * size * self.n, 0, 1) * (rise > -0.02) * (rise < 0.16)
        self._over(self._lit(self._vary((0.40, 0.20, 0.14)), np.ones_like(off)), hull)
        for side, reach in ((1, 0.48), (-1, 0.34)):
            sail = (
                np.clip((reach * (1.15 - rise) - side * off) * size * self.n, 0, 1)
                * (side * off > 0.02)
                * (rise > 0.2)
                * (rise < 1.15)
            )
            self._over(self._lit((0.96, 0.94, 0.88), 1.0 - 0.10 * side * np.ones_like(off)), sail)

    # -- weather --------------------------------------------------------------------------------------------------

    def _paint_weather(self) -> None:
        if self.a.sky == "fog":
            self._over(
                self.sky.horizon,
                0.55 * np.exp(-(((self.y - self.horizon) / 0.22) ** 2)) * np.clip(0.8 + 0.25 * self._field(2.0), 0, 1),
            )
        if self.a.weather == "snowfall":
            flakes = np.zeros((self.n, self.n))
            row, column = self.rng.integers(0, self.n, (2, 130))
            flakes[row, column] = self.rng.uniform(2, 7, 130)
            self._over((0.98, 0.98, 1.0), np.minimum(gaussian_filter(flakes, 0.8), 0.9))
        if self.a.weather == "rain":
            streaks = gaussian_filter((self.rng.random((self.n, self.n)) > 0.985) * 1.0, (4.5, 0.5))
            self._over((0.72, 0.75, 0.78), np.minimum(6 * streaks, 0.35))
