"""One step of training: microbatches, their gradient, one update, if it is a good one.

Only the parameters that move are differentiated and have optimizer state; the frozen
ones are an argument of their own, and what an objective does not read is not even
passed to the device program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from timeviper_jax import sharding
from timeviper_jax.training import guard
from timeviper_jax.training.metrics import Mean, Means
from timeviper_jax.training.parameters import Params, Shapes, merge

Objective = Callable[[nnx.Module, Any], Means]
Adapt = Callable[[Params], Params]


class TrainState(NamedTuple):
    """What a step changes: the parameters that move, the optimizer's memory of them.

    `step` counts the stage's batches, also those whose update was skipped; the
    optimizer's own counts (its schedule's among them) only the updates made.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    guard: guard.GuardState


def create_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    guard_config: guard.GuardConfig = guard.FINITE,
) -> tuple[TrainState, TrainState]:
    """The state before the first step, and the sharding of every part of it."""
    places = state_places(params, optimizer, mesh)
    state = TrainState(
        step=jax.device_put(jnp.zeros((), jnp.int32), places.step),
        params=params,
        opt_state=jax.jit(optimizer.init, out_shardings=places.opt_state)(params),
        # Made in place: what several hosts put must be equal, and nan is not.
        guard=jax.jit(lambda: guard.init(guard_config), out_shardings=places.guard)(),
    )
    return state, places


def describe_state(
    params: Shapes,
    optimizer: optax.GradientTransformation,
    mesh: sharding.AnyMesh,
    guard_config: guard.GuardConfig = guard.FINITE,
) -> TrainState:
    """The shapes of that state, each with its sharding; builds nothing."""

    def create(params):
        step = jnp.zeros((), jnp.int32)
        opt_state, guarded = optimizer.init(params), guard.init(guard_config)
        return TrainState(step, params, opt_state, guarded)

    places = state_places(params, optimizer, mesh)
    return sharding.place(jax.eval_shape(create, params), places)


def state_places(
    params: Shapes, optimizer: optax.GradientTransformation, mesh: sharding.AnyMesh
) -> TrainState:
    """The sharding of every part of a state."""
    whole = NamedSharding(mesh, P())
    return TrainState(
        step=whole,
        params=sharding.shard_params(params, mesh),
        opt_state=sharding.shard_like_params(
            jax.eval_shape(optimizer.init, params), params, mesh
        ),
        guard=guard.GuardState(losses=whole, in_row=whole),
    )


def make_train_step(
    graph: nnx.GraphDef,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    adapt: Adapt = lambda params: params,
    guard_config: guard.GuardConfig = guard.FINITE,
) -> Callable[[TrainState, Params, Any], tuple[TrainState, Means]]:
    """Returns `step(state, frozen, batch) -> (state, means)`, not yet compiled.

    The batch goes through in `accumulate` parts, one after the other; loss and
    gradient are those of the whole batch at once, each target counting the same.
    `adapt` makes the model's parameters of those that are kept, such as LoRA's. What
    the guard turns down leaves parameters and optimizer as they were, bit for bit, and
    weighs nothing in the means; "skipped" counts it.
    """

    def train_step(state, frozen, batch):
        def total_loss(params, part):
            means = objective(merge(graph, adapt({**frozen, **params})), part)
            return means["loss"].total, means

        def gradient(params, part):
            grads, means = jax.grad(total_loss, has_aux=True)(params, part)
            return sharding.constrain_params(grads), means

        grads, means = _accumulate(gradient, state.params, batch, accumulate)
        # A batch without a single target teaches nothing, and must not divide by it.
        count = jnp.maximum(means["loss"].count, 1)
        grads = jax.tree.map(lambda g: g / count, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        grad_norm = optax.tree.norm(grads)
        loss = means["loss"].total / count
        good, guarded = guard.judge(state.guard, loss, grad_norm, guard_config)
        keep = lambda new, old: jnp.where(good, new, old)
        means["grad_norm"] = Mean.single(grad_norm)
        means = jax.tree.map(lambda part: jnp.where(good, part, 0), means)
        means["skipped"] = Mean.single(~good)
        params = optax.apply_updates(state.params, updates)
        state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            guard=guarded,
        )
        return state, means

    return train_step


def _accumulate(
    gradient: Callable, params: Params, batch: Any, parts: int
) -> tuple[Params, Means]:
    """Sums of gradients and means over `parts` equal parts of the batch."""
    if parts == 1:
        return gradient(params, batch)
    # Neighbouring rows go to different parts, so each part spans all devices.
    leaves, tree = jax.tree.flatten(batch)
    leaves = [rearrange(x, "(B A) ... -> A B ...", A=parts) for x in leaves]

    def of_part(part):
        return gradient(params, jax.tree.unflatten(tree, part))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, of_part(part)), None

    shapes = jax.eval_shape(of_part, [x[0] for x in leaves])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, leaves)
    return sums
