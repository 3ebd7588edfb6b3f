"""The hub, imitated by a server on 127.0.0.1: download, cache, offline, revisions, tokens."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import images, numpy, run_python, tiny_lora_model, tiny_model
from tests.hub_server import COMMITS, TOKEN, Hub
from tfimm_lora import lora, models

NAME, FIELDS = (
    "vit_tiny_patch16_224",
    {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
)


# Repositories whose weights have another name than timm's, and that name.
OTHER_NAMES = {
    "open_clip": "open_clip_model.safetensors",
    "shards": "model.safetensors.index.json",
    "pickle": "pytorch_model.bin",
    "without": "README.md",
}


def _put(folder: Path, model: Any, name: str = "model.safetensors") -> None:
    folder.mkdir(parents=True)
    models.save_safetensors(model, folder / "model.safetensors").rename(folder / name)
    config = {
        "architecture": NAME,
        "num_classes": model.cfg.nb_classes,
        "pretrained_cfg": {"input_size": [3, *model.cfg.input_size], "tag": "hub"},
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with open, private and gated repositories, two revisions, and an adapter."""
    folder = tmp_path_factory.mktemp("hub")
    first, second = tiny_model(seed=1), tiny_model(seed=2)
    for repo in ("org/open", "org/private", "org/gated", "timm/vit_tiny_patch16_224.own"):
        _put(folder / f"{repo}@main", first)
    _put(folder / "org/open@v2", second)
    (folder / "org/empty@main").mkdir()
    for repo, name in OTHER_NAMES.items():
        _put(folder / f"org/{repo}@main", first, name)
    adapter = lora.convert_to_lora_model(first, lora_rank=2)
    source = tiny_lora_model(seed=5, lora_rank=2, lora_train_classifier=False)
    models.transfer_weights(first, source, lora.LORA_WEIGHT_NAMES)
    lora.save_adapter(source, folder / "org/adapter@main")
    lora.save_adapter(source, folder / "org/adapter@v2", name="default")
    assert lora.lora_layers(adapter)
    np.save(folder / "x.npy", images(first))
    np.save(folder / "first.npy", numpy(first(images(first))))
    np.save(folder / "second.npy", numpy(second(images(first))))
    np.save(folder / "adapted.npy", numpy(source(images(first))))
    server = Hub(folder)
    yield server
    server.server.shutdown()


# Runs the cases one after the other, in one process, each with an environment of its own.
CLIENT = """
import json, os, pathlib, sys
import numpy as np
folder, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
import huggingface_hub.constants as constants
import tfimm_lora
from tfimm_lora import lora
import keras
FIELDS = json.loads(sys.argv[3])
x = np.load(folder / "x.npy")
answers = []
for case in cases:
    constants.HF_HUB_OFFLINE = case.get("offline", False)
    os.environ.pop("HF_TOKEN", None)
    if case.get("token"):
        os.environ["HF_TOKEN"] = case["token"]
    try:
        if "adapter" in case:
            base = tfimm_lora.create_model("vit_tiny_patch16_224", pretrained="hf-hub:org/open", **FIELDS)
            model = lora.load_adapter(base, case["adapter"])
        else:
            name = case.get("name", "vit_tiny_patch16_224")
            model = tfimm_lora.create_model(name, pretrained=case["pretrained"], **FIELDS)
        out = keras.ops.convert_to_numpy(model(x))
        answers.append([n for n in ("first", "second", "adapted")
                        if np.abs(out - np.load(folder / f"{n}.npy")).max() < 1e-5])
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
print("ANSWERS" + json.dumps(answers))
"""  # noqa: E501


def ask(hub: Hub, cache: Path, *cases: dict[str, Any], **environment: str) -> list[Any]:
    """Answers of a fresh process: names of the outputs that a model's are equal to, or an error."""
    process = run_python(
        CLIENT, hub.folder, json.dumps(cases), json.dumps(FIELDS),
        **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache),
           "HF_HUB_DISABLE_XET": "1", **environment},
    )  # fmt: skip
    line = next(li for li in process.stdout.splitlines() if li.startswith("ANSWERS"))
    return json.loads(line.removeprefix("ANSWERS"))


def test_download_cache_offline_revision_and_token(hub: Hub, tmp_path):
    hub.requests.clear()
    open_repo = {"pretrained": "hf-hub:org/open"}
    cases = [
        open_repo,
        open_repo,
        {**open_repo, "offline": True},
        {"pretrained": "hf-hub:org/open@v2"},
        {"pretrained": "hf-hub:org/open@v2", "offline": True},
        {"pretrained": f"hf-hub:org/open@{COMMITS['main']}"},
        {"pretrained": "hf-hub:org/private", "token": TOKEN},
        {"pretrained": "hf-hub:org/gated", "token": TOKEN},
        {"adapter": "org/adapter"},
        {"adapter": "org/adapter@v2", "offline": True},
    ]
    answers = ask(hub, tmp_path, *cases)
    assert answers[:9] == [
        ["first"], ["first"], ["first"], ["second"], ["second"], ["first"], ["first"], ["first"],
        ["adapted"],
    ]  # fmt: skip
    assert answers[9].startswith("OSError: adapter_config.json of hub repository org/adapter at")
    # Once for each of: open, open@v2, private, gated. The second call asked for headers only, the
    # offline one for nothing, and the commit is known to be the main branch's.
    assert hub.downloads("model.safetensors") == 4
    assert all("/org/" in path for _, path, _ in hub.requests)


def test_what_cannot_be_had_says_why_and_what_to_do(hub: Hub, tmp_path):
    cases = {
        "hf-hub:org/nothing": r"config.json of hub repository org/nothing was not found. Check the "
        r"name; for a private repository set HF_TOKEN",
        "hf-hub:org/private": r"org/private was not found. .*private repository set HF_TOKEN",
        "hf-hub:org/gated": r"org/gated is gated: accept its terms on the hub, then set HF_TOKEN",
        "hf-hub:org/open@v9": r"org/open at revision v9 could not be found",
        "hf-hub:org/empty": r"config.json of hub repository org/empty could not be found",
        "hf-hub:not a name": r"not a name.* could not be fetched",
        "augreg_in21k": r"timm/vit_tiny_patch16_224.augreg_in21k was not found",
    }
    offline = {"pretrained": "hf-hub:org/open", "offline": True}
    *answers, without_cache = ask(hub, tmp_path, *({"pretrained": p} for p in cases), offline)
    assert re.match(
        r"OSError: config.json of hub repository org/open could not be found. HF_HUB_OFFLINE is "
        r"set, and offline it has to be in the hub's cache already \(.*\); unset the variable, or "
        r"download .* pass model_path=FILE",
        without_cache,
    )
    for message, answer in zip(cases.values(), answers, strict=True):
        assert re.match(f"(OS|FileNotFound)Error: .*{message}", answer, re.DOTALL), answer


def test_weights_under_other_names_and_names_of_models(hub: Hub, tmp_path):
    cases = {
        "org/open_clip": ["first"],
        "org/shards": r"ValueError: hub repository org/shards has its weights in several files "
        r"\(model.safetensors.index.json\).*write all tensors to one model.safetensors",
        "org/pickle": r"ValueError: hub repository org/pickle has its weights only as "
        r"pytorch_model.bin, a pickle.*timm.create_model\('hf-hub:org/pickle'",
        "org/without": r"FileNotFoundError: hub repository org/without has no model.safetensors",
    }
    as_name = {"name": "hf-hub:org/open@v2", "pretrained": True}
    *answers, named, contradiction, headers = ask(
        hub,
        tmp_path,
        *({"pretrained": f"hf-hub:{repo}"} for repo in cases),
        as_name,
        {**as_name, "pretrained": "hf-hub:org/open"},
        {"name": "hf-hub:org/without", "pretrained": False},
    )
    for expected, answer in zip(cases.values(), answers, strict=True):
        if isinstance(expected, str):
            assert re.match(expected, answer, re.DOTALL), answer
        else:
            assert answer == expected
    assert named == ["second"]
    assert contradiction.startswith("ValueError: 'hf-hub:org/open@v2' names its weights already")
    assert headers == []  # a model with fresh weights, from config.json alone
