"""The experiments: a small one from end to end, the cache, and the statistics on cases with known results."""

import json
from dataclasses import replace
from functools import partial
from itertools import repeat

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from benchmarks import finite_differences, m_sharpness
from benchmarks.experiments import __main__ as program
from benchmarks.experiments import analysis, federated, report, reuse, runs, staleness, tasks
from benchmarks.experiments.methods import METHODS, WITHOUT_ABLATION
from benchmarks.experiments.runs import Config, run, run_all
from crsam_ext import CRSAM
from crsam_ext import figures as figure_style
from crsam_ext.training import checkpoint

pytestmark = pytest.mark.slow

TINY = Config("graph", "CR-SAM", 0.1, 0, epochs=3, checkpoints=(1, 3), probes=2, samples=20)


@pytest.fixture(autouse=True)
def tiny_graph(monkeypatch):
    """Make the graph task small, with few nodes to test."""
    splits = tasks.nodes()
    few = replace(splits, test=(splits.test[0][:50], splits.test[1][:50]))
    monkeypatch.setitem(tasks.TASKS, "graph", replace(tasks.TASKS["graph"], load=lambda: few, quick_epochs=3))


@pytest.mark.parametrize("name", tasks.TASKS)
def test_tasks_are_splits_without_overlap(name):
    task = tasks.TASKS[name]
    splits = task.load()
    task.load.cache_clear() if hasattr(task.load, "cache_clear") else None
    again = task.load()
    seen = set()
    for (x, y), (x_again, y_again) in zip(vars(splits).values(), vars(again).values(), strict=True):
        assert x.equal(x_again)
        assert y.equal(y_again)
        samples = {sample.numpy().tobytes() for sample in x}
        # Source files have a few blank or comment lines in common.
        assert len(samples & seen) <= (0.01 * len(samples) if "characters" in name else 0)
        seen |= samples
        loss = F.cross_entropy(task.model()(x[:4]), y[:4])
        assert 0 < loss < 10


def test_labels_are_the_next_characters_and_hidden_from_the_input():
    x, y = tasks.source_code().train
    assert x.flatten()[1:].equal(y.flatten()[:-1])
    for network in (tasks.Transformer(), tasks.Recurrent()):
        changed = x[:1].clone()
        changed[0, 40] = (changed[0, 40] + 1) % 128
        difference = (network(x[:1]) - network(changed)).abs().amax((0, 1))
        assert difference[:40].max() < 1e-5
        assert difference[40] > 1e-3


def test_a_run_is_repeatable_and_not_affected_by_measurements():
    first, second = run(TINY), run(replace(TINY, checkpoints=(3,)))
    assert [row["epoch"] for row in first["rows"]] == [1, 3]
    assert first["rows"][1] == second["rows"][0]
    assert all(value is not None for row in first["rows"] for value in row.values())


def test_tuning_never_sees_the_test_set(monkeypatch):
    config = replace(TINY, tuning=True, checkpoints=(3,))
    expected = run(config)["rows"]
    splits = tasks.TASKS["graph"].load()
    blind = replace(splits, test=None)
    monkeypatch.setitem(tasks.TASKS, "graph", replace(tasks.TASKS["graph"], load=lambda: blind))
    assert run(config)["rows"] == expected


def test_runs_resume_from_the_cache(tmp_path, monkeypatch):
    configs = [replace(TINY, seed=seed) for seed in range(3)]
    calls = []

    def fake(config):
        calls.append(config.seed)
        if config.seed == 2 and len(calls) == 3:
            raise KeyboardInterrupt
        return {"config": vars(config) | {"checkpoints": []}, "rows": [], "seconds": 0}

    monkeypatch.setattr(runs, "run", fake)
    with pytest.raises(KeyboardInterrupt):
        run_all(configs, tmp_path, workers=0)
    next(tmp_path.glob(f"{configs[0].key}*")).write_text("{ damaged")
    results = run_all(configs, tmp_path, workers=0)

    assert calls == [0, 1, 2, 0, 2]
    assert [result["config"]["seed"] for result in results] == [0, 1, 2]
    assert run_all(configs, tmp_path, workers=0) == results
    assert len(calls) == 5


def test_the_cache_key_depends_on_every_option_and_on_the_version(monkeypatch):
    others = [replace(TINY, rho=0.2), replace(TINY, checkpoints=(3,)), replace(TINY, tuning=True)]
    keys = {TINY.key} | {other.key for other in others}
    monkeypatch.setattr(runs, "VERSION", runs.VERSION + 1)
    keys.add(TINY.key)
    assert len(keys) == 5


def test_program_runs_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis, "DRAWS", 20)
    command = ["--quick", "--tasks", "graph", "--seeds", "2", "--workers", "0"]
    command += ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    program.main(command)

    content = json.loads((tmp_path / "experiments-quick.json").read_text())
    assert [r["config"]["method"] for r in content["runs"]] == 2 * ["base"] + 2 * ["SAM"] + 2 * ["CR-SAM"]
    assert "| CR-SAM |" in (tmp_path / "experiments-quick.md").read_text()
    for figure in ("accuracy", "curves", "predictions"):
        assert (tmp_path / f"experiments-quick-{figure}.png").stat().st_size > 5_000
    summary = analysis.summaries(content["runs"])[-1]
    accuracies = [r["rows"][-1]["test_accuracy"] for r in content["runs"][-2:]]
    assert summary["test_accuracy"] == pytest.approx((np.mean(accuracies), np.std(accuracies, ddof=1) / 2**0.5))


def test_workers_compute_the_same_results(tmp_path):
    """A worker is a separate process, in which the graph task has all nodes."""
    config = Config("graph", "SAM", 0.1, 0, epochs=2, checkpoints=(2,), tuning=True)
    (result,) = run_all([config], tmp_path, workers=2)
    assert result["rows"] == run(config)["rows"]


def test_best_rho_has_the_highest_accuracy():
    def result(rho, accuracy):
        return {"config": {"task": "t", "method": "m", "rho": rho}, "rows": [{"test_accuracy": accuracy}]}

    results = [result(0.1, 0.5), result(0.1, 0.9), result(0.2, 0.75), result(0.4, 0.2), result(0.05, 0.7)]
    assert analysis.best_rho(results) == {("t", "m"): 0.2}
    assert analysis.best_rho([*results, result(0.05, 0.8)]) == {("t", "m"): 0.05}  # the smaller of equally good ones


def test_bootstrap_has_the_expected_width():
    """Spearman's coefficient of n independent normal pairs has a standard deviation of 1/sqrt(n - 1)."""
    generator = np.random.default_rng(0)
    n = 200
    points = [(generator.normal(size=1), generator.normal(size=1)) for _ in range(n)]
    low, high = analysis.bootstrap_interval(points, "spearman")
    # The width of a bootstrap interval has an error of 1/sqrt(2 n) from the sample, plus 3 % from 1000 draws.
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(n - 1), rel=0.25)
    assert low < 0 < high


def test_bootstrap_draws_whole_runs():
    """Repeated checkpoints of a run add no information: the width of the interval does not change."""
    generator = np.random.default_rng(0)
    points = [(generator.normal(size=1), generator.normal(size=1)) for _ in range(30)]
    repeated = [(x.repeat(10), y.repeat(10)) for x, y in points]
    assert analysis.bootstrap_interval(points, "spearman") == pytest.approx(
        analysis.bootstrap_interval(repeated, "spearman"), abs=1e-9
    )


def test_a_run_that_diverges_is_reported_as_missing(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "graph", replace(tasks.TASKS["graph"], base_options={"lr": 1e30}))
    result = run(TINY)
    json.dumps(result, allow_nan=False)
    assert result["rows"][-1]["test_loss"] is None
    summary = analysis.summaries([result])[-1]
    assert np.isnan(summary["test_loss"][0])
    assert torch.isfinite(torch.tensor(summary["test_accuracy"][0]))


# Reuse of the sharpness direction ------------------------------------------------------------------------------------


def test_gradients_per_step_are_counted():
    """The count equals the number of passes of the optimizer."""
    for method in reuse.COMPARED.values():
        params = [torch.nn.Parameter(torch.ones(2))]
        optimizer = CRSAM(params, lr=0.1, **{"rho": 0.1, **method.options})
        passes = []
        for _ in range(100):
            passes.append(optimizer.passes)
            optimizer.step(lambda params=params: params[0].square().sum().backward())
        assert sum(passes) / 100 == pytest.approx(method.gradients, abs=1e-9)


@pytest.mark.parametrize("name", ["random direction, 5", "direction of another run, 5"])
def test_replacement_of_the_direction_has_its_norm(name):
    config = reuse.Config("graph", name, 0.1, 0, epochs=3)
    trained, other = reuse.Run(config, 0), reuse.Run(replace(config, method="CR-SAM, reuse 5"), 1)
    twin = reuse.Run(replace(config, method="CR-SAM, reuse 5"), 0)
    x, y = tasks.nodes().train
    for each in (other, trained, twin):
        each.step(x, y, other)
    assert reuse.length(trained.direction) == pytest.approx(reuse.length(twin.direction), rel=1e-5)
    products = [float((h * g).sum()) for h, g in zip(trained.direction, twin.direction, strict=True)]
    assert abs(sum(products)) < 0.9 * reuse.length(twin.direction) ** 2


def test_looksam_adds_the_orthogonal_component():
    """Steps between perturbations add 0.7 of the norm of g0 along the part of ghat orthogonal to the g0 of the
    perturbed step."""
    trained = reuse.Run(reuse.Config("graph", "LookSAM's rule, 5", 0.1, 0, epochs=3), 0)
    x, y = tasks.nodes().train
    trained.step(x, y)
    g0 = [param.grad.clone() for param in trained.model.parameters()]
    assert reuse.length(trained._added) == pytest.approx(1, rel=1e-5)
    assert sum(float((v * g).sum()) for v, g in zip(trained._added, g0, strict=True)) == pytest.approx(0, abs=1e-5)
    assert reuse.length(trained.direction) == 0
    plain = torch.autograd.grad(F.cross_entropy(trained.model(x), y), list(trained.model.parameters()))
    trained.step(x, y)
    added = [param.grad - g for param, g in zip(trained.model.parameters(), plain, strict=True)]
    for v, direction in zip(added, trained._added, strict=True):
        torch.testing.assert_close(v, 0.7 * reuse.length(plain) * direction, rtol=1e-3, atol=1e-5)


def test_step_times_are_measured_over_whole_cycles():
    """Blocks are whole cycles of steps, and each set of options is timed once."""
    steps = {name: method.timed_steps for name, method in reuse.COMPARED.items()}
    assert steps["SAM"] == steps["CR-SAM, reuse 2"] == steps["CR-SAM, curvature 10"] == 10
    assert steps["SAM, reuse 20"] == 20
    assert steps["CR-SAM, reuse 5, curvature 10"] == 50
    methods = ["CR-SAM", "SAM", "SAM, 1.5 x", "random direction, 5"]
    times = reuse.step_times("graph", methods, seconds=0, rounds=(3, 9))
    assert times.keys() == {"base", "CR-SAM", "SAM", "SAM, 1.5 x"}
    assert times["base"] == [1, 1, 1]
    assert times["SAM, 1.5 x"] == times["SAM"]
    for low, median, high in times.values():
        assert 0 < low <= median <= high
    assert times["CR-SAM"][1] > 1.2


def test_rounds_of_times_are_limited(monkeypatch):
    blocks = []
    monkeypatch.setattr(reuse.Method, "timed_steps", property(lambda self: blocks.append(self) or 1))
    reuse.step_times("graph", ["SAM"], seconds=60, rounds=(2, 4))
    assert len(blocks) == 2 * (1 + 4)


@pytest.mark.parametrize(
    ("quantiles", "cell"),
    [([1.29, 1.31, 1.33], "1.31"), ([1.2, 1.31, 1.4], "1.31 (1.20–1.40)"), (None, "–")],
)
def test_ratio_cell_shows_large_spreads(quantiles, cell):
    assert reuse.ratio_cell(quantiles) == cell


def test_program_of_reuse_runs_from_end_to_end(tmp_path, monkeypatch):
    drawn = {"base", *(name for names in reuse.LINES.values() for name in names)}
    few = {name: method for name, method in reuse.COMPARED.items() if name in drawn}
    monkeypatch.setattr(reuse, "COMPARED", few)
    monkeypatch.setattr(reuse, "RHOS", (0.1,))
    monkeypatch.setattr(reuse, "step_times", partial(reuse.step_times, seconds=0, rounds=(2, 2)))
    monkeypatch.setitem(tasks.TASKS, "graph", replace(tasks.TASKS["graph"], epochs=3))
    command = ["--tasks", "graph", "--seeds", "2", "--workers", "0"]
    reuse.main([*command, "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)])
    content = json.loads((tmp_path / "reuse.json").read_text())
    assert len(content["runs"]) == 2 * len(few)
    times = content["step_times"]["graph"]
    assert times.keys() == few.keys() - {"LookSAM's rule, 5"}
    table = (tmp_path / "reuse.md").read_text(encoding="utf-8")
    assert "| method | gradients per step | time per step / base | epochs |" in table
    assert f"| CR-SAM, reuse 5 | 1.40 | {reuse.ratio_cell(times['CR-SAM, reuse 5'])} | 3 |" in table
    assert "| LookSAM's rule, 5 | 1.20 | – | 3 |" in table
    assert (tmp_path / "reuse.png").stat().st_size > 5_000


def test_figure_of_reuse_has_three_panels_in_a_row_and_one_legend(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(figure_style, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[-1])
    names = {"base", *(name for names in reuse.LINES.values() for name in names)}
    rows = [{"task": task, "method": name, "test_accuracy": (0.5, 0.1)} for task in "abcde" for name in names]
    reuse.draw(rows, tmp_path / "five.png")
    axes, legends = figures[0].axes, figures[0].legends
    assert [ax.get_subplotspec().rowspan.start for ax in axes] == [0, 0, 0, 1, 1]
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)
    assert all("base" in [text.get_text() for text in ax.texts] for ax in axes)
    assert [text.get_text() for text in legends[0].get_texts()] == [*reuse.LINES]
    assert (tmp_path / "five.png").stat().st_size < 150_000


def test_figure_of_curves_has_a_panel_for_each_task_and_one_legend(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(figure_style, "Figure", lambda **kwargs: figures.append(Figure(**kwargs)) or figures[-1])
    measures = dict.fromkeys(report.CURVES, (100.0, 10.0))
    rows = [
        {"task": task, "method": method, "epoch": epoch, **measures}
        for task in "abcd" for method in (*WITHOUT_ABLATION, "CR-SAM, log") for epoch in (1, 2)
    ]  # fmt: skip
    report.draw_curves(rows, tmp_path / "curves.png")
    axes, legends = figures[0].axes, figures[0].legends
    assert [ax.get_title() for ax in axes] == list("abcd")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in axes)
    assert all(len(ax.containers) == len(WITHOUT_ABLATION) * len(measures) for ax in axes)
    assert [text.get_text() for text in legends[0].get_texts()] == [*WITHOUT_ABLATION, "C(w)", "Hessian trace"]


def test_variants_of_a_method_have_its_color():
    colors = {name: figure_style.method_color(name) for name in METHODS}
    assert {colors["CR-SAM, log"], colors["CR-SAM, norm only"]} == {colors["CR-SAM"]}
    assert len({colors[name] for name in WITHOUT_ABLATION}) == 3


def test_direction_at_the_same_point_equals_the_stored_one():
    """It is computed from the formulas, at the same point and with the same batch."""
    x, y = tasks.nodes().train
    trained = reuse.Run(reuse.Config("graph", "CR-SAM, reuse 5", staleness.RHO, 0, epochs=3), 0)
    _, expected = staleness.sharpness_direction(trained.model, x, y)
    trained.step(x, y)
    for h, e in zip(trained.direction, expected, strict=True):
        torch.testing.assert_close(h, e, rtol=1e-4, atol=1e-5)


# Federated averaging -------------------------------------------------------------------------------------------------


FEDERATED = federated.Config("graph", "CR-SAM", 3, 2, local_steps=2, rounds=4, lr=0.5, rho=0.1, seed=0)


@pytest.mark.parametrize("clients", federated.CLIENTS)
def test_clients_partition_the_samples(clients):
    labels = torch.cat([samples[1] for samples in (tasks.images("mnist1d").train, tasks.images("mnist1d").validation)])
    parts = federated.split(labels, clients, 0)
    assert len(parts) == clients
    assert torch.cat(parts).sort().values.equal(torch.arange(len(labels)))
    assert min(map(len, parts)) >= federated.LEAST
    for part, again, other in zip(
        parts, federated.split(labels, clients, 0), federated.split(labels, clients, 1), strict=True
    ):
        assert part.equal(again)
        assert not part.equal(other)
    # The largest label of a client would have a tenth of its samples if all clients were alike.
    largest = [labels[part].bincount().max().item() / len(part) for part in parts]
    assert np.mean(largest) > 0.25


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("method", ["SGD", "CR-SAM"])
def test_a_federation_of_one_client_equals_plain_training(method, local_steps):
    config = replace(FEDERATED, method=method, clients=1, participants=1, local_steps=local_steps, rounds=6)
    x, y = tasks.nodes().train
    federation = federated.Federation(config, (x, y))
    checkpoint.seed_everything(config.seed)
    model = tasks.TASKS["graph"].model()
    options = {"lr": config.lr, **federated.SGD}
    if method == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), **options)
    else:
        optimizer = CRSAM(model.parameters(), rho=config.rho, **federated.METHODS[method], **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.rounds)
    batches = federated.stream(x, y, 0)
    for _ in range(config.rounds):
        federation.round()
        for _ in range(local_steps):
            samples, labels = next(batches)

            def closure(samples=samples, labels=labels):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(samples), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        schedule.step()
        for weight, param in zip(federation.weights, model.parameters(), strict=True):
            assert weight.equal(param.detach())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # the optimizer makes no step
def test_clients_are_weighted_by_their_samples():
    """Each client trains to a constant; the average is over the two clients of the round."""
    federation = federated.Federation(FEDERATED, tasks.nodes().train)
    federation.streams = [repeat((client, None)) for client in range(3)]
    federation.sizes = sizes = [10, 20, 70]
    drawn = []

    def step(client, _):
        drawn.append(client)
        with torch.no_grad():
            for param in federation.params:
                param.fill_(10.0**client)

    federation.step = step
    federation.round()
    first, second = drawn[::2]
    assert drawn == [first, first, second, second]
    assert first != second
    mean = (sizes[first] * 10.0**first + sizes[second] * 10.0**second) / (sizes[first] + sizes[second])
    for weight in federation.weights:
        torch.testing.assert_close(weight, torch.full_like(weight, mean))


def test_bytes_and_gradients_of_a_round_are_counted():
    """Perturbations and curvature stay on the client: all methods send the same number of bytes."""
    weights = sum(param.nbytes for param in tasks.GraphNetwork().parameters())
    gradients = {"SGD": 1, "SAM": 2, "CR-SAM": 3, "SGD, 3 x local steps": 3}
    for name in federated.COMPARED:
        (row,) = federated.run(replace(FEDERATED, method=name))["rows"]
        assert row["down"] == row["up"] == 4 * 2 * weights
        assert row["gradients"] == 4 * 2 * 2 * gradients[name]


def test_program_of_federated_runs_from_end_to_end(tmp_path, monkeypatch):
    few = {"TASK": "graph", "CLIENTS": (2, 3), "PARTICIPANTS": 2, "LOCAL_STEPS": (1, 2), "ROUNDS": 2}
    for name, value in {**few, "RHOS": (0.1,)}.items():
        monkeypatch.setattr(federated, name, value)
    command = ["--seeds", "2", "--workers", "0", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path)]
    federated.main(command)
    content = json.loads((tmp_path / "federated.json").read_text())
    assert len(content["runs"]) == 2 * 2 * 2 * len(federated.COMPARED)
    assert {run["config"]["rho"] for run in content["runs"] if "SAM" in run["config"]["method"]} == {0.1}
    assert "| 2 | CR-SAM | 12 |" in (tmp_path / "federated.md").read_text()
    assert (tmp_path / "federated.png").stat().st_size > 5_000


# Committed tables ----------------------------------------------------------------------------------------------------


def test_committed_tables_are_made_from_the_committed_results():
    def content(name):
        return json.loads((program.RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    experiments, finite = content("experiments"), content("finite-differences")
    made = {
        "experiments": report.markdown(
            experiments, analysis.summaries(experiments["runs"]), experiments["predictions"]
        ),
        "federated": federated.markdown(federated.summaries(content("federated")["runs"])),
        "finite-differences": finite_differences.markdown(finite["rows"], finite),
        "m-sharpness": m_sharpness.table(content("m-sharpness")["accuracy"]),
        "reuse": reuse.markdown(reuse.summaries(content("reuse")["runs"]), content("reuse")["step_times"]),
    }
    committed = {name: (program.RESULTS / f"{name}.md").read_text(encoding="utf-8") for name in made}
    assert made == committed
