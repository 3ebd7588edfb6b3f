"""Several adapters on a compiled model, and on the backbone of an extractor."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from tests.helpers import (
    assert_same_bits,
    numpy,
    randomize,
    relative_error,
    trained,
    values,
)
from tests.several import (
    base_model,
    batch,
    expected_outputs,
    fields,
    first_model,
)
from tfimm_lora import lora
from tfimm_lora.models.features import FeatureExtractor
from tfimm_lora.weights.names import is_lora_weight


@pytest.fixture(scope="module")
def outputs() -> Any:
    return expected_outputs()


# --- Compiled models --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "functional"])
def test_compiled_model_follows_and_says_when_to_compile_again(kind, outputs, traces):
    model = first_model(kind, "ab")
    x = batch(model)
    y = np.zeros(numpy(model(x)).shape, "float32")
    model.compile(keras.optimizers.Adam(0.01), "mse")

    def predicts(active: tuple[str, ...]) -> bool:
        """Whether predict agrees; the loss of evaluate as well."""
        expected = outputs(kind, active)
        loss = model.evaluate(x, y, batch_size=4, verbose=0)
        assert loss == pytest.approx(float(np.mean(expected**2)), rel=1e-4)
        return relative_error(model.predict(x, verbose=0), expected) <= 1e-5

    assert predicts(("a",))
    lora.set_adapter(model, "b")
    assert predicts(("b",))
    lora.set_adapter(model, ["a", "b"])
    assert predicts(("a", "b"))
    with lora.disable_adapters(model):
        assert predicts(())
    seen = traces[0]
    for active in (("a",), ("b",), ("a", "b")):  # all have been there: nothing is traced again
        lora.set_adapter(model, active)
        assert predicts(active)
    with lora.disable_adapters(model):
        assert predicts(())
    assert traces[0] == seen
    # Training: the optimizer knows the weights with which it was built (JAX: by evaluate above).
    lora.set_adapter(model, "b")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, verbose=0)
    moments = [numpy(v) for v in model.optimizer.variables]
    lora.set_adapter(model, "a")
    before = values(model)
    for train in (model.fit, model.train_on_batch):
        with pytest.raises(ValueError, match=r"other weights than when it was compiled .*: a"):
            train(x, y)
    assert_same_bits(values(model), before)
    assert predicts(("a",))
    lora.set_adapter(model, "b")  # back again, with its moments
    for now, then in zip(model.optimizer.variables, moments, strict=True):
        np.testing.assert_array_equal(numpy(now), then)
    model.fit(x, y, verbose=0)
    lora.set_adapter(model, "a")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    before = values(model)
    model.fit(x, y, verbose=0)
    changed = {k for k, v in values(model).items() if v.tobytes() != before[k].tobytes()}
    assert changed and not any(".b" in path for path in changed)


def test_training_again_after_the_same_name_came_back():
    model = first_model("vit", "ab")
    x = batch(model)
    y = np.zeros((4, 10), "float32")
    lora.set_adapter(model, "b")
    model.compile("sgd", "mse")
    model.fit(x, y, verbose=0)
    model.predict(x, verbose=0)
    lora.set_adapter(model, "a")
    lora.delete_adapter(model, "b")
    lora.add_adapter(model, "b", **fields("vit", "b"))
    lora.set_adapter(model, "b")
    with pytest.raises(ValueError, match=r"Call model\.compile"):
        model.fit(x, y, verbose=0)
    assert relative_error(model.predict(x, verbose=0), model(x)) <= 1e-5


def test_base_model_in_a_callback_of_fit(outputs):
    """Comparing with the base model after each epoch does not disturb training."""

    def train(callbacks: list[Any]) -> dict[str, np.ndarray]:
        keras.utils.set_random_seed(0)
        model = first_model("vit", "a")
        model.compile(keras.optimizers.Adam(0.01), "mse")
        x = batch(model)
        y = np.ones((4, 10), "float32")
        model.fit(x, y, epochs=3, batch_size=2, shuffle=False, verbose=0, callbacks=callbacks)
        return values(model)

    found: list[np.ndarray] = []

    class Compare(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            with lora.disable_adapters(self.model):
                found.append(self.model.predict(batch(self.model), verbose=0))

    assert_same_bits(train([Compare()]), train([]))
    assert len(found) == 3
    for base in found:
        assert relative_error(base, outputs("vit", ())) <= 1e-5


def test_state_of_an_optimizer_for_other_weights_is_not_saved(tmp_path):
    model = first_model("vit", "ab")
    x, y = batch(model), np.zeros((4, 10), "float32")
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.fit(x, y, verbose=0)
    optimizer = model.optimizer
    lora.set_adapter(model, "b")
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    assert model.optimizer is optimizer
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert not loaded.compiled
    loaded.compile(keras.optimizers.Adam(0.01), "mse")
    loaded.fit(x, y, verbose=0)
    lora.set_adapter(model, "a")
    model.save(tmp_path / "m.keras")
    assert keras.saving.load_model(tmp_path / "m.keras").optimizer.iterations == 1


def test_extractor_acts_on_its_backbone():
    extractor = FeatureExtractor(
        lora.convert_to_lora_model(base_model("vit"), lora_rank=2), [0], freeze_unused=True
    )
    model = extractor.backbone
    randomize(model, 3, only=is_lora_weight)
    x = batch(model)
    first, base = numpy(extractor(x)), None
    unused = {n for n in trained(model) if n.startswith("head")}
    lora.add_adapter(extractor, "b", lora_rank=2, lora_train_classifier=True)
    assert lora.adapter_names(extractor) == ("default", "b")
    with lora.disable_adapters(extractor):
        base = extractor.predict(x, verbose=0)
        assert lora.active_adapters(extractor) == ()
    lora.set_adapter(extractor, "b")
    assert not unused and not any(n.startswith("head") for n in trained(model))
    for found, expected in zip(extractor.predict(x, verbose=0), base, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    lora.set_adapter(extractor, "default")
    for found, expected in zip(extractor.predict(x, verbose=0), first, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    lora.delete_adapter(extractor, "b")
    assert lora.adapter_names(extractor) == ("default",)
