"""The one stage of a finished run, to go through again step by step."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from timeviper_jax.data import pipeline
from timeviper_jax.data.iterator import NamedBatches
from timeviper_jax.data.tokenizer import ByteTokenizer
from timeviper_jax.training import experiment, guard
from timeviper_jax.training.checkpoint import open_run
from timeviper_jax.training.optimizer import OptimizerConfig, make_optimizer
from timeviper_jax.training.parameters import Params, merge
from timeviper_jax.training.step import TrainState, create_state, make_train_step

GUARD = guard.GuardConfig(max_skips=10, spike_window=0, spike_deviations=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage, with other rows and perhaps another model than the run's."""

    config: dict[str, Any]
    cfg: experiment.TimeViperConfig
    stage: experiment.StageConfig
    rows: int

    @classmethod
    def of(cls, folder: pathlib.Path, rows: int, preset: str) -> "Stage":
        """The stage of the run in `folder`, with so many rows and that preset."""
        checkpoints = open_run(folder)
        record = checkpoints.latest()
        checkpoints.close()
        config = {
            **record.config,
            "model": {**record.config["model"], "preset": preset},
        }
        stage = experiment.StageConfig.from_dict(config["stages"][record.stage])
        # Which layers TransV stands before is said of the run's own model.
        own = preset == record.config["model"]["preset"]
        cfg = experiment.model_config(**config["model"])
        cfg = cfg.with_transv(stage.transv if own else ())
        return cls(config=config, cfg=cfg, stage=stage, rows=rows)

    def batches(self) -> NamedBatches:
        cfg = experiment.text_data(self.config["data"], self.stage, self.cfg)
        cfg = dataclasses.replace(cfg, batch_size=self.rows)
        return pipeline.make_batches(cfg, ByteTokenizer(), seed=self.config["seed"])

    def begin(
        self, mesh: Mesh, params: Params
    ) -> tuple[TrainState, TrainState, Params]:
        """The state before the first step, where it lives, and what stands still."""
        params = experiment.fill(self.cfg, params, self.config["seed"], mesh)
        moving = self.stage.moving(params)
        frozen = {path: a for path, a in params.items() if path not in moving}
        params = {path: a for path, a in params.items() if path in moving}
        state, places = create_state(params, self.optimizer(params), mesh, GUARD)
        return state, places, frozen

    def optimizer(self, params: Params) -> optax.GradientTransformation:
        config = OptimizerConfig(**self.config["optimizer"])
        return make_optimizer(params, lambda _: 1e-3, config)

    def step(self, params: Params) -> Callable:
        """A step as training makes it, not compiled."""
        graph, _ = experiment.describe(self.cfg)
        objective = self.stage.task.objective(ByteTokenizer())
        return make_train_step(
            *(graph, objective, self.optimizer(params)), guard_config=GUARD
        )

    def bare_step(self, params: Params) -> Callable:
        """The same gradient and update, and nothing that looks after them."""
        graph, _ = experiment.describe(self.cfg)
        objective, optimizer = self.stage.task.objective(None), self.optimizer(params)

        def step(state, frozen, batch):
            def loss(params):
                means = objective(merge(graph, {**frozen, **params}), batch)
                return means["loss"].total / means["loss"].count, means

            grads, means = jax.grad(loss, has_aux=True)(state.params)
            updates, memory = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return state._replace(params=params, opt_state=memory), means

        return step
