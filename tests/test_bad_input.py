"""What a user may get wrong, a table a kind: one line that names the flag or file, 2 for usage and 1 for failure, and
nothing written."""
import shutil
from argparse import Namespace
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ALONE, TINY, TINY_STAGE2, random_model, refuses, run_main, trained_shifters
from PIL import Image

import data
import evaluate
import pca_features
import sample
import train_stage1
import train_stage2
from baselines.adapters import ADAPTERS
from dit import save_model
from domain_shifter import DomainShifters
from experiments import benchmark, layer_selective, shift, tables
from related import refany3d
from support.files import load_tensors, save_tensors
from support.folders import find_images, read_caption, read_image, read_views
from support.networks import load_inception
from toy import pretrain
from training.log import Log
from training.states import stored_speed

NUMBERS = [
    (train_stage2, ("--lr", "nan"), "--lr"), (train_stage2, ("--lr", "-1"), "--lr"),
    (train_stage2, ("--lr", "inf"), "--lr"), (train_stage2, ("--real_steps", "1001"), "--real_steps"),
    (train_stage1, ("--clip", "-1"), "--clip"), (train_stage2, ("--stage1_steps", "0"), "--stage1_steps"),
    (train_stage2, ("--real_warmup", "-5000"), "--real_warmup"), (train_stage2, ("--seed", 2 ** 64), "--seed"),
    (train_stage2, ("--picture_steps", "1001"), "--picture_steps"),
    (train_stage2, ("--p_B", "nan"), "--p_B"), (train_stage2, ("--tau_B", "1.1"), "--tau_B"),
    (train_stage2, ("--rank", 10 ** 8), "--rank"), (train_stage2, ("--batch", 10 ** 8), "--batch"),
    (sample, ("--object", 10 ** 8), "--object"), (sample, ("--object", -1), "--object"),
    (sample, ("--texture_size", 10 ** 7), "--texture_size"), (data, ("--size", 10 ** 5), "--size"),
    (data, ("--size", 0), "--size"), (sample, ("--out", "."), "--out"),
    (train_stage2, ("--weight_decay", "-0.1"), "--weight_decay"), (train_stage2, ("--threads", "0"), "--threads"),
    (pretrain, ("--num_base_images", "0"), "--num_base_images"), (pretrain, ("--preset", "full"), "preset full"),
    (benchmark, ("--tau_B", "nan"), "--tau_B"), (sample, ("--cfg_scale", "inf"), "--cfg_scale"),
    (sample, ("--object", "1", "--prompt", "a red wooden mug"), "--object and --prompt both say what to draw"),
    (tables, ("table1", "--processes", "0"), "--processes"),
    (sample, ("--B_max", "nan"), "--B_max"), (pca_features, ("--cfg_scale", "nan"), "--cfg_scale"),
    (evaluate, ("toy", "--cfg_scale", "nan"), "--cfg_scale"), (shift, ("select", "--max_loss", "nan"), "--max_loss"),
    (evaluate, ("folders", "a", "b", "--elevation", "nan"), "--elevation"),
    (evaluate, ("folders", "a", "b", "--extent", "nan"), "--extent"),
    (evaluate, ("folders", "a", "b", "--extent", "0"), "--extent"),
    (evaluate, ("folders", "a", "b", "--azimuths", "nan", "0"), "--azimuths"),
    (sample, ("--num_steps", "0"), "--num_steps"), (sample, ("--t_max", "1001"), "--t_max"),
    (sample, ("--seed", "-1"), "--seed"), (sample, ("--B_max", "1.5"), "--B_max"),
    (sample, ("--threads", 10 ** 9), "--threads"), (evaluate, ("toy", "--num", "0"), "--num"),
    (evaluate, ("toy", "--num_steps", "1001"), "--num_steps"), (data, ("--seed", "-1"), "--seed"),
    (pca_features, ("--seed", "-1"), "--seed"), (tables, ("table1", "--num_steps", "0"), "--num_steps"),
    (refany3d, ("--prompt", "a mug", "--num_steps", "0"), "--num_steps"),
    (train_stage2, ("--threads", 10 ** 9), "--threads"), (benchmark, ("--rounds", 10 ** 9), "--rounds"),
    # flags that would do nothing, and files that cannot be written
    (sample, ("--texture_size", "64"), "--texture_size is of --textured"),
    (sample, ("--num_assets", "3"), "--num_assets is of --real_set"),
    (sample, ("--real_set", "r.safetensors", "--object", "3"), "--real_set draws its own captions"),
    (sample, ("--B_max", "0.2", "--domain", "real"), "--B_max and --t_max are of --domain shifted"),
    (tables, ("table1", "--processes", "2", "--threads", "2"), "--processes gives each of them one thread"),
    (tables, ("table1", "--train_flags=--bogus 1"), "--train_flags '--bogus 1': unrecognized arguments"),
    (tables, ("table1", "--train_flags=--out elsewhere"), "--train_flags must not name --out"),
    (train_stage2, ("--method", "domain_switcher", "--rank", "5"), "--rank would do nothing"),
    (train_stage2, ("--no_reassignment", "--p_B", "0.3"), "--p_B would do nothing"),
    (train_stage2, ("--no_reassignment", "--no_freezing", "--tau_B", "0.3"), "--tau_B would do nothing"),
    (train_stage2, ("--method", "syn_only", "--real", "r.safetensors"), "--real would do nothing"),
    (train_stage2, ("--no_real_data", "--real_warmup", "3"), "--real_warmup would do nothing"),
    (train_stage2, ("--method", "lora", "--stage1_steps", "9"), "--stage1_steps would do nothing"),
    (train_stage2, ("--joint", "--stage1_steps", "9"), "--stage1_steps would do nothing"),
    (train_stage2, ("--method", "lora", "--muon"), "--muon would do nothing"),
    (evaluate, ("folders", "a", "b", "--extent", "0.7"), "--extent would do nothing"),
    (train_stage2, ("--method", "lora", "--no_reassignment"), "--no_reassignment would do nothing"),
    (train_stage2, ("--no_real_data", "--no_freezing"), "--no_freezing would do nothing"),
    (train_stage2, ("--method", "syn_only", "--no_real_data"), "--no_real_data would do nothing"),
    (train_stage2, ("--joint",), "--joint trains the shifters"),
    (train_stage2, ("--preset", "full", "--loss", "even"), "--loss even"),
    (train_stage1, ("--muon",), "--muon would do nothing"),
    (sample, ("--real_set", "r.safetensors", "--spacing", "leading"), "--spacing would do nothing"),
    (train_stage1, ("--adapter", "lora", "--real_steps", "9"), "--real_steps would do nothing"),
    (train_stage1, ("--adapter", "switcher", "--rank", "9"), "--rank would do nothing"),
    (pretrain, ("--num_assets", "9"), "--num_assets would do nothing"),
    (benchmark, ("--out", "there"), "--out would do nothing"),
    (layer_selective, ("--synthetic", "there"), "--synthetic would do nothing"),
    (refany3d, ("--prompt", "a mug", "--steps", "9"), "--steps would do nothing"),
    (refany3d, ("--num_steps", "9"), "--num_steps would do nothing"),
    (data, ("--out", "."), "--out"), (pca_features, ("--out", "."), "--out"), (evaluate, ("toy", "--out", ""), "--out"),
    (train_stage2, ("--lr", "100"), "--lr"), (train_stage2, ("--clip", "0"), "--clip"),
    (train_stage2, ("--name", " "), "--name"), (train_stage2, ("--name", "a" * 250), "--name"),
    (evaluate, ("folders", "a", "b", "--extent", "1e-300"), "--extent"),
    (evaluate, ("folders", "a", "b", "--azimuths", "1e300"), "--azimuths"),
    (sample, ("--texture_size", "8", "--textured", "t"), "--texture_size"), (sample, ("--out", "/dev/null"), "--out"),
    (sample, ("--out", "new/"), "--out"), (sample, ("--out", "b" * 250 + ".png"), "--out"),
    (sample, ("--views", "/dev/null/views"), "--views"), (sample, ("--real_set", "."), "--real_set"),
    (refany3d, ("--mesh", "", "--object", "3", "--prompt", "a mug"), "--mesh and --object both name what to draw"),
]
NAMES = ["base", "shifters", "stage1", "lora_5", "shifters_4", "sets", "sets/real_4", "../elsewhere", ".", ".."]


@pytest.mark.parametrize("program, flags, word", NUMBERS)
def test_numbers_out_of_range_name_their_flag(program, flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refuses(program, flags, 2, word)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_training_does_not_take_another_files_name(name, tiny_toy):
    out, _ = tiny_toy
    before = sorted(out.rglob("*"))
    refuses(train_stage2, ("--out", out, "--name", name), 2, "--name")
    assert sorted(out.rglob("*")) == before


def test_a_base_model_takes_no_folder_of_others(tmp_path):
    for name in ("sets", ".", "..", "stage1", "shifters"):
        refuses(pretrain, ("--out", tmp_path, "--name", name), 2, "--name")
    assert not list(tmp_path.iterdir())


def test_stage_1_must_be_of_this_method_and_rank(tiny_toy):
    out, _ = tiny_toy
    files = {"base": dict(model=random_model()), "rank 3": dict(shifters=trained_shifters()),
             "lora": dict(adapter=ADAPTERS["lora"](TINY, 8))}
    for name, parts in files.items():
        save_model(f"{out}/{name}.safetensors", TINY, **parts, adapter_kind=name)
        refuses(train_stage2, ("--out", out, "--num_assets", 4, "--shifters", f"{out}/{name}.safetensors"), 1, name,
                "takes shifters of rank 8")
    save_model(f"{out}/shifters_8.safetensors", TINY, shifters=DomainShifters(TINY))
    refuses(train_stage2, ("--out", out, "--joint", "--shifters", f"{out}/shifters_8.safetensors"), 2, "--joint")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_whatever_reads_them(number, tiny_toy):
    out, _ = tiny_toy
    model, shifters, path = random_model(), trained_shifters(), f"{out}/broken.safetensors"
    with torch.no_grad():
        model.blocks[1].mlp[0].weight[0, 0] = number
    save_model(path, TINY, model, shifters)
    for program, flags in ((sample, ("--model", path)), (train_stage1, ("--base", path, "--out", out)),
                           (sample, ("--model", path, "--real_set", f"{out}/set.safetensors")),
                           (pca_features, ("--model", path))):
        refuses(program, flags, 1, path, "not finite", "blocks.1.mlp.0.weight")
    assert not (out / "set.safetensors").exists()


def test_a_rank_without_a_world_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    refuses(train_stage2, ("--threads", 1), 1, "RANK is 1 and WORLD_SIZE 1")
    monkeypatch.setenv("RANK", "abc")
    refuses(train_stage2, ("--threads", 1), 1, "RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers")


def test_two_rows_of_a_picture_have_two_names(tiny_toy):
    out, _ = tiny_toy
    base = f"{out}/base.safetensors"
    refuses(sample, ("--model", base, "--prompt", "a mug", "--beside", f"a={base}", f"a={base}"), 2, "called a already")
    refuses(sample, ("--model", base, "--prompt", "<end> mug"), 2, "--prompt: unknown word '<end>'")
    save_model(f"{out}/larger.safetensors", replace(TINY, image_size=32), random_model(replace(TINY, image_size=32)))
    flags = ("--model", base, "--prompt", "a mug", "--beside", f"{out}/larger.safetensors", "--out", f"{out}/a.png")
    refuses(sample, flags, 1, "larger.safetensors is a checkpoint of another configuration: image_size 32")


def test_a_model_of_stage_2_is_no_base_model(tiny_toy):
    out, _ = tiny_toy
    save_model(f"{out}/trained.safetensors", TINY, random_model(), settings=dict(task="texturing"))
    for program in (train_stage1, train_stage2, pretrain):
        refuses(program, ("--out", out, "--base", f"{out}/trained.safetensors"), 1, "trained.safetensors", "stage 2")
        refuses(program, ("--out", out, "--base", f"{out}/nowhere.safetensors"), 1, "nowhere.safetensors")
    assert not (out / "sets").exists()


def test_another_name_leaves_the_default_one_in_peace(tiny_toy):
    """Stage 1 and base models: what a stage finds by itself is not replaced by a training of another name."""
    out, _ = tiny_toy
    base = (out / "base.safetensors").read_bytes()
    small = ("--picture_steps", 1, "--threads", 1, "--steps", 1, "--batch", 1)
    run_main(train_stage1, "--out", out, "--name", "mine", "--num_assets", 4, "--real_steps", 2, *small)
    assert (out / "mine.safetensors").exists() and not (out / "shifters.safetensors").exists()
    run_main(pretrain, "--out", out, "--name", "another", "--num_base_images", 4, *small)
    assert (out / "another.safetensors").exists() and (out / "base.safetensors").read_bytes() == base


def test_the_real_set_replaces_no_other_file(tiny_toy):
    out, _ = tiny_toy
    shutil.copy(out / "base.safetensors", out / "kept.safetensors")
    (out / "notes.txt").write_text("kept")
    save_tensors(f"{out}/synthetic.safetensors", {"x": torch.zeros(1)}, key=dict(kind="synthetic", num=4))
    for name in ("kept.safetensors", "notes.txt", "synthetic.safetensors"):
        before = (out / name).read_bytes()
        refuses(sample, ("--base", out / "base.safetensors", "--real_set", out / name), 2, "--real_set", name)
        assert (out / name).read_bytes() == before


@pytest.mark.parametrize("field, value", [
    ("depth", "4"), ("depth", None), ("depth", 10 ** 6), ("heads", 0), ("patch_size", 0), ("width", -16),
    ("qk_norm", 2.5), ("pos_scale", 0), ("image_size", True), ("image_size", 8000)])
def test_a_configuration_that_cannot_be_names_the_field(field, value, tmp_path):
    path = str(tmp_path / "model.safetensors")
    save_tensors(path, dict(random_model().state_dict()), config=asdict(TINY) | {field: value})
    refuses(sample, ("--model", path), 1, path, *(("256 x 256 tokens",) if value == 8000 else (field, repr(value))))
    save_tensors(path, dict(random_model().state_dict()), config=asdict(TINY) | dict(depth=8000))
    refuses(sample, ("--model", path), 1, path, "holds 4 blocks of 8000")         # at once: 8,000 take minutes to make


@pytest.mark.parametrize("settings", ["a string", ["a list"], None, 3])
def test_settings_that_are_no_dictionary_are_no_settings(settings, tmp_path):
    save_tensors(str(tmp_path / "model.safetensors"), {"x": torch.zeros(1)}, settings=settings)
    assert sample.trained_task(str(tmp_path / "model.safetensors")) is None


def test_lines_of_a_log_that_are_none_are_left_out(tmp_path):
    lines = ("[1]", "3", '"a"', '{"loss": 1}', '{"step": "a"}', '{"step": 1, "domain": "syn"}',
             '{"step": 1, "domain": "syn", "loss": Infinity}', '{"step": 1, "domain": "syn", "loss": NaN}',
             '{"step": -1}', '{"step": 1e400}', "[" * 10 ** 5, '{"step": 1, "domain": "syn", "loss": 1.0}', '{"step"')
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    log = Log(str(tmp_path), None, ALONE, 5)
    assert log.lines == [dict(step=1, domain="syn", loss=1.0)]


@pytest.mark.parametrize("stored", [
    "[]", "{}", '{"B_max": 0.3}', '{"t_max": 950, "model": ["m", 0]}', "null", "no", "[" * 10 ** 5,
    '{"B_max": 5, "t_max": 950, "model": 0}', '{"B_max": NaN, "t_max": 950, "model": 0}',
    '{"B_max": 0.3, "t_max": Infinity, "model": 0}'])
def test_a_shift_that_cannot_be_read_is_named(stored, tmp_path):
    path = str(tmp_path / "m.safetensors")
    save_tensors(path, {"x": torch.zeros(1)})
    (tmp_path / "m.shift.json").write_text(stored)
    with pytest.raises(ValueError, match="m.shift.json is damaged: delete it"):
        sample.selected_shift(path)


ROWS_THAT_ARE_NONE = ("null", '{"toy": null}', '{"toy": {"0": null}}', '{"toy": {"0": {"psnr": "3"}}}',
                      '{"toy": {"0": {"psnr": NaN}}}')


@pytest.mark.parametrize("stored", ["[]", "{}", '{"settings": {}}', *(
    '{"settings": {}, "rows": {"syn only": %s}}' % row for row in ROWS_THAT_ARE_NONE)])
def test_results_that_are_none_are_named(stored, tmp_path):
    (tmp_path / "table1.json").write_text(stored)
    with pytest.raises(ValueError, match="table1.json is no file of results"):
        tables.read_results(str(tmp_path / "table1.json"), Namespace())


@pytest.mark.parametrize("in_the_way", ["realiz3d_texturing.png", "realiz3d_texturing.safetensors", "stage1.png",
                                        "shifters.safetensors"])
def test_a_folder_in_the_way_is_found_before_stage_1(in_the_way, tiny_toy):
    out, seen = tiny_toy
    (out / in_the_way).mkdir()
    refuses(train_stage2, ("--out", out, *TINY_STAGE2), 2, in_the_way, "--out and --name")
    assert not seen and len(list(out.iterdir())) == 2


def test_shifters_of_another_base_model_are_refused(tiny_toy):
    out, seen = tiny_toy
    run_main(train_stage2, "--out", out, *TINY_STAGE2)
    save_model(f"{out}/base.safetensors", TINY, random_model(seed=3))
    flags = ("--out", out, "--name", "again", *TINY_STAGE2)
    refuses(train_stage2, flags, 1, "shifters.safetensors was trained beside another base model, base.safetensors")
    assert "again" not in seen


@pytest.mark.parametrize("part", [dict(shifters=trained_shifters()), dict(adapter=ADAPTERS["lora"](TINY, 8))])
def test_low_rank_matrices_of_another_shape_are_named(part, tiny_toy):
    out, _ = tiny_toy
    path = f"{out}/flat.safetensors"
    save_model(path, TINY, random_model(), **part, adapter_kind="lora")
    tensors, metadata = load_tensors(path)
    flat = {name: tensor.flatten() if name.endswith("W_right") else tensor for name, tensor in tensors.items()}
    save_tensors(path, flat, **metadata)
    refuses(sample, ("--model", path, "--prompt", "a mug"), 1, path, "W_right")


def test_a_training_without_a_render_is_refused(tiny_toy):
    out, _ = tiny_toy
    refuses(train_stage2, ("--out", out, "--steps", 20), 2, "--steps 20", "--real_warmup 20")
    assert not (out / "sets").exists()


def test_weights_that_16_bits_do_not_hold_are_not_written(tiny_toy):
    out, _ = tiny_toy
    flags = ("--method", "syn_only", "--num_assets", 4, "--batch", 1, "--steps", 1, "--picture_steps", 1)
    refuses(train_stage2, ("--out", out, *flags, "--lr", 10, "--weight_decay", 1e6, "--warmup", 0), 1, "--lr")
    assert not (out / "syn_only_texturing.safetensors").exists()


@pytest.mark.parametrize("speed", [
    dict(threads=-5, dtype="float32"), dict(threads=1, dtype=["float32"]), dict(threads=1),
    dict(threads=1, dtype="float32", processes=0), dict(threads=1, dtype="float32", processes=10 ** 6), [], 3])
def test_a_speed_that_cannot_be_is_not_gone_on_with(speed, tmp_path):
    save_tensors(f"{tmp_path}/state_00000001.safetensors", {"x": torch.zeros(1)}, speed=speed)
    assert stored_speed([str(tmp_path)]) == {}
    good = dict(threads=2, dtype="bfloat16", processes=2)
    save_tensors(f"{tmp_path}/state_00000001.safetensors", {"x": torch.zeros(1)}, speed=good)
    assert stored_speed([str(tmp_path)]) == good


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line(error):
    def main(flags):
        raise error
    refuses(Namespace(main=main), (), 1, "out of memory", "--batch")


def test_what_a_kill_left_half_written_is_cleared_away(tiny_toy):
    out, _ = tiny_toy
    (out / "realiz3d_texturing").mkdir()
    (out / "realiz3d_texturing" / "state_00000001.safetensors.123.tmp").write_bytes(b"half")
    run_main(train_stage2, "--out", out, *TINY_STAGE2)
    assert not list(out.rglob("*.tmp")) and (out / "realiz3d_texturing.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Images, maps and networks of the user's


def views_and_maps(folder):
    """One object's view and position map below folder/ours and folder/maps."""
    for name in ("ours/a", "maps/a"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "ours" / "a" / "color_000.png")
    np.save(folder / "maps" / "a" / "position_000.npy", np.full((8, 8, 3), 0.5, np.float32))


@pytest.mark.parametrize("array", [
    np.array(["a"] * 192).reshape(8, 8, 3), np.full((8, 8, 3), None), np.zeros((7, 8, 3)), np.full((8, 8, 3), np.nan),
    np.zeros(3), np.zeros((8, 8, 2))])
def test_maps_that_are_none_name_their_folder(array, tmp_path):
    views_and_maps(tmp_path)
    np.save(tmp_path / "maps" / "a" / "position_000.npy", array)
    with pytest.raises(ValueError, match="maps/a"):
        read_views(f"{tmp_path}/ours/a", tmp_path / "maps" / "a", 1)


def test_an_image_too_large_to_open_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    views_and_maps(tmp_path)
    with pytest.raises(ValueError, match="cannot read the image .*color_000.png"):
        read_image(f"{tmp_path}/ours/a/color_000.png")


def test_a_pattern_that_leaves_the_folder_is_refused(tmp_path):
    views_and_maps(tmp_path)
    for pattern in ("/etc/*", "", "../*"):
        with pytest.raises(ValueError, match="pattern"):
            find_images(tmp_path, pattern)


@pytest.mark.parametrize("meta, error", [
    ("{", ValueError), ("[]", FileNotFoundError), ('{"caption": 3}', FileNotFoundError)])
def test_captions_that_are_none_name_their_file(meta, error, tmp_path):
    views_and_maps(tmp_path)
    (tmp_path / "ours" / "a" / "meta.json").write_text(meta)
    with pytest.raises(error, match="meta.json"):
        read_caption(f"{tmp_path}/ours/a/color_000.png")


def test_captions_that_are_no_text_name_their_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="a.txt is no text in UTF-8"):
        read_caption(f"{tmp_path}/a.png")


def test_a_map_off_its_camera_or_of_nothing_is_named():
    position = torch.full((1, 3, 8, 8), torch.nan)
    with pytest.raises(ValueError, match="position_000.npy lies wholly off its camera"):
        evaluate.check_cameras(position, [0], 20, "maps")


def test_a_network_without_features_is_named(tmp_path):
    torch.jit.script(torch.nn.Identity()).save(str(tmp_path / "net.pt"))
    with pytest.raises(ValueError, match="net.pt gives no features of an image"):
        load_inception(str(tmp_path / "net.pt"))
