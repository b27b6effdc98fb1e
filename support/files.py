"""Files that are whole or not there: safetensors with JSON metadata, JSON, text and bytes.

Everything is written to a temporary name and moved into place, so that a stop leaves the old file or the new one.
"""
import io
import json
import os
import zlib
from contextlib import contextmanager

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ---------------------------------------------------------------------------------------------------------------------
# Tensors


def save_tensors(path, tensors, **metadata):
    """Writes {name: tensor} with JSON metadata to a temporary name and moves it into place."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    partial = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        save_file(tensors, partial, {key: json.dumps(value) for key, value in metadata.items()})
        os.chmod(partial, 0o644)            # the library writes files that only their owner can read
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:     # the latter for a full or read-only disk
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load_tensors(path, device="cpu", prefix=""):
    """({name: tensor}, metadata) of what `save_tensors` wrote, or of another program's safetensors or torch.save file
    (.pth, .pt; weights only, no metadata). prefix: of safetensors, only what is called so is read. Raises
    FileNotFoundError, ValueError if damaged."""
    metadata = read_metadata(path)
    if str(path).endswith((".pth", ".pt")):
        try:
            tensors = torch.load(path, map_location=device, weights_only=True)
        except Exception:           # its unpickler raises whatever the bytes of another file lead it to
            raise ValueError(f"{path} is not a readable file of torch.save with nothing but tensors in it") from None
        tensors = tensors.get("state_dict", tensors) if isinstance(tensors, dict) else {}
        whole = isinstance(tensors, dict) and all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())
        if not whole or not tensors:
            raise ValueError(f"{path} holds no state_dict, a dictionary of tensors")
        return tensors, metadata
    with safe_open(path, "pt", device=str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}, metadata


def read_metadata(path):
    """The metadata alone: {} for a file of torch.save. Raises as `load_tensors`."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {path}")
    if str(path).endswith((".pth", ".pt")):
        return {}
    try:
        with safe_open(path, "pt") as file:
            return {key: parse_metadata(value) for key, value in (file.metadata() or {}).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a readable safetensors file (cut off, or another type): {error}") from None


def parse_metadata(value):
    """What `save_tensors` wrote as JSON; a plain word of another program's file ("format": "pt") as it is."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def up_to_date(path, key):
    """Whether `path` is a file that `save_tensors` wrote with this metadatum `key`; says so where it is damaged."""
    try:
        return read_metadata(path).get("key") == json.loads(json.dumps(key))
    except FileNotFoundError:
        return False
    except ValueError:
        print(f"{path} is damaged, making it again")
        return False


def cached(path, key, build):
    """The {name: tensor} in the file at path if it was made from key; else build() it and keep it there."""
    if up_to_date(path, key):
        tensors, metadata = load_tensors(path)
        if metadata.get("checksum") in (None, checksum(tensors)):               # sets of earlier commits have none
            return tensors
        print(f"{path} is damaged, making it again")
    tensors = build()
    save_tensors(path, tensors, key=key, checksum=checksum(tensors))
    return tensors


def write_parts(folder, key, parts, draw, progress):
    """{"image": draw(rows)} for each range of rows in parts, as FOLDER/START.safetensors. Those that are there and made
    from key stay as they are, so that a run that was stopped goes on; the tqdm bar `progress` passes them."""
    for rows in parts:
        path = f"{folder}/{rows.start:08d}.safetensors"
        if up_to_date(path, key):
            progress.update(len(rows))
        else:
            save_tensors(path, {"image": draw(rows)}, key=key)


def joined_parts(folder, parts):
    """The images of `write_parts`, in their order."""
    return torch.cat([load_tensors(f"{folder}/{rows.start:08d}.safetensors")[0]["image"] for rows in parts])


def ranges(num, size=64):
    """0 .. num in ranges of at most `size`."""
    return [range(start, min(start + size, num)) for start in range(0, num, size)]


def checksum(tensors):
    """CRC-32 over the bytes of {name: tensor}."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def file_id(path):
    """Name and checksum of a checkpoint: changes when the checkpoint does."""
    return [os.path.basename(path), checksum(load_tensors(path)[0])]


def run_or_shipped(folder, preset, name):
    """Path of FOLDER/NAME, or where that is missing of the repository's weights/PRESET_NAME, if there is one."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own, shipped = f"{folder}/{name}", f"{root}/weights/{preset}_{name}"
    return shipped if os.path.isfile(shipped) and not os.path.isfile(own) else own


def load_strictly(module, weights, path):
    """module.load_state_dict, with every misfit named in one line (ValueError)."""
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    misfit = sorted(f"{name} {given.get(name, 'missing')}" for name in shapes.keys() | given.keys()
                    if shapes.get(name) != given.get(name))
    if misfit:
        raise ValueError(f"{path} does not fit the model: {', '.join(misfit[:4])}{', ...' if len(misfit) > 4 else ''}")
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path} holds numbers that are not finite, in {broken[0]}: take an earlier file")
    module.load_state_dict(weights)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes, text, JSON


def write_bytes(path, content):
    """Writes to a temporary name and moves it into place."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(f"{path}.tmp", "wb") as file:
            file.write(content)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


def write_array(path, array):
    """Writes a NumPy array as .npy, as `write_bytes`."""
    content = io.BytesIO()
    np.save(content, array)
    write_bytes(path, content.getvalue())


def write_text(path, text):
    """Writes text, as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path, value):
    """Writes a value as JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path):
    """A JSON file of this project. Raises ValueError naming it where it is damaged."""
    try:
        with open(path) as file:
            return json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, or take it from git") from None


@contextmanager
def locked(folder):
    """Within it no other process is within its own `locked(folder)`: they wait, and say so. For files that several add
    to."""
    os.makedirs(folder, exist_ok=True)
    try:
        import fcntl
    except ImportError:                         # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that is at work in {folder}", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:                             # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)
