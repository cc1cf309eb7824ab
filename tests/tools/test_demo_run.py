"""Training runs of the embedded models: lessons by workers, checkpoints, and losses that never wait for the device."""

import copy
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import train_demo  # noqa: E402
from demo_training import labels  # noqa: E402
from demo_training.guide import Guide  # noqa: E402
from demo_training.lessons import FIRST_STEPS, Teacher, in_order  # noqa: E402
from demo_training.muon import Muon  # noqa: E402
from demo_training.sight import make_head  # noqa: E402
from demo_training.team import Team  # noqa: E402
from demo_training.tokenizer import train_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def tokenizers():
    return {arch: train_tokenizer(control) for arch, (_, control) in train_demo.ARCHITECTURES.items()}


def make_run(arch, tokenizers, folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_demo.py", "--arch", arch, "--work", str(folder), "--steps", "20"])
    tokenizer = tokenizers[arch]
    net = train_demo.ARCHITECTURES[arch][0](tokenizer, 0)
    net.model.train()
    torch.manual_seed(0)
    teacher = Teacher(net.writer(), Guide(tokenizer), seed=0)
    team = Team(0, 1, folder / "meeting", time.monotonic)
    return train_demo.Run(train_demo.parse_args(), net, make_head(net.feature_size), teacher, team)


def test_two_processes_learn_from_both_and_stay_the_same(tmp_path, monkeypatch):
    flags = "--steps 4 --sight-share 0.5 --final-cases 0 --sight-rows 2 --rows 1 --more-views 1"
    learned = []
    for processes in ("1", "2"):
        work = tmp_path / processes
        own = ["--work", str(work), "--out", str(work / "out"), "--processes", processes]
        monkeypatch.setattr(sys, "argv", ["train_demo.py", *flags.split(), *own])
        train_demo.train(train_demo.parse_args())  # which compares the processes' weights where it saves
        state = torch.load(work / "checkpoint.pt", weights_only=True)
        assert state["step"] == 4
        learned.append(state["model"]["model.visual.merger.mlp.2.weight"])
    assert not torch.equal(*learned)


def test_parts_of_a_team_have_lessons_of_the_same_kinds_about_other_pictures(tokenizers):
    build, _ = train_demo.ARCHITECTURES["qwen2-vl"]
    writer, guide = build(tokenizers["qwen2-vl"]).writer(), Guide(tokenizers["qwen2-vl"])
    one, other = (Teacher(writer, guide, 0, part).answers(2, 2, 0, FIRST_STEPS) for part in (0, 1))
    assert [len(batch.images) for batch in one.batches] == [len(batch.images) for batch in other.batches]
    assert one.views[0].patches.shape != other.views[0].patches.shape or not torch.equal(
        one.views[0].patches, other.views[0].patches
    )


def tensors_of(data):
    found = []
    data.each(lambda tensor: (found.append(tensor), tensor)[1])
    return found


@pytest.mark.parametrize("arch", train_demo.ARCHITECTURES)
def test_workers_make_the_lessons_that_are_made_without_them(arch, tokenizers):
    build, _ = train_demo.ARCHITECTURES[arch]
    teacher = Teacher(build(tokenizers[arch]).writer(), Guide(tokenizers[arch]), seed=3)
    first = FIRST_STEPS + 7
    made = in_order(lambda step: teacher.answers(2, 2, 0, step), first, num_workers=2, pin_memory=False)
    for step, lesson in zip(range(first, first + 3), made, strict=False):
        right = teacher.answers(2, 2, 0, step)
        assert len(lesson.batches) == 3 and lesson.guidance[0].targets.keys() == right.guidance[0].targets.keys()
        pairs = list(zip(tensors_of(lesson), tensors_of(right), strict=True))
        assert len(pairs) > 20 and all(torch.equal(one, other) for one, other in pairs)


def test_a_run_that_stops_goes_on_as_if_it_had_not(tokenizers, tmp_path, monkeypatch):
    run = make_run("qwen2-vl", tokenizers, tmp_path, monkeypatch)
    for step in range(2):
        run.step(run.teacher.sight(2, step), is_told=False)
    run.answers_from = 2
    run.step(run.teacher.answers(1, 1, 2, 2), is_told=True)
    run.save()
    again = make_run("qwen2-vl", tokenizers, tmp_path, monkeypatch)
    again.restore()
    assert (again.clock.step, again.answers_from) == (3, 2)
    for either in (run, again):
        lessons = either.lessons()
        for lesson in itertools.islice(lessons, 1):
            either.step(lesson, is_told=False)
    for one, other in zip(run.weights, again.weights, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("arch", train_demo.ARCHITECTURES)
def test_a_step_makes_nothing_on_another_device_and_waits_for_nothing(arch, tokenizers, tmp_path, monkeypatch):
    """On `meta` nothing can be read back, and no tensor of the CPU can be mixed in."""
    run = make_run(arch, tokenizers, tmp_path, monkeypatch)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # unknown to meta
    device = torch.device("meta")
    weights = list(torch.nn.ModuleList([run.model, run.head]).to(device).parameters())
    lessons = [run.teacher.answers(2, 2, 0, FIRST_STEPS + step) for step in range(8)]  # other kinds in turn
    for lesson in (run.teacher.sight(2, 0), *lessons):
        loss = run.loss(lesson.to(device), {})
        loss.backward()
        assert loss.is_meta and torch.nn.utils.clip_grad_norm_(weights, 1.0).is_meta


@pytest.mark.parametrize("arch", train_demo.ARCHITECTURES)
def test_images_of_one_grid_are_seen_at_once_as_they_are_one_group_after_the_other(
    arch, tokenizers, tmp_path, monkeypatch
):
    run = make_run(arch, tokenizers, tmp_path, monkeypatch)
    lesson = run.teacher.answers(2, 2, 0, FIRST_STEPS)
    if arch == "qwen2-vl":  # whose images have many grids: each twice
        groups = [group for batch in lesson.batches for group in batch.images]
        lesson = replace(lesson, views=[replace(group, patches=group.patches.flip(0)) for group in groups])
    told = {}
    for joins in (False, True):
        run.joins_images = joins
        views, naming = run.views(lesson, None)
        told[joins] = [*views, naming, run.loss(lesson, None)]
    assert len(told[True]) == len(told[False]) > 4
    for one, other in zip(told[False], told[True], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_muon_of_matrices_at_once_is_torchs_of_one_after_the_other():
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (24, 8)]
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.full(shape, 0.1)) for shape in shapes] for _ in range(2))
    idle = torch.nn.Parameter(torch.ones(8, 8))  # a text model's, while the tower learns alone
    optimizers = (
        Muon([*ours, idle], weight_decay=0.05, lr=0.01),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(idle, torch.ones(8, 8))


def test_a_step_that_is_not_finite_changes_nothing(tokenizers, tmp_path, monkeypatch):
    run = make_run("qwen2-vl", tokenizers, tmp_path, monkeypatch)
    lesson = run.teacher.sight(2, 0)
    run.step(lesson, is_told=False)
    before = copy.deepcopy(run.weights)
    group = lesson.views[0]
    run.step(replace(lesson, views=[replace(group, weights=group.weights * float("inf"))]), is_told=False)
    assert all(torch.equal(one, other) for one, other in zip(run.weights, before, strict=True))
    run.step(lesson, is_told=False)
    assert not all(torch.equal(one, other) for one, other in zip(run.weights, before, strict=True))


def test_what_shows_nothing_weighs_as_much_as_what_shows_something(tokenizers, tmp_path, monkeypatch):
    run = make_run("qwen2-vl", tokenizers, tmp_path, monkeypatch)
    group = run.teacher.sight(12, 1).views[0]
    weights, named = group.weights, group.labels
    assert float(weights.sum()) == pytest.approx(1, abs=1e-5)
    assert not weights[named == labels.IGNORED].any()
    at = labels.FIELD_IDX["glyph"]
    is_none = named[..., at] == labels.NOTHING["glyph"]
    assert float(weights[..., at][is_none].sum()) == pytest.approx(float(weights[..., at][~is_none].sum()), rel=1e-4)


def test_the_rate_rises_then_falls_in_sight_and_again_in_answers(tokenizers, tmp_path, monkeypatch):
    run = make_run("qwen2-vl", tokenizers, tmp_path, monkeypatch)
    run.clock.steps = 10_000

    def rate(step):
        run.clock.step = step
        return run.learning_rate()

    assert rate(0) < rate(99) == pytest.approx(run.args.sight_lr, rel=0.01)
    switch = round(run.args.sight_share * run.clock.steps)
    assert rate(switch - 100) < 0.25 * run.args.sight_lr
    run.answers_from = switch
    assert rate(switch) < rate(switch + 100) == pytest.approx(run.args.lr, rel=0.01) and rate(9990) < 0.02 * run.args.lr
