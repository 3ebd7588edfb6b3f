"""One method, trained from its start to its figures, in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tfimm_lora.data import (
    Dataset,
    EvaluationTransform,
    create_transform,
    training_batches,
    validation_batches,
)
from tfimm_lora.tasks import TASKS
from tfimm_lora.training.config import RunConfig
from tfimm_lora.training.events import make_callback
from tfimm_lora.training.memory import peak_megabytes, resident_megabytes
from tfimm_lora.training.methods import METHODS
from tfimm_lora.training.schedules import make_optimizer

if TYPE_CHECKING:
    import keras


@dataclass
class Fit:
    """What one method's training gave.

    Attributes:
        model: The trained model.
        figures: Its results as plain values, as in ``metrics.json``.
        history: One dictionary per epoch.
        validation: The batches it was validated on.
    """

    model: keras.Model
    figures: dict[str, Any]
    history: list[dict[str, float]] = field(default_factory=list)
    validation: Any = None


def fit_method(config: RunConfig, method: str, dataset: Dataset, send: Callable[..., None]) -> Fit:
    """Trains one method and measures it.

    The score is that of the last epoch: choosing the best epoch by its validation images would
    flatter it. Seconds are those of training and validation, with the tracing or compiling of the
    step, and without imports, building the model or reading the weights.

    Args:
        config: The recipe.
        method: ``linear_probe``, ``lora`` or ``full``.
        dataset: The images.
        send: Is told of progress; see :func:`tfimm_lora.training.events.send`.

    Returns:
        The trained model and its figures.

    Example:
        >>> fit = fit_method(config, "lora", load_dataset(config.data), send)
    """
    import keras

    keras.config.set_dtype_policy(config.train.precision)
    keras.utils.set_random_seed(config.train.seed)
    task = TASKS[config.train.task]()
    model = METHODS[method](config, task.nb_outputs(dataset.class_names))
    batches, validation = make_batches(config, model, dataset)
    steps = len(batches)
    model.compile(
        optimizer=make_optimizer(
            config.train.rate(method),
            steps * config.train.epochs,
            warmup=config.train.warmup,
            weight_decay=config.train.weight_decay,
        ),
        loss=task.loss(),
        metrics=task.metrics(),
        jit_compile=config.train.jit_compile,
    )
    trainable = sum(int(keras.ops.size(v)) for v in model.trainable_variables)
    weights = sum(int(keras.ops.size(v)) for v in model.weights if _is_number(v))
    resident = resident_megabytes()
    send("started", trainable=trainable, weights=weights, epochs=config.train.epochs)

    history: list[dict[str, float]] = []

    def keep_epoch(event: str, **values: float) -> None:
        if event == "epoch":
            history.append(values)
        send(event, **values)

    began, cpu_began = time.perf_counter(), time.process_time()
    model.fit(
        batches,
        epochs=config.train.epochs,
        validation_data=validation,
        validation_freq=validated_epochs(config.train.epochs, config.train.validate_every),
        callbacks=[make_callback(steps, keep_epoch)],
        verbose=0,
        shuffle=False,  # the batches are shuffled already
    )
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    later = sorted(epoch["seconds"] for epoch in history[1:])
    figures = {
        f"val_{task.score}": history[-1][f"val_{task.score}"],
        f"train_{task.score}": history[-1][task.score],
        "val_loss": history[-1]["val_loss"],
        "train_loss": history[-1]["loss"],
        "trainable_weights": trainable,
        "weights": weights,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "seconds_per_epoch": later[len(later) // 2] if later else None,
        "peak_memory_mb": peak_megabytes(),
        "memory_before_training_mb": resident,
        "learning_rate": config.train.rate(method),
    }
    return Fit(model, figures, history, validation)


def make_batches(config: RunConfig, model: keras.Model, dataset: Dataset) -> tuple[Any, Any]:
    """Returns training and validation batches as a model and its checkpoint want their images.

    Args:
        config: The recipe.
        model: A built model of the zoo.
        dataset: The images.

    Example:
        >>> train, val = make_batches(config, model, load_dataset(config.data))
    """
    import tfimm_lora

    # The facts are those of the checkpoint that was loaded, whatever the name's default is.
    transform = create_transform(model)
    assert isinstance(transform, EvaluationTransform)  # and not the one for training
    resize = transform.resize
    preprocess = tfimm_lora.create_preprocessing(model)
    batches = training_batches(
        dataset.train,
        resize,
        preprocess,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        flip=dataset.flip,
        shift=config.data.shift,
        cache_megabytes=config.data.cache_megabytes,
    )
    validation = validation_batches(
        dataset.val,
        resize,
        preprocess,
        # Without gradients more images fit into the same memory.
        batch_size=4 * config.train.batch_size,
        cache_megabytes=config.data.cache_megabytes,
    )
    return batches, validation


def validated_epochs(epochs: int, every: int) -> list[int]:
    """Returns the epochs, counted from 1, that are validated.

    Example:
        >>> validated_epochs(10, 4)
        [4, 8, 10]
    """
    return sorted({*range(every, epochs + 1, every), epochs})


def _is_number(variable: Any) -> bool:
    """Leaves out the states of random generators, which dropout keeps among the weights."""
    return "seed_generator_state" not in variable.path
