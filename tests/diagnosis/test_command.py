"""The diagnosis of a small run of random networks, held against dense computations in NumPy."""

import dataclasses
import itertools
import json
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from flatjax.diagnosis import command, sources, stages
from flatjax.diagnosis.head import of_sequences
from flatjax.diagnosis.page import render
from flatjax.diagnosis.quantities import jackknife_error, mean
from flatjax.diagnosis.reading import forward, tokens_of
from flatjax.diagnosis.sources import load_checkpoint
from flatjax.models import Decoder, DecoderConfig
from flatjax.run.checkpoints import checkpointer
from flatjax.run.text import evenly, read, windows
from harness.data.text import train_tokenizer

VOCAB, WIDTH, DEPTH, CONTEXT, BATCH, BLOCKS, MIN_COUNT, TOP = 264, 8, 2, 12, 4, 3, 4, 2
STEPS = (0, 7)
KERNEL = "blocks/0/perceptron/down"
DECODER = DecoderConfig(
    vocab_size=VOCAB, width=WIDTH, depth=DEPTH, num_heads=2, num_key_value_heads=1, inner_width=12, tied=False
)
OPTIONS = {
    "context": CONTEXT, "max_tokens": 22 * CONTEXT, "batch_size": BATCH, "blocks": BLOCKS, "min_count": MIN_COUNT,
    "radii": (0.01, 0.3), "fit_range": (2, 6), "layers": (KERNEL,), "profile_sequences": 4,
    "profile_batch": 2, "num_probes": 92, "max_probes": 92, "windows": 3, "window_context": 5, "directions": TOP,
    "name": "d",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run as train_lm leaves it, of two checkpoints, and a text."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoin"), size=rng.integers(1, 5))) for _ in range(30)]
    (folder / "text.txt").write_text(" ".join(rng.choice(words, size=180)))
    documents = read([folder / "text.txt"])
    run = folder / "run"
    run.mkdir()
    train_tokenizer(documents, VOCAB).save(str(run / "tokenizer.json"))
    recorded = {"text": [str(folder / "text.txt")], "pattern": "*", "files": {"held_out": ["text.txt"], "transfer": []}}
    (run / "config.json").write_text(json.dumps({"model": dataclasses.asdict(DECODER)} | recorded))
    with checkpointer(run / "checkpoints", keep=None) as checkpoints:
        for step in STEPS:
            params = nnx.to_pure_dict(nnx.state(Decoder(DECODER, rngs=nnx.Rngs(step)), nnx.Param))
            # Larger than at a start, so that nothing is nearly linear or nearly uniform.
            params = jax.tree.map(lambda leaf: 2.5 * leaf if leaf.ndim > 1 else leaf, params)
            if step == STEPS[-1]:
                params["head"]["kernel"] = collapsed_head(params, documents, run / "tokenizer.json")
            checkpoints.save(step, {"params": params, "optimizer": {"count": jnp.zeros(())}})
    return SimpleNamespace(run=run, text=folder / "text.txt", documents=documents)


def collapsed_head(params, documents, tokenizer):
    """With rows near the class means, so that it decides as the nearest mean does for some tokens."""
    model = nnx.merge(nnx.graphdef(Decoder(DECODER, rngs=nnx.Rngs(0))), params)
    sequences = windows(tokens_of(Tokenizer.from_file(str(tokenizer)), [each.text for each in documents]), CONTEXT)
    feats = np.asarray(jax.jit(lambda tokens: model.features(tokens))(sequences[:, :-1])).reshape(-1, WIDTH)
    labels = sequences[:, 1:].ravel()
    seen = np.unique(labels)
    kernel = 0.3 * np.random.default_rng(0).normal(size=(WIDTH, VOCAB)).astype(np.float32)
    kernel[:, seen] += 2 * np.stack([feats[labels == c].mean(axis=0) - feats.mean(axis=0) for c in seen], axis=1)
    return jnp.asarray(kernel)


@pytest.fixture(scope="module", autouse=True)
def _as_experiments_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


def on_one_device(config):
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def diagnose(trained, folder, **options):
    given = {"checkpoints": (str(trained.run),), "text": (trained.text,), "folder": folder} | OPTIONS | options
    command.main(command.Config(**given))
    return json.loads((folder / "d" / render.RECORD).read_text())


@pytest.fixture
def _undrawn(monkeypatch):
    """The page takes longer than what is shown there, and is that of any other record."""
    monkeypatch.setattr(render, "redraw", lambda folder: None)


@pytest.fixture(scope="module")
def diagnosed(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnosed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "mesh_of", on_one_device)
        record = diagnose(trained, folder)
    return SimpleNamespace(folder=folder, record=record, parts=record["checkpoints"][-1]["parts"])


@pytest.fixture(scope="module")
def dense(trained):
    """The last checkpoint on all tokens, in float64 from what it computes in float32 in the stream."""
    model = load_checkpoint(trained.run, STEPS[-1], mesh=on_one_device(None))
    tokenizer = sources.find([str(trained.run)])[0].tokenizer()
    tokens = tokens_of(tokenizer, (each.text for each in trained.documents))
    sequences = evenly(windows(tokens, CONTEXT), 22)
    stream = np.asarray(jax.jit(lambda model, tokens: model.stream(tokens))(model, sequences[:, :-1]), float)
    feats = np.asarray(model.norm(jnp.asarray(stream[-1], jnp.float32)), float)
    W = np.asarray(model.head.kernel[...], float).T
    z = feats @ W.T
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    labels = sequences[:, 1:]
    batches = np.arange(len(sequences)) // BATCH
    blocks = batches * BLOCKS // (batches[-1] + 1)
    return SimpleNamespace(
        model=model, sequences=sequences, labels=labels, stream=stream, feats=feats, W=W, z=z, p=p, blocks=blocks
    )


def cross_entropies(z, labels):
    shifted = z - z.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(shifted).sum(axis=-1))
    return normaliser - np.take_along_axis(shifted, labels[..., None], axis=-1)[..., 0]


def assert_is(quantity, value, rtol=2e-4, atol=0.0):
    assert np.all(np.isfinite(value))
    np.testing.assert_allclose(np.array(quantity["value"], float), value, rtol=rtol, atol=atol)


def without_blocks(statistic, dense):
    return jackknife_error([statistic(dense.blocks != block) for block in range(BLOCKS)])


def test_loss_and_flatness_of_the_head_are_the_dense_ones(diagnosed, dense):
    head, squares = diagnosed.parts["head"], np.sum(dense.feats**2, axis=-1)
    losses = cross_entropies(dense.z, dense.labels)
    assert_is(head["loss"], losses.mean())
    assert_is(head["perplexity"], np.exp(losses.mean()))
    means = dense.p @ dense.W
    variances = dense.p @ np.sum(dense.W**2, axis=1) - np.sum(means**2, axis=-1)
    assert_is(head["kappa"], np.mean(squares * variances))
    traces = 1 - np.sum(dense.p**2, axis=-1)
    assert_is(head["kappa_hat"], np.sum(dense.W**2) * np.mean(squares * traces))
    assert head["loss"]["num_tokens"] == dense.labels.size


def test_standard_errors_are_those_of_leaving_out_blocks_of_text(diagnosed, dense):
    losses = cross_entropies(dense.z, dense.labels).mean(axis=1)
    wanted = without_blocks(lambda kept: losses[kept].mean(), dense)
    np.testing.assert_allclose(diagnosed.parts["head"]["loss"]["standard_error"], wanted, rtol=1e-3)
    classes = np.flatnonzero(np.bincount(dense.labels.ravel(), minlength=VOCAB) >= MIN_COUNT)
    wanted = without_blocks(lambda kept: collapse(dense, kept, classes)["cdnv"], dense)
    np.testing.assert_allclose(diagnosed.parts["collapse"]["cdnv"]["standard_error"], wanted, rtol=1e-3)


def test_the_standard_error_of_a_mean_over_equal_blocks_is_that_of_batch_means():
    values = np.random.default_rng(0).normal(size=(12, 2))
    means = values.reshape(4, 3, 2).mean(axis=1)
    np.testing.assert_allclose(mean(values, np.arange(12) // 3)[1], means.std(axis=0, ddof=1) / 2)


def collapse(dense, kept, classes=None):
    feats, labels = dense.feats[kept].reshape(-1, WIDTH), dense.labels[kept].ravel()
    counts = np.bincount(labels, minlength=VOCAB)
    classes = np.flatnonzero(counts >= MIN_COUNT) if classes is None else classes[counts[classes] >= 2]
    means = np.array([feats[labels == c].mean(axis=0) for c in classes])
    squares = (np.sum((feats[labels == c] - mu) ** 2, axis=1) for c, mu in zip(classes, means, strict=True))
    spreads = np.array([np.mean(each) for each in squares])
    centred, rows = means - means.mean(axis=0), dense.W[classes]
    distances = np.sum((means[:, None] - means[None]) ** 2, axis=-1)
    pairs = ~np.eye(len(classes), dtype=bool)
    units = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    logs = -np.log(np.linalg.norm(units[:, None] - units[None], axis=-1)[pairs])
    cosines = np.sum(rows * centred, axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(centred, axis=1)
    is_class = np.isin(labels, classes)
    nearest = classes[np.argmin(np.sum((feats[is_class][:, None] - means[None]) ** 2, axis=-1), axis=1)]
    return {
        "cdnv": np.mean(((spreads[:, None] + spreads[None])[pairs]) / (2 * distances[pairs])),
        "nc3": np.sum((rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)) ** 2),
        "unc3": cosines.std() / np.abs(cosines.mean()),
        "gnc2_mean_means": logs.mean(),
        "gnc2_variation_means": logs.std() / np.abs(logs.mean()),
        "nc4": np.mean(nearest != np.argmax(feats[is_class] @ dense.W.T, axis=1)),
        "num_classes": len(classes),
    }


def test_collapse_over_the_vocabulary_is_the_dense_one(diagnosed, dense):
    wanted = collapse(dense, np.full(len(dense.blocks), True))
    for name in ("cdnv", "nc3", "unc3", "gnc2_mean_means", "gnc2_variation_means"):
        assert_is(diagnosed.parts["collapse"][name], wanted[name], rtol=1e-3)
    assert diagnosed.parts["collapse"]["cdnv"]["num_classes"] == wanted["num_classes"]
    assert 0 < wanted["nc4"] < 1
    assert_is(diagnosed.parts["decisions"]["nc4"], wanted["nc4"], rtol=1e-6)


def test_geometry_is_that_of_the_singular_values_of_all_tokens(diagnosed, dense):
    geometry = diagnosed.parts["geometry"]
    for layer, feats in enumerate([*dense.stream, dense.feats]):
        flat = feats.reshape(-1, WIDTH)
        sigma = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)
        for name, sizes in (("rankme", sigma), ("rankme_of_variances", sigma**2)):
            shares = sizes / sizes.sum()
            np.testing.assert_allclose(
                geometry[name]["value"][layer], np.exp(-np.sum(shares * np.log(shares))), rtol=1e-4
            )
        ratio = np.sum(sigma**2) ** 2 / np.sum(sigma**4)
        np.testing.assert_allclose(geometry["participation_ratio"]["value"][layer], ratio, rtol=1e-4)
        ranks = np.arange(2, 7)
        slope = np.polyfit(np.log(ranks), np.log(sigma[1:6] ** 2), 1, w=ranks**-0.5)[0]
        np.testing.assert_allclose(geometry["alpha_req"]["value"][layer], -slope, rtol=1e-3)


def test_the_way_through_the_blocks_is_that_of_the_median_token(diagnosed, dense):
    steps, sizes = np.diff(dense.stream, axis=0), np.linalg.norm(dense.stream, axis=-1)
    lengths = np.linalg.norm(steps, axis=-1)
    ways = {
        "line_shape": DEPTH / np.linalg.norm(np.sum(steps / lengths[..., None], axis=0), axis=-1),
        "spacing": lengths.std(axis=0) / lengths.mean(axis=0),
        "growth_rate": np.log(sizes[-1] / sizes[0]) / DEPTH,
    }
    for name, of_tokens in ways.items():
        assert_is(diagnosed.parts["trajectory"][name], np.median(of_tokens, axis=1).mean())
    assert_is(diagnosed.parts["trajectory"]["norms"], np.median(sizes, axis=2).mean(axis=1))


def test_logit_sharpness_is_reached_at_a_corner_of_the_box(diagnosed, dense):
    is_label = np.arange(VOCAB) == dense.labels[..., None]
    rises = []
    for radius in OPTIONS["radii"]:
        moved = dense.z + np.where(is_label, -1, 1) * radius * (np.abs(dense.z) + 1)
        rises.append(np.mean(cross_entropies(moved, dense.labels) - cross_entropies(dense.z, dense.labels)))
    assert_is(diagnosed.parts["sharpness"]["rise"], rises)


def test_jacobians_are_those_of_automatic_differentiation_at_the_last_token_of_a_window(diagnosed, dense):
    chosen = evenly(dense.sequences, OPTIONS["windows"])[:, : OPTIONS["window_context"]]
    jacobian = jax.jit(jax.jacfwd(lambda x, block, before: block(before.at[0, -1].set(x))[0, -1]))
    couplings, alignments = [], []
    for window in chosen:
        stream = dense.model.stream(jnp.asarray(window)[None])
        J = [
            np.asarray(jacobian(x[0, -1], block, x), float) - np.eye(WIDTH)
            for x, block in zip(stream[:-1], dense.model.blocks, strict=True)
        ]
        U, S, Vt = (np.stack(each) for each in zip(*map(np.linalg.svd, J), strict=True))
        for i in range(DEPTH):
            for j in range(DEPTH):
                if i != j:
                    between = np.abs(U[j][:, :TOP].T @ J[i] @ Vt[j][:TOP].T)
                    couplings.append(np.linalg.norm(between - np.diag(S[i][:TOP])) / np.linalg.norm(S[i][:TOP]))
                    is_diagonal = np.eye(TOP, dtype=bool)
                    alignments.append(between[~is_diagonal].mean() / between[is_diagonal].mean())
    assert_is(diagnosed.parts["jacobians"]["coupling"], np.mean(couplings), rtol=1e-3)
    assert_is(diagnosed.parts["jacobians"]["alignment"], np.mean(alignments), rtol=1e-3)
    matrix = np.array(diagnosed.parts["jacobians"]["coupling_matrix"]["value"])
    np.testing.assert_allclose(np.diag(matrix), 0, atol=1e-5)


def test_the_profile_is_kappa_by_the_dense_hessian_within_its_errors(diagnosed, dense):
    """Of each kernel, Σ ⟨w_s, w_s'⟩ Tr H_{s,s'} on the sequences that it was measured on; of the head exactly."""
    chosen = evenly(dense.sequences, OPTIONS["profile_sequences"])
    tokens, labels = jnp.asarray(chosen[:, :-1]), jnp.asarray(chosen[:, 1:])
    graphdef, params = nnx.split(dense.model, nnx.Param)
    profile = diagnosed.parts["profile"]["layer_kappa"]
    values, errors = (dict(zip(profile["layers"], profile[key], strict=True)) for key in ("value", "error_of_probes"))
    assert list(values) == [KERNEL, "head"]

    def loss(kernel):
        changed = nnx.to_pure_dict(params)
        changed["blocks"][0]["perceptron"]["down"]["kernel"] = kernel
        z = nnx.merge(graphdef, changed)(tokens)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(z), labels[..., None], axis=-1))

    kernel = params["blocks"][0]["perceptron"]["down"]["kernel"][...]
    H, W = np.asarray(jax.jit(jax.hessian(loss))(kernel), float), np.asarray(kernel, float).T
    kappa = np.sum((W @ W.T) * np.einsum("kskt->st", H))
    assert errors[KERNEL] < 0.3 * abs(kappa)
    assert abs(values[KERNEL] - kappa) < 3 * errors[KERNEL]
    places = [int(np.flatnonzero(np.all(dense.sequences == row, axis=1))[0]) for row in chosen]
    squares, means = np.sum(dense.feats[places] ** 2, axis=-1), dense.p[places] @ dense.W
    variances = dense.p[places] @ np.sum(dense.W**2, axis=1) - np.sum(means**2, axis=-1)
    np.testing.assert_allclose(values["head"], np.mean(squares * variances), rtol=1e-4)


def numbers(record):
    """All but what times go into."""
    return [{key: value for key, value in each.items() if key != "cost"} for each in record["checkpoints"]]


def killed_at(monkeypatch, *calls):
    """Stops the calls of these numbers, from now on, that read a batch or take it up; returns all calls."""
    unkilled, seen = stages._timed, []

    def killed(function, *arguments):
        seen.append((function, arguments))
        if len(seen) in calls:
            raise KeyboardInterrupt
        return unkilled(function, *arguments)

    monkeypatch.setattr(stages, "_timed", killed)
    return seen


class Shares(command.Progress):
    """A bar of which every share that it shows is known."""

    def _advance(self, kind, number):
        super()._advance(kind, number)
        shares.append((self.share_done, sum(self.total.values())))


shares: list[tuple[float, int]] = []


@pytest.mark.usefixtures("_undrawn")
def test_what_is_killed_at_any_moment_goes_on_to_the_same_numbers(trained, diagnosed, tmp_path, monkeypatch):
    """And the bar has one total, which the work that is done before is a part of, and which is done in the end."""
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    monkeypatch.setattr(command, "Progress", Shares)
    killed_at(monkeypatch, 9, 14, 50)
    of_runs, options = [], {"resume": True, "steps": STEPS[:1], "save_every": 0.0}
    for _ in range(3):
        shares.clear()
        with pytest.raises(KeyboardInterrupt):
            diagnose(trained, tmp_path, **options)
        of_runs.append(list(shares))
    shares.clear()
    record = diagnose(trained, tmp_path, **options)
    of_runs.append(list(shares))
    assert numbers(record) == numbers(diagnosed.record)[:1]
    assert not list((tmp_path / "d" / "states").iterdir())
    assert len({total for of_run in of_runs for _, total in of_run}) == 1
    for of_run, after in itertools.pairwise(of_runs):
        assert 0 < of_run[-1][0] < 1
        assert of_run == sorted(of_run)
        # It is shown anew stage by stage, from nothing to where it was left.
        assert of_run[-1] in after
    assert of_runs[-1][-1][0] == pytest.approx(1)


@pytest.mark.usefixtures("_undrawn")
def test_of_what_is_resumed_a_checkpoint_that_is_done_counts(trained, diagnosed, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    monkeypatch.setattr(command, "Progress", Shares)
    for steps, before in ((STEPS[:1], 0), (STEPS, 0.5), (STEPS, 1)):
        shares.clear()
        diagnose(trained, tmp_path, parts=("head",), resume=True, steps=steps)
        assert before in [share for share, _ in [(0, 0), *shares]]
        assert shares[-1][0] == pytest.approx(1)
    assert min(share for share, _ in shares) > 0


@pytest.mark.parametrize("calls", [1, 4])
def test_what_is_killed_before_a_save_is_due_leaves_nothing(calls, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    killed_at(monkeypatch, calls)
    with pytest.raises(KeyboardInterrupt):
        diagnose(trained, tmp_path / "runs", steps=STEPS[:1], parts=("head",))
    assert not (tmp_path / "runs").exists()


def test_a_save_is_due_before_a_minute_is_lost(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flatjax.diagnosis.stages.time.monotonic", lambda: now[0])
    saves = stages.Saves(tmp_path / "states", 60.0)
    for now[0], next_seconds, is_due in ((30.0, 29.0, False), (30.0, 31.0, True), (61.0, 0.0, True)):
        assert saves.is_due(next_seconds) == is_due
    assert not (tmp_path / "states").exists()
    saves.save("tokens", 3, {"a": np.arange(2)})
    assert not saves.is_due(59.0)
    done, state = saves.latest("tokens", {"a": np.zeros(2, int)})
    assert (done, state["a"].tolist()) == (3, [0, 1])
    assert saves.latest("layers", {"a": None}) == (0, {"a": None})


@pytest.fixture
def published(tmp_path):
    """A folder with a tokenizer, its text, and how it is diagnosed: names and losses."""
    golden = Path(__file__).parents[1] / "loading" / "golden"
    folder = Path(shutil.copytree(golden / "qwen3", tmp_path / "ck"))
    shutil.copy(golden / "llama" / "tokenizer.json", folder)
    text = tmp_path / "text.txt"
    text.write_text("a flat head is a flat head and so they say " * 12)

    def diagnosed(*checkpoints, **options):
        given = {"checkpoints": tuple(map(str, checkpoints)), "text": (text,), "folder": tmp_path / "runs"}
        command.main(command.Config(**given | OPTIONS | {"parts": ("head",), "max_tokens": 200} | options))
        record = json.loads((tmp_path / "runs" / "d" / render.RECORD).read_text())
        return {each["name"]: each["parts"]["head"]["loss"]["value"] for each in record["checkpoints"]}

    return SimpleNamespace(folder=folder, diagnosed=diagnosed, golden=golden, text=text, runs=tmp_path / "runs")


def scale_head(folder, factor):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * ml_dtypes.bfloat16(factor)
    save_file(tensors, folder / "model.safetensors")


def test_a_checkpoint_is_known_by_its_weights_and_not_by_its_path(published, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    calls = killed_at(monkeypatch)
    folder = published.folder

    def resumed(*checkpoints):
        calls.clear()
        return published.diagnosed(*checkpoints, resume=True), bool(calls)

    first, _ = resumed(folder)
    assert resumed(folder) == (first, False)
    scale_head(folder, 4)
    capsys.readouterr()
    second, was_measured = resumed(folder)
    assert was_measured
    assert list(second) == list(first) == [str(folder)]
    assert second[str(folder)] > first[str(folder)] + 0.1
    assert "is measured anew" in capsys.readouterr().out
    moved = folder.rename(tmp_path / "moved")
    assert resumed(moved) == ({str(moved): second[str(folder)]}, False)
    copied = shutil.copytree(moved, tmp_path / "copied")
    assert resumed(moved, copied) == ({str(each): second[str(folder)] for each in (moved, copied)}, False)
    scale_head(copied, 0.25)
    both = {str(moved): second[str(folder)], str(copied): first[str(folder)]}
    assert resumed(copied) == (both, False)


@pytest.mark.usefixtures("_undrawn")
def test_another_tokenizer_is_measured_anew(published, monkeypatch):
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    before = published.diagnosed(published.folder)
    file = published.folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    file.write_text(json.dumps(tokenizer))
    assert published.diagnosed(published.folder, resume=True) != before


def test_another_text_or_option_does_not_go_on(published, monkeypatch):
    monkeypatch.setattr(command, "mesh_of", on_one_device)
    published.diagnosed(published.folder)
    with pytest.raises(SystemExit, match=r"another configuration \(context 12 -> 11\)"):
        published.diagnosed(published.folder, resume=True, context=11)
    published.text.write_text("so they say " * 50)
    with pytest.raises(SystemExit, match=r"another configuration \(text '"):
        published.diagnosed(published.folder, resume=True)


def test_what_cannot_be_diagnosed_is_said_before_weights_are_read_and_leaves_nothing(published, tmp_path, monkeypatch):
    monkeypatch.setattr("flatjax.loading.Checkpoint.load", lambda *_, **__: pytest.fail("weights were read"))
    learned = Path(shutil.copytree(published.golden / "gpt2", tmp_path / "learned"))
    shutil.copy(published.folder / "tokenizer.json", learned)
    with pytest.raises(SystemExit, match=r"--context is 21, but .*learned has 20 learned positions"):
        published.diagnosed(learned, context=21)
    for options, message in (
        ({"layers": ("none",), "parts": ("profile",)}, "--layers has none, which fits none of"),
        ({"min_count": 999, "parts": ("collapse",)}, "--min-count is 999"),
        ({"batch_size": 3}, "of 8 devices --tensor-parallel 2 leaves 4 to share the sequences"),
        ({"radii": (0.1, -1.0)}, "--radii has -1.0, wanted numbers above 0"),
        ({"radii": (float("nan"),)}, "--radii has nan"),
        ({"radii": ()}, "--radii is empty"),
        ({"relative_error": 0.0}, "--relative-error has 0.0"),
        ({"parts": ()}, "--parts is empty"),
        ({"fit_range": (9, 9)}, "--fit-range is 9 9"),
        ({"fit_range": (0, 9)}, "--fit-range is 0 9"),
        ({"seed": -1}, "--seed is -1"),
        ({"save_every": -1.0}, "--save-every is -1.0"),
    ):
        with pytest.raises(SystemExit, match=message):
            published.diagnosed(published.folder, **options)
    published.text.write_bytes(b"so they \xe9 say")
    with pytest.raises(SystemExit, match=r"--text has .*text\.txt, which is not UTF-8 at byte 8, 0xe9"):
        published.diagnosed(published.folder)
    assert not published.runs.exists()


@pytest.mark.usefixtures("_undrawn")
def test_on_a_mesh_of_all_devices_it_is_the_same(trained, diagnosed, tmp_path):
    parts = ("head", "sharpness", "collapse", "geometry", "jacobians")
    record = diagnose(trained, tmp_path, steps=STEPS[-1:], parts=parts)
    assert record["machine"]["devices"] == 8
    for part, quantities in record["checkpoints"][0]["parts"].items():
        for name, quantity in quantities.items():
            if name != "relative_residual":  # which is rounding
                for key in ("value", "standard_error"):
                    got, wanted = (np.array(each[key], float) for each in (quantity, diagnosed.parts[part][name]))
                    np.testing.assert_allclose(got, wanted, rtol=5e-3, atol=2e-5, err_msg=f"{part} {name} {key}")


def test_what_reads_a_batch_is_exported_for_accelerators():
    graphdef, params = nnx.split(Decoder(DECODER, rngs=nnx.Rngs(0)), nnx.Param)
    sequences = jnp.arange(3 * CONTEXT).reshape(3, CONTEXT) % VOCAB

    def measure(params, tokens, labels):
        stream, feats = forward(graphdef, params, tokens)
        head = nnx.merge(graphdef, params).head_params()
        return of_sequences(head, feats, labels), stream

    args = params, sequences[:, :-1], sequences[:, 1:]
    exported = jax.export.export(jax.jit(measure), platforms=("cpu", "cuda", "tpu"))(*args)
    (got, _), (wanted, _) = exported.call(*args), measure(*args)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, err_msg=name)


def test_the_page_needs_nothing_else_and_has_all_sections(diagnosed):
    text = (diagnosed.folder / "d" / render.NAME).read_text()
    assert not re.search(r"https?:|//[a-z]|src=|@import|url\((?!#)|<script|<link", text)
    assert all(each.startswith("#") for each in re.findall(r'href="([^"]*)"', text))
    anchors = set(re.findall(r'id="?([\w-]+)', text))
    assert {each[1:] for each in re.findall(r'<a href="([^"]*)"', text)} <= anchors
    for section in render.SECTIONS:
        assert f"<h2>{section.title}</h2>" in text
        for word in section.words:
            assert render._math(word.label) in text
    assert text.count("<svg") == 8
    assert "step 0" in text
    assert "step 7" in text


def test_the_page_is_redrawn_from_the_record_alone(diagnosed, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / render.RECORD).write_text(json.dumps(diagnosed.record))
    command.main(command.Config(folder=tmp_path, name="d", redraw=True))
    assert (tmp_path / "d" / render.NAME).read_text() == (diagnosed.folder / "d" / render.NAME).read_text()


def test_every_number_has_its_error_its_tokens_and_its_convention(diagnosed):
    for part in diagnosed.parts.values():
        for quantity in part.values():
            assert np.shape(quantity["value"]) == np.shape(quantity["standard_error"])
            assert quantity["standard_error_over"]
            assert "num_tokens" in quantity
            assert quantity["convention"]


def test_the_text_of_a_run_is_known_by_what_it_held_out(trained):
    (document,) = sources.documents_of_run(f"{trained.run}/checkpoints/7", "held_out")
    assert document.text == trained.text.read_text()
    assert sources.documents_of_run(str(trained.run), "train") == []


def test_a_published_folder_is_a_checkpoint_and_a_revision_of_a_hub_has_its_step():
    golden = str(Path(__file__).parents[1] / "loading" / "golden" / "qwen3")
    folder, revision = sources.find([golden, "someone/model@step3000"])
    assert (folder.step, revision.step, revision.name) == (None, 3000, "someone/model@step3000")
    mesh = on_one_device(None)
    assert folder.load(jnp.float32, mesh).config.query_key_norm
    with pytest.raises(SystemExit, match="has no tokenizer"):
        folder.tokenizer()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoints": ()}, "wanted a checkpoint"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"num_probes": 5}, "--num-probes is 5"),
        ({"steps": (0, 3)}, r"--steps has \[3\]"),
        ({"layers": ("blocks/9",)}, "--layers has blocks/9, which fits none of"),
        ({"min_count": 10_000}, "--min-count is 10000, but 0 tokens"),
    ],
)
def test_options_that_do_not_fit_are_an_error(trained, tmp_path, options, message):
    with pytest.raises(SystemExit, match=message), warnings.catch_warnings():
        diagnose(trained, tmp_path, **{"steps": (0,)} | options)
