"""The whole model from recorded ids and pixels: what it sees, and what it answers.

Answers are written twice: after one pass over the prompt, and by `inference.viewer`,
which watches in chunks and then reads the question.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from timeviper_jax.benchmarks.recorded import language
from timeviper_jax.benchmarks.recorded.case import Case, Tally, compile_once, under
from timeviper_jax.benchmarks.recorded.language import (
    Sample,
    compare_kept,
    language_family,
)
from timeviper_jax.benchmarks.recorded.vision import (
    build_encoder,
    channels_last,
    encoder_config,
    projector_config,
)
from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.conversion.vision import PROJECTOR_RULES
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Batch, Example, Role
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt
from timeviper_jax.timeviper import TimeViper, TimeViperConfig


def build_model(case: Case) -> TimeViper:
    """Encoder, projector and language model, sized by the recording."""
    params, about = case.params, case.about
    encoder = under("vision_backbone.featurizer.", params)
    encoder = under("vision_tower.", encoder) or encoder  # InternVideo2's.
    vision = encoder_config(encoder, about, case.arrays["in.pixel_values"].shape[-1])
    kind, _, keep = about["arch"].partition("-")
    projector, fused = under("projector.", params), kind.startswith("fused")
    family = language_family(about)
    cfg = TimeViperConfig(
        vision=vision,
        projector=projector_config(projector, fused=fused),
        llm=family.config(about["config"]),
        tokens_per_frame=int(keep or vision.num_tokens),
    )
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    nnx.update(model.vision, nnx.state(build_encoder(encoder, vision)))
    load_params(model.projector, projector, PROJECTOR_RULES)
    llm = under("llm_backbone.llm.", params)
    load_params(model.llm, llm, family.rules(cfg.llm), ignore=family.unused(cfg.llm))
    return model


def spliced(case: Case, tokens_per_frame: int) -> Int[np.ndarray, "T"]:
    """The ids, with a frame's many places where its image stood."""
    ids, image = case.arrays["in.input_ids"][0], case.about["image_token_id"]
    return np.repeat(ids, np.where(ids == image, tokens_per_frame, 1)).astype(np.int32)


def compare_generate(case: Case, tally: Tally) -> None:
    """What is seen, spliced, kept and answered: `vlm_generate`."""
    model = build_model(case)
    tokens = spliced(case, model.cfg.tokens_per_frame)
    sample = Sample.of_vision(tokens == case.about["image_token_id"])
    steps = len(case.arrays["out.tokens"])

    def run(model, pixels):
        features = model.encode(pixels)
        batch = batch_of(tokens, [sample], features[None])
        seen = model.project(features[None], batch.frame_times)[0]
        stream = model.embed(batch)
        return features, seen, stream.x, language.infer(model.llm, stream, steps)

    pixels = channels_last(case.arrays["in.pixel_values"])
    features, seen, x, inferred = compile_once(run)(model, pixels)
    output, _, written = inferred
    tally.value("out.visual_embeddings", seen)
    tally.value("out.fused.inputs_embeds", x)
    tally.tokens("out.fused.position_ids", np.arange(len(tokens))[None])
    compare_kept(case, tally, model.cfg.llm, output, [sample], "out.", trained=False)
    language.compare_written(tally, written, "out.")
    # The release's decoding counts rotary positions in its own way; see `infer`.
    if not (model.cfg.llm.rope_theta and model.cfg.llm.transv):
        got, logits = answer(model, tokens, sample, np.asarray(features), steps)
        tally.tokens("out.tokens", got)
        tally.value("out.logits", logits)


def batch_of(
    tokens: Int[np.ndarray, "T"],
    samples: Sequence[Sample],
    features: Float[Array, "1 F V E"],
) -> Batch:
    """A row of samples, whose frames are encoded."""
    ids = np.repeat(np.arange(len(samples)) + 1, list(map(len, samples)))
    roles = np.concatenate([sample.roles for sample in samples])
    return Batch(
        tokens=jnp.asarray(tokens)[None],
        roles=jnp.asarray(roles)[None],
        segment_ids=jnp.asarray(ids, jnp.int32)[None],
        loss_mask=jnp.zeros((1, len(tokens)), bool),
        frames=None,
        features=features,
        frame_times=jnp.zeros(features.shape[:2]),
        num_segments=len(samples),
    )


def answer(
    model: TimeViper,
    tokens: Int[np.ndarray, "T"],
    sample: Sample,
    features: Float[np.ndarray, "F V E"],
    length: int,
) -> tuple[Int[np.ndarray, "T"], Float[np.ndarray, "T vocab"]]:
    """Greedy tokens, and the logits each is chosen by."""
    room = len(tokens) + 2 * length + 16
    sizes = ViewerConfig(chunk=16, text_chunk=16, text_room=room, smallest_cache=64)
    viewer = Viewer(model, sizes)
    none = np.zeros(len(tokens), bool)
    prompt = EncodedText(tokens=tokens, roles=sample.roles, loss_mask=none)
    watched, question = split_prompt(prompt)
    times = np.zeros(len(features), np.float32)
    example = Example(**vars(watched), frame_times=times, features=features)
    memory = viewer.watch([example])
    (got,) = viewer.ask(memory, [question], decoding=Decoding(max_tokens=length))
    begun = [_begun(question, got[:written]) for written in range(length)]
    logits = [viewer.logits(memory, [text])[0] for text in begun]
    return np.array(got), np.stack(logits)


def _begun(question: EncodedText, written: Sequence[int]) -> EncodedText:
    """The question, and the answer so far."""
    more = len(written)
    return EncodedText(
        tokens=np.append(question.tokens, np.array(written, np.int32)),
        roles=np.pad(question.roles, (0, more), constant_values=Role.ANSWER),
        loss_mask=np.pad(question.loss_mask, (0, more)),
    )


def compare_training(case: Case, tally: Tally) -> None:
    """The model as it trains, packed or not: `vlm_packed`, `vlm_train`."""
    model = build_model(case)
    about, arrays = case.about, case.arrays
    image, keep = about["image_token_id"], model.cfg.tokens_per_frame
    tokens = spliced(case, keep)
    ids = arrays["in.input_ids"][0]
    widths = np.where(ids == image, keep, 1)
    told = about.get("txt_seq_lens", [len(ids)])
    numbers = np.repeat(np.arange(len(told)), told)
    lengths = np.bincount(np.repeat(numbers, widths))
    samples = [
        Sample.of_vision(part == image)
        for part in np.split(tokens, np.cumsum(lengths)[:-1])
    ]
    labels = np.where(ids == image, -100, arrays["in.labels"][0])
    labels = np.repeat(labels, widths)
    tally.tokens("out.fused.labels", labels[None])
    tally.tokens("out.fused.seq_idx", np.repeat(numbers, widths)[None])
    positions = np.concatenate([np.arange(length) for length in lengths])
    tally.tokens("out.fused.position_ids", positions[None])

    stages = language.as_trained(model.llm).cfg.transv
    choices = language.recorded_choices(case, stages, samples, "out.")
    model.llm = language.as_trained(model.llm)

    def loss(params, graph, pixels):
        model = nnx.merge(graph, params)
        features = model.encode(pixels)
        batch = batch_of(tokens, samples, features[None])
        seen = model.project(features[None], batch.frame_times)[0]
        stream = model.embed(batch)
        output = model.llm(stream, choices=choices, record=True)
        logits = model.llm.logits(output.hidden)
        value = language.token_loss(logits, jnp.asarray(labels)[None], output.stream)
        return value, (seen, stream.x, output, logits)

    def gradients(model, pixels):
        graph, params = nnx.split(model)
        step = jax.value_and_grad(loss, has_aux=True)
        return step(params, graph, pixels)

    pixels = channels_last(arrays["in.pixel_values"])
    (value, (seen, x, output, logits)), grads = compile_once(gradients)(model, pixels)
    tally.value("out.loss", value)
    tally.value("out.visual_embeddings", seen)
    tally.value("out.fused.inputs_embeds", x)
    cfg = model.cfg.llm
    language.compare_output(
        case, tally, cfg, (output, logits), samples, "out.", trained=True
    )
    tally.gradients(published_gradients(case, model, grads))


def published_gradients(
    case: Case, model: TimeViper, grads: nnx.State
) -> dict[str, Any]:
    """Gradients of projector and language model, named as the release names them."""
    grads = nnx.merge(nnx.graphdef(model), grads)
    rules = language_family(case.about).rules(model.cfg.llm)
    llm = save_params(grads.llm, rules)
    projector = save_params(grads.projector, PROJECTOR_RULES)
    return {f"llm_backbone.llm.{name}": array for name, array in llm.items()} | {
        f"projector.{name}": array for name, array in projector.items()
    }
