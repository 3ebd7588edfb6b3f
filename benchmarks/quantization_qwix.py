"""Training steps of a ViT under Qwix, to set beside our own: memory, bytes and time.

    python benchmarks/quantization_qwix.py --batch 8 > qwix.jsonl

Runs in an environment of its own (Python 3.11):

    pip install jax==0.10.2 qwix==0.1.8 flax==0.12.8 optax==0.2.8

The model has the sizes of timm's ``vit_small_patch16_224``. LoRA of rank 8 on every linear layer
of the blocks and a fresh head are trained with AdamW; all else is frozen. Prints a line of JSON
for every variant:

    float                  Qwix's LoRA on float32 kernels
    nf4-64 int4-64 ...     Qwix's QLoRA: packed kernels with a scale for 64 inputs, or for each
                           output (``channel``); ``minmax`` is asymmetric, the others symmetric
    fake-int8-channel ...  Qwix's quantised training, weights only, on frozen float32 kernels; it
                           has no LoRA of its own, so that this is Flax's

The variants take their steps in turns, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx

BLOCKS, WIDTH, HEADS, HIDDEN, PATCH, SIZE = 12, 384, 6, 1536, 16, 224
LINEAR_LAYERS = r"blocks/\d+/(attn/(qkv|proj)|mlp/fc[12])"
QLORA = {
    "float": {},
    "nf4-64": {"weight_qtype": "nf4", "tile_size": 64},
    "int4-64": {"weight_qtype": jnp.int4, "tile_size": 64},
    "int4-64-minmax": {
        "weight_qtype": jnp.int4,
        "tile_size": 64,
        "weight_calibration_method": "minmax",
    },
    "int4-channel": {"weight_qtype": jnp.int4},
    "int8-64": {"weight_qtype": jnp.int8, "tile_size": 64},
    "int8-channel": {"weight_qtype": jnp.int8},
}
FAKE = {
    "fake-int8-channel": {"weight_qtype": jnp.int8},
    "fake-int4-channel": {"weight_qtype": jnp.int4},
    "fake-int4-64": {"weight_qtype": jnp.int4, "tile_size": 64},
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=[*QLORA, *FAKE], choices=[*QLORA, *FAKE])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    return parser.parse_args()


# --- The model --------------------------------------------------------------------------------


class Attention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.proj = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = (qkv[:, :, i] for i in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (WIDTH // HEADS) ** -0.5
        return self.proj(jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.fc2 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.attn = Attention(rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.mlp = Mlp(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nnx.Module):
    def __init__(self, classes: int, rngs: nnx.Rngs):
        patches = (SIZE // PATCH) ** 2
        self.patch_embed = nnx.Conv(
            3, WIDTH, (PATCH, PATCH), (PATCH, PATCH), padding="VALID", rngs=rngs
        )
        self.cls_token = nnx.Param(jnp.zeros((1, 1, WIDTH)))
        self.pos_embed = nnx.Param(0.02 * rngs.params.normal((1, 1 + patches, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
        self.head = nnx.Linear(WIDTH, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patch_embed(images).reshape(len(images), -1, WIDTH)
        first = jnp.broadcast_to(self.cls_token[...], (len(images), 1, WIDTH))
        x = jnp.concatenate([first, x], 1) + self.pos_embed[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def create(variant: str, classes: int, rank: int) -> VisionTransformer:
    """The model of a variant; alpha = rank, so that updates are added as they are."""
    rngs, images = nnx.Rngs(0), jnp.zeros((1, SIZE, SIZE, 3))
    model = VisionTransformer(classes, rngs)
    if variant in QLORA:
        rule = qwix.LoraRule(module_path=LINEAR_LAYERS, rank=rank, alpha=rank, **QLORA[variant])
        return qwix.apply_lora_to_model(model, qwix.LoraProvider([rule]), images, rngs=rngs)
    for block in model.blocks:
        for parent, name in (
            (block.attn, "qkv"),
            (block.attn, "proj"),
            (block.mlp, "fc1"),
            (block.mlp, "fc2"),
        ):
            layer = getattr(parent, name)
            sizes = (layer.in_features, rank, layer.out_features)
            setattr(parent, name, nnx.LoRA(*sizes, base_module=layer, rngs=rngs))
    rule = qwix.QtRule(module_path=LINEAR_LAYERS + "/base_module", **FAKE[variant])
    provider = qwix.QtProvider([rule])
    model = qwix.quantize_model(model, provider, images)
    assert not provider.get_unused_rules()
    return model


# --- Measuring --------------------------------------------------------------------------------


def prepare(variant: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], Callable]:
    """What is known of a variant before it is timed, and a call that takes one step."""
    model = create(variant, arguments.classes, arguments.rank)
    trained = nnx.Any(nnx.LoRAParam, nnx.PathContains("head"))
    definition, weights, frozen = nnx.split(model, trained, ...)
    optimizer = optax.adamw(1e-3)
    slots = optimizer.init(weights)
    generator = np.random.default_rng(0)
    shape = (arguments.batch, SIZE, SIZE, 3)
    images = jnp.asarray(generator.standard_normal(shape), "float32")
    labels = jnp.asarray(generator.integers(arguments.classes, size=arguments.batch))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(weights, slots, frozen, images, labels):
        def loss(weights):
            logits = nnx.merge(definition, weights, frozen)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(weights)
        updates, slots = optimizer.update(gradients, slots, weights)
        return optax.apply_updates(weights, updates), slots, value

    compiled = step.lower(weights, slots, frozen, images, labels).compile()
    memory = compiled.memory_analysis()
    found = {
        "framework": "qwix",
        "variant": variant,
        "batch": arguments.batch,
        "trainable": sum(w.size for w in jax.tree.leaves(weights)),
        "parameter_bytes": sum(stored_bytes(w) for w in jax.tree.leaves((weights, frozen))),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "losses": [],
        "step_cpu_s": [],
        "step_wall_s": [],
    }
    state = [weights, slots]

    def take() -> float:
        *state[:], value = compiled(*state, frozen, images, labels)
        return float(value)

    return found, take


def stored_bytes(array: jax.Array) -> int:
    """Bytes of an array where two values of 4 bits share one."""
    bits = {"int4": 4, "uint4": 4}.get(array.dtype.name, 8 * array.dtype.itemsize)
    return array.size * bits // 8


def main() -> None:
    arguments = parse()
    prepared = [prepare(variant, arguments) for variant in arguments.variants]
    for turn in range(arguments.steps + 1):
        for found, take in prepared:
            wall, cpu = time.perf_counter(), time.process_time()
            found["losses"].append(take())
            if turn:  # the first step warms up
                found["step_cpu_s"].append(time.process_time() - cpu)
                found["step_wall_s"].append(time.perf_counter() - wall)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "qwix")}
    for found, _ in prepared:
        print(json.dumps({**found, **versions}))


if __name__ == "__main__":
    main()
