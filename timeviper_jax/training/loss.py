"""What is learned: the next token of answers, or the label of a frame.

An objective takes the model and a batch and returns means; the one called "loss" is
differentiated. A mean carries its count, so that microbatches weigh as much as the
targets they hold.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int

from timeviper_jax.data.examples import Batch
from timeviper_jax.data.frames import FrameBatch
from timeviper_jax.llm.rows import move_tokens, whole_shards
from timeviper_jax.llm.stream import take, where_true
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.training.cross_entropy import cross_entropy
from timeviper_jax.training.metrics import Mean, Means


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Targets:
    """Up to A supervised predictions of each row.

    `index` is where the predicting token stands among those that survived, `tokens`
    what follows it, `segment_ids` the sample it belongs to; `valid` says which of the
    A are real.
    """

    index: Int[Array, "B A"]
    tokens: Int[Array, "B A"]
    segment_ids: Int[Array, "B A"]
    valid: Bool[Array, "B A"]


def find_targets(
    batch: Batch, positions: Int[Array, "B U"], answer_tokens: int
) -> Targets:
    """Finds the first `answer_tokens` supervised predictions of each row.

    The token that survived from position p predicts the token at p + 1, if that one is
    supervised and of the same sample. `check_answers` says whether all were found.
    """
    T = batch.tokens.shape[1]
    following = jnp.minimum(positions + 1, T - 1)
    segment_ids = take(batch.segment_ids, positions)
    supervised = (
        take(batch.loss_mask, following)
        & (take(batch.segment_ids, following) == segment_ids)
        & (segment_ids > 0)
        & (positions < T - 1)
    )
    index, valid = where_true(supervised, answer_tokens)
    return Targets(
        index=index,
        tokens=take(take(batch.tokens, following), index),
        segment_ids=take(segment_ids, index),
        valid=valid,
    )


def check_answers(batch: Batch, answer_tokens: int) -> Batch:
    """Returns the batch, or raises when a row supervises more tokens than fit."""
    most = int(np.sum(batch.loss_mask, axis=1).max())
    if most > answer_tokens:
        raise ValueError(
            f"A row has {most} supervised tokens and answer_tokens={answer_tokens};"
            " raise it, or shorten the answers."
        )
    return batch


def text_objective(model: TimeViper, batch: Batch, *, answer_tokens: int) -> Means:
    """Cross-entropy of the answers' tokens, in float32.

    Only the tokens that predict an answer go through the head. `accuracy` is of
    tokens; `exact` is the share of samples whose every answer token is predicted.
    """
    output = model.forward(batch)
    targets = find_targets(batch, output.positions, whole_shards(answer_tokens))
    losses, correct = cross_entropy(
        move_tokens(output.hidden, targets.index),
        model.llm.head_kernel,
        targets.tokens,
        dtype=model.cfg.llm.dtype,
    )
    return {
        "loss": Mean.of(losses, targets.valid),
        "accuracy": Mean.of(correct, targets.valid),
        "exact": _exact(correct, targets, batch.num_segments),
    }


def _exact(correct: Bool[Array, "B A"], targets: Targets, num_segments: int) -> Mean:
    def count(values):  # B A -> B samples, the first of which is padding.
        one_row = lambda v, s: jax.ops.segment_sum(v, s, num_segments + 1)
        return jax.vmap(one_row)(values.astype(jnp.int32), targets.segment_ids)

    wrong = count(~correct & targets.valid)
    asked = count(targets.valid) > 0
    return Mean.of(wrong == 0, asked)


def frame_objective(
    model: TimeViper, batch: FrameBatch, *, words: Sequence[int]
) -> Means:
    """Cross-entropy of which word, by its token id, says what a frame shows."""
    logits = model.match_words(batch.frames, jnp.array(words))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    everything = jnp.ones_like(losses)
    return {
        "loss": Mean.of(losses, everything),
        "accuracy": Mean.of(jnp.argmax(logits, axis=-1) == batch.labels, everything),
    }
