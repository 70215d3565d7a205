"""Several processes give what one gives, and end together."""

import os
import pickle
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import secateur
from secateur import Settings, Store, calibrate, open_model
from secateur.apply import sequential as propagate
from secateur.apply.sequential import Propagation, narrow_blocks
from secateur.apply.surgery import narrow_block
from secateur.calibration import layer_stream as stream
from secateur.calibration.gradients import CURVED_LOSS, needs_gradients
from secateur.calibration.pair_scores import PairScores
from secateur.calibration.token_batches import TokenBatches
from secateur.data.tokens import Calibration
from secateur.distributed.collectives import ALONE, Ranks
from secateur.distributed.messages import DTYPES, pack, unpack
from secateur.linalg import least_squares as linalg
from secateur.methods import METHODS, gauss_newton, method_class
from secateur.models.streamed_loading import open_streamed
from secateur.planning.planner import make_plan
from secateur.scoring.evidence import score
from secateur.structure.budget import Budget
from tests.support import families
from tests.support.processes import forked, together

WINDOWS, LENGTH = 9, 16
BATCH = 2 * LENGTH  # so that there are more batches than processes, of which one is half empty
SHARED = ("auto", "modegpt", "flap", "shortgpt", "svd-llm")
CPU = Settings(device="cpu", dtype="float64")

pytestmark = forked


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(stream, "TOKENS_PER_BATCH", BATCH)


def numbered(world):
    """Ranks that know their number and can't speak."""
    for rank in range(world):
        yield Ranks(rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("windows", "rows"), [(1, 4), (3, 2), (8, 2), (9, 2), (5, 8), (64, 16)])
def test_every_window_is_shared_out_once(world, windows, rows):
    shares = [ranks.share(windows, rows) for ranks in numbered(world)]
    taken = [window for share in shares for window in range(share.start, share.stop)]
    assert taken == [*range(windows)]
    assert all(share.start % rows == 0 for share in shares if share.start < windows)
    assert shares[0].start < shares[0].stop  # what it sees of blocks decides


def read_all(name, ranks, needs):
    store = Store()
    given = open_model(families_folder[name], CPU)
    calibrate(given, families.read(name, WINDOWS, LENGTH), needs, store, ranks=ranks)
    if not ranks.leader:
        return None
    kept = [store.get(block.index, needs) for block in given.blocks]
    return [{n.id: (s.total, s.tokens) for n, s in own.items()} for own in kept]


families_folder = {}


@pytest.fixture
def known(dense):
    def folder(name):
        families_folder[name] = dense(name)
        return families_folder[name]

    return folder


@pytest.mark.parametrize(
    ("world", "name"),
    [
        (2, "llama"),
        (4, "llama"),
        (2, "t5"),
        pytest.param(4, "bert", marks=pytest.mark.slow),
        pytest.param(7, "llama", marks=pytest.mark.slow),  # two have no window
    ],
)
def test_statistics_are_the_same(known, tmp_path, monkeypatch, world, name):
    known(name)
    monkeypatch.setattr(PairScores, "most_tokens", 3 * LENGTH)  # ends inside the first share
    needs = frozenset()
    for method in map(method_class, METHODS):
        needs |= method().needs | method().allocator.needs
    assert any(map(needs_gradients, needs))
    needs |= {*CURVED_LOSS.values()}
    expected = read_all(name, ALONE, needs)
    found, *_ = together(world, lambda ranks: read_all(name, ranks, needs), tmp_path)
    for own, others in zip(expected, found, strict=True):
        assert own.keys() == others.keys()
        for key, (total, tokens) in own.items():
            assert others[key][1] == tokens, key
            scale = float(total.abs().max())
            rest = float((others[key][0] - total).abs().max())
            assert rest <= 1e-12 * scale, key


def compressed(folder, method, tokens, ranks, place, streamed=False, keep=0.6):
    """Sizes of a plan, what it rests on, and the weights that it gives."""
    given = (open_streamed if streamed else open_model)(str(folder), CPU)
    store, allocator = Store(place), method.allocator
    calibrate(given, tokens, method.needs | allocator.needs, store, ranks=ranks)
    ranks.all_gather(None)  # the first one has written all
    evidence = score(given, method, store, tokens, ranks=ranks)
    text, budget = Calibration("stream", WINDOWS, LENGTH, 0), Budget(keep=keep)
    plan = make_plan(given, method, evidence, text, tokens, budget=budget, store=store)
    sizes = plan.sizes
    units, weights = method.units(given, 8), []
    for block in narrow_blocks(given, method, units, sizes, tokens, store, ranks=ranks):
        weights.append({n: p.clone() for n, p in block.module.state_dict().items()})
    curves = {name: curve.errors for name, curve in evidence.curves.items()}
    losses = evidence.losses and {name: curve.errors for name, curve in evidence.losses.items()}
    return sizes, (curves, losses, [*evidence.readings]), weights


def close(found, expected, rest):
    for block, there in zip(expected, found, strict=True):
        assert block.keys() == there.keys()
        for name, weight in block.items():
            assert weight.shape == there[name].shape, name
            if weight.is_floating_point() and weight.numel():
                difference = (there[name].double() - weight.double()).norm()
                assert float(difference) <= rest * float(weight.double().norm()), name
            else:
                assert torch.equal(weight, there[name]), name


def determined(block):
    """Weights of a block; T5's decoder reads too few tokens here to say more of values and outputs
    than their product, as directions that no token has are all alike."""
    own = "layer.0.SelfAttention"
    if f"{own}.v_proj.weight" not in block:
        return block
    value, output = (block[f"{own}.{kind}_proj.weight"] for kind in "vo")
    rest = {n: w for n, w in block.items() if n not in {f"{own}.{k}_proj.weight" for k in "vo"}}
    return {**rest, own: output @ value}


@pytest.mark.parametrize(
    ("method", "world", "name", "streamed"),
    [
        *((method, 2, "llama", False) for method in SHARED),
        ("auto", 4, "llama", False),
        ("auto", 2, "llama", True),
        *(
            pytest.param(method, 4, name, False, marks=pytest.mark.slow)
            for method in (*SHARED, "llm-pruner", "sleb", "obspa", "forms")
            for name in ("llama", "gpt2")
        ),
        pytest.param("auto", 4, "t5", False, marks=pytest.mark.slow),
    ],
)
def test_plans_and_weights_are_the_same(known, tmp_path, method, world, name, streamed):
    folder, chosen = known(name), method_class(method)()
    tokens = families.read(name, WINDOWS, LENGTH)
    given, keep = (folder, chosen, tokens), 0.7 if method == "sleb" else 0.6
    expected = compressed(*given, ALONE, tmp_path / "alone", streamed, keep)
    found = together(
        world,
        lambda ranks: compressed(*given, ranks, tmp_path / "shared", streamed, keep),
        tmp_path,
    )
    for sizes, (curves, losses, readings), weights in found:
        assert sizes == expected[0]
        assert [*curves] == [*expected[1][0]]
        for key, errors in expected[1][0].items():
            assert curves[key] == pytest.approx(errors, rel=1e-6, abs=1e-12), key
        for key, errors in (expected[1][1] or {}).items():
            assert losses[key] == pytest.approx(errors, rel=1e-6, abs=1e-12), key
        assert readings == [pytest.approx(own, rel=1e-9) for own in expected[1][2]]
        close(*([*map(determined, own)] for own in (weights, expected[2])), 1e-6)


def test_units_are_dealt_out(known, tmp_path):
    """The mistake: every process solves every unit."""
    folder, chosen = known("llama"), method_class("modegpt")()
    given, tokens = open_model(folder, CPU), families.read("llama", WINDOWS, LENGTH)
    store = Store(tmp_path / "statistics")
    calibrate(given, tokens, chosen.needs | chosen.allocator.needs, store)
    units = chosen.units(given, 8)
    sizes = {unit.name: unit.sizes()[len(unit.sizes()) // 2] for unit in units}

    def solved(ranks):
        seen = []
        own = type(chosen).solve

        def noting(self, unit, block, statistics):
            seen.append(unit.name)
            return own(self, unit, block, statistics)

        type(chosen).solve = noting
        score(given, chosen, store, tokens, ranks=ranks)
        scored = [*seen]
        seen.clear()
        for block in given.blocks:
            own_units = [unit for unit in units if unit.block == block.index]
            read = store.get(block.index, chosen.needs)
            narrow_block(block, own_units, sizes, chosen, read, ranks)
        return scored, seen

    found = together(2, solved, tmp_path)
    for which in (0, 1):
        every = [name for own in found for name in own[which]]
        assert sorted(every) == sorted(unit.name for unit in units)
        kinds = [{name.rpartition(".")[2] for name in own[which]} for own in found]
        assert kinds[0] == kinds[1]  # none has all of the dear ones


def test_states_are_kept_by_any_number_and_read_by_another(known, tmp_path):
    folder, tokens = known("llama"), families.read("llama", WINDOWS, LENGTH)
    path = tmp_path / "some.states"

    def there(ranks):
        given = open_model(str(folder), CPU)
        with torch.no_grad():
            line = stream.Stream(given, tokens, ranks=ranks)
            line.advance(given.blocks[0])
        return line

    def saved(ranks):
        line = there(ranks)
        line.save(path)
        ranks.barrier()
        before = line.states.clone()
        line.held[:] = torch.zeros_like(before)
        line.load(path)
        share = ranks.share(WINDOWS, 2)
        return share.start >= share.stop or torch.equal(line.states, before)

    assert all(together(7, saved, tmp_path))  # more than there are batches
    line = there(ALONE)
    expected = line.states.clone()
    line.held[:] = torch.zeros_like(expected)
    line.load(path)
    assert torch.equal(line.states, expected)


@pytest.mark.parametrize("additive", [True, False])
def test_all_targets_are_of_the_kind_that_the_first_one_sees(
    known, tmp_path, monkeypatch, additive
):
    """The mistake: each process decides by its own windows."""
    folder, tokens = known("llama"), families.read("llama", WINDOWS, LENGTH)

    def targets(ranks, first):
        given = open_model(folder, CPU)
        monkeypatch.setattr(propagate, "_adds_up", lambda *_: first is ranks.leader)
        line = Propagation(given, tokens, method_class("auto")(), ranks)
        with torch.no_grad():
            assert line._run_dense(given.blocks[0]) is first
        return line.targets[:]

    expected = targets(ALONE, additive)
    found = together(2, lambda ranks: targets(ranks, additive), tmp_path)
    assert torch.equal(torch.cat(found), expected)


def test_waiting_for_a_rank_has_no_limit(tmp_path):
    """The mistake: collectives have a limit, and a rank may be solving for hours."""

    def limit(ranks):
        group = dist.distributed_c10d._get_default_group()
        own = group._get_backend(torch.device("cpu")).options._timeout
        return own.total_seconds()

    days = 24 * 3600
    assert min(together(2, limit, tmp_path)) > 30 * days


def test_values_arrive_as_they_were_and_nothing_is_pickled(tmp_path):
    def value(rank):
        numbers = torch.arange(6, dtype=torch.float64).view(2, 3) / (rank + 1)
        parts = {str(dtype): numbers.to(dtype) for dtype in DTYPES.values()}
        return {
            "tensors": parts,
            "rows": [numbers.t(), torch.tensor(rank), torch.empty(0, 4)],
            "plain": [None, True, rank, 0.1 + 0.2, float("inf"), "é"],
        }

    def passed(ranks):
        def refuse(*_, **__):
            raise AssertionError("pickled")

        before = pickle.dumps, pickle.Pickler, torch.save
        pickle.dumps = pickle.Pickler = torch.save = refuse
        found = [*ranks.all_gather(value(ranks.rank)), ranks.broadcast(lambda: value(9), 1)]
        pickle.dumps, pickle.Pickler, torch.save = before
        return found

    for found in together(2, passed, tmp_path):
        for own, expected in zip(found, map(value, (0, 1, 9)), strict=True):
            assert own["plain"] == expected["plain"]
            assert own["tensors"].keys() == expected["tensors"].keys()
            for there, tensor in zip(
                (*own["tensors"].values(), *own["rows"]),
                (*expected["tensors"].values(), *expected["rows"]),
                strict=True,
            ):
                assert there.dtype == tensor.dtype
                assert torch.equal(there, tensor)


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(TypeError, match="a Calibration can't be sent"):
        pack({"some": [Calibration()]})
    with pytest.raises(ValueError, match="number format 'object'"):
        unpack(b'{"__tensor__": "object", "shape": [1]}', torch.device("cpu"))


def test_no_module_loads_or_sends_pickles():
    forbidden = (
        "import pickle",
        "pickle.",
        "weights_only=False",
        "_object_list(",
        "gather_object(",
        "torch.load(",
    )
    root = Path(secateur.__file__).parent
    found = [
        f"{path.relative_to(root)}: {word}"
        for path in root.rglob("*.py")
        for word in forbidden
        if word in path.read_text()
    ]
    assert not found


def test_ranks_that_round_differently_stop_together(known, tmp_path):
    """The mistake: one that finds nothing left to gain leaves the others in a sum."""
    inputs = torch.randn(512, families.HIDDEN, generator=torch.Generator().manual_seed(0)).double()
    folder = known("llama")

    def stepped(ranks):
        block = open_model(folder, CPU).blocks[0]
        with torch.no_grad():
            target = block.mlp.channels(block.mlp.produced(inputs)) @ block.mlp.consumer_weight
            for weight in block.mlp.producer_weights:
                weight.data.mul_(1.1)
        exact = linalg._dot
        if not ranks.leader:
            linalg._dot = lambda a, b: -exact(a, b)
        share = slice(256 * ranks.rank, 256 * ranks.rank + 256 if ranks.world_size == 2 else None)
        rows = TokenBatches(lambda: [(inputs[share], target[share])], 256 * ranks.rank, ranks)
        with torch.no_grad():
            gauss_newton.GaussNewton(4, 1e-3, 1e-6).refine(block, rows)
        return [
            weight.clone() for weight in (*block.mlp.producer_weights, block.mlp.consumer_weight)
        ]

    expected = stepped(ALONE)
    for own in together(2, stepped, tmp_path):
        assert not isinstance(own, str), own
        for found, weight in zip(own, expected, strict=True):
            assert float((found - weight).norm()) <= 1e-5 * float(weight.norm())


@pytest.mark.parametrize("neighbours", [1, 2, 8])
def test_slopes_of_all_processes_of_a_machine_have_their_share(monkeypatch, neighbours):
    monkeypatch.setattr(gauss_newton, "free_bytes", lambda _: 2**30)
    taken = neighbours * gauss_newton._room(torch.device("cpu"), neighbours)
    assert taken == 2**30 // gauss_newton.SHARE
    assert gauss_newton._room(torch.device("cuda"), neighbours) == 2**30 // gauss_newton.SHARE


def test_one_that_dies_ends_the_others(tmp_path):
    def dying(ranks):
        ranks.all_gather(ranks.rank)
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.all_gather(ranks.rank)

    start = time.monotonic()
    first, dead, last = together(3, dying, tmp_path)
    assert dead is None
    assert "rank 1 of 3" in first
    assert "Type the command again" in first
    assert first.startswith("RankGoneError")
    assert last == "RankGoneError: "  # one speaks
    assert time.monotonic() - start < 30


def test_one_that_dies_while_another_works(tmp_path):
    """It does not take a meeting to see it."""

    def dying(ranks):
        if ranks.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(40)

    start = time.monotonic()
    dead, other = together(2, dying, tmp_path)
    assert dead is None
    assert "rank 0 of 2 is gone" in other
    assert time.monotonic() - start < 30


def test_what_one_refuses_the_first_one_says(tmp_path):
    def refusing(ranks):
        if ranks.rank:
            ranks.liveness.fail("the text is of no use", True)
            os._exit(2)
        ranks.all_gather(0)

    first, _ = together(2, refusing, tmp_path)
    assert first == "RankFailedError: the text is of no use"
