"""Language models from recorded ids or embeddings: forward, backward, greedy tokens.

The prompt of a recorded answer fills the caches in one pass, and decoding goes on from
them, as `HybridLM.extend` does.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from timeviper_jax.benchmarks.recorded.case import Case, Tally, compile_once
from timeviper_jax.conversion.families import LANGUAGE, LanguageFamily
from timeviper_jax.conversion.load import load_params, save_params
from timeviper_jax.data.examples import Role
from timeviper_jax.layers.layout import Layout
from timeviper_jax.llm import transv
from timeviper_jax.llm.hybrid import HybridLM, Output
from timeviper_jax.llm.stream import Stream, make_stream

_IGNORED = -100  # The label that counts for nothing.


def language_family(about: Mapping[str, Any]) -> LanguageFamily:
    """The family a recording names, or whose name its kind begins with."""
    name = about.get("family") or about["kind"].split("_")[0]
    config = about["config"].get("model_type")
    for candidate in (name, config):
        if candidate in LANGUAGE:
            return LANGUAGE[candidate]
    raise ValueError(f"family {name!r} is not one of {sorted(LANGUAGE)}.")


def build_language_model(case: Case) -> HybridLM:
    """The recorded language model, from its config and parameters."""
    family = language_family(case.about)
    cfg = family.config(case.about["config"])
    lm = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    load_params(lm, case.params, family.rules(cfg), ignore=family.unused(cfg))
    return lm


# Streams.


@dataclasses.dataclass(frozen=True)
class Sample:
    """One of a row's samples, by the roles of its tokens."""

    roles: Int[np.ndarray, "T"]

    def __len__(self) -> int:
        return len(self.roles)

    @property
    def sees(self) -> bool:
        return Role.VISION in self.roles

    @classmethod
    def of_vision(cls, is_vision: Bool[np.ndarray, "T"]) -> "Sample":
        """All text behind the last vision token is the instruction."""
        roles = np.where(is_vision, Role.VISION, Role.TEXT).astype(np.int32)
        roles[np.flatnonzero(is_vision).max(initial=-1) + 1 :] = Role.INSTRUCTION
        return cls(roles)


def samples_of(about: Mapping[str, Any], lengths: Sequence[int]) -> list[Sample]:
    """The row's samples, with the vision tokens that a TransV case tells of."""
    told = about.get("train_pdrop_args")
    starts = told["first_vision_token_positions"] if told else [0] * len(lengths)
    counts = told["num_vision_tokens"] if told else [0] * len(lengths)
    spans = [np.arange(length) for length in lengths]
    return [
        Sample.of_vision((span >= start) & (span < start + count))
        for span, start, count in zip(spans, starts, counts, strict=True)
    ]


def stream_of(x: Float[Array, "B T D"], samples: Sequence[Sample]) -> Stream:
    """Rows of samples that are alike in their roles."""
    roles = np.concatenate([sample.roles for sample in samples])
    ids = np.repeat(np.arange(len(samples)) + 1, list(map(len, samples)))
    rows = lambda z: jnp.broadcast_to(jnp.asarray(z, jnp.int32), x.shape[:2])
    return make_stream(
        x,
        rows(roles),
        rows(ids),
        num_segments=len(samples),
        vision_capacity=int(np.sum(roles == Role.VISION)),
    )


# What is compared.


def compare_plain(case: Case, tally: Tally) -> None:
    """A model without TransV: `nano_plain`, `qwen2_plain`."""
    lm = build_language_model(case)
    ids = jnp.asarray(case.arrays["in.input_ids"], jnp.int32)
    samples = samples_of(case.about, [ids.shape[1]])
    row = lambda lm, ids: stream_of(lm.embed(ids), samples)
    compare_training(case, tally, lm, row, (ids,), "out.", samples)
    length = case.about.get("decode_prompt_len")
    if length and "out.decode.tokens" in case.arrays:
        prompt = [Sample(samples[0].roles[:length])]
        steps = len(case.arrays["out.decode.tokens"])
        run = compile_once(
            lambda lm, ids: infer(lm, stream_of(lm.embed(ids), prompt), steps)
        )
        output, _, written = run(lm, ids[:1, :length])
        compare_written(tally, written, "out.decode.")
        compare_prefill(case, tally, lm, output)


def compare_transv(case: Case, tally: Tally) -> None:
    """A model with TransV: `nano_pdrop`, `qwen2_pdrop`, as it infers and trains."""
    lm = build_language_model(case)
    x = jnp.asarray(case.arrays["in.inputs_embeds"])
    samples = samples_of(case.about, [x.shape[1]])
    steps = len(case.arrays.get("out.decode.tokens", ()))
    run = compile_once(lambda lm, x: infer(lm, stream_of(x, samples), steps))
    output, logits, written = run(lm, x)
    compare_output(case, tally, lm.cfg, (output, logits), samples, "out.eval.")
    compare_written(tally, written, "out.decode.")
    compare_prefill(case, tally, lm, output)
    if "out.train.logits" in case.arrays:
        row = lambda _, x: stream_of(x, samples)
        compare_training(case, tally, lm, row, (x,), "out.train.", samples)


def compare_packed(case: Case, tally: Tally) -> None:
    """Several samples in a row, in training: `nano_packed_train`, `qwen2_…`."""
    lm = build_language_model(case)
    x = jnp.asarray(case.arrays["in.inputs_embeds"])
    lengths = np.unique(case.arrays["in.seq_idx"][0], return_counts=True)[1]
    samples = samples_of(case.about, lengths.tolist())
    compare_training(
        case, tally, lm, lambda _, x: stream_of(x, samples), (x,), "out.", samples
    )


def compare_training(
    case: Case,
    tally: Tally,
    lm: HybridLM,
    row: Callable[..., Stream],
    inputs: tuple[jax.Array, ...],
    prefix: str,
    samples: Sequence[Sample],
) -> None:
    """Loss, logits, hidden states and gradients, `all_text` and kept as recorded."""
    lm = as_trained(lm)
    choices = recorded_choices(case, lm.cfg.transv, samples, prefix)
    labels = jnp.asarray(case.arrays["in.labels"], jnp.int32)

    def loss(params, graph, *inputs):
        lm = nnx.merge(graph, params)
        output = lm(row(lm, *inputs), choices=choices, record=True)
        logits = lm.logits(output.hidden)
        return token_loss(logits, labels, output.stream), (output, logits)

    floats = tuple(
        i + 2 for i, z in enumerate(inputs) if jnp.issubdtype(z.dtype, jnp.floating)
    )

    def gradients(lm, *inputs):
        graph, params = nnx.split(lm)
        step = jax.value_and_grad(loss, argnums=(0, *floats), has_aux=True)
        return step(params, graph, *inputs)

    (value, result), (grads, *of_inputs) = compile_once(gradients)(lm, *inputs)
    tally.value(f"{prefix}loss", value)
    compare_output(case, tally, lm.cfg, result, samples, prefix, trained=True)
    named = published_gradients(case, lm, grads)
    if floats:
        named["in.inputs_embeds"] = of_inputs[0]
    tally.gradients(named)


def as_trained(lm: HybridLM) -> HybridLM:
    """The same parameters; transfers reach all text, as the release trains."""
    stages = tuple(
        dataclasses.replace(stage, transfer_to="all_text") for stage in lm.cfg.transv
    )
    cfg = dataclasses.replace(lm.cfg, transv=stages)
    other = nnx.eval_shape(lambda: HybridLM(cfg, rngs=nnx.Rngs(0)))
    nnx.update(other, nnx.state(lm))
    return other


def published_gradients(case: Case, lm: HybridLM, grads: nnx.State) -> dict[str, Any]:
    """Gradients under the names of the parameters they are of."""
    rules = language_family(case.about).rules(lm.cfg)
    return save_params(nnx.merge(nnx.graphdef(lm), grads), rules)


def token_loss(
    logits: Float[Array, "B T vocab"], labels: Int[Array, "B _"], stream: Stream
) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, where that has a label."""
    here = jnp.maximum(stream.positions, 0)
    targets = jnp.take_along_axis(labels, here, axis=1)[:, 1:]
    counts = (targets != _IGNORED) & (stream.positions[:, 1:] >= 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.maximum(targets, 0)
    )
    return jnp.mean(losses, where=counts)


def infer(
    lm: HybridLM, stream: Stream, steps: int
) -> tuple[Output, jax.Array, tuple[jax.Array, jax.Array]]:
    """A pass that fills the caches, its logits, and `steps` greedy (tokens, logits)."""
    caches = lm.init_caches(1, stream.x.shape[1] + steps)
    output = lm(stream, caches=caches, record=True)
    logits = lm.logits(output.hidden)
    last = jnp.sum(output.positions[0] >= 0) - 1

    def step(carry, _):
        logits, caches = carry
        token = jnp.argmax(logits).astype(jnp.int32)
        # The release's decoding counts rotary positions as before any stage.
        hidden, caches = lm.extend(
            lm.embed(token[None, None]),
            jnp.ones((1, 1), jnp.int32),
            caches,
            original_positions=True,
        )
        return (lm.logits(hidden)[0, 0], caches), (token, logits)

    first = logits[0, last], output.caches
    return output, logits, jax.lax.scan(step, first, length=steps)[1]


def compare_written(
    tally: Tally, written: tuple[jax.Array, jax.Array], prefix: str
) -> None:
    """Greedy tokens, and the logits each was chosen by."""
    tokens, logits = written
    tally.tokens(f"{prefix}tokens", tokens)
    tally.value(f"{prefix}logits", logits)


def trace_of(case: Case, prefix: str) -> list[Mapping[str, Any]]:
    """What the recording notes of each stage and sample, in its order."""
    part = prefix.removeprefix("out.").replace(".", "_")
    return case.about.get(f"{part}trace", case.about.get("trace", []))


def traced_survivors(
    case: Case, samples: Sequence[Sample], prefix: str
) -> list[tuple[str, int, Int[np.ndarray, "K"]]]:
    """Of each trace entry: its key, its stage, which vision tokens survive.

    A recording counts in what the stage was given of the sample; positions count in
    the row at first.
    """
    starts = np.cumsum([0, *map(len, samples)])
    given = {i: np.arange(len(sample)) for i, sample in enumerate(samples)}
    seeing = [i for i, sample in enumerate(samples) if sample.sees]
    found, seen = [], {}
    for number, entry in enumerate(trace_of(case, prefix)):
        stage, key = entry["stage"], f"{prefix}trace.{number}.kept"
        if key not in case.arrays:
            continue
        which = seeing[seen.setdefault(stage, 0)]
        seen[stage] += 1
        before, roles = given[which], samples[which].roles
        survivors = before[case.arrays[key]]
        text = before[roles[before] != Role.VISION]
        given[which] = np.sort(np.concatenate([text, survivors]))
        found.append((key, stage, starts[which] + survivors))
    return found


def recorded_choices(
    case: Case,
    stages: Sequence[transv.Stage],
    samples: Sequence[Sample],
    prefix: str,
) -> list[Bool[Array, "1 T"] | None]:
    """For each stage that ranks, which positions of the row the recording keeps."""
    traced = traced_survivors(case, samples, prefix)
    row = np.arange(sum(map(len, samples)))
    choices = []
    for number, stage in enumerate(stages):
        mine = [survivors for _, at, survivors in traced if at == number]
        ranks = stage.select == "attention" and mine
        kept = np.isin(row, np.concatenate(mine)) if ranks else None
        choices.append(None if kept is None else jnp.asarray(kept)[None])
    return choices


def compare_output(
    case: Case,
    tally: Tally,
    cfg: Any,
    result: tuple[Output, jax.Array],
    samples: Sequence[Sample],
    prefix: str,
    *,
    trained: bool = False,
) -> None:
    """Logits, hidden states, mixers, and what each stage kept and why."""
    output, logits = result
    tally.value(f"{prefix}logits", _real(output, logits))
    # A published layer may be several of our blocks.
    blocks = len(output.layers) // case.about["config"]["num_hidden_layers"]
    hidden = [before for before, _ in output.layers[::blocks]] + [output.hidden]
    for i, array in enumerate(hidden):
        name = f"{prefix}hidden.{i:02d}"
        if name in case.arrays:
            tally.value(name, array[:, : case.arrays[name].shape[1]])
    if blocks == 1:
        for i, (_, mixed) in enumerate(output.layers):
            tally.value(f"{prefix}mixer.{i}", mixed)
            tally.value(f"{prefix}mixer.{i:02d}", mixed)
    compare_kept(case, tally, cfg, output, samples, prefix, trained=trained)


def _real(output: Output, array: jax.Array) -> jax.Array:
    """A row without its padding."""
    return array[:, : int(np.sum(np.asarray(output.positions[0]) >= 0))]


def compare_kept(
    case: Case,
    tally: Tally,
    cfg: Any,
    output: Output,
    samples: Sequence[Sample],
    prefix: str,
    *,
    trained: bool,
) -> None:
    """Kept indices in the recording's count; rankings where they are the same."""
    roles = np.concatenate([sample.roles for sample in samples])
    starts = np.cumsum([0, *map(len, samples)])
    given = np.arange(len(roles))
    traced = traced_survivors(case, samples, prefix)
    for stage, positions in enumerate(output.kept):
        positions = np.asarray(positions[0])
        after = positions[positions >= 0]
        for key, at, survivors in traced:
            if at != stage:
                continue
            sample = np.searchsorted(starts, survivors[0], side="right") - 1
            mine = (given >= starts[sample]) & (given < starts[sample + 1])
            stays = np.isin(given[mine], after) & (roles[given[mine]] == Role.VISION)
            # The release's training ranks by a slip of its own; see `survivors`.
            if not (trained and cfg.transv[stage].select == "attention"):
                tally.kept(key, np.flatnonzero(stays))
            scores = output.scores[stage]
            if scores is not None and not trained:
                vision = mine & (roles[given] == Role.VISION)
                name = key.replace(".kept", ".scores")
                tally.value(name, np.asarray(scores[0])[: len(given)][vision])
        given = after


def compare_prefill(case: Case, tally: Tally, lm: HybridLM, output: Output) -> None:
    """The states that Mamba layers are left in after the prompt."""
    caches = [cache.mamba for cache in output.caches]
    join = lambda name: np.concatenate([np.asarray(getattr(c, name)) for c in caches])
    conv = [join(f"conv_{part}") for part in "xbc"]
    conv, states = np.concatenate(conv, axis=-1), join("state")
    layers = [i for i, kind in enumerate(lm.cfg.pattern) if kind == "M"]
    for index, layer in enumerate(layers):
        tally.value(f"out.prefill.ssm_state.{layer}", states[index])
        name = f"out.prefill.conv_state.{layer}"
        if name in case.arrays:  # Theirs holds one input more than a next token needs.
            oldest = case.arrays[name][:, :, :1]
            window = np.moveaxis(conv[index], 1, 2)
            tally.value(name, np.concatenate([oldest, window], axis=2))


def compare_modules(case: Case, tally: Tally) -> None:
    """Each mixer and norm alone, as the recording's notes say."""
    lm = build_language_model(case)
    inputs = {name: jnp.asarray(z) for name, z in case.under("in.").items()}

    def run(lm, z):
        blocks = {k: lm.block(k, 0) for k in ("mamba", "attention", "mlp")}
        layout = Layout(segment_ids=jnp.ones(z["u"].shape[:2], jnp.int32))
        ones = lambda x: jnp.ones(x.shape[:2], jnp.int32)
        dropped = transv.Dropped(x=z["dropped"], segment_ids=ones(z["dropped"]))
        transfer = lm.transfer_module(0)
        read = transfer(z["text"], ones(z["text"]), dropped) - z["text"]
        gate = jnp.tanh(transfer.alpha[...])
        return {
            "out.mamba_mixer": blocks["mamba"].mixer(z["u"], layout)[0],
            "out.attention": blocks["attention"].mixer(z["u"], layout)[0],
            "out.mlp": blocks["mlp"].mixer(z["u"]),
            "out.rmsnorm": blocks["mamba"].norm(z["u"]),
            "out.gated_norm": blocks["mamba"].mixer.norm(z["y"], z["gate"]),
            "out.cross_attention": read / gate,
        }

    tally.values(compile_once(run)(lm, inputs))
