"""The whole model: as recorded from pixels on, and each part's own promise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import recorded
import tiny
from flax import nnx
from golden_cases import load

from timeviper_jax.data.examples import Batch, Example, Role, RowSize, collate
from timeviper_jax.llm.transv import Stage
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeDigits, TimeViper, with_stages

RECORDED = dict(atol=2e-5, rtol=0)  # In float32 by other arithmetic.
FLOAT32 = dict(atol=1e-5, rtol=1e-5)

# The recorded cases: six frames of 58 pixels, a question, sixteen greedy tokens.


def test_recorded_generation_from_pixels():
    description, arrays = load("vlm_nano_generate_pdrop")
    model = recorded.whole_model(description, arrays)
    pixels = jnp.asarray(arrays["in.pixel_values"].transpose(0, 2, 3, 1))[None]
    tokens, roles = recorded.prompt(description, arrays)
    length = len(tokens)
    tokens, roles = (np.pad(z, (0, 16))[None] for z in (tokens, roles))

    @tiny.quick_jit
    def run(model, tokens, roles):
        features = model.encode(pixels)
        batch = Batch(
            tokens=tokens,
            roles=roles,
            segment_ids=(roles > 0).astype(jnp.int32),
            loss_mask=roles == Role.ANSWER,
            frame_times=jnp.zeros((1, 6)),
            features=features,
        )
        stream, output = model.embed(batch), model.forward(batch)
        visual = model.project(features, batch.frame_times)
        return visual, stream.x, model.llm.logits(output.hidden), output

    visual, fused, _, output = run(model, tokens, roles)
    np.testing.assert_allclose(visual[0], arrays["out.visual_embeddings"], **RECORDED)
    want = arrays["out.fused.inputs_embeds"]
    np.testing.assert_allclose(fused[:, :length], want, **RECORDED)
    given = np.arange(length)
    for i, kept in enumerate(output.kept):
        want = given[arrays[f"out.trace.{i}.kept"]]
        given = np.asarray(kept[0])
        given = given[given >= 0]
        np.testing.assert_array_equal(given[roles[0, given] == Role.VISION], want)
    for step, (token, want) in enumerate(
        zip(arrays["out.tokens"], arrays["out.logits"], strict=True)
    ):
        _, _, logits, output = run(model, tokens, roles)
        last = logits[0, np.sum(np.asarray(output.positions) >= 0) - 1]
        np.testing.assert_allclose(last, want, **RECORDED)
        assert jnp.argmax(last) == token
        tokens[0, length + step], roles[0, length + step] = token, Role.ANSWER


def test_recorded_packed_training_from_pixels():
    description, arrays = load("vlm_nano_train_packed")
    model = recorded.whole_model(description, arrays)
    pixels = jnp.asarray(arrays["in.pixel_values"].transpose(0, 2, 3, 1))[None]
    labels = jnp.asarray(arrays["out.fused.labels"], jnp.int32)
    segment_ids = jnp.asarray(arrays["out.fused.seq_idx"], jnp.int32) + 1
    tokens, _ = recorded.prompt(description, arrays)
    roles = np.where(tokens == description["image_token_id"], Role.VISION, Role.TEXT)
    batch = Batch(
        tokens=jnp.asarray(tokens)[None],
        roles=jnp.asarray(roles, jnp.int32)[None],
        segment_ids=segment_ids,
        loss_mask=labels >= 0,
        frame_times=jnp.zeros((1, pixels.shape[1])),
        num_segments=2,
    )

    def loss(model, batch):
        batch = dataclasses.replace(batch, features=model.encode(pixels))
        stream, output = model.embed(batch), model.forward(batch)
        logits = model.llm.logits(output.hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], jnp.maximum(labels[:, 1:], 0)
        )
        loss = jnp.mean(losses, where=labels[:, 1:] >= 0)
        return loss, (loss, logits, stream.x)

    grads, (loss, logits, fused) = tiny.quick_jit(tiny.gradient(loss))(model, batch)
    np.testing.assert_allclose(fused, arrays["out.fused.inputs_embeds"], **RECORDED)
    np.testing.assert_allclose(logits, arrays["out.logits"], **RECORDED)
    np.testing.assert_allclose(loss, arrays["out.loss"], **RECORDED)
    first = grads["llm"]["mamba"]
    layer = "llm_backbone.llm.backbone.layers.0."
    got = {
        f"{layer}norm.weight": first["norm"]["scale"][0],
        f"{layer}mixer.norm.weight": first["mixer"]["norm"]["scale"][0],
    }
    for number, name in enumerate(("0", "2")):  # An activation stands between.
        linear = grads["projector"]["layers"][number]
        got[f"projector.projector.{name}.weight"] = linear["kernel"][...].T
        got[f"projector.projector.{name}.bias"] = linear["bias"][...]
    for name, gradient in got.items():
        want = arrays[f"grad.{name}"]
        scale = np.abs(want).max()
        np.testing.assert_allclose(gradient, want, atol=2e-5 * scale, rtol=0)


# A tiny model of its own.

TINY = dataclasses.replace(PRESETS["tiny"], time_digits=3)


def example(frames: int, question: int, answer: int, seed: int = 0) -> Example:
    """Two words, a video with pixels, a question and its answer."""
    rng = np.random.default_rng([seed, frames, question])
    roles = [Role.TEXT] * 2 + [Role.VISION] * (4 * frames)
    roles += [Role.INSTRUCTION] * question + [Role.ANSWER] * answer
    roles = np.array(roles, np.int32)
    return Example(
        tokens=rng.integers(1, 200, len(roles)).astype(np.int32),
        roles=roles,
        loss_mask=roles == Role.ANSWER,
        frame_times=np.arange(frames).astype(np.float32) * 37 + 1,
        frames=rng.integers(0, 256, (frames, 32, 32, 3)).astype(np.uint8),
    )


@pytest.fixture(scope="module")
def model():
    return tiny.build(lambda: TimeViper(TINY, rngs=nnx.Rngs(0)))


EXAMPLES = [example(3, 5, 2), example(2, 4, 3), example(1, 3, 1)]
SEPARATE = RowSize(num_frames=3, text_tokens=9, tokens_per_frame=4)


@pytest.fixture(scope="module")
def separate(model):
    """Gradients of a training step on rows of one sample, and the forward's output."""
    batch = collate([[e] for e in EXAMPLES], SEPARATE)
    return tiny.quick_jit(tiny.gradient(_loss))(model, batch)


def _loss(model: TimeViper, batch: Batch):
    output = model.forward(batch)
    positions = output.positions
    b = jnp.arange(len(positions))[:, None]
    targets = jnp.minimum(positions + 1, batch.tokens.shape[1] - 1)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model.llm.logits(output.hidden), batch.tokens[b, targets]
    )
    asked = (positions >= 0) & batch.loss_mask[b, targets]
    text_loss = jnp.mean(losses, where=asked)
    labels = model.match_words(batch.frames[:, 0], jnp.arange(5))
    return text_loss + jnp.mean(labels**2), output


def test_every_parameter_has_a_finite_gradient(separate):
    grads, output = separate
    assert jnp.all(jnp.isfinite(output.hidden))
    for path, param in nnx.to_flat_state(grads):
        gradient, name = np.asarray(param[...]), "/".join(map(str, path))
        assert np.all(np.isfinite(gradient)), name
        assert np.any(gradient), name


def test_packed_samples_are_as_in_rows_of_their_own(model, separate):
    size = RowSize(num_frames=6, text_tokens=24, tokens_per_frame=4, num_segments=3)
    packed = tiny.quick_jit(lambda m, b: m.forward(b))(model, collate([EXAMPLES], size))
    start = 0
    for i, sample in enumerate(EXAMPLES):
        stop = start + len(sample.tokens)
        here = np.flatnonzero((packed.positions >= start) & (packed.positions < stop))
        here = here[here < packed.positions.shape[1]]
        alone = np.flatnonzero(separate[1].positions[i] >= 0)
        np.testing.assert_array_equal(
            packed.positions[0, here] - start, separate[1].positions[i, alone]
        )
        np.testing.assert_allclose(
            packed.hidden[0, here], separate[1].hidden[i, alone], **FLOAT32
        )
        start = stop


def test_stored_features_take_the_place_of_frames(model):
    batch = collate([[e] for e in EXAMPLES], SEPARATE)

    @tiny.quick_jit
    def run(model, batch):
        stored = dataclasses.replace(
            batch, frames=None, features=model.encode(batch.frames)
        )
        return model.embed(batch), model.embed(stored)

    from_frames, from_features = run(model, batch)
    np.testing.assert_array_equal(from_frames.x, from_features.x)
    # Frames that a row does not have stand nowhere in it.
    batch.frames[2, 1:] = 255
    np.testing.assert_array_equal(run(model, batch)[0].x[2], from_frames.x[2])


def test_vision_tokens_stand_where_their_role_does(model):
    text = np.array([7, 7, 263, 263, 7, 263, 263, 263, 263, 263, 263, 9], np.int32)
    roles = np.where(text == 263, Role.VISION, Role.TEXT).astype(np.int32)
    rng = np.random.default_rng(0)
    interleaved = Example(
        tokens=text,
        roles=roles,
        loss_mask=roles < 0,
        frame_times=np.array([4, 725], np.float32),
        features=rng.normal(size=(2, 4, 32)).astype(np.float32),
    )
    batch = collate(
        [[interleaved]], RowSize(num_frames=2, text_tokens=6, tokens_per_frame=4)
    )

    @tiny.quick_jit
    def run(model, batch):
        vision = model.project(batch.features, batch.frame_times)
        return (
            model.embed(batch).x[0],
            vision.reshape(8, -1),
            model.llm.embed.embedding[...],
        )

    x, vision, table = run(model, batch)
    want = np.array(table[np.where(text == 263, 0, text)])
    want[text == 263] = vision
    np.testing.assert_array_equal(x[:12], want)


def test_time_is_embedded_by_its_digits():
    digits = tiny.build(lambda: TimeDigits(4, 24, tiny.LM, rngs=nnx.Rngs(0)))
    table = np.asarray(digits.embedding[...])
    got = jax.jit(digits.__call__)(jnp.array([[0.0, 7.9, 305.5, 86_399.0]]))
    for token, text in zip(got[0], ("0000", "0007", "0305", "6399"), strict=True):
        want = sum(table[i, int(d)] for i, d in enumerate(reversed(text)))
        np.testing.assert_allclose(token, want, **FLOAT32)


def test_vision_tokens_can_be_given_the_size_of_text():
    cfg = dataclasses.replace(TINY, normalise_vision=True, time_digits=0)
    model = tiny.build(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    features = 50 * jax.random.normal(jax.random.key(0), (1, 3, 4, 32))
    project = tiny.quick_jit(lambda m, f: m.project(f, jnp.zeros((1, 3))))
    sizes = jnp.sqrt(jnp.mean(project(model, features) ** 2, axis=-1))
    np.testing.assert_allclose(sizes, cfg.llm.embed_std, rtol=1e-4)


def test_a_model_may_drop_where_it_was_not_trained_to(model, separate):
    drop = Stage(layer=2, keep=0.5, transfer=False)
    later = TINY.llm.transv[1]
    other = with_stages(model, (drop, later))
    assert other.cfg.llm.transv == (drop, later)
    batch = collate([[e] for e in EXAMPLES], SEPARATE)
    output = tiny.quick_jit(lambda m, b: m.forward(b))(other, batch)
    text = sum(role != Role.VISION for role in EXAMPLES[0].roles)
    assert np.sum(output.kept[0][0] >= 0) == text + 6
    assert np.sum(output.kept[1][0] >= 0) == text + 3
    alpha = other.llm.transv[0].alpha[...]
    np.testing.assert_array_equal(alpha, model.llm.transv[1].alpha[...])
    with pytest.raises(ValueError, match=r"no transfer at layers \[2\], only at"):
        with_stages(model, (dataclasses.replace(drop, transfer=True),))
