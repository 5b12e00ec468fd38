"""Probes of frozen features: nearest neighbours and a linear classifier, from few labels to all of them.

sparsecnx probe runs/mine/last.pt --data photos --out runs/mine/probe
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from sparsecnx.common.errors import InputError
from sparsecnx.common.files import open_atomically
from sparsecnx.train.learner import chosen_device
from sparsecnx.transfer.features import Pretrained, encoder_of, features, load_pretrained, pixels, pooled
from sparsecnx.transfer.labels import Labelled, find_labelled, how_read, subset
from sparsecnx.transfer.report import aligned, draw_confusion

# k-NN as in DINO (arXiv 2104.14294): these neighbours, weighted by exp(cosine / temperature).
NEIGHBOURS, TEMPERATURE = 20, 0.07
# The penalty of the linear classifier for one image is chosen among these, on a fifth of up to so many labels.
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CHOSEN_ON = 5000
HELD_OUT = 0.2
ITERATIONS = 1000
RANDOM, PIXELS = "random weights", "pixels"
RESULTS, CONFUSION, CURVES = "probe.json", "confusion.png", "curves.png"


class Score(NamedTuple):
    """Hold the results of one probe at one share of the labels.

    Attributes:
        features: a checkpoint, `random weights` or `pixels`.
        probe: `knn` or `linear`.
        share: of the labels.
        labels: how many these are.
        accuracies: top-1 of each seed, 0 to 1.
    """

    features: str
    probe: str
    share: float
    labels: int
    accuracies: list[float]

    def __str__(self) -> str:
        """Return the mean in percent, and the standard deviation over the seeds where there are several."""
        mean = f"{100 * fmean(self.accuracies):.1f}"
        return mean if len(self.accuracies) == 1 else f"{mean} ± {100 * stdev(self.accuracies):.1f}"


def probe(
    checkpoints: Sequence[str | Path],
    data: str,
    out: str | Path,
    *,
    test: str | None = None,
    model: str | None = None,
    image_size: Any = None,
    shares: Sequence[float] = (0.01, 0.1, 1),
    seeds: int = 3,
    device: str = "auto",
    workers: int = 1,
    baselines: bool = True,
    say: Callable[[str], None] = print,
) -> list[Score]:
    """Classify frozen features, and write `probe.json`, `confusion.png` and `curves.png`.

    Features are the means of the last map over space, standardised. k-NN takes the 20 nearest images by their cosine;
    the linear classifier is logistic regression, whose L2 penalty is chosen on a fifth of the labels. Each seed draws
    the labels of a share anew, and the random weights.

    Args:
        checkpoints: see `load_pretrained`; the first one is drawn.
        data, test: see `find_labelled`.
        out: folder to write to, which may hold no results.
        model, image_size: see `load_pretrained`.
        shares: of the labels, each more than 0, at most 1.
        seeds: how often labels and random weights are drawn.
        device, workers: see `features`.
        baselines: whether to add the same network with random weights, and the pixels alone.
        say: takes lines of text.

    Returns:
        The scores, by features, share and probe.

    Raises:
        InputError: an argument does not fit, see the functions above.
    """
    folder = Path(out)
    if any((folder / name).exists() for name in (RESULTS, CONFUSION, CURVES)):
        raise InputError("out", out, "holds results already; expected another folder")
    if not all(0 < share <= 1 for share in shares) or not shares:
        raise InputError("labels", shares, "expected shares of the labels, more than 0, at most 1")
    if seeds < 1:
        raise InputError("seeds", seeds, "expected 1 or more")
    networks = [load_pretrained(path, model, image_size) for path in checkpoints]
    recipe = networks[0].recipe
    parts = find_labelled(data, test, how_read(recipe))
    if few := [name for share in shares for name in _too_few(parts[0], share)]:
        problem = f"expected larger shares: {min(shares):g} of the images of {few[0]} is less than one"
        raise InputError("labels", " ".join(f"{share:g}" for share in shares), problem)
    say(_described(parts))

    found: dict[tuple[str, str, float], list[float]] = {}
    where, skipped, confusion = chosen_device(device), dict[str, str](), np.zeros((0, 0))
    rows: list[tuple[str, Pretrained | None, int | None]] = [(one.name, one, None) for one in networks]
    if baselines:
        rows += [(RANDOM, networks[0]._replace(encoder=encoder_of(recipe, seed)), seed) for seed in range(seeds)]
        rows.append((PIXELS, None, None))
    for name, network, seed in rows:
        say(f"reading features of {name}" + ("" if seed is None else f", seed {seed}"))
        of, its = (pixels, recipe) if network is None else (pooled(network.encoder.to(where)), network.recipe)
        trained, tested = (features(of, part, its, where, workers, skipped) for part in parts)
        for share in shares:
            for kind, classify in CLASSIFIERS.items():
                drawn = range(seeds) if seed is None and share < 1 else [seed or 0]
                for one in drawn:
                    predicted = _predicted(classify, trained, tested[0], share, one)
                    found.setdefault((name, kind, share), []).append(accuracy_score(tested[1], predicted))
                    if kind == "linear" and share == max(shares) and not confusion.size:
                        confusion = confusion_matrix(tested[1], predicted, labels=range(len(parts[0].names)))
    labels = {share: len(subset(parts[0].classes, share, 0)) for share in shares}
    scores = [Score(name, kind, share, labels[share], values) for (name, kind, share), values in found.items()]
    for name, reason in skipped.items():
        say(f"skipped {name} ({reason})")
    say(table(scores))
    folder.mkdir(parents=True, exist_ok=True)
    with open_atomically(*(folder / name for name in (RESULTS, CONFUSION, CURVES))) as files:
        about = {"data": data, "test": test, "seeds": seeds, "skipped": len(skipped), "images": len(parts[0].classes)}
        files[0].write(json.dumps(_result(scores, about, len(parts[1].classes)), indent=1).encode())
        draw_confusion(confusion, parts[0].names, networks[0].name).savefig(files[1], format="png")
        draw_curves(scores).savefig(files[2], format="png")
    return scores


def nearest(images: NDArray[Any], classes: NDArray[Any], tested: NDArray[Any]) -> NDArray[Any]:
    """Return the classes that the nearest of some images have, weighted by the cosines of their features.

    Args:
        images, tested: standardised features, float32 `(N, D)`.
        classes: of `images`, int64 `(N,)`.
    """
    count = min(NEIGHBOURS, len(images))
    closest = KNeighborsClassifier(count, weights=lambda far: np.exp((1 - far) / TEMPERATURE), metric="cosine")
    return closest.fit(images, classes).predict(tested)


def linear(images: NDArray[Any], classes: NDArray[Any], tested: NDArray[Any]) -> NDArray[Any]:
    """Return the classes by logistic regression; the arguments are those of `nearest`."""
    some = np.random.default_rng(0).permutation(len(images))[:CHOSEN_ON]
    kept, held = some[round(HELD_OUT * len(some)) :], some[: round(HELD_OUT * len(some))]
    penalty = PENALTIES[len(PENALTIES) // 2]
    if len(held) and set(classes[held]) <= set(classes[kept]) and len(set(classes[kept])) > 1:
        scores = [_regression(images[kept], classes[kept], one).score(images[held], classes[held]) for one in PENALTIES]
        penalty = PENALTIES[int(np.argmax(scores))]
    return _regression(images, classes, penalty).predict(tested)


CLASSIFIERS = {"knn": nearest, "linear": linear}


def _regression(images: NDArray[Any], classes: NDArray[Any], penalty: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (penalty * len(images)), max_iter=ITERATIONS).fit(images, classes)


def _predicted(
    classify: Callable[..., NDArray[Any]],
    trained: tuple[NDArray[Any], NDArray[Any]],
    tested: NDArray[Any],
    share: float,
    seed: int,
) -> NDArray[Any]:
    """Return the classes of images that a classifier finds from a share of the labels, drawn by `seed`."""
    images, classes = trained
    chosen = subset(classes, share, seed)
    scale = StandardScaler().fit(images[chosen])
    return classify(scale.transform(images[chosen]), classes[chosen], scale.transform(tested))


def table(scores: Sequence[Score]) -> str:
    """Return the scores as text: a row for features, a column for a share of the labels and a probe, in percent."""
    columns = list(dict.fromkeys((one.share, one.probe) for one in scores))
    labels = {one.share: f"{100 * one.share:g}% ({one.labels})" for one in scores}
    heads = [["labels", *(labels[share] for share, _ in columns)], ["features", *(kind for _, kind in columns)]]
    cells = {(one.features, (one.share, one.probe)): str(one) for one in scores}
    names = dict.fromkeys(one.features for one in scores)
    rows = [[name, *(cells[name, column] for column in columns)] for name in names]
    return aligned([*heads, *rows])


def draw_curves(scores: Sequence[Score]) -> Figure:
    """Draw accuracy over the number of labels, a panel for each probe, with the spread over the seeds."""
    kinds = list(dict.fromkeys(one.probe for one in scores))
    figure = Figure(figsize=(4.5 * len(kinds), 4), dpi=100, layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True):
        for name in dict.fromkeys(one.features for one in scores):
            some = sorted((one.labels, one) for one in scores if (one.features, one.probe) == (name, kind))
            means = [100 * fmean(one.accuracies) for _, one in some]
            spread = [100 * stdev(one.accuracies) if len(one.accuracies) > 1 else 0 for _, one in some]
            axes.errorbar([count for count, _ in some], means, spread, marker="o", capsize=3, label=name)
        axes.set(xscale="log", xlabel="labels", title=kind)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("top-1 accuracy, %")
    figure.axes[-1].legend(fontsize=8)
    return figure


def _too_few(part: Labelled, share: float) -> list[str]:
    """Return the classes of which a share of the labels has no image: it rounds to none."""
    return [part.names[number] for number, count in enumerate(np.bincount(part.classes)) if round(share * count) < 1]


def _described(parts: Sequence[Labelled]) -> str:
    trained, tested = parts
    names = ", ".join(trained.names[:10]) + (", ..." if len(trained.names) > 10 else "")
    counts = f"{len(trained.classes)} images to train on, {len(tested.classes)} to test on"
    return f"{counts}, {len(trained.names)} classes: {names}"


def _result(scores: Sequence[Score], about: Mapping[str, Any], tested: int) -> dict[str, Any]:
    return {
        **about,
        "tested": tested,
        "scores": [one._asdict() for one in scores],
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
