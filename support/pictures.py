"""Pictures: images as numbers, labelled sheets of images, and plots, all by Pillow."""
import io
import math

import torch
from PIL import Image, ImageDraw

from support.files import write_bytes


def to_uint8(images):
    """[-1, 1] -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pixels(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def save_picture(path, rows, scale=3, column_titles=(), below=None):
    """Writes `sheet` as PNG."""
    save_image(path, sheet(rows, scale, column_titles, below))


def save_animation(path, rows, scale=1, milliseconds=80):
    """Writes labelled rows of moving images as a GIF without end: rows = [(label, uint8 (frames, n, 3, H, W)), ...]."""
    count = len(rows[0][1])
    frames = [sheet([(label, images[k]) for label, images in rows], scale).quantize(128) for k in range(count)]
    content = io.BytesIO()
    frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    write_bytes(path, content.getvalue())


def sheet(rows, scale=3, column_titles=(), below=None):
    """Labelled rows of images as one PIL image: rows = [(label, uint8 (n, 3, H, W)), ...]; below: a PIL image."""
    label_width, pad = 8 + 6 * max(len(label) for label, _ in rows), 2
    size = rows[0][1].shape[-1] * scale + pad
    width, top = label_width + size * max(len(images) for _, images in rows), 16 if column_titles else 0
    height = top + size * len(rows)
    page = Image.new("RGB", (width, height) if below is None else (max(width, below.width), height + below.height),
                     "white")
    if below is not None:
        page.paste(below, (0, height))
    pen = ImageDraw.Draw(page)
    for k, title in enumerate(column_titles):
        pen.text((label_width + size * k, 2), title, "black")
    for r, (label, images) in enumerate(rows):
        pen.text((4, top + size * r + size // 2 - 6), label, "black")
        for k, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size - pad,) * 2, Image.NEAREST)
            page.paste(tile, (label_width + size * k, top + size * r))
    return page


def save_image(path, image):
    """Writes a PIL image as PNG."""
    content = io.BytesIO()
    image.save(content, "PNG")
    write_bytes(path, content.getvalue())


PLOT_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def axes(points, x_label, y_label, log_y=False, size=(640, 360), margin=12):
    """An empty plot that spans points [(x, y), ...], right of it `margin` pixels: the page, its pen, and place(x, y)
    -> pixels."""
    (width, height), left, top, bottom = size, 60, 20, 36

    def scale_y(y):
        return math.log10(max(y, 1e-12)) if log_y else float(y)
    x0, x1 = span([x for x, _ in points])
    y0, y1 = span([scale_y(y) for _, y in points])

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - margin),
                height - bottom - (scale_y(y) - y0) / (y1 - y0) * (height - bottom - top))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.rectangle([left, top, width - margin, height - bottom], outline="black")
    for x in round_numbers(x0, x1):
        at = place(x, points[0][1])[0]
        pen.line([(at, height - bottom - 4), (at, height - bottom)], "black")
        pen.text((at, height - bottom + 4), f"{x:.4g}", "black", anchor="ma")
    for y in [10 ** e for e in round_numbers(y0, y1)] if log_y else round_numbers(y0, y1):
        at = place(x0, y)[1]
        pen.line([(left, at), (left + 4, at)], "black")
        pen.text((left - 4, at), f"{y:.3g}", "black", anchor="rm")
    pen.text(((left + width - margin) // 2, height - 16), x_label, "black", anchor="ma")
    pen.text((left, top - 4), y_label, "black", anchor="ls")
    return page, pen, place


def span(values):
    """The least and the greatest value; one more than that where they are the same."""
    low, high = min(values), max(values)
    return (low, high) if low < high else (low, low + 1)


def round_numbers(low, high):
    """Three to nine numbers in [low, high], each a multiple of 1, 2 or 5 times a power of ten."""
    step = min((m * 10. ** e for e in range(-12, 12) for m in (1, 2, 5)), key=lambda step: abs((high - low) / step - 5))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def draw_plot(curves, x_label, y_label, log_y=False, size=(640, 360), y_range=()):
    """A line plot: curves = {name: [(x, y), ...]}, spanning y_range at least, names beside it. Returns a PIL image."""
    points = [point for curve in curves.values() for point in curve]
    margin = 20 + 6 * max(map(len, curves))
    page, pen, place = axes(points + [(points[0][0], y) for y in y_range], x_label, y_label, log_y, size, margin)
    for k, (name, curve) in enumerate(sorted(curves.items())):
        pen.line([place(x, y) for x, y in sorted(curve)], PLOT_COLORS[k % 5], 2)
        pen.text((page.width - margin + 8, 20 + 14 * k), name, PLOT_COLORS[k % 5])
    return page


def save_plot(path, curves, x_label, y_label, log_y=False):
    """Writes `draw_plot` as PNG."""
    save_image(path, draw_plot(curves, x_label, y_label, log_y))


def draw_points(points, x_label, y_label, limit=None, highlight=(), errors=None, best=False):
    """A plot of labelled points {label: (x, y)}, their labels apart, those in `highlight` in red; limit: a vertical
    line at this x; errors: {label: (dx, dy)}, drawn as bars to each side; best: joins the points that no other beats
    by less x and more y. A PIL image, 700 x 560."""
    size, errors = (700, 560), errors or {}
    ends = [(x + s * errors.get(label, (0, 0))[0], y + s * errors.get(label, (0, 0))[1])
            for label, (x, y) in points.items() for s in (-1, 1)]
    (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*ends)]
    x1 = x1 if limit is None else max(x1, limit)
    dx, dy = 0.06 * (x1 - x0), 0.06 * (y1 - y0)
    page, pen, place = axes([(x0 - dx, y0 - dy), (x1 + dx, y1 + dy)], x_label, y_label, size=size)
    if limit is not None:
        x, _ = place(limit, y0)
        pen.line([(x, 20), (x, size[1] - 36)], "gray")
    if best:
        pen.line([place(*point) for point in frontier(points.values())], "#cccccc", 2)
    for label, (ex, ey) in errors.items():
        x, y = points[label]
        pen.line([place(x - ex, y), place(x + ex, y)], "gray")
        pen.line([place(x, y - ey), place(x, y + ey)], "gray")
    places = {label: place(*point) for label, point in points.items()}
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places.values()]
    for k, (label, (x, y)) in enumerate(places.items()):
        color = PLOT_COLORS[label in highlight]
        pen.ellipse(taken[k], fill=color)
        box = free_box(x, y, pen.textlength(label), taken, size[0])
        taken.append(box)
        pen.text(box[:2], label, color)
    return page


def frontier(points):
    """Of points (x, y) those that no other beats by less x and more y, in the order of x."""
    best = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or y > best[-1][1]:
            best.append((x, y))
    return best


def free_box(x, y, wide, taken, width):
    """Where a label of this width goes beside a point: the first box (left, top, right, bottom) that meets none of
    those that are taken, near ones first; the first of all where there is none."""
    boxes = []
    for shift in (0, 11, -11, 22, -22, 33, -33, 44, -44):
        for left in (x + 7, x - 7 - wide):
            if 60 < left < width - 12 - wide:
                boxes.append((left, y - 6 + shift, left + wide, y + 5 + shift))
    for box in boxes:
        if not any(overlap(box, other) for other in taken):
            return box
    return boxes[0]


def overlap(one, other):
    """Whether two boxes (left, top, right, bottom) share some of the picture."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def side_by_side(images):
    """PIL images in a row."""
    page = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    for k, image in enumerate(images):
        page.paste(image, (sum(other.width for other in images[:k]), 0))
    return page
