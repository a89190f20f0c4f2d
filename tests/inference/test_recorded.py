"""Watching and answering as recorded: greedy tokens of the authors' release."""

import dataclasses

import numpy as np
import pytest
import recorded
from flax import nnx
from golden_cases import load, under

from timeviper_jax.conversion.load import load_params
from timeviper_jax.data.conversation import EncodedText
from timeviper_jax.data.examples import Example, Role
from timeviper_jax.inference.sampling import Decoding
from timeviper_jax.inference.viewer import Viewer, ViewerConfig, split_prompt
from timeviper_jax.presets import PRESETS
from timeviper_jax.timeviper import TimeViper
from timeviper_jax.vision.projector import ProjectorConfig

SIZES = ViewerConfig(chunk=16, text_chunk=16, text_room=40, smallest_cache=64)
DECODING = Decoding(max_tokens=16)
RECORDED = dict(atol=2e-5, rtol=0)  # In float32 by other arithmetic.


def recorded_model(description: dict, tensors: dict) -> TimeViper:
    """The recorded language model, behind an encoder and projector of any weights."""
    llm = dataclasses.replace(
        recorded.config_from_json(description["config"]), rolled=True
    )
    width = llm.embed_dim
    cfg = dataclasses.replace(
        PRESETS["tiny"],
        llm=llm,
        vision=dataclasses.replace(PRESETS["tiny"].vision, embed_dim=width),
        projector=ProjectorConfig(vision_dim=width, llm_dim=width),
    )
    model = nnx.eval_shape(lambda: TimeViper(cfg, rngs=nnx.Rngs(0)))
    unused = {
        path: param.replace(np.zeros(param.shape, param.dtype))
        for path, param in nnx.to_flat_state(nnx.state(model))
        if path[0] != "llm"
    }
    nnx.update(model, nnx.from_flat_state(list(unused.items())))
    load_params(model.llm, tensors, recorded.rules(llm))
    return model


def check(viewer: Viewer, example: Example, tokens, logits) -> None:
    text = EncodedText(
        tokens=example.tokens, roles=example.roles, loss_mask=example.loss_mask
    )
    before, question = split_prompt(text)
    watched = dataclasses.replace(example, **vars(before))
    memory = viewer.watch([watched])
    got = viewer.logits(memory, [question])
    np.testing.assert_allclose(got[0], logits[0], **RECORDED)
    assert viewer.ask(memory, [question], decoding=DECODING) == [tokens.tolist()]


@pytest.mark.parametrize(
    "case",
    [
        "vlm_nano_generate_plain",
        "vlm_nano_generate_pdrop",
        "vlm_qwen2_generate_plain",
    ],
)
def test_recorded_answers_about_frames(monkeypatch, case):
    description, arrays = load(case)
    visual = arrays["out.visual_embeddings"]
    # What the projector gave is recorded, and stands in for it.
    monkeypatch.setattr(TimeViper, "project", lambda self, features, times: features)
    published = under("param.llm_backbone.llm.", arrays)
    viewer = Viewer(recorded_model(description, published), SIZES)
    ids, image = arrays["in.input_ids"][0], description["image_token_id"]
    tokens = np.repeat(ids, np.where(ids == image, visual.shape[1], 1)).astype(np.int32)
    roles = np.where(tokens == image, Role.VISION, Role.TEXT).astype(np.int32)
    roles[np.flatnonzero(tokens == image)[-1] + 1 :] = Role.INSTRUCTION
    example = Example(
        tokens=tokens,
        roles=roles,
        loss_mask=np.zeros(len(tokens), bool),
        frame_times=np.zeros(len(visual), np.float32),
        features=visual,
    )
    check(viewer, example, arrays["out.tokens"], arrays["out.logits"])


def test_recorded_continuation_of_a_text():
    description, arrays = load("nano_plain_g2")
    viewer = Viewer(recorded_model(description, under("param.", arrays)), SIZES)
    tokens = arrays["in.input_ids"][0, : description["decode_prompt_len"]]
    example = Example(
        tokens=tokens.astype(np.int32),
        roles=np.full(len(tokens), Role.INSTRUCTION, np.int32),
        loss_mask=np.zeros(len(tokens), bool),
        frame_times=np.zeros(0, np.float32),
        features=np.zeros((0, 4, 64), np.float32),
    )
    check(viewer, example, arrays["out.decode.tokens"], arrays["out.decode.logits"])
