"""First values: drawn as Keras' initialisers declare, or read once from a file, nothing twice."""

from __future__ import annotations

import gc
import math
import weakref

import keras
import numpy as np
import pytest

from tests.helpers import answer_of, numpy, tiny_model, values
from tfimm_lora.models.transfer import transfer_weights
from tfimm_lora.weights.aligned import aligned, empty_aligned
from tfimm_lora.weights.draw import draw
from tfimm_lora.weights.first_values import assign_all, building

kinds = keras.initializers
SHAPE = (3, 3, 40, 160)

# --- Drawing ----------------------------------------------------------------------------------

RANDOM = {
    "truncated": lambda: kinds.TruncatedNormal(mean=0.1, stddev=0.02, seed=1),
    "normal": lambda: kinds.RandomNormal(mean=-0.2, stddev=0.5, seed=1),
    "uniform": lambda: kinds.RandomUniform(minval=-0.3, maxval=0.1, seed=1),
    "glorot_uniform": lambda: kinds.GlorotUniform(seed=1),
    "glorot_normal": lambda: kinds.GlorotNormal(seed=1),
    "he_normal": lambda: kinds.HeNormal(seed=1),
    "lecun_uniform": lambda: kinds.LecunUniform(seed=1),
    "fan_out": lambda: kinds.VarianceScaling(2.0, "fan_out", "truncated_normal", seed=1),
    "untruncated": lambda: kinds.VarianceScaling(0.5, "fan_avg", "untruncated_normal", seed=1),
}


def quantiles(value: np.ndarray) -> np.ndarray:
    return np.quantile(value, [0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98])


@pytest.mark.parametrize("shape", [SHAPE, (400, 100), (40_000,)])
@pytest.mark.parametrize("name", RANDOM)
def test_the_distribution_is_keras_own(name: str, shape):
    """Quantiles and range, within what chance allows for so many values."""
    initializer = RANDOM[name]()
    ours, theirs = draw(initializer, shape, "float32"), numpy(initializer(shape))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    spread = theirs.std()
    allowed = 12 * spread / math.sqrt(ours.size)
    np.testing.assert_allclose(quantiles(ours), quantiles(theirs), rtol=0, atol=allowed)
    np.testing.assert_allclose(ours.std(), spread, rtol=0.03)
    if name in {"truncated", "uniform", "glorot_uniform", "lecun_uniform", "fan_out"}:
        np.testing.assert_allclose(np.ptp(ours), np.ptp(theirs), rtol=0.02)


def test_neighbours_are_independent():
    value = draw(RANDOM["truncated"](), (400, 100), "float32").astype("float64")
    value = (value - value.mean()) / value.std()
    for shift in (1, 2, 3, 4, 100):
        correlation = np.mean(value.reshape(-1)[shift:] * value.reshape(-1)[:-shift])
        assert abs(correlation) < 5 / math.sqrt(value.size), shift


@pytest.mark.parametrize("name", RANDOM)
def test_a_seed_gives_one_value_and_another_seed_another(name: str):
    config = RANDOM[name]().get_config()
    one, two, other = (
        draw(type(RANDOM[name]()).from_config({**config, "seed": seed}), (7, 5), "float32")
        for seed in (3, 3, 4)
    )
    assert np.array_equal(one, two)
    assert not np.any(one == other)


def test_without_a_seed_keras_random_seed_rules():
    drawn = []
    for seed in (5, 5, 6):
        keras.utils.set_random_seed(seed)
        drawn.append(draw(kinds.GlorotUniform(), (4, 4), "float32"))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_other_types_are_the_rounded_values(dtype: str):
    initializer = RANDOM["truncated"]()
    value = draw(initializer, (9, 9), dtype)
    assert value.dtype.name == dtype
    assert np.array_equal(value, draw(initializer, (9, 9), "float32").astype(value.dtype))


@pytest.mark.parametrize(
    ("initializer", "constant"),
    [(kinds.Zeros(), 0), (kinds.Ones(), 1), (kinds.Constant(1e-6), 1e-6), (kinds.Constant(3), 3)],
)
def test_constants(initializer, constant):
    for dtype in ("float32", "bfloat16", "int32"):
        value = draw(initializer, (2, 3), dtype)
        assert value.dtype.name == dtype
        assert np.array_equal(value, np.full((2, 3), constant, value.dtype))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5,), (1, 1)])
def test_odd_shapes(shape):
    assert draw(RANDOM["truncated"](), shape, "float32").shape == shape


class Doubled(kinds.RandomUniform):
    """Draws something of its own."""

    def __call__(self, shape, dtype=None):
        return 2 * super().__call__(shape, dtype)


@pytest.mark.parametrize(
    ("initializer", "dtype"),
    [
        (Doubled(seed=1), "float32"),
        (kinds.Orthogonal(seed=1), "float32"),
        (kinds.Identity(), "float32"),
        (kinds.Constant(np.ones((4, 4))), "float32"),
        (kinds.RandomNormal(seed=keras.random.SeedGenerator(1)), "float32"),
        (kinds.RandomNormal(seed=1), "float64"),
        (lambda shape, dtype=None: np.ones(shape), "float32"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_only_the_initialiser_knows_is_left_to_it(initializer, dtype: str):
    assert draw(initializer, (4, 4), dtype) is None


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (0, 2)])
def test_aligned_arrays(shape, dtype: str):
    value = empty_aligned(shape, dtype)
    assert value.shape == shape and value.dtype.name == dtype
    assert value.flags.c_contiguous and value.flags.writeable
    assert value.size == 0 or value.ctypes.data % 64 == 0
    assert value.size == 0 or aligned(value, dtype) is value
    turned = np.arange(6.0).reshape(2, 3).T
    copy = aligned(turned, "float32")
    assert copy.ctypes.data % 64 == 0 and copy.dtype == "float32" and np.array_equal(copy, turned)


# --- Models -----------------------------------------------------------------------------------


class Small(keras.Model):
    """Two dense layers; the second's initialiser only knows itself how to draw."""

    def __init__(self, width: int = 4, **options) -> None:
        super().__init__(**options)
        self.a = keras.layers.Dense(width, name="a")
        self.b = keras.layers.Dense(width, kernel_initializer=Doubled(seed=2), name="b")

    def build(self, input_shape) -> None:
        self.a.build(input_shape)
        self.b.build((*input_shape[:-1], self.a.units))
        self.built = True

    def call(self, x):
        return self.b(self.a(x))


def built(model: keras.Model) -> keras.Model:
    with building(model):
        model.build((None, 4))
    return model


def test_without_a_file_every_layer_gets_what_it_declares():
    model = built(Small())
    initializer = model.a.kernel_initializer
    assert np.array_equal(numpy(model.a.kernel), draw(initializer, (4, 4), "float32"))
    assert np.array_equal(numpy(model.b.kernel), numpy(Doubled(seed=2)((4, 4))))
    assert not numpy(model.a.bias).any()
    assert model(np.ones((2, 4), "float32")).shape == (2, 4)


def test_what_is_read_is_read_once_and_the_rest_is_drawn():
    model, reads = Small(), []

    def read():
        reads.append(1)
        return np.full((4, 4), 2.0)  # of another type

    with building(model):
        model.build((None, 4))
        assign_all([(model.a.kernel, read)])
        assert reads == [1] and numpy(model.a.kernel).max() == 2.0
        assert numpy(model.b.kernel).any()
    assert reads == [1]
    assert model.a.kernel.dtype == "float32"


def test_variables_that_have_values_are_assigned():
    model = Small()
    model.build((None, 4))
    assign_all([(model.a.kernel, lambda: np.ones((4, 4)))])
    assert np.array_equal(numpy(model.a.kernel), np.ones((4, 4)))


def test_a_model_and_its_copy_share_no_memory():
    source, model = Small(256), Small(256)
    source.build((None, 256))
    before = values(source)
    with building(model):
        model.build((None, 256))
        transfer_weights(source, model)
    assert np.array_equal(numpy(model.b.kernel), before["b/kernel"])
    for variable in model.trainable_variables:
        variable.assign_add(np.ones(variable.shape, "float32"))
    for path, value in values(source).items():
        assert np.array_equal(value, before[path])


def test_one_value_is_read_at_a_time():
    """What a reader returned is gone when the next one is asked."""
    model, living = Small(64), []

    def read():
        value = np.ones((64, 64))  # of another type, so that it cannot become the variable's
        gc.collect()
        assert not any(reference() is not None for reference in living)
        living.append(weakref.ref(value))
        return value

    with building(model):
        model.build((None, 64))
        assign_all([(model.a.kernel, read), (model.b.kernel, read)])
    assert len(living) == 2


# --- Errors -----------------------------------------------------------------------------------


def test_the_first_error_is_raised_and_the_process_goes_on():
    model, reads = Small(), []

    def fails(name: str):
        def read():
            reads.append(name)
            raise OSError(name)

        return read

    with pytest.raises(OSError, match=r"^first$"), building(model):
        model.build((None, 4))
        assign_all([(model.a.kernel, fails("first")), (model.b.kernel, fails("second"))])
    assert reads == ["first"]
    assert not numpy(model.a.kernel).any(), "nothing half-loaded"
    assert built(Small())(np.ones((1, 4), "float32")).shape == (1, 4)


def test_a_value_of_another_shape_is_an_error():
    model = Small()
    message = r"a/kernel has shape \(4, 4\) and its value \(4,\)"
    with pytest.raises(ValueError, match=message), building(model):
        model.build((None, 4))
        assign_all([(model.a.kernel, lambda: np.ones(4))])


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_a_build_that_fails_leaves_nothing_waiting(error):
    model = Small()
    with pytest.raises(error), building(model):
        model.build((None, 4))
        raise error
    assert not numpy(model.a.kernel).any()
    assert built(Small())(np.ones((1, 4), "float32")).shape == (1, 4)


def test_an_interrupt_while_values_are_read_leaves_nothing_waiting():
    """Control-C in a notebook, and then another model."""
    model = Small()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), building(model):
        model.build((None, 4))
        ones = [(v, lambda: np.ones((4, 4))) for v in (model.a.kernel,)]
        assign_all([*ones, (model.b.kernel, interrupted)])
    assert numpy(model.a.kernel).all() and not numpy(model.b.kernel).any()
    assert built(Small())(np.ones((1, 4), "float32")).shape == (1, 4)
    with keras.StatelessScope():
        pass


# --- Models in models -------------------------------------------------------------------------


class Outer(Small):
    """Makes another model while it is built, and loads weights into it."""

    def build(self, input_shape) -> None:
        inner = Small(name="inner")
        with building(inner):
            inner.build(input_shape)
            assign_all([(inner.a.kernel, lambda: np.full((4, 4), 7.0))])
        self.inner = inner
        super().build(input_shape)


def test_a_model_that_is_made_while_another_is_built_gets_its_weights():
    model = Outer()
    with building(model):
        model.build((None, 4))
        assign_all([(model.a.kernel, lambda: np.full((4, 4), 3.0))])
    assert np.all(numpy(model.inner.a.kernel) == 7)
    assert np.all(numpy(model.a.kernel) == 3)
    assert numpy(model.b.kernel).any() and numpy(model.inner.b.kernel).any()


def test_a_build_that_assigns_keeps_what_it_assigned():
    class Assigning(Small):
        def build(self, input_shape) -> None:
            super().build(input_shape)
            self.a.bias.assign(np.arange(4.0))

    model = built(Assigning())
    assert np.array_equal(numpy(model.a.bias), np.arange(4.0))
    model = Assigning()
    with building(model):
        model.build((None, 4))
        assign_all([(model.a.bias, lambda: np.full(4, 9.0))])
    assert np.array_equal(numpy(model.a.bias), np.full(4, 9.0))


# --- Backends ---------------------------------------------------------------------------------

SAME = """
import hashlib, json
import keras
keras.utils.set_random_seed(0)
from tests.helpers import TINY_VIT, numpy
import tfimm_lora
from tfimm_lora.weights.names import named_variables
model = tfimm_lora.create_model("vit_tiny_patch16_224", **TINY_VIT)
digests = {v.path: hashlib.sha256(numpy(v.variable).tobytes()).hexdigest()
           for v in named_variables(model)}
print(json.dumps([keras.backend.backend(), digests]))
"""


def test_every_backend_draws_the_same_values():
    pytest.importorskip("jax", reason="jax comes with the extra 'jax'")
    (one, ours), (two, theirs) = (
        answer_of(SAME, KERAS_BACKEND=backend) for backend in ("tensorflow", "jax")
    )
    assert (one, two) == ("tensorflow", "jax")
    assert ours == theirs
    assert len(set(ours.values())) > 8
    assert len(ours) == len(values(tiny_model(seed=None)))
