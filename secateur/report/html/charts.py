"""Small pictures as inline SVG: for a narrow column, without scripts, told apart without colour.

A picture is drawn 340 units wide and scaled by the page. What stands in it comes from reports,
which are not trusted: every text is escaped.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from secateur.report.report import perplexity

WIDTH, LEFT, RIGHT, TOP = 340.0, 44.0, 14.0, 12.0
BOTTOM = 30.0  # for the numbers of an axis and its name
FLOOR = 1e-9  # of a logarithmic axis
CEILING = 1e100  # of any axis; the perplexity of a wrecked model may be beyond it
FAINT = 1e-4  # of the largest value, below which one is as good as zero
SPREAD = 20.0  # of values beyond which an axis is logarithmic
Form = Callable[[float], str]


@dataclass(frozen=True)
class Scale:
    """Maps values to positions along one axis, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def of(
        cls,
        values: Iterable[float],
        start: float,
        end: float,
        log: bool = False,
        room: float = 0.05,
    ) -> "Scale":
        """A scale that contains all values, with a margin unless they start at zero."""
        least = FLOOR if log else -CEILING
        found = [min(max(v, least), CEILING) for v in values] or [0.0, 1.0]
        low, high = min(found), max(found)
        if log:
            if high / low < 1.2:
                low, high = low / 1.2, high * 1.2
            stretch = math.exp(room * (math.log(high) - math.log(low)))
            return cls(low / stretch, high * stretch, start, end, True)
        span = (high - low) or abs(high) or 1.0
        return cls(low - room * span if low else 0.0, high + room * span, start, end)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = (math.log(max(v, FLOOR)) for v in (low, high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Three to six round numbers in the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
                found = [d * 10.0**e for e in range(first, last + 1) for d in digits]
                inside = [value for value in found if self.low <= value <= self.high]
                if len(inside) >= 3:
                    return inside[:: math.ceil(len(inside) / 6)]
            if len(inside) == 2:
                return inside
        span = self.high - self.low
        rough = span / 4
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1.0, 2.0, 2.5, 5.0, 10.0) if m * power >= rough)
        first_tick = math.ceil(self.low / step - 1e-9)
        count = int((self.high - first_tick * step) / step + 1e-9) + 1
        return [(first_tick + i) * step for i in range(count)]


def number(value: float) -> str:
    """A value as an axis label: short, with a decimal unit if it is large."""
    if abs(value) >= 1e15:
        return f"{value:.0e}".replace("e+", "e")
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{name}"
    if value and abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.3g}"


def percent(value: float) -> str:
    """A share as an axis label."""
    for digits in (3, 2, 1):
        if len(told := f"{100 * value:.{digits}g}") <= 4:  # there is room for no more
            return f"{told}%"
    return f"{100 * value:.0e}%".replace("e-0", "e-").replace("e+0", "e")


def tag(name: str, content: object = "", **attributes: object) -> Markup:
    """An SVG element; attributes and content are escaped, except markup."""
    given = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{v:.2f}" if isinstance(v, float) else v
        )
        for key, v in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), given, content)


def text(x: float, y: float, content: str, **attributes: object) -> Markup:
    """A label."""
    return tag("text", content, x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def joined(parts: Iterable[Markup]) -> Markup:
    """Concatenated markup."""
    return Markup("").join(parts)


STYLE = """
:root { --paper: #fdfdfb; --ink: #1c1f1b; --soft: #5a6159; --faint: #e3e4de; --now: #2c6b45;
  --was: #9ca39a }
@media (prefers-color-scheme: dark) { :root { --paper: #151815; --ink: #e5e8e2; --soft: #a3aba1;
  --faint: #2d322c; --now: #86cba0; --was: #6b736a } }
text { font: 10.5px system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif; fill: var(--soft) }
.end { text-anchor: end } .middle { text-anchor: middle } .sign, .run { fill: var(--ink) }
.run { white-space: pre }
.paper { fill: var(--paper) } .grid { stroke: var(--faint) } .tick { stroke: var(--was) }
.dot, .diamond { fill: var(--now) } .cross { stroke: var(--soft); stroke-width: 1.6 }
.step { fill: none; stroke: var(--now); stroke-width: 1.2 }
"""


def sheet(title: str, pictures: Sequence[Markup], names: Sequence[str]) -> str:
    """Charts side by side as one SVG file, with the names below in columns."""
    across, rows = 2, math.ceil(len(pictures) / 2)
    wide = (WIDTH + 24) * min(across, max(len(pictures), 1)) + 24
    parts = [tag("style", Markup(STYLE)), tag("rect", width="100%", height="100%", class_="paper")]
    high = 260.0
    for i, inner in enumerate(pictures):
        x, y = 12 + (i % across) * (WIDTH + 24), 14 + (i // across) * high
        given = Markup('<svg x="{:.0f}" y="{:.0f}" width="{:.0f}" height="250"').format(x, y, WIDTH)
        parts.append(given + Markup(inner.removeprefix("<svg")))
    height = 14 + rows * high
    if len(pictures) > across and len(pictures) % across:  # the place that no picture takes
        columns, left, top = 1, 36 + WIDTH, 44 + (rows - 1) * high
    else:
        columns, left, top = max(1, int(wide // 240)), 24.0, height + 16
    for i, name in enumerate(names):
        y = top + (i // columns) * 18
        parts.append(text(left + (i % columns) * 240.0, y, name, class_="run"))
        height = max(height, y + 20)
    return str(
        tag(
            "svg",
            joined((tag("title", title), *parts)),
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {wide:g} {height:g}",
            width=f"{wide:g}",
            height=f"{height:g}",
            role="img",
        )
    )


def picture(title: str, told: str, height: float, parts: Iterable[Markup]) -> Markup:
    """An SVG with a title for screen readers."""
    return tag(
        "svg",
        joined((tag("title", f"{title}. {told}"), *parts)),
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        role="img",
        aria_label=f"{title}. {told}",
    )


def marked(shape: str, x: float, y: float, told: str) -> Markup:
    """A mark whose shape, not its colour, identifies it, with a tooltip."""
    r = 4.0
    if shape == "dot":
        inner = tag("circle", cx=x, cy=y, r=r - 0.5, class_="dot")
    elif shape == "ring":
        inner = tag("circle", cx=x, cy=y, r=r - 0.5, class_="ring")
    elif shape == "diamond":
        points = f"{x:.2f},{y - r - 1:.2f} {x + r + 1:.2f},{y:.2f} "
        points += f"{x:.2f},{y + r + 1:.2f} {x - r - 1:.2f},{y:.2f}"
        inner = tag("polygon", points=points, class_="diamond")
    else:
        inner = joined(
            (line(x - r, y - r, x + r, y + r, "cross"), line(x - r, y + r, x + r, y - r, "cross"))
        )
    return tag("g", joined((tag("title", told), inner)))


def upright(scale: Scale, form: Form = number) -> Iterator[Markup]:
    """The vertical axis: grid lines and labels."""
    for tick in scale.ticks:
        y = scale(tick)
        yield line(LEFT, y, WIDTH - RIGHT, y, "grid")
        yield text(LEFT - 6, y + 3.5, form(tick), class_="end")


def level(scale: Scale, y: float, name: str, form: Form = number) -> Iterator[Markup]:
    """The horizontal axis: ticks, labels and a name."""
    taken = -math.inf
    for tick in scale.ticks:
        x, told = scale(tick), form(tick)
        if x - 3 * len(told) < taken + 6:
            continue
        taken = x + 3 * len(told)
        yield line(x, y, x, y + 3, "tick")
        yield text(x, y + 14, told, class_="middle")
    yield text((scale.start + scale.end) / 2, y + 27, name, class_="middle name")


def layers(count: int) -> tuple[float, list[float]]:
    """The width of a layer's column and the middle of each."""
    step = (WIDTH - RIGHT - LEFT) / max(count, 1)
    return step, [LEFT + (i + 0.5) * step for i in range(count)]


def numbered(labels: Sequence[str], y: float, name: str = "layer") -> Iterator[Markup]:
    """Layer numbers: all, or every second, fifth … depending on the width."""
    step, middles = layers(len(labels))
    every = next((n for n in (1, 2, 5, 10, 20, 50) if n * step >= 16), 100)
    for i, (label, x) in enumerate(zip(labels, middles, strict=True)):
        if i % every == 0:
            yield text(x, y + 14, label, class_="middle")
    yield text((LEFT + WIDTH - RIGHT) / 2, y + 27, name, class_="middle name")


def kept(title: str, labels: Sequence[str], shares: Sequence[float], told: Sequence[str]) -> Markup:
    """The kept share of each layer, solid, and the original, hatched."""
    height, bottom = 132.0, 102.0
    scale = Scale(0.0, 1.0, bottom, TOP)
    step, middles = layers(len(labels))
    wide = max(1.0, min(30.0, 0.72 * step))
    parts = [line(LEFT, scale(at), WIDTH - RIGHT, scale(at), "grid") for at in (0.0, 0.5, 1.0)]
    parts += [text(LEFT - 6, scale(at) + 3.5, percent(at), class_="end") for at in (0.0, 0.5, 1.0)]
    for x, share, said in zip(middles, shares, told, strict=True):
        top = scale(min(1.0, share))
        bar = {"x": x - wide / 2, "width": wide}
        parts.append(
            tag(
                "g",
                joined(
                    (
                        tag("title", said),
                        tag("rect", y=TOP, height=bottom - TOP, class_="was", **bar),
                        tag("rect", y=top, height=bottom - top, class_="now", **bar),
                    )
                ),
            )
        )
    parts += numbered(labels, bottom)
    whole = f"Of {len(shares)} layers {percent(min(shares))} to {percent(max(shares))} stay"
    return picture(title, whole, height, parts)


def by_layer(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    form: Form = percent,
) -> Markup:
    """One or two values per layer, as rings and diamonds; two of a layer are connected.

    The axis starts from zero. It is logarithmic if values differ by orders of magnitude; values
    near zero are then at the bottom.
    """
    height, bottom = 160.0, 130.0
    found = [v for values in series.values() for v in values if v is not None]
    faint = FAINT * max(found, default=0.0)
    every = [v for v in found if v > faint]
    log = bool(every) and max(every) > SPREAD * min(every)
    scale = Scale.of(every if log else [0.0, *every], bottom, TOP, log)
    _, middles = layers(len(labels))
    parts = [*upright(scale, form), line(LEFT, bottom, WIDTH - RIGHT, bottom, "tick")]
    shapes = ("ring", "diamond") if len(series) == 2 else ("diamond",)
    for i, x in enumerate(middles):
        own = [values[i] for values in series.values()]
        ends = [scale(v) if v > faint else bottom for v in own if v is not None]
        if len(ends) > 1:
            parts.append(line(x, min(ends), x, max(ends), "tie"))
        elif not log and ends:
            parts.append(line(x, bottom, x, ends[0], "stem"))
        for shape, name, value in zip(shapes, series, own, strict=True):
            if value is not None:
                said = f"layer {labels[i]}, {name}: {form(value)}"
                parts.append(marked(shape, x, scale(value) if value > faint else bottom, said))
    parts += numbered(labels, bottom)
    return picture(title, ", ".join(series), height, parts)


def curves(
    title: str,
    lines: Sequence[Sequence[tuple[float, float]]],
    chosen: Sequence[tuple[float, float, str]],
) -> Markup:
    """Error against the share kept, one line per unit, with a dot at the chosen size."""
    height, bottom = 190.0, 160.0
    every = [y for points in lines for _, y in points if y > 0]
    low = max(min(every, default=1e-4), 1e-4 * max(every, default=1.0))
    scale = Scale.of([low, max(every, default=1.0)], bottom, TOP, True)
    across = Scale(0.0, 1.0, LEFT, WIDTH - RIGHT)
    parts = [*upright(scale, percent), line(LEFT, bottom, WIDTH - RIGHT, bottom, "tick")]
    for points in lines:
        shown = [(x, y) for x, y in points if y > 0]
        path = " ".join(f"{across(x):.2f},{scale(y):.2f}" for x, y in shown)
        if len(shown) > 1:
            parts.append(tag("polyline", points=path, class_="curve"))
    for x, y, said in chosen:
        parts.append(marked("dot", across(x), scale(y) if y > 0 else bottom, said))
    parts += level(across, bottom, "kept", percent)
    return picture(title, "Error against what is kept, a line a layer", height, parts)


def pair(title: str, dense: float, small: float, told: tuple[str, str]) -> Markup:
    """Two bars from zero: dense hatched, compressed solid, with their values."""
    most, height = max(dense, small) or 1.0, 62.0
    parts = []
    rows = (("dense", dense, "was", 18.0), ("compressed", small, "now", 42.0))
    for (name, value, kind, y), said in zip(rows, told, strict=True):
        wide = 170.0 * value / most
        parts.append(text(78.0, y + 9, name, class_="end"))
        parts.append(tag("rect", x=84.0, y=y, width=wide, height=13.0, class_=kind))
        parts.append(text(90.0 + wide, y + 10, said))
    parts.insert(0, text(84.0, 10.0, title, class_="name"))
    return picture(title, f"dense {told[0]}, compressed {told[1]}", height, parts)


@dataclass(frozen=True)
class Point:
    """A run on a frontier."""

    sign: str
    name: str
    x: float
    y: float
    best: bool
    dense: bool = False
    own: bool = False


def beside(
    x: float, y: float, sign: str, taken: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """A position for the label of a point: the first that is free.

    The step line comes from above and leaves to the right.
    """
    aside = 9 + 3.0 * len(sign)
    places = [(x - aside, y), (x, y + 13), (x + aside, y - 9), (x, y - 12), (x + aside, y + 9)]
    inside = [p for p in places if LEFT < p[0] < WIDTH - RIGHT]
    free = [p for p in inside if all(abs(p[0] - a) > 10 or abs(p[1] - b) > 9 for a, b in taken)]
    return (free or places)[0]


def frontier(title: str, name: str, points: Sequence[Point], form: Form = number) -> Markup:
    """Perplexity against a cost; steps join the runs that are not dominated, × marks the others."""
    height, bottom = 250.0, 220.0
    ys, xs = [p.y for p in points], [p.x for p in points]
    scale = Scale.of(ys, bottom, TOP + 12, min(ys) > 0 and max(ys) > 3 * min(ys), 0.08)
    across = Scale.of(xs, LEFT + 8, WIDTH - RIGHT - 8, room=0.1)
    parts = [*upright(scale), line(LEFT, bottom, WIDTH - RIGHT, bottom, "tick")]
    best = sorted((p.x, p.y) for p in points if p.best)
    corners: list[str] = []
    for i, (x, y) in enumerate(best):
        if i:
            corners.append(f"{across(x):.2f},{scale(best[i - 1][1]):.2f}")
        corners.append(f"{across(x):.2f},{scale(y):.2f}")
    if len(best) > 1:
        parts.append(tag("polyline", points=" ".join(corners), class_="step"))
    taken = [(across(p.x), scale(p.y)) for p in points]
    for p in points:
        shape = "diamond" if p.dense else "dot" if p.best else "cross"
        told = f"{p.sign} {p.name}: perplexity {perplexity(p.y)} at {form(p.x)}"
        parts.append(marked(shape, across(p.x), scale(p.y), told))
        kind = "middle own" if p.own else "middle sign"
        x, y = beside(across(p.x), scale(p.y), p.sign, taken)
        taken.append((x, y))
        parts.append(text(x, y + 4, p.sign, class_=kind))
    parts.append(text(LEFT, TOP - 3, "perplexity", class_="name"))
    parts += level(across, bottom, name, form)
    beaten = sum(not p.best for p in points)
    return picture(title, f"{len(points)} models, {beaten} of them dominated", height, parts)
