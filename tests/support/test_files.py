"""Files are whole or not there: what a failed or cut-off write leaves, and what is said of a damaged file."""

import os
import subprocess
import sys
import zlib

import pytest
import torch
from conftest import ROOT
from tqdm import tqdm

import support.files
from support.files import (cached, file_id, joined_parts, load_strictly, load_tensors, locked, ranges, read_json,
                           run_or_shipped, save_tensors, up_to_date, write_json, write_parts)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"a": torch.ones(1)})

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr(support.files, "save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(path, {"a": torch.zeros(1)})
    assert load_tensors(path)[0]["a"].item() == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_tensors_and_metadata_come_back(tmp_path):
    path = tmp_path / "sub" / "m.safetensors"
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.ones(2, 3).T.half()}
    save_tensors(path, tensors, key=dict(seed=1, words=["x"]), name="m")
    again, metadata = load_tensors(path)
    assert metadata == dict(key=dict(seed=1, words=["x"]), name="m")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("content", [
    {}, [torch.ones(1)], {"a": 3}, {"state_dict": torch.ones(2)}, {"state_dict": "a"},
])
def test_a_pth_file_of_something_else_is_named(content, tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, tmp_path / "m.pth")
    assert load_tensors(tmp_path / "m.pth")[0]["a"].tolist() == [1, 1]
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="m.pth (holds no state_dict|is not a readable file of torch.save)"):
        load_tensors(tmp_path / "m.pth")


def test_a_cached_file_is_made_once_a_key_and_again_when_damaged(tmp_path, capsys):
    path, built = tmp_path / "c.safetensors", []

    def build():
        built.append(1)
        return {"a": torch.full((2,), len(built))}

    for key, times in ((dict(seed=0), 1), (dict(seed=0), 1), (dict(seed=1), 2), (dict(seed=1), 2)):
        assert cached(path, key, build)["a"].tolist() == [times] * 2 and len(built) == times
    assert up_to_date(path, dict(seed=1)) and not up_to_date(path, dict(seed=0))
    path.write_bytes(path.read_bytes()[:20])
    assert cached(path, dict(seed=1), build)["a"].tolist() == [3, 3]
    assert "c.safetensors is damaged, making it again" in capsys.readouterr().out
    assert not up_to_date(tmp_path / "none.safetensors", dict(seed=1))


def test_parts_are_made_once_a_key_and_joined_in_order(tmp_path):
    """A part that another key has made, as of another precision, is made again."""
    made, parts, bar = [], ranges(5, 2), tqdm(total=5, disable=True)
    assert parts == [range(0, 2), range(2, 4), range(4, 5)]

    def draw(rows):
        made.append(rows)
        return torch.tensor([*rows]) + 10
    for key, those, expected in (("a", parts[:2], parts[:2]), ("a", parts, parts[2:]), ("b", parts, parts)):
        made.clear()
        write_parts(tmp_path / "parts", dict(dtype=key), those, draw, bar)
        assert made == expected
    assert joined_parts(tmp_path / "parts", parts).tolist() == [10, 11, 12, 13, 14]


def test_a_file_s_id_changes_when_its_tensors_do(tmp_path):
    path = tmp_path / "m.safetensors"
    save_tensors(path, {"a": torch.tensor([1.0, -2.0]), "b": torch.ones(3, dtype=torch.half)})
    content = torch.tensor([1.0, -2.0]).numpy().tobytes() + torch.ones(3, dtype=torch.half).numpy().tobytes()
    assert file_id(path) == ["m.safetensors", zlib.crc32(content)]
    for other in ([1.0, 2.0], [-2.0, 1.0]):
        save_tensors(path, {"a": torch.tensor(other), "b": torch.ones(3, dtype=torch.half)})
        assert file_id(path)[1] != zlib.crc32(content)


def test_weights_that_do_not_fit_are_named(tmp_path):
    layer = torch.nn.Linear(2, 3)
    load_strictly(layer, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "m")
    assert layer.weight.sum() == 6
    with pytest.raises(ValueError, match=r"m does not fit the model: bias missing, weight \(2, 3\)"):
        load_strictly(layer, {"weight": torch.ones(2, 3)}, "m")


def test_json_comes_back_and_a_damaged_one_is_named(tmp_path):
    path = str(tmp_path / "sub" / "a.json")
    write_json(path, {"rows": [1, None]})
    assert read_json(path) == {"rows": [1, None]}
    with open(path, "w") as file:
        file.write('{"rows": [1')
    with pytest.raises(ValueError, match="a.json is damaged .*: delete it"):
        read_json(path)


def test_a_lock_is_waited_for_and_that_is_said(tmp_path):
    """A second process enters after the first has left."""
    code = f"from support.files import locked\nwith locked({str(tmp_path / 'shared')!r}): print('inside', flush=True)"
    with locked(tmp_path / "shared"):
        other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == f"waiting for another process that is at work in {tmp_path / 'shared'}\n"
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "inside\n" and other.returncode == 0


def test_the_run_folders_file_comes_before_the_shipped_one(tmp_path):
    shipped = run_or_shipped(tmp_path, "toy", "base.safetensors")
    assert os.path.samefile(shipped, f"{ROOT}/weights/toy_base.safetensors")
    own = tmp_path / "base.safetensors"
    own.touch()
    assert run_or_shipped(tmp_path, "toy", "base.safetensors") == str(own)
    assert run_or_shipped(tmp_path, "small", "other.safetensors") == str(tmp_path / "other.safetensors")
