"""Shared by all tests: one thread (the machine is small), the path, a tiny model and a tiny trained run."""

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""     # bits are compared, and two ranks run on machines of one GPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

from dit import Config, DiT  # noqa: E402
from domain_shifter import DomainShifters  # noqa: E402
from support.launch import Launched, run_cli  # noqa: E402
from toy.world import WORLD_VERSION  # noqa: E402

torch.set_num_threads(1)
GOLDEN = ROOT / "tests" / "golden"
TINY = Config(
    image_size=8,
    patch_size=4,
    channels=3,
    out_channels=3,
    control_channels=6,
    num_views=4,
    depth=4,
    width=16,
    heads=2,
    text_dim=16,
    text_length=16,
    vocab_size=64,
    output_skip=True,
    qk_norm=True,
    world=WORLD_VERSION,
)
NULL = {"text": torch.tensor([[1] + [0] * 13])}  # the empty caption of random_inputs and tiny_sets
ALONE = Launched(torch.device("cpu"))


@pytest.fixture(autouse=True, scope="session")
def nothing_to_choose():
    """Programs in this process compute in fp32 and with the threads that it has: what is fastest is not always the
    same, and other threads round otherwise. Their trials are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.estimate.IMAGES", 4)
        patch.setattr("support.speed.CPU_DTYPES", ("float32",))
        for module in ("support.speed", "training.estimate"):
            patch.setattr(f"{module}.thread_counts", lambda: [torch.get_num_threads()])
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Random models and what goes into them


def random_model(config=TINY, seed=0, dtype=torch.float32):
    """A DiT whose every weight is random, the zero-initialised ones too, so that each input matters."""
    torch.manual_seed(seed)
    model = DiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def trained_shifters(seed=0):
    """Domain Shifters of a TINY model that move its tokens, as training would make them."""
    torch.manual_seed(seed)
    shifters = DomainShifters(TINY, rank=3)
    torch.nn.init.normal_(shifters.W_left)
    return shifters


def random_inputs(config=TINY, batch=2, views=4, dtype=torch.float32):
    """x, t and text that fit the config."""
    torch.manual_seed(1)
    x = torch.randn(batch, views, config.channels, config.image_size, config.image_size, dtype=dtype)
    return x, torch.tensor([7, 903, 400, 650])[:batch], torch.randint(1, 50, (batch, 14))


def tiny_sets():
    """Six grids with control and 24 single images, as a TINY model trains on."""
    generator = torch.Generator().manual_seed(5)

    def pixels(*shape):
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    def words(n):
        return torch.randint(2, 50, (n, 14), generator=generator)

    syn = {"image": pixels(6, 4, 3, 8, 8), "text": words(6)}
    syn["control"] = torch.randn(6, 4, 6, 8, 8, generator=generator).half()
    return {"syn": syn, "real": {"image": pixels(24, 1, 3, 8, 8), "text": words(24)}}


def tiny_clip(folder):
    """A tiny random CLIP saved as Hugging Face does: (model, tokenizer, image processor). Needs transformers."""
    transformers = pytest.importorskip("transformers")
    words = ["!", "a</w>", "red</w>", "mug</w>", "re", "mu", *"redmug", "d</w>", "g</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\nm u\nmu g</w>\n")
    part = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=part | dict(vocab_size=16, max_position_embeddings=12, bos_token_id=14, eos_token_id=15),
        vision_config=part | dict(image_size=32, patch_size=16), projection_dim=8))
    model.save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    resize = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(resize, tokenizer).save_pretrained(folder)
    return model.eval(), tokenizer, resize


# ---------------------------------------------------------------------------------------------------------------------
# Programs: in this process where that is enough, as importing torch takes seconds; or in one of their own


def run_main(program, *flags):
    """Runs the main() of an imported program in this process."""
    return program.main([str(flag) for flag in flags])


def refuses(program, flags, code, *words):
    """Asserts that a program, run in this process as its __main__ does, ends with this exit code and one line of error
    with the words."""
    printed = io.StringIO()
    with pytest.raises(SystemExit) as stopped, redirect_stderr(printed):
        run_cli(lambda: run_main(program, *flags))
    ended, last = stopped.value.code, printed.getvalue().strip().rpartition("\n")[2]
    if isinstance(ended, str):  # Python prints it and exits with 1
        ended, last = 1, ended
    assert ended == code and "error: " in last and "\n" not in last, (ended, last)
    for word in words:
        assert str(word) in last, last


def script(*command, torchrun=0, env=None, timeout=300):
    """Runs a script of the project in a process of its own; returns the CompletedProcess, output as text.

    command: a path and its flags, or "-m", a module and its flags. torchrun: how many processes, if any.
    """
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
        if torchrun
        else [sys.executable]
    )
    return subprocess.run(
        [*launcher, *map(str, command)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (env or {}),
    )


def one_line_error(result, code, *words):
    """Asserts that a script ended with this exit code and one line of error with the words, no traceback."""
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in last, last
    for word in words:
        assert str(word) in last, last


# ---------------------------------------------------------------------------------------------------------------------
# A trained run

TINY_STAGE2 = (
    "--num_assets",
    4,
    "--real_steps",
    2,
    "--steps",
    3,
    "--batch",
    1,
    "--stage1_steps",
    2,
    "--real_warmup",
    1,
    "--log_every",
    1,
    "--picture_steps",
    1,
)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run folder with a base model, shifters and a stage-2 model of the toy preset, each trained for two steps or
    three."""
    import train_stage2
    from toy import pretrain

    out = tmp_path_factory.mktemp("run")
    run_main(pretrain, "--num_base_images", 16, "--steps", 2, "--batch", 4, "--out", out, "--picture_steps", 1)
    run_main(train_stage2, "--out", out, *TINY_STAGE2)
    return out


@pytest.fixture(scope="session")
def shipped_judges(tmp_path_factory):
    """The judges in weights/, beside 40 photographs: the commands render 1,000."""
    import data
    from toy.judge import SECOND, Judges, train_feature_net, train_normal_net

    folder = tmp_path_factory.mktemp("judges")
    net, second, normal = train_feature_net(folder), train_feature_net(folder, seed=SECOND), train_normal_net(folder)
    return Judges(net, second, normal, net.features(data.photo_set(40, folder=folder)["image"][:, 0] / 255))


@pytest.fixture
def tiny_toy(tmp_path, monkeypatch):
    """A run folder with a random base model, while the preset toy is as tiny as TINY: trainings of milliseconds.

    Also {name: what a training of stage 1 or 2 of this name was given}: "learns", the names of what trains, "sets".
    """
    import train_stage1
    import train_stage2
    from dit import PRESETS, save_model
    from training.loop import train

    monkeypatch.setitem(PRESETS, "toy", TINY)
    save_model(str(tmp_path / "base.safetensors"), TINY, random_model())
    seen = {}

    def watched(network, sets, null, plan, args, *rest):
        learns = {name for name, p in network.named_parameters() if p.requires_grad}
        seen[args.name] = dict(learns=learns, sets=sets)
        return train(network, sets, null, plan, args, *rest)

    monkeypatch.setattr(train_stage1, "train", watched)
    monkeypatch.setattr(train_stage2, "train", watched)
    return tmp_path, seen
