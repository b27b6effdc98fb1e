"""Rendered objects on disk: there and back, another renderer's layout by hand, and a refusal for each mistake."""

import json
import math
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from conftest import one_line_error, script
from PIL import Image
from shapes import one_asset

from data import control_maps
from full.objects import object_folders, read_object, read_pixels, write_object, write_toy_objects
from geometry.camera import AZIMUTHS, EXTENT, Views, camera
from support.launch import UsageError
from toy.render import Look, render
from toy.world import asset_captions, sample_assets, take

SIZE = 32
OPPOSITE = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # our frame -> z up: (x, y, z) -> (x, -z, y)


@pytest.fixture(scope="module")
def mug():
    return render(one_asset("mug"), Look("render"), size=SIZE)


@pytest.fixture
def folder(mug, tmp_path):
    write_object(tmp_path / "objects" / "a", "a red mug", mug)
    return tmp_path / "objects" / "a"


def save(path, maps):
    """Maps (3 or 4, H, W) in [0, 1] as an 8-bit image, losslessly."""
    pixels = (maps * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, lossless=True, exact=True)


def change_meta(folder, **changes):
    meta = json.loads((folder / "meta.json").read_text()) | changes
    (folder / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def refused(folder, *words, error=ValueError):
    with pytest.raises(error) as caught:
        read_object(folder)
    assert "\n" not in str(caught.value)
    for word in words:
        assert str(word) in str(caught.value), caught.value


# ---- our own layout


def test_there_and_back(tmp_path):
    """Colours and coverage to half a step of 8 bits, normals to a step and of unit length, positions exactly."""
    assets = take(sample_assets(60, 5), slice(0, 60, 12))
    views = render(assets, Look("render"), size=24)
    for k in range(len(assets.category)):
        write_object(tmp_path / f"{k}", asset_captions(assets)[k], views, k)
        caption, back = read_object(tmp_path / f"{k}")
        one = Views(*(part[k : k + 1] for part in views))
        assert caption == asset_captions(assets)[k]
        assert [part.shape for part in back] == [part.shape for part in one]
        there = (one.normal != 0).any(dim=2, keepdim=True)
        assert torch.equal((back.normal != 0).any(dim=2, keepdim=True), there)
        assert torch.allclose(back.position, one.position, rtol=0, atol=1e-7)
        assert torch.allclose(back.normal.norm(dim=2, keepdim=True)[there], torch.ones(()), atol=1e-6)
        assert (back.normal - one.normal).abs().max() < 1.5 / 255
        assert (back.mask - one.mask).abs().max() <= 0.5001 / 255
        assert (back.rgb - one.rgb).abs().max() < 1.5 / 255
        assert (control_maps(back) - control_maps(one)).abs().max() < 1.5 / 255
        assert (read_pixels(tmp_path / f"{k}" / "normal_003.png")[~there[0, 3, 0]] == 1).all()     # white
    assert object_folders(tmp_path) == [tmp_path / f"{k}" for k in range(5)]


def png16(values):
    """A PNG with 16 bits a channel of values (H, W, 3) in [0, 65535]; PIL cannot write one."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", (8, 16))
def test_png_positions_and_normals(folder, mug, bits):
    """Positions and normals as PNG, to a step of 8 bits; of 16 bits the upper 8 count."""
    off = (mug.normal == 0).all(dim=2, keepdim=True)
    for name, maps in (("position", mug.position + 0.5), ("normal", mug.normal / 2 + 0.5)):
        for v, image in enumerate(maps.masked_fill(off, 1)[0]):
            path = folder / f"{name}_{v:03}.png"
            if bits == 8:
                save(path, image)
            else:
                path.write_bytes(png16((image * 65535).round().permute(1, 2, 0).numpy()))
    for v in range(4):
        (folder / f"position_{v:03}.npy").unlink()
    _, back = read_object(folder)
    assert torch.equal((back.normal == 0).all(dim=2, keepdim=True), off)
    assert (back.position - mug.position).abs().max() <= (0.5001 if bits == 8 else 1.001) / 255
    assert (back.normal - mug.normal).abs().max() < (1.5 if bits == 8 else 4) / 255


def test_rgb_before_white(folder, mug):
    """Without alpha the colours are taken as they are, and the coverage is where there is a position."""
    for v in range(4):
        save(folder / f"color_{v:03}.png", mug.rgb[0, v])
    _, back = read_object(folder)
    assert (back.rgb - mug.rgb).abs().max() <= 0.5001 / 255
    assert torch.equal(back.mask == 1, (mug.normal != 0).any(dim=2, keepdim=True))


def test_another_camera(tmp_path):
    """Another elevation; and another extent, for which positions are scaled to what `project` takes."""
    views = render(one_asset("duck"), Look("render"), size=SIZE, elevation=5)
    write_object(tmp_path / "low", "a duck", views, elevation=5)
    _, back = read_object(tmp_path / "low")
    assert torch.allclose(back.position, views.position, rtol=0, atol=1e-7)
    write_object(tmp_path / "wide", "a duck", views._replace(position=views.position * 0.6), 0, 5, 0.6 * 0.55)
    _, back = read_object(tmp_path / "wide")
    assert torch.allclose(back.position, views.position, atol=1e-6)
    write_object(tmp_path / "wrong", "a duck", views, elevation=20)
    refused(tmp_path / "wrong", "wrong/position_000.npy", "pixels off its camera")


def test_edges_that_are_mostly_background(folder, mug):
    """Where antialiasing leaves no normal, or a position outside the cube, a pixel that is not full is no object."""
    there = (mug.normal[0, 0] != 0).any(dim=0)
    gray, far, white = ((mug.mask[0, 0, 0] < 1) & there).nonzero()[:3].tolist()
    normal = read_pixels(folder / "normal_000.png").permute(2, 0, 1)
    normal[:, gray[0], gray[1]], normal[:, white[0], white[1]] = 0.5, 1
    save(folder / "normal_000.png", normal)
    position = np.load(folder / "position_000.npy")
    position[far[0], far[1]] = 9
    np.save(folder / "position_000.npy", position)
    _, back = read_object(folder)
    for row, column in (gray, far, white):
        assert not back.normal[0, 0, :, row, column].any() and not back.position[0, 0, :, row, column].any()
    assert int((back.normal[0, 0] != 0).any(dim=0).sum()) == int(there.sum()) - 3


def test_write_is_all_or_nothing(folder, mug, monkeypatch):
    """A folder that is there stays as it was, a failure leaves nothing behind, and half a folder is no object."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"cannot write {folder} .*, choose another folder"):
        write_object(folder, "another", mug)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ValueError, match="No space left"):
            write_object(folder.parent / "b", "a mug", mug)
    (folder.parent / "c.1.tmp").mkdir()
    (folder.parent / "c.1.tmp" / "meta.json").write_text("{}")
    (folder.parent / "notes").mkdir()
    assert object_folders(folder.parent) == [folder]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a", "c.1.tmp", "notes"]
    for views in (mug._replace(rgb=None), Views(*(part[:, :2] for part in mug))):
        with pytest.raises(ValueError, match="of 4 views"):
            write_object(folder.parent / "b", "a mug", views)


def test_no_objects(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: .*nowhere"):
        object_folders(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} has no folder"):
        object_folders(tmp_path)


# ---- refusals


@pytest.mark.parametrize("name", ("color_002.png", "normal_001.png", "position_003.npy", "meta.json"))
def test_missing_and_damaged(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    refused(folder, folder / name)
    (folder / name).unlink()
    refused(folder, "no such file", folder / name, error=FileNotFoundError)


def test_meta_refused(folder):
    path = folder / "meta.json"
    for wrong in ([0, 45, 90, 135], [0, 90, 180], None, 90):
        change_meta(folder, azimuths=wrong)
        refused(folder, path, "azimuths", "[0, 90, 180, 270]")
    change_meta(folder, azimuths=[0, 90, 180, 270])
    for key, wrong in (("elevation", 90), ("elevation", "high"), ("elevation", math.nan), ("extent", 0),
                       ("extent", None), ("extent", math.inf)):
        change_meta(folder, **{key: wrong})
        refused(folder, path, key)
        change_meta(folder, elevation=20, extent=0.55)
    change_meta(folder, caption=7)
    refused(folder, path, "caption")
    change_meta(folder, caption=None)
    refused(folder, path, "caption.txt")
    (folder / "caption.txt").write_text("a blue mug\n")
    assert read_object(folder)[0] == "a blue mug"
    path.write_text("[1]")
    refused(folder, path, "JSON")


def test_sizes_that_differ(folder, mug):
    save(folder / "normal_002.png", mug.normal[0, 2, :, :-2, :-2] / 2 + 0.5)
    refused(folder, folder / "normal_002.png", "(3, 30, 30)", "(3, 32, 32)")
    for v in range(4):
        save(folder / f"color_{v:03}.png", mug.rgb[0, v, :, :-2])
    refused(folder, folder / "color_000.png", "(3, 30, 32)")


def test_shape_of_positions(folder):
    for shape in ((), (3,), (SIZE, SIZE), (SIZE, SIZE, 2), (3, SIZE, SIZE), (SIZE, SIZE, 3, 1)):
        np.save(folder / "position_001.npy", np.zeros(shape))
        refused(folder, folder / "position_001.npy", "shape")


def test_a_header_that_promises_more_than_any_memory(folder):
    with open(folder / "position_001.npy", "wb") as file:
        header = dict(descr="<f4", fortran_order=False, shape=(10**8, 10**8, 3))
        np.lib.format.write_array_header_1_0(file, header)
    refused(folder, "cannot read", folder / "position_001.npy", "Unable to allocate")


@pytest.mark.parametrize("how", ("gamma", "other code", "camera's frame"))
def test_wrong_normals(folder, mug, how):
    normal = mug.normal[0, 2] / 2 + 0.5
    if how == "gamma":
        normal = normal ** (1 / 2.2)
    elif how == "other code":
        normal = mug.normal[0, 2].clamp(0, 1)
    else:
        axes = torch.stack(camera(180))
        axes[2] *= -1
        normal = (axes @ mug.normal[0, 2].flatten(1)).view_as(normal) / 2 + 0.5
    save(folder / "normal_002.png", normal)
    refused(folder, folder / "normal_002.png", "look away" if how == "camera's frame" else "unit length")


def test_wrong_positions(folder):
    path = folder / "position_001.npy"
    good = np.load(path)
    there = np.isfinite(good).all(axis=-1)
    row, column = np.argwhere(there)[there.sum() // 2]                  # in the middle: the object fills this pixel

    def with_pixel(value):
        wrong = good.copy()
        wrong[row, column] = np.add(value, 0.5)
        return wrong
    for wrong, word in ((np.roll(good, 3, axis=1), "3.0 pixels off"), (np.roll(good, -3, axis=0), "3.0 pixels off"),
                        (with_pixel(0.52), "0.520"), (with_pixel(np.inf), "infinite"),
                        (with_pixel([0, 0, np.nan]), "NaN in part"), (np.full_like(good, np.nan), "opaque"),
                        (np.where((np.arange(SIZE) % 2 > 0)[:, None, None], good, np.nan), "opaque")):
        np.save(path, wrong)
        refused(folder, path, word)
    np.save(path, with_pixel(0.503))                                    # as half floats have it
    assert read_object(folder)[1].position[0, 1, :, row, column].tolist() == [0.5] * 3
    np.save(path, with_pixel(np.nan))                                   # a hole is no mistake
    assert not read_object(folder)[1].normal[0, 1, :, row, column].any()


def test_steps_wider_than_a_pixel(tmp_path):
    """Positions of 8 bits of an object so small that a step is 4.7 pixels wide: no mistake, as the file is a PNG."""
    right, up, forward = (axis[:, :, None, None] for axis in camera(torch.tensor(AZIMUTHS)))
    size, extent, r = 96, 0.04, 0.03
    line = ((torch.arange(size) + 0.5) * 2 / size - 1) * extent
    x, y = line, -line[:, None]
    ball = (x * right + y * up - (r**2 - x**2 - y**2).sqrt() * forward)[None]           # NaN off it
    views = Views(torch.ones(1, 4, 3, size, size), ball[:, :, :1].isfinite().float(), ball.nan_to_num() / r, ball)
    write_object(tmp_path / "a", "a ball", views, extent=extent)
    for v in range(4):
        save(tmp_path / "a" / f"position_{v:03}.png", (ball[0, v] + 0.5).nan_to_num(1))
        (tmp_path / "a" / f"position_{v:03}.npy").unlink()
    _, back = read_object(tmp_path / "a")
    assert (back.position - ball.nan_to_num() * 0.55 / extent).abs().max() < 0.501 / 255 * 0.55 / extent
    steps = ((ball[0, 1] + 0.5) * 255).round() / 255 - 0.5
    np.save(tmp_path / "a" / "position_001.npy", steps.permute(1, 2, 0) + 0.5)
    refused(tmp_path / "a", "position_001.npy lies", "pixels off")


def test_transparent_everywhere(folder, mug):
    for v in range(4):
        save(folder / f"color_{v:03}.png", torch.cat([mug.rgb[0, v], torch.zeros(1, SIZE, SIZE)]))
    refused(folder, folder / "position_000.npy", "opaque")
    for v in range(4):
        np.save(folder / f"position_{v:03}.npy", np.full((SIZE, SIZE, 3), np.nan))
    refused(folder, folder, "no view shows an object")


# ---- the program


def test_toy_objects_through_the_command(tmp_path, capsys):
    """They read back; run again, it leaves what is there; bad flags end in one line."""
    command = ("-m", "full.objects", tmp_path / "toy", "--num", 2, "--size", 24, "--seed", 5)
    done = script(*command)
    assert done.returncode == 0 and f"wrote 2 objects to {tmp_path / 'toy'}" in done.stdout, done.stderr
    assets = sample_assets(2, 5)
    folders = object_folders(tmp_path / "toy")
    times = [path.stat().st_mtime_ns for folder in folders for path in sorted(folder.iterdir())]
    for k, folder in enumerate(folders):
        caption, views = read_object(folder)
        assert caption == asset_captions(assets)[k] and views.rgb.shape == (1, 4, 3, 24, 24)
    for num, said in ((2, "wrote 0 objects to"), (3, "wrote 1 objects to")):
        write_toy_objects(tmp_path / "toy", num, 24, 6)
        assert f"{said} {tmp_path / 'toy'}; 2 were there already, and are left" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for folder in folders for path in sorted(folder.iterdir())]
    one_line_error(script(*command[:3], "--num", 0), 2, "--num: 0 does not lie in [1, 1000000]")
    with pytest.raises(UsageError, match="meta.json/x' must be the name of a file"):
        write_toy_objects(folders[0] / "meta.json", 1, 24)


# ---- Objaverse-Ortho10View

SCALE = 1.24                                                            # width of an image in the world's units
DISTANCE = 2.5


def blender_camera(azimuth, elevation):
    """Camera to world, z up: at Blender's -y for azimuth 0, looking at the origin along its own -z."""
    a, e = math.radians(azimuth), math.radians(elevation)
    back = np.array([math.cos(e) * math.sin(a), -math.cos(e) * math.cos(a), math.sin(e)])
    right = np.array([math.cos(a), math.sin(a), 0])
    matrix = np.eye(4)
    matrix[:3] = np.stack([right, np.cross(back, right), back, DISTANCE * back], axis=1)
    return matrix


@pytest.fixture(scope="module")
def teapot():
    """Views of a teapot as the layout has them, eight azimuths at elevation 0, top and bottom; and their cameras."""
    turns = [(azimuth, 0) for azimuth in range(225, 225 + 360, 45)] + [(0, 90), (0, -90)]
    views = [render(one_asset("teapot"), Look("render"), [azimuth % 360], SIZE, elevation=e) for azimuth, e in turns]
    return views, [blender_camera(*turn) for turn in turns]


def write_ortho10view(folder, views, matrices, background=1e10):
    """The toy's units are drawn at EXTENT, so those of the world that an image SCALE wide shows are larger."""
    folder.mkdir(parents=True, exist_ok=True)
    places = []
    for k, (view, matrix) in enumerate(zip(views, matrices)):
        there = (view.normal[0, 0] != 0).any(dim=0)
        world = (OPPOSITE @ view.position[0, 0].flatten(1)).numpy().astype(np.float64) * SCALE / (2 * EXTENT)
        ahead = -(matrix[:3, 2] @ (world - matrix[:3, 3:])).reshape(SIZE, SIZE)         # along the camera's -z
        np.save(folder / f"depth_{k:04}.npy", np.where(there, ahead, background))
        normal = (OPPOSITE @ view.normal[0, 0].flatten(1)).view(3, SIZE, SIZE) / 2 + 0.5
        save(folder / f"normal_{k:04}.webp", normal)
        save(folder / f"color_{k:04}.webp", torch.cat([view.rgb[0, 0], view.mask[0, 0]]))
        places.append(dict(index=k, transform_matrix=matrix.tolist(), ortho_scale=SCALE, projection_type="ORTHO"))
    (folder / "meta.json").write_text(json.dumps(dict(caption="a teapot", locations=places)))
    return folder


@pytest.mark.parametrize("background, alpha", ((1e10, False), (65504, False), (np.inf, False), (np.nan, False),
                                               (0, False), (1e10, True), (2.9, True)))
def test_ortho10view(teapot, tmp_path, background, alpha):
    """The four views, turned to our frame, at the pixels' centres; the depth or alpha tells where the object is."""
    views, matrices = teapot
    folder = write_ortho10view(tmp_path / "a", views, matrices, background)
    for k, view in enumerate(views):
        if not alpha:
            save(folder / f"color_{k:04}.webp", view.rgb[0, 0])
        elif background < 10:                                           # a wall behind it, opaque nowhere
            inside = (view.normal[0, 0] != 0).any(dim=0, keepdim=True)
            save(folder / f"color_{k:04}.webp", torch.cat([view.rgb[0, 0], view.mask[0, 0] * inside]))
    caption, back = read_object(folder)
    truth = render(one_asset("teapot"), Look("render"), size=SIZE, elevation=0)
    assert caption == "a teapot"
    assert torch.equal((back.normal != 0).any(dim=2), (truth.normal != 0).any(dim=2))
    assert (back.position - truth.position).abs().max() < 1e-4
    assert (back.normal - truth.normal).abs().max() < 1.5 / 255
    assert (control_maps(back) - control_maps(truth)).abs().max() < 1.5 / 255
    if background == 1e10 and alpha:
        assert (back.mask - truth.mask).abs().max() < 0.51 / 255


def test_ortho10view_takes_the_elevation_nearest_to_ours(teapot, tmp_path):
    """Of three rings the one at 20 degrees; a ring of which a view lacks does not count."""
    views, matrices = teapot
    ring = [render(one_asset("teapot"), Look("render"), [azimuth], SIZE, elevation=20) for azimuth in AZIMUTHS]
    high, ours = ([blender_camera(azimuth, e) for azimuth in AZIMUTHS] for e in (60, 20))
    more, places = [*views, *ring, *ring], [*matrices, *high, *ours]    # the maps at 60 are not to be read
    _, back = read_object(write_ortho10view(tmp_path / "both", more, places))
    truth = render(one_asset("teapot"), Look("render"), size=SIZE)
    assert (back.position - truth.position).abs().max() < 1e-4
    _, back = read_object(write_ortho10view(tmp_path / "one", more[:-1], places[:-1]))
    truth = render(one_asset("teapot"), Look("render"), size=SIZE, elevation=0)
    assert (back.position - truth.position).abs().max() < 1e-4


def test_ortho10view_exr(teapot, tmp_path, monkeypatch):
    """Depth as EXR through a stand-in of the package, one channel or three in one; a clear line where it is absent."""
    folder = write_ortho10view(tmp_path / "a", *teapot)
    truth = read_object(folder)[1]
    depths = {}
    for path in folder.glob("*.npy"):
        depths[str(path.with_suffix(".exr"))] = np.load(path).astype(np.float32)
        path.rename(path.with_suffix(".exr"))
    monkeypatch.setitem(sys.modules, "OpenEXR", None)
    refused(folder, "depth_0003.exr", "pip install OpenEXR")
    channel = lambda pixels: types.SimpleNamespace(pixels=pixels)
    for channels in (lambda d: {"V": channel(d), "Z": channel(0 * d)},
                     lambda d: {"RGB": channel(np.stack([d, 0 * d, 0 * d], axis=2))}):
        file = lambda path, channels=channels: types.SimpleNamespace(channels=lambda: channels(depths[path]))
        monkeypatch.setitem(sys.modules, "OpenEXR", types.SimpleNamespace(File=file))
        assert (read_object(folder)[1].position - truth.position).abs().max() < 1e-6

    def broken(path):
        raise RuntimeError("not an EXR file")
    monkeypatch.setitem(sys.modules, "OpenEXR", types.SimpleNamespace(File=broken))
    refused(folder, "depth_0003.exr", "not an EXR file")


def test_ortho10view_refused(teapot, tmp_path):
    views, matrices = teapot
    folder = write_ortho10view(tmp_path / "a", views, matrices)
    path = folder / "meta.json"
    places = json.loads(path.read_text())["locations"]

    def with_place(k, **changes):
        changed = {key: value for key, value in (places[k] | changes).items() if value is not None}
        return [*places[:k], changed, *places[k + 1:]]
    turned = blender_camera(272, 0).tolist()
    scaled = (blender_camera(0, 0) * 2).tolist()
    for locations, where, word in (
        (with_place(2, projection_type="PERSP"), path, "view 2 is not orthographic"),
        (with_place(2, ortho_scale=None), path, "view 2 is not orthographic"),
        (with_place(2, transform_matrix=scaled), path, "transform_matrix of view 2"),
        (with_place(2, transform_matrix=[[1, 0], [0]]), path, "locations"),
        (with_place(2, index=None), path, "index"),
        (with_place(2, index=math.inf), path, "locations cannot be read: OverflowError"),
        (with_place(2, ortho_scale=10**400), path, "locations cannot be read: OverflowError"),
        (with_place(2, transform_matrix=[[10**400] * 4] * 4), path, "locations cannot be read: OverflowError"),
        (with_place(1, transform_matrix=turned), folder, "no four views"),              # view 1 is that at 270
        (with_place(1, ortho_scale=1.0), path, "ortho_scale"),
        (places[:5], folder, "no four views"),
        (places[8:], folder, "no four views"),
        ([], folder, "no four views"),
        (7, path, "locations"),
    ):
        change_meta(folder, locations=locations)
        refused(folder, where, word)
    moved = np.array(places[3]["transform_matrix"])                      # view 3 is that at 0
    moved[0, 3] += 3 * SCALE / SIZE
    change_meta(folder, locations=with_place(3, transform_matrix=moved.tolist()))
    refused(folder, folder / "depth_0003.npy", "3.0 pixels off")
    change_meta(folder, locations=places, caption=None)
    refused(folder, path, "caption.txt")
    (folder / "caption.txt").write_text("a white teapot")
    assert read_object(folder)[0] == "a white teapot"
    depth = np.load(folder / "depth_0005.npy")
    np.save(folder / "depth_0005.npy", depth / 3)                       # as if it had been normalised
    refused(folder, folder / "depth_0005.npy", "from the middle")
    np.save(folder / "depth_0005.npy", depth[..., None])
    refused(folder, folder / "depth_0005.npy", "(32, 32, 1)")
    (folder / "depth_0005.npy").unlink()
    refused(folder, "depth_0005.exr or ", folder / "depth_0005.npy", error=FileNotFoundError)
