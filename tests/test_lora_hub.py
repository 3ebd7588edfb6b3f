"""Sharing adapters: pushing to a hub on 127.0.0.1 and loading from it, and the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import yaml

from tests.helpers import images, numpy, randomize, run_python, tiny_lora_model, tiny_model
from tests.hub_server import EXPIRED_TOKEN, READ_TOKEN, TOKEN, Fault, Hub
from tfimm_lora import lora
from tfimm_lora.lora.adapter_state import adapter_state
from tfimm_lora.lora.config import LoRAConfig
from tfimm_lora.lora.methods import METHODS
from tfimm_lora.lora.model_card import adapter_card, is_generated
from tfimm_lora.models.registry import pretrained_config

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]

# Runs the steps one after the other in one process.
CLIENT = """
import json, os, pathlib, sys, warnings
import keras
import numpy as np
import huggingface_hub.constants as constants
from tests.helpers import tiny_model
from tfimm_lora import lora
folder, steps = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
x = np.load(folder / "x.npy")
answers = []
for step in steps:
    constants.HF_HUB_OFFLINE = step.pop("offline", False)
    os.environ.pop("HF_TOKEN", None)
    if step.get("environment_token"):
        os.environ["HF_TOKEN"] = step.pop("environment_token")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if "push" in step:
                source = lora.load_adapter(tiny_model(seed=1), folder / step.pop("folder", "first"))
                answer = lora.push_adapter_to_hub(source, step.pop("push"), **step)
            else:
                model = lora.load_adapter(tiny_model(seed=1), step.pop("load"), **step)
                answer = keras.ops.convert_to_numpy(model(x)).tolist()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
    answers.append([answer, [str(w.message) for w in caught if "README" in str(w.message)]])
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """An empty hub; beside it two adapters of one base model and the outputs of the first."""
    folder = tmp_path_factory.mktemp("hub")
    for name, seed in (("first", 5), ("second", 6)):
        model = lora.convert_to_lora_model(tiny_model(seed=1), lora_rank=2)
        randomize(model, seed, only="lora")
        lora.save_adapter(model, folder / name)
        x = images(model)
        np.save(folder / "x.npy", x)
        np.save(folder / f"{name}.npy", numpy(model(x)))
    server = Hub(folder)
    yield server
    server.server.shutdown()


@pytest.fixture
def ask(hub: Hub, tmp_path: Path):
    """Asks a fresh process with a fresh cache; every step is answered by a value and warnings."""
    hub.forget()

    def ask(*steps: dict[str, Any], **environment: str) -> list[Any]:
        process = run_python(
            CLIENT, hub.folder, json.dumps(steps),
            **{"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"),
               "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        )  # fmt: skip
        line = next(li for li in process.stdout.splitlines() if li.startswith("ANSWERS"))
        return json.loads(line.removeprefix("ANSWERS"))

    return ask


def header(text: str) -> dict[str, Any]:
    _, found, _ = text.split("---\n", 2)
    return yaml.safe_load(found)


def contents(path: Path) -> object:
    """A file's bytes; of safetensors the header read, whose metadata comes in any order."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def test_push_and_load_again(hub: Hub, ask):
    described = {"metrics": {"accuracy": 0.93}, "data": "Pets | dogs"}
    steps = [
        {"push": "me/pets", "environment_token": TOKEN, **described},
        {"load": "hf-hub:me/pets"},
        {"load": "me/pets@main"},
        {"load": "hf-hub:me/pets", "name": "pets"},
        {"load": "me/pets", "offline": True},
        {"load": "me/pets", "name": "pets", "offline": True},
    ]
    (address, warned), *loaded = ask(*steps)
    assert address == f"{hub.endpoint}/me/pets/commit/{'a' * 40}" and not warned
    assert hub.commits == [("me/pets", "Upload adapter", FILES)]
    for answer, _ in loaded:
        assert not isinstance(answer, str), answer
        np.testing.assert_allclose(answer, np.load(hub.folder / "first.npy"), atol=1e-5)
    saved = hub.folder / "me/pets@main"
    for name in FILES[1:]:
        assert contents(saved / name) == contents(hub.folder / "first" / name)
    card = (saved / "README.md").read_text()
    assert is_generated(card)
    assert "| accuracy | 0.93 |" in card and "Pets | dogs" in card
    assert 'lora.load_adapter(base, "hf-hub:me/pets")' in card
    assert 'PeftModel.from_pretrained(base, "me/pets")' in card


def test_pushing_again_replaces_the_adapter_and_keeps_a_card_of_the_users(hub: Hub, ask):
    push = {"push": "hf-hub:me/again", "token": TOKEN}
    ask(push, {**push, "folder": "second", "commit_message": "Train longer"})
    assert [commit[1] for commit in hub.commits] == ["Upload adapter", "Train longer"]
    readme = hub.folder / "me/again@main/README.md"
    readme.write_text("# My own words\n")
    (first, warned), (loaded, _) = ask(push, {"load": "me/again"})
    assert first.startswith("http") and "somebody wrote or edited" in warned[0]
    assert hub.commits[-1][2] == FILES[1:]
    assert readme.read_text() == "# My own words\n"
    np.testing.assert_allclose(loaded, np.load(hub.folder / "first.npy"), atol=1e-5)


def test_private_repositories(hub: Hub, ask):
    push = {"push": "me/secret", "token": TOKEN, "private": True}
    answers = ask(push, push, {"push": "me/open", "token": TOKEN}, {**push, "push": "me/open"})
    assert [a[0].startswith("http") for a in answers] == [True, True, True, False]
    assert hub.private == {"me/secret"}
    assert "is public, and private=True makes only a new one private" in answers[3][0]
    assert [commit[0] for commit in hub.commits] == ["me/secret", "me/secret", "me/open"]


def test_refusals_leave_nothing_behind(hub: Hub, ask):
    other = hub.folder / "me/model@main"
    other.mkdir(parents=True)
    (other / "model.safetensors").write_bytes(b"weights")
    answers = ask(
        {"push": "me/none"},
        {"push": "me/none", "token": EXPIRED_TOKEN},
        {"push": "me/none", "token": READ_TOKEN},
        {"push": "me/none", "token": TOKEN, "offline": True},
        {"push": "me/model", "token": TOKEN},
        {"push": "none", "token": TOKEN},
        {"push": "me/none", "token": TOKEN, "name": "other/../name"},
    )
    expected = [
        "OSError: .* status 401: it asks for a token, or the token is wrong",
        "OSError: .* status 401: it asks for a token, or the token is wrong",
        "OSError: .* status 403: the token may not write to 'me'",
        "OSError: .* HF_HUB_OFFLINE is set. Unset it, or use lora.save_adapter",
        r"ValueError: .* me/model exists and holds something else than an adapter \(model.safe",
        "ValueError: 'none' is no name of a repository on the hub, which is org/repo",
        "ValueError: An adapter's name is made of letters",
    ]
    for (answer, _), pattern in zip(answers, expected, strict=True):
        assert re.search(pattern, answer), answer
    assert hub.commits == [] and hub.objects == {}
    assert not (hub.folder / "me/none@main").exists()
    assert [p.name for p in other.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "method"), [("/preupload/main", "POST"), ("/commit/main", "POST"), ("", "PUT")]
)
def test_what_breaks_on_the_way_changes_nothing(hub: Hub, ask, name: str, method: str):
    """The adapter on the hub is the old one as long as the one commit has not been made."""
    push = {"push": "me/broken", "token": TOKEN}
    ask(push)
    before = {p.name: p.read_bytes() for p in (hub.folder / "me/broken@main").iterdir()}
    hub.commits.clear()
    hub.faults.append(Fault(name, method, times=99, status=403))
    (answer, _), (loaded, _) = ask({**push, "folder": "second"}, {"load": "me/broken"})
    assert answer.startswith("OSError: The adapter could not be uploaded to me/broken"), answer
    assert hub.commits == []
    assert {p.name: p.read_bytes() for p in (hub.folder / "me/broken@main").iterdir()} == before
    np.testing.assert_allclose(loaded, np.load(hub.folder / "first.npy"), atol=1e-5)


def test_a_hub_that_does_not_answer(ask):
    ((answer, _),) = ask({"push": "me/x", "token": TOKEN}, HF_ENDPOINT="http://127.0.0.1:9")
    assert answer.startswith("OSError: The adapter could not be uploaded to me/x: the hub (http")
    assert "Check network and proxy" in answer


def test_header_and_code_of_a_card():
    model = lora.create_model("test_vit", nb_classes=3, lora_rank=4, lora_targets=("attn.q",))
    card = adapter_card(model, "default", place="me/pets")
    found = header(card)
    assert found["library_name"] == "peft"
    assert found["base_model"] == "timm/test_vit.r160_in1k"
    assert found["license"] == "apache-2.0"
    tags = {"lora", "peft_type:LORA", "base_model:adapter:timm/test_vit.r160_in1k"}
    assert tags <= set(found["tags"])
    assert 'tfimm_lora.create_model("test_vit.r160_in1k", pretrained=True, nb_classes=3)' in card
    assert 'timm.create_model("test_vit.r160_in1k", pretrained=True, num_classes=3)' in card
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert f"{trained:,} weights" in card
    assert '| `lora_targets` | `["attn.q"]` |' in card
    assert "| `lora_rank` | `4` |" in card
    assert "Not stated." in card


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_card(method: str):
    fields = {"boft": {"block_size": 4}, "oft": {"block_size": 4}}.get(method, {})
    model = tiny_lora_model(lora_method=method, lora_rank=2, lora_options=fields)
    card = adapter_card(model, "default")
    assert header(card)["library_name"] == ("peft" if METHODS[method].peft_type else "keras")
    assert ("## Use in PEFT" in card) == (METHODS[method].peft_type is not None)
    trained = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    assert f"has {trained:,} weights" in card


def test_licences_of_the_base():
    for tag, license, words in (
        ("convnextv2_atto.fcmae_ft_in1k", "cc-by-nc-4.0", "does not allow commercial use"),
        ("convnext_base.dinov3_lvd1689m", "other", "restricts their use"),
    ):
        model = tiny_lora_model()
        model.pretrained_cfg = pretrained_config(tag)
        card = adapter_card(model, "default")
        assert header(card)["license"] == license
        assert words in card
        if license == "other":
            assert header(card)["license_name"] == "dinov3-license"
            assert header(card)["license_link"].startswith("https://huggingface.co/timm/")


def test_saving_writes_a_card_and_never_over_the_users(tmp_path):
    model = tiny_lora_model(lora_rank=2)
    readme = lora.save_adapter(model, tmp_path) / "README.md"
    first = readme.read_text()
    assert is_generated(first) and 'lora.load_adapter(base, "FOLDER")' in first
    adapter_state(model).add(model, "second", LoRAConfig(lora_rank=7))
    readme.write_text(first)
    lora.save_adapter(model, tmp_path / "other", name="second")
    assert "`7`" in (tmp_path / "other" / "second" / "README.md").read_text()
    edited = first.replace("Not stated.", "Pets.")
    assert not is_generated(edited)
    readme.write_text(edited)
    lora.save_adapter(model, tmp_path)
    assert readme.read_text() == edited
    readme.write_text(first.replace("\n", "\r\n"))
    assert is_generated(readme.read_text())


def test_a_functional_model_has_a_card():
    inputs = keras.Input((8,))
    base = keras.Model(inputs, keras.layers.Dense(4)(inputs), name="mine")
    card = adapter_card(lora.convert_to_lora_model(base, lora_rank=2), "default")
    assert "base_model" not in header(card)
    assert "base = ...  # the model that the adapter was trained on" in card
    assert "## Use in PEFT" not in card
