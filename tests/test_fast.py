"""Many seeds as one batch, compiled updates and CUDA graphs: nothing that is computed changes.

Sums within a batch of seeds run in another order than those of one seed: values agree to rounding.
A run of --num-seeds therefore equals single runs closely, and another of its own kind exactly.
"""

import contextlib
import copy
import dataclasses
import math
import shlex
import shutil
import types
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import checkpoint
import collect
import datasets
import envs
import run as run_module
import train
from buffer import Batch, OfflineDataset, SyntheticBuffer
from fast import CudaGraph, Stack, each
from logo_wm import LogoWM
from macql import Actor, Critic, critic_loss, policy_loss, random_actions, soft_update
from prepare import build
from run import Runs, descend, evaluate, phase, set_lr

K, B, N, O, S, A, H, HIDDEN = 3, 6, 3, 4, 5, 4, 3, 16  # noqa: E741
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = pytest.mark.parametrize("discrete", [True, False], ids=["discrete", "continuous"])


def make_batch(seed: int, discrete: bool = True, size: int = B) -> Batch:
    g = torch.Generator().manual_seed(seed)
    avail = (torch.rand(2, size, N, A, generator=g) < 0.7).float()
    avail[..., 0] = 1.0
    wish = torch.rand(size, N, A, generator=g) * 2 - 1
    taken = F.one_hot((wish + 9 * avail[0]).argmax(-1), A).float()
    return Batch(
        obs=torch.randn(size, N, O, generator=g), state=torch.randn(size, S, generator=g),
        actions=taken if discrete else wish, avail=avail[0] if discrete else None,
        reward=torch.randn(size, generator=g), next_obs=torch.randn(size, N, O, generator=g),
        next_state=torch.randn(size, S, generator=g), next_avail=avail[1] if discrete else None,
        terminated=(torch.rand(size, generator=g) < 0.3).float(),
    )  # fmt: skip


def make_model(seed: int, discrete: bool = True, **options) -> LogoWM:
    torch.manual_seed(seed)
    return LogoWM(N, O, S, A, HIDDEN, discrete, **options)


def make_actor(seed: int, discrete: bool = True, shared: bool = True) -> Actor:
    torch.manual_seed(seed)
    return Actor(torch.zeros(N, O), torch.ones(N, O), A, HIDDEN, discrete, shared)


def make_critic(seed: int, discrete: bool = True) -> Critic:
    torch.manual_seed(seed)
    mean, std = torch.zeros(N, O), torch.ones(N, O)
    return Critic(mean, std, torch.zeros(S), torch.ones(S), A, HIDDEN, discrete)


def make_rollout(seed: int, discrete: bool = True) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"obs": (H + 1, B, N, O), "state": (H + 1, B, S), "actions": (H, B, N, A)}
    shapes |= {name: (H, B) for name in ("reward", "terminated", "u", "filled")}
    shapes |= {"avail": (H + 1, B, N, A)} if discrete else {}
    rollout = {name: torch.rand(shape, generator=g) for name, shape in shapes.items()}
    return rollout | {"filled": (rollout["filled"] < 0.7).float()}


def make_buffer(seed: int, discrete: bool = True) -> SyntheticBuffer:
    buffer = SyntheticBuffer(2, H, B, N, O, S, A, "cpu", discrete)
    for c in range(3):  # the ring has wrapped around
        buffer.add(make_rollout(10 * seed + c, discrete), cap=2.0)
    return buffer


def stacked(values: list):
    """One structure of tensors with a leading dimension of K such structures."""
    return tree_map(lambda *x: torch.stack(x) if isinstance(x[0], torch.Tensor) else x[0], *values)


def slices(tree, k: int):
    return tree_map(lambda x: x[k] if isinstance(x, torch.Tensor) else x, tree)


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True))


def assert_each_equals_the_loop(function, kinds: list[list], inputs: list[tuple], **settings):
    """Of all seeds at once and one after the other: results, and gradients of the first kind.

    kinds: K modules each; inputs: of each seed, what follows the modules.
    """
    stacks = [Stack([copy.deepcopy(module) for module in modules]) for modules in kinds]
    together = each(function, *stacks, *map(stacked, zip(*inputs, strict=True)), **settings)
    learns = isinstance(together, tuple) and together[0].requires_grad
    moved = gradients(together[0].sum(), stacks[0]) if learns else []
    for k in range(K):
        alone = function(*(modules[k] for modules in kinds), *inputs[k], **settings)
        torch.testing.assert_close(slices(together, k), alone, **CLOSE)
        own = gradients(alone[0], kinds[0][k]) if learns else []
        torch.testing.assert_close(slices(moved, k), own, **CLOSE)
        assert not learns or any(g.any() for g in own)
    first, second = (tree_leaves(slices(together, k)) for k in (0, 1))
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)


# ------------------------------------------------------------------------------------ each, Stack


@pytest.mark.parametrize("learn_variance", [False, True])
@pytest.mark.parametrize("eq4_input", ["obs", "next_obs"])
@KINDS
def test_the_world_models_loss_of_all_seeds_equals_the_loop(discrete, eq4_input, learn_variance):
    models = [make_model(k, discrete, learn_variance=learn_variance) for k in range(K)]
    inputs = [(make_batch(k, discrete),) for k in range(K)]
    assert_each_equals_the_loop(LogoWM.loss, [models], inputs, eq4_input=eq4_input)


@KINDS
def test_a_step_of_all_seeds_models_equals_the_loop(discrete):
    batches = [make_batch(k, discrete) for k in range(K)]
    inputs = [(b.obs, b.state, b.actions) for b in batches]
    models = [make_model(k, discrete) for k in range(K)]
    assert_each_equals_the_loop(LogoWM.step, [models], inputs)


def play(model, actor, start, noise, dice, heads=True):
    def act(obs, avail, h):
        return actor.explore(obs, avail, noise[h], 0.2)

    return model.imagine(act, start.obs, start.state, start.avail, dice, heads)


@pytest.mark.parametrize("heads", [True, False])
@KINDS
def test_the_rollouts_of_all_seeds_equal_the_loop(discrete, heads):
    models, actors = ([make(k, discrete) for k in range(K)] for make in (make_model, make_actor))
    generators = [torch.Generator().manual_seed(k) for k in range(K)]
    inputs = [
        (make_batch(k, discrete), actor.noise((H, B, N, A), g), torch.rand(H, B, generator=g))
        for k, (actor, g) in enumerate(zip(actors, generators, strict=True))
    ]
    assert_each_equals_the_loop(play, [models, actors], inputs, heads=heads)


@pytest.mark.parametrize(
    "options",
    [{}, {"conservative": "expectation"}, {"backup": "max"}, {"real_share": 0.5},
     {"conservative_on": "real", "bellman_on": "real"}],
    ids=lambda o: "+".join(o) or "default",
)  # fmt: skip
@KINDS
def test_the_critics_loss_of_all_seeds_equals_the_loop(discrete, options):
    kinds = [
        [make_critic(k, discrete) for k in range(K)],
        [make_critic(10 + k, discrete) for k in range(K)],
        [make_actor(k, discrete) for k in range(K)],
    ]
    draws = [
        None if discrete else random_actions((B, N, A), torch.Generator().manual_seed(k))
        for k in range(K)
    ]
    inputs = [
        (make_batch(k, discrete), (torch.arange(B) % 2).float(), 0.9, 0.7, draws[k])
        for k in range(K)
    ]
    assert_each_equals_the_loop(critic_loss, kinds, inputs, **options)


@pytest.mark.parametrize("shared", [True, False])
@KINDS
def test_the_policys_loss_of_all_seeds_equals_the_loop(discrete, shared):
    actors = [make_actor(k, discrete, shared) for k in range(K)]
    critics = [make_critic(k, discrete) for k in range(K)]
    real = (torch.arange(B) % 2).float()
    inputs = [(make_batch(k, discrete), real, 0.3) for k in range(K)]
    assert_each_equals_the_loop(policy_loss, [actors, critics], inputs, normalise_q=True)
    cloning = [(None, *of_seed) for of_seed in inputs]
    assert_each_equals_the_loop(policy_loss, [actors], cloning)


@KINDS
def test_the_rows_gathered_from_all_seeds_buffers_equal_the_loop(discrete):
    buffers = [make_buffer(k, discrete) for k in range(K)]
    inputs = [(b.draw(50, torch.Generator().manual_seed(k)),) for k, b in enumerate(buffers)]
    assert_each_equals_the_loop(SyntheticBuffer.gather, [buffers], inputs)


def test_each_without_a_stack_is_the_plain_call():
    seen = []
    result = each(lambda *args, **settings: seen.append((args, settings)) or "it", K, None, b=B)
    assert result == "it" and seen == [((K, None), {"b": B})]


def test_what_the_stack_learns_its_modules_have_learnt():
    models = [make_model(k) for k in range(K)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    stack = Stack(models)
    assert all(torch.equal(x, m.state_dict()[n]) for m, b in zip(models, before, strict=True)
               for n, x in b.items())  # fmt: skip
    optimizer = torch.optim.AdamW(stack.parameters(), lr=1e-2, fused=True)
    loss, _ = each(LogoWM.loss, stack, stacked([make_batch(k) for k in range(K)]))
    descend(optimizer, loss)
    for k, model in enumerate(models):
        alone = make_model(k)
        own = torch.optim.AdamW(alone.parameters(), lr=1e-2, fused=True)
        descend(own, alone.loss(make_batch(k))[0])
        for name, p in model.named_parameters():
            assert not torch.equal(p, before[k][name]), name
        torch.testing.assert_close(model.state_dict(), alone.state_dict(), **CLOSE)


def test_what_is_loaded_into_one_module_is_in_the_stack_and_in_no_other():
    models, other = [make_model(k) for k in range(K)], make_model(99)
    kept = [copy.deepcopy(model.state_dict()) for model in models]
    stack = Stack(models)
    models[1].load_state_dict(other.state_dict())
    kept[1] = other.state_dict()
    for k, state in enumerate(kept):
        assert all(torch.equal(x, models[k].state_dict()[name]) for name, x in state.items())
        inside = stack.tensors()
        assert all(torch.equal(x, inside[f"module.{name}"][k]) for name, x in state.items())


def test_a_collection_added_to_one_buffer_is_drawn_through_the_stack():
    buffers = [make_buffer(k) for k in range(2)]
    stack = Stack(buffers)
    points = stacked([b.draw(50, torch.Generator().manual_seed(0)) for b in buffers])
    before = each(SyntheticBuffer.gather, stack, points)
    new = make_rollout(77)
    buffers[1].add(new | {"u": new["u"] - 5}, cap=9.0)  # it outweighs all that is there
    after = each(SyntheticBuffer.gather, stack, points)
    for a, b in zip(after, before, strict=True):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])
    own = new["reward"].flatten().tolist()
    assert np.mean([r in own for r in after.reward[1].tolist()]) > 0.8


@KINDS
def test_no_seed_learns_from_anothers_batch(discrete):
    critics, actors = (Stack([make(k, discrete) for k in range(2)])
                       for make in (make_critic, make_actor))  # fmt: skip
    models = Stack([make_model(k, discrete) for k in range(2)])
    real = torch.ones(2, B)
    draws = None
    if not discrete:
        draws = random_actions((B, N, A), torch.Generator()).expand(2, -1, -1, -1, -1, -1)

    def moved(seeds: tuple[int, int]) -> list[torch.Tensor]:
        batch = stacked([make_batch(seed, discrete) for seed in seeds])
        losses = {
            models: each(LogoWM.loss, models, batch)[0],
            critics: each(
                critic_loss, critics, critics, actors, batch, real, 0.9, 1.0, draws
            )[0],
            actors: each(policy_loss, actors, critics, batch, real, 0.3)[0],
        }  # fmt: skip
        return [g for stack, loss in losses.items() for g in gradients(loss.sum(), stack)]

    for a, b in zip(moved((5, 6)), moved((5, 7)), strict=True):
        assert torch.equal(a[0], b[0])
        assert not a[1].any() or not torch.equal(a[1], b[1])


def test_a_soft_update_of_stacks_moves_every_seeds_own_weights():
    targets, sources = ([make_critic(s + k) for k in range(2)] for s in (0, 10))
    expected = [
        [0.75 * p + 0.25 * q for p, q in zip(t.parameters(), s.parameters(), strict=True)]
        for t, s in zip(targets, sources, strict=True)
    ]
    soft_update(Stack(targets), Stack(sources), 0.25)
    for target, wanted in zip(targets, expected, strict=True):
        torch.testing.assert_close(list(target.parameters()), wanted)


# ------------------------------------------------------------------------------------ run.py's part


def test_a_descent_takes_every_seeds_own_step_and_touches_nothing_else():
    x, bystander = (torch.nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(2))
    optimizer = torch.optim.SGD([x], lr=0.5)
    descend(optimizer, x.square() * bystander.sum())  # (K,) losses
    assert x.tolist() == [1.0 - 3.0, 2.0 - 6.0] and bystander.grad is None


@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("tensor", [True, False])
def test_the_step_size_falls_linearly_and_a_tensor_keeps_its_place(tensor, decay):
    lr = torch.tensor(0.1) if tensor else 0.1
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=lr, fused=True)
    for done in range(4):
        set_lr(optimizer, 0.1, done, 4, decay)
        (group,) = optimizer.param_groups
        assert float(group["lr"]) == pytest.approx(0.1 * (1 - done / 4) if decay else 0.1)
        assert isinstance(group["lr"], torch.Tensor) == tensor
        assert not tensor or group["lr"] is lr


def make_runs(folder: Path, seeds=(1,), discrete=True, device="cpu", **flags) -> Runs:
    """Small networks, ten episodes of five steps, no simulator; 20 updates a phase, each noted."""
    args = train.Args(
        num_seeds=len(seeds), hidden=HIDDEN, wm_hidden=HIDDEN, batch_size=16, wm_batch_size=16,
        rollouts=8, horizon=2, collect_every=5, retain=2, updates=20, wm_updates=20, log_every=1,
        u_scale=5.0, device=device, **flags,
    )  # fmt: skip
    rows = make_batch(0, discrete, size=60)
    columns = (rows.obs, rows.state, rows.actions, rows.avail, rows.reward, rows.terminated)
    data = OfflineDataset(*(x if x is None else x.to(device) for x in columns), [5] * 10)
    spec, facts = envs.Spec("none", "offline", N, O, S, A, discrete, 5), {"sha256": "none"}

    def one(seed: int) -> run_module.Run:
        of_seed = dataclasses.replace(args, seed=seed)
        return build(of_seed, folder / f"seed{seed}", data, facts, None, spec)

    return Runs([one(seed) for seed in seeds])


class Notes(list):
    """In place of run.Log."""

    def write(self, phase: str, update: int, metrics: dict[str, float]) -> None:
        self.extend((phase, update, name, value) for name, value in metrics.items())


def trained(runs: Runs) -> list[tuple[dict, list]]:
    """Algorithm 1; each seed's weights, and all its metrics."""
    updates, logs = train.make_updates(runs), [Notes() for _ in runs]
    train.phase_0_clone(runs, logs, updates)
    train.phase_1_world_model(runs, logs, updates)
    train.phases_2_and_3_policy(runs, logs, updates)
    return [(weights(run), log) for run, log in zip(runs, logs, strict=True)]


def weights(run: run_module.Run) -> dict[str, dict[str, torch.Tensor]]:
    return {name: getattr(run, name).state_dict() for name in checkpoint.MODULES}


def assert_same_training(one, other, **close) -> None:
    """Of one seed: the same metrics after every update, and the same weights in the end."""
    assert len(one[1]) == len(other[1]) > 80  # every metric of every update
    for a, b in zip(one[1], other[1], strict=True):
        assert a[:3] == b[:3] and a[3] == pytest.approx(b[3], **close), (a, b)
    torch.testing.assert_close(one[0], other[0], rtol=close["rel"], atol=close["abs"])


ROUNDING, EXACT = {"rel": 1e-5, "abs": 1e-5}, {"rel": 0, "abs": 0}


@pytest.mark.parametrize("flags", [{}, {"mixing": "coin"}, {"uncertainty": "penalty"}], ids=str)
@KINDS
def test_every_seed_trains_as_it_would_alone(tmp_path, discrete, flags):
    both = trained(make_runs(tmp_path, (1, 2), discrete, **flags))
    for seed, together in zip((1, 2), both, strict=True):
        (alone,) = trained(make_runs(tmp_path, (seed,), discrete, **flags))
        assert_same_training(together, alone, **ROUNDING)
    assert both[0][1] != both[1][1]


def test_a_metric_that_is_not_finite_is_told_with_its_update_and_its_seeds_folder(tmp_path):
    runs, broken = make_runs(tmp_path, (1, 2)), torch.tensor([[0.0, 0.0], [math.nan, 0.0]])

    def update(k: int) -> dict[str, torch.Tensor]:  # of the second seed, in the third update
        return {"fine": torch.zeros(2), "bad": broken[:, int(k != 2)]}

    runs.args.log_every = 5
    with pytest.raises(FloatingPointError) as error:
        phase(runs, [Notes(), Notes()], "policy", "Phase 3", 10, update)
    assert "Phase 3, update 3: bad is not finite" in str(error.value)
    assert str(tmp_path / "seed2") in str(error.value) and "seed1" not in str(error.value)


class Counter:
    """An environment in which everybody sees how many steps were made; plays five of them."""

    num_envs = 2

    def __init__(self, backend: str):
        self.spec, self.seeds = envs.Spec("none", backend, N, O, S, A, True, 5), []

    def reset(self, seed):
        self.seeds.append(seed)
        self.now = 0
        return self.step(np.zeros((2, N, A)), 0)

    def step(self, actions, count=1):
        self.now += count
        obs = np.full((2, N, O), self.now, np.float32)
        avail, over = np.ones((2, N, A), np.float32), np.full(2, self.now == 5)
        return types.SimpleNamespace(
            obs=obs, avail=avail, over=over, won=over, reward=actions[:, :, 0].sum(-1)
        )


def test_a_game_that_has_no_batches_is_played_by_one_seed_after_the_other(tmp_path):
    runs = make_runs(tmp_path, (3, 4))
    runs.env = env = Counter("mamujoco")
    scores = evaluate(runs, "averaged", 7, episodes=4)
    assert env.seeds == [4_000_007, 4_000_008, 5_000_007, 5_000_008]
    for seed, score in zip((3, 4), scores, strict=True):
        alone = make_runs(tmp_path, (seed,))
        alone.env = Counter("mamujoco")
        assert evaluate(alone, "averaged", 7, episodes=4) == [score] and score["episodes"] == 4
    assert scores[0]["return_mean"] != scores[1]["return_mean"]


# ------------------------------------------------------------------------------------ compiled


def test_traced_and_eager_updates_do_the_same(tmp_path, monkeypatch):
    """What torch.compile makes of the updates, less the C++ that it would write (75 s)."""
    compiled = torch.compile
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="aot_eager"))
    (traced,) = trained(make_runs(tmp_path, compile=True))
    (eager,) = trained(make_runs(tmp_path))
    assert_same_training(traced, eager, **ROUNDING)


@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler"
)
def test_compiled_and_eager_updates_do_the_same_every_time(tmp_path):
    """The clone's, from the first line to the C++: it is the smallest."""

    def cloned(**flags):
        torch.compiler.reset()
        runs, log = make_runs(tmp_path, **flags), Notes()
        train.phase_0_clone(runs, [log], train.make_updates(runs))
        assert len(log) == 20
        return runs.clone.state_dict(), torch.tensor([value for *_, value in log])

    eager, compiled, again = cloned(), cloned(compile=True), cloned(compile=True)
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    for a, b in zip(compiled, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------------ CUDA graphs


@pytest.fixture
def no_gpu(monkeypatch):
    """A GPU's streams and graphs as fakes: what runs while recording leaves no trace, and a replay
    computes it again from the recorded tensors into the recorded results."""

    class Graph:
        def replay(self):
            for name, x in self.function(*self.inputs).items():
                self.result[name].copy_(x)
            replays.append(self)

    class Learner:
        """w <- w + lr * x (+ y), told with the sum of w; notes who called."""

        def __init__(self):
            self.w, self.lr, self.calls = torch.zeros(2), torch.tensor(1.0), 0

        def __call__(self, x, nothing, y=None):
            assert nothing is None
            self.calls += 1
            self.w += self.lr * x + (0 if y is None else y)
            result = {"sum": self.w.sum()}
            if recording:
                graph = recording[-1]
                graph.inputs, graph.result, graph.function = (x, nothing, y), result, self
            return result

    @contextlib.contextmanager
    def record(graph):
        recording.append(graph)
        before = learner.w.clone()
        yield
        learner.w.copy_(before)
        recording.clear()

    recording, replays, learner = [], [], Learner()
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": Graph,
        "stream": lambda s: contextlib.nullcontext(), "graph": record,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return learner, replays


def test_every_call_of_a_recorded_function_is_one_update_the_warm_up_too(no_gpu):
    learner, replays = no_gpu
    graph, expected = CudaGraph(learner, warm_up=3), torch.zeros(2)
    for call in range(1, 9):
        x, y = torch.full((2,), float(call)), torch.tensor([0.0, 0.5])
        told = graph(x, None, y)["sum"].item()
        expected += x + y
        assert learner.w.tolist() == expected.tolist() and told == expected.sum()
        assert len(replays) == max(0, call - 3)
    assert len(set(map(id, replays))) == 1  # it was recorded once


def test_a_recorded_function_keeps_its_own_inputs_and_follows_what_is_set_in_place(no_gpu):
    learner, replays = no_gpu
    graph, x = CudaGraph(learner, warm_up=0), torch.ones(2)
    first = graph(x, None)
    held, nothing, missing = replays[0].inputs
    assert held is not x and nothing is None and missing is None
    x.fill_(100.0)  # is the caller's
    learner.lr.fill_(0.5)
    second = graph(torch.full((2,), 3.0), None)
    assert learner.w.tolist() == [2.5, 2.5]
    assert second["sum"] is first["sum"] and first["sum"].item() == 5.0  # overwritten
    assert held.tolist() == [3.0, 3.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
@KINDS
def test_recorded_and_eager_updates_do_the_same(tmp_path, discrete, seeds, compiled):
    """With a step size that falls, which a graph must read anew."""
    torch.compiler.reset()
    recorded = {"device": "cuda", "cudagraphs": True, "compile": compiled}
    eager = trained(make_runs(tmp_path, seeds, discrete, device="cuda"))
    graphs = trained(make_runs(tmp_path, seeds, discrete, **recorded))
    constant = trained(make_runs(tmp_path, seeds, discrete, **recorded, lr_decay=False))
    for a, b, c in zip(graphs, eager, constant, strict=True):
        assert_same_training(a, b, rel=1e-4, abs=1e-4)
        assert a[1][-1][3] != pytest.approx(c[1][-1][3], rel=1e-4)


# ------------------------------------------------------------------------------------ whole runs

TINY = [*conftest.TINY, "--collect-every", "1"]


@pytest.fixture(scope="module")
def go(dataset):
    """go(folder, "--flag", ...) -> final.json of every seed of a miniature run."""

    def go(out: Path, *flags: str) -> list[dict]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.report, "draw", lambda run, final: None)  # takes a second each
            return train.cli([*TINY, "--dataset", str(dataset), "--out", str(out), *flags])

    return go


@pytest.fixture(scope="module")
def pair(go, tmp_path_factory):
    """(folder, final.json of both) of a run with seeds 4 and 5."""
    out = tmp_path_factory.mktemp("pair")
    return out, go(out, "--seed", "4", "--num-seeds", "2")


def stored(folder: Path) -> tuple[dict, list]:
    """A finished run's weights and metrics, as `trained` has them."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = [row.split(",") for row in (folder / "metrics.csv").read_text().splitlines()[1:]]
    metrics = [(phase, int(update), name, float(value)) for phase, update, name, value in rows]
    return {name: state[name] for name in checkpoint.MODULES}, metrics


def scores(final: dict) -> dict:
    return {k: final[k] for k in ("seed", "eval", "clone", "evaluations")}


@pytest.mark.parametrize("seed", [4, 5])
def test_every_seed_leaves_what_it_would_have_left_alone(go, pair, tmp_path, seed):
    out, finals = pair
    (alone,) = go(tmp_path, "--seed", str(seed))
    together = finals[seed - 4]
    kinds = [{p.name.split(".")[0] for p in f.iterdir()} for f in (tmp_path, out / f"seed{seed}")]
    assert kinds[0] == kinds[1]
    assert scores(together) == scores(alone)  # the same battles, move for move
    assert together["args"] == alone["args"] | {"num_seeds": 2, "out": str(out)}
    for part in ("world_model", "offline"):
        plain = {k: v for k, v in alone[part].items() if k != "rollout"}
        assert {k: together[part][k] for k in plain} == pytest.approx(plain, rel=1e-4, abs=1e-4)
    assert_same_training(stored(out / f"seed{seed}"), stored(tmp_path), rel=1e-4, abs=1e-4)


def test_the_seeds_are_told_apart_and_summed_up(pair):
    out, (first, second) = pair
    assert [p.name for p in sorted(out.iterdir())] == ["seed4", "seed5"]
    assert (first["seed"], second["seed"]) == (4, 5) and scores(first) != scores(second)
    mean = (first["eval"]["return_mean"] + second["eval"]["return_mean"]) / 2
    assert first["over_seeds"] == second["over_seeds"]
    assert first["over_seeds"]["return_mean"] == pytest.approx(mean)
    apart = abs(first["eval"]["return_mean"] - second["eval"]["return_mean"])
    assert first["over_seeds"]["return_ci95"] == pytest.approx(12.7062 * apart / 2, rel=1e-4)
    assert first["over_seeds"]["seeds"] == [4, 5]


@pytest.fixture
def killed(go, tmp_path, monkeypatch):
    """killed(module, "function", n): the folder of a run like `pair`'s that dies at the call after
    the n-th; only calls count whose first argument ends as `of` says."""

    def killed(module, name: str, left: int, of: str = "") -> Path:
        original, done = getattr(module, name), [0]

        def dying(*arguments):
            done[0] += str(arguments[0]).endswith(of)
            if done[0] > left:
                raise KeyboardInterrupt
            return original(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, dying)
            with pytest.raises(KeyboardInterrupt):
                go(tmp_path, "--seed", "4", "--num-seeds", "2")
        return tmp_path

    return killed


@pytest.mark.parametrize("steps", [3, 9, 19])
def test_seeds_killed_and_resumed_together_end_as_if_nothing_had_happened(go, pair, killed, steps):
    """After so many gradient steps: 6 of the clone, 4 of the model, 12 of critic and actor."""
    out, whole = pair
    folder = killed(train, "descend", steps)
    resumed = go(folder, "--seed", "4", "--num-seeds", "2", "--resume")
    for seed, final, expected in zip((4, 5), resumed, whole, strict=True):
        assert scores(final) == scores(expected)
        mine, theirs = stored(folder / f"seed{seed}"), stored(out / f"seed{seed}")
        assert_same_training(mine, theirs, **EXACT)


def test_seeds_stopped_at_different_updates_go_on_one_by_one(go, pair, killed):
    """Killed when seed 4 had written its eighth checkpoint and seed 5 had not."""
    folder = killed(datasets, "write_atomic", 7, of="seed5/checkpoint.pt")
    together = ("--seed", "4", "--num-seeds", "2", "--resume")
    with pytest.raises(SystemExit, match="different updates.*one by one") as error:
        go(folder, *together)
    assert "\n" not in str(error.value)
    for seed, expected in zip((4, 5), pair[1], strict=True):
        (final,) = go(folder / f"seed{seed}", "--seed", str(seed), "--resume")
        assert scores(final) == scores(expected)
        mine, theirs = stored(folder / f"seed{seed}"), stored(pair[0] / f"seed{seed}")
        assert_same_training(mine, theirs, rel=1e-4, abs=1e-4)


def test_policies_that_play_at_once_fight_the_battles_they_would_fight_alone():
    """One after the other in an env of 8 slots, and together in one of 16: the same numbers."""
    together, alone = envs.make("3s_vs_5z", 16), envs.make("3s_vs_5z", 8)

    def first(obs, avail):  # of what is allowed
        return F.one_hot(avail.argmax(-1), avail.shape[-1]).float()

    def last(obs, avail):
        best = (avail * torch.arange(avail.shape[-1])).argmax(-1)
        return F.one_hot(best, avail.shape[-1]).float()

    def both(obs, avail):
        return torch.cat([last(obs[:8], avail[:8]), first(obs[8:], avail[8:])])

    expected = [envs.evaluate(alone, act, 10, s) for act, s in ((last, 7), (first, 10**8))]
    assert envs.evaluate_together(together, both, 10, [7, 10**8]) == expected
    assert expected[0]["episodes"] == 16 and expected[0] != expected[1]


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "flags", ["--num-seeds 0", "--num-seeds 1000000", "--cudagraphs", "--cudagraphs --device cuda",
              "--compile", "--device cuda"],
)  # fmt: skip
@pytest.mark.parametrize("recorded", [True, False])
def test_what_cannot_work_is_one_sentence_before_any_work(
    flags, recorded, dataset, tmp_path, monkeypatch
):
    def works(*args, **kwargs):
        raise AssertionError("work was done")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(collect, "load_or_record", works)
    monkeypatch.setattr("prepare.build", works)
    given = ["--dataset", str(dataset)] if recorded else []
    tiny = [flag for flag in TINY if flag not in ("--device", "cpu")]
    with pytest.raises(SystemExit) as error:
        train.cli([*tiny, *given, "--out", str(tmp_path / "run"), *shlex.split(flags)])
    assert error.value.code != 0 and "\n" not in str(error.value)
    assert any(flag in str(error.value) for flag in flags.split() if flag.startswith("--"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
