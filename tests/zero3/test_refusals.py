"""Everything the ZeRO-3 engine refuses, by name and before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.multirank


def _refusals() -> dict[str, str]:
    """Message of each refusal, tried one after another on one rank."""
    import copy

    import deepspeed
    import torch
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.utils import set_z3_leaf_modules
    from transformers.models.llama.modeling_llama import LlamaMLP

    import lisa_ds
    from lisa_ds.errors import LisaError
    from tests.zero3 import trajectory
    from tests.zero3.trajectory import Case

    deepspeed.init_distributed(dist_backend="gloo")
    base = trajectory.deepspeed_config(Case("refusals"), 1)
    messages = {}

    def attempt(
        name: str,
        change: Callable[[dict[str, Any]], Any] = lambda config: None,
        model: Any = None,
        lisa: dict[str, Any] | None = None,
        optimizer: Any = True,
        then: Callable[[Any], Any] = lambda engine: None,
    ) -> None:
        config = copy.deepcopy(base)
        change(config)
        model = model or trajectory.build_model(layers=3)
        if optimizer is True:
            optimizer = torch.optim.AdamW(model.parameters())
        kwargs = {"optimizer": optimizer} if optimizer else {}
        try:
            engine, *_ = lisa_ds.initialize(model=model, config=config, lisa_config=lisa, **kwargs)
            then(engine)
            messages[name] = "nothing was refused"
        except LisaError as error:
            messages[name] = f"{type(error).__name__}: {error}"
        assert deepspeed.DeepSpeedEngine.__module__ == "deepspeed.runtime.engine"

    zero = "zero_optimization"
    attempt("stage 2", lambda c: c[zero].update(stage=2))
    attempt("zenflow", lambda c: c[zero].update(zenflow={"topk_ratio": 0.1}))
    attempt("deepcompile", lambda c: c.update(compile={"deepcompile": True}))
    attempt("quantised", lambda c: c[zero].update(zero_quantized_nontrainable_weights=True))
    attempt("nvme", lambda c: c[zero].update(offload_optimizer={"device": "nvme", "nvme_path": "x"}))
    attempt("partial", lambda c: c[zero].update(offload_optimizer={"device": "cpu", "ratio": 0.5}))
    attempt("universal", lambda c: c.update(checkpoint={"load_universal": True}))
    leaf = trajectory.build_model(layers=3)
    set_z3_leaf_modules(leaf, [LlamaMLP])
    attempt("leaf", model=leaf)
    attempt("no blocks", model=torch.nn.Linear(3, 3))
    attempt("too many", lisa={"num_sampled_layers": 4})
    attempt("tied", model=trajectory.build_model(tied=True), lisa={"embeddings": "never", "lm_head": "always"})
    attempt(
        "bernoulli",
        lisa={"sampler": "bernoulli", "embeddings": "never", "lm_head": "never", "rest": "never"},
    )
    attempt(
        "bernoulli with roles now and then",
        lisa={"sampler": "bernoulli", "embeddings": "sampled", "lm_head": {"every": 2}, "rest": "never"},
    )
    attempt(
        "tied at times",
        model=trajectory.build_model(tied=True),
        lisa={"embeddings": {"every": 2}, "lm_head": "sampled"},
    )
    attempt(
        "tied alike",
        model=trajectory.build_model(tied=True),
        lisa={"embeddings": {"every": 2}, "lm_head": {"every": 2}},
    )
    attempt("epochs", lisa={"interval_steps": "1epoch"})
    attempt("no optimizer", optimizer=False)
    attempt("no such layer", then=lambda engine: engine.switch_to([1, 3]))

    rows = torch.zeros(2, 8, dtype=torch.long)

    def switch_before_step(engine: Any) -> None:
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        before = (engine.sampled_layers, engine.layer_history)
        try:
            engine.switch_to([1])
        finally:
            assert (engine.sampled_layers, engine.layer_history) == before  # nothing has changed

    attempt("unused gradients", then=switch_before_step)
    attempt("accumulating", lambda c: c.update(gradient_accumulation_steps=2), then=switch_before_step)
    nothing_else = {"embeddings": "never", "lm_head": "never", "rest": "never"}
    attempt("empty", lisa=nothing_else, then=lambda engine: engine.switch_to([]))

    def switch_without_roles(engine: Any) -> None:
        engine.backward(engine(input_ids=rows, labels=rows).loss)
        engine.step()  # interval 1, without embeddings and head
        assert engine.sampled_roles == ()
        assert engine.what_trains == f"layers {list(engine.sampled_layers)} and nothing else"
        engine.switch_to([0])
        assert (engine.sampled_layers, engine.sampled_roles) == ((0,), ())  # they stay as they are
        engine.switch_to([])

    at_times = {"embeddings": {"every": 2}, "lm_head": {"every": 2}, "rest": "never", "interval_steps": 1}
    attempt("empty without roles", lisa=at_times, then=switch_without_roles)
    attempt("offload_states", then=lambda engine: engine.offload_states())

    def one_step(engine: Any) -> None:
        engine.backward(engine(rows))
        engine.step()

    attempt("cut graph", model=_by_hand(), lisa={"embeddings": "never"}, then=one_step)
    attempt("cut graph control", model=_by_hand(), then=one_step)

    def check_both_drawn(engine: Any) -> None:
        assert engine.sampled_layers == (0, 2), engine.sampled_layers

    part = trajectory.build_model(layers=3)
    part.model.layers[1].requires_grad_(False)
    attempt("frozen layer", model=part, lisa={"num_sampled_layers": 3})
    attempt("frozen layer by name", model=part, lisa={"sampler": {"name": "fixed", "layers": [0, 1]}})
    attempt(
        "frozen layer by hand", model=part, lisa={"num_sampled_layers": 1}, then=lambda engine: engine.switch_to([1])
    )
    # What an engine has frozen of its own accord is not frozen for the next one.
    attempt("a second engine", model=part, lisa={"num_sampled_layers": 2}, then=check_both_drawn)
    still = trajectory.build_model(layers=3)
    still.model.layers.requires_grad_(False)
    attempt("frozen layers", model=still)
    attempt(
        "frozen layer control",
        model=part,
        lisa={"sampler": {"name": "fixed", "layers": [0, 2]}},
        then=lambda engine: None,
    )
    whole = trajectory.build_model(layers=3)
    attempt("partial optimizer", model=whole, optimizer=torch.optim.AdamW(whole.model.layers[0].parameters()))
    attempt("adagrad", model=whole, optimizer=torch.optim.Adagrad(whole.parameters()))
    foreign = torch.optim.AdamW([*whole.parameters(), torch.nn.Parameter(torch.zeros(3))])
    attempt("foreign parameter", model=whole, optimizer=foreign)
    version = deepspeed.__version__
    for found in ("0.15.4", "0.20.0"):
        deepspeed.__version__ = found
        attempt(f"version {found}")
    deepspeed.__version__ = version
    method = DeepSpeedZeroOptimizer_Stage3.set_grad_positions
    del DeepSpeedZeroOptimizer_Stage3.set_grad_positions
    attempt("method")
    DeepSpeedZeroOptimizer_Stage3.set_grad_positions = method
    return messages


def _by_hand() -> Any:
    import torch

    class Hand(torch.nn.Module):
        """Checkpoints its blocks by hand, reentrantly: with frozen embeddings that cuts them out of backward."""

        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(11, 8)
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            self.head = torch.nn.Linear(8, 11)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(rows)
            for block in self.blocks:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=True)
            return self.head(hidden).float().logsumexp(-1).mean()

    return Hand()


def _cut_on_every_rank() -> str:
    import deepspeed
    import torch

    import lisa_ds
    from lisa_ds.errors import EngineError
    from tests.zero3 import trajectory
    from tests.zero3.trajectory import Case

    deepspeed.init_distributed(dist_backend="gloo")
    model = _by_hand()
    config = trajectory.deepspeed_config(Case("cut"), 2)
    optimizer = torch.optim.AdamW(model.parameters())
    engine, *_ = lisa_ds.initialize(
        model=model, config=config, optimizer=optimizer, lisa_config={"embeddings": "never"}
    )
    engine.backward(engine(torch.arange(10)[None]))
    try:
        engine.step()
    except EngineError as error:
        return str(error)
    return "nothing was refused"


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return run_ranks(1, _refusals, tmp_path_factory.mktemp("refusals"))[0]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("stage 2", ["EngineError", "zero_optimization.stage", "got 2", "set it to 3"]),
        ("zenflow", ["EngineError", "zero_optimization.zenflow", "remove it"]),
        ("deepcompile", ["EngineError", "compile.deepcompile", "set it to false"]),
        ("quantised", ["EngineError", "zero_quantized_nontrainable_weights", "set it to false"]),
        ("nvme", ["EngineError", "offload_optimizer.device", "'nvme'", "use 'cpu'"]),
        ("partial", ["EngineError", "offload_optimizer.ratio", "got 0.5"]),
        ("universal", ["EngineError", "checkpoint.load_universal"]),
        ("leaf", ["EngineError", "model.layers.0.mlp (LlamaMLP)", "leaf module"]),
        ("no blocks", ["ModelError", "no stack of blocks", "wrap the blocks"]),
        ("too many", ["ConfigError", "num_sampled_layers", "the model has 3 layers, got 4"]),
        ("tied", ["ConfigError", "lisa.lm_head", "'always'", "tied", "'never'"]),
        ("bernoulli", ["ConfigError", "lisa.sampler", "'uniform'"]),
        ("bernoulli with roles now and then", ["ConfigError", "lisa.sampler", "'uniform'", "always"]),
        ("tied at times", ["ConfigError", "lisa.lm_head", "'sampled'", "tied", "{every: 2}"]),
        ("tied alike", ["nothing was refused"]),
        ("empty without roles", ["EngineError", "nothing to train", "[]"]),
        ("epochs", ["ConfigError", "interval_steps"]),
        ("no optimizer", ["EngineError", "there is no optimizer"]),
        ("no such layer", ["EngineError", "switch_to", "[1, 3]", "layers 0 to 2"]),
        ("unused gradients", ["EngineError", "switch after step()"]),
        ("accumulating", ["EngineError", "switch after step()"]),
        ("empty", ["EngineError", "nothing to train", "[]"]),
        ("offload_states", ["EngineError", "offload_states"]),
        ("cut graph", ["EngineError", "no gradient", "use_reentrant=False"]),
        ("cut graph control", ["nothing was refused"]),
        (
            "frozen layer",
            ["ConfigError", "the model has 2 layers, got 3; choose 1 to 2", "of 3, layers [1] are frozen and"],
        ),
        (
            "frozen layer by name",
            ["ConfigError: lisa_config: sampler.layers: layers [1] have no parameter that requires grad"],
        ),
        (
            "frozen layer by hand",
            ["EngineError: switch_to: layers [1] were frozen before the engine was built, got [1]"],
        ),
        ("a second engine", ["nothing was refused"]),
        ("frozen layers", ["ModelError: every layer is frozen: no parameter in any requires grad; unfreeze those"]),
        ("frozen layer control", ["nothing was refused"]),
        ("partial optimizer", ["ModelError", "layers [1, 2]", "give the optimizer every parameter"]),
        ("adagrad", ["EngineError", "Adagrad", "AdamW"]),
        ("foreign parameter", ["EngineError", "shape (3,)"]),
        ("version 0.15.4", ["EngineError", "deepspeed 0.15.4", "pip install"]),
        ("version 0.20.0", ["EngineError", "deepspeed 0.20.0", "pip install"]),
        ("method", ["EngineError", "set_grad_positions", "pip install"]),
    ],
)
def test_refusal_names_the_key_the_value_and_the_remedy(messages: dict[str, str], name: str, parts: list[str]) -> None:
    assert all(part in messages[name] for part in parts), messages[name]


def test_a_graph_that_is_cut_is_refused_on_all_ranks_together(tmp_path: Path) -> None:
    first, second = run_ranks(2, _cut_on_every_rank, tmp_path)
    assert first == second
    assert "backward gave them no gradient" in first


def test_every_option_is_reported_at_once(tmp_path: Path) -> None:
    (message,) = run_ranks(1, _two_mistakes, tmp_path)
    assert len(message.splitlines()) == 2


def _two_mistakes() -> str:
    from lisa_ds.engines.zero3 import supported
    from lisa_ds.errors import EngineError

    class Zero:
        stage, zero_quantized_nontrainable_weights = 1, True
        zenflow = offload_optimizer = offload_param = None
        zero_hpz_partition_size = 1

    class Config:
        zero_config = Zero()
        _param_dict: dict[str, Any] = {}  # noqa: RUF012

    try:
        supported.check_options(Config())
    except EngineError as error:
        return str(error)
    return ""
