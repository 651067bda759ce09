"""What digits-LT's models must beat: scikit-learn's class-balanced logistic regression on the pixels.

    python -m benchmarks.digits_baseline

The digits are averaged back to scikit-learn's 8 x 8 pixels; the splits are those of DigitsLTDataLoader.
"""
from __future__ import annotations

import numpy as np


def fit(split_seed: int) -> dict[str, float | None]:
    """Accuracy, 0 to 1, over all images and by group (`model.metric.shot_accuracy`) on one split."""
    from sklearn.linear_model import LogisticRegression

    from data_loader.data_loaders import DigitsLTDataLoader
    from model.metric import shot_accuracy

    def pixels(loader: DigitsLTDataLoader) -> np.ndarray:
        images = np.stack([loader.raw_image(i)[..., 0] for i in range(loader.n_samples)]).astype(np.float64)
        return images.reshape(len(images), 8, 4, 8, 4).mean((2, 4)).reshape(len(images), 64) / 255

    train = DigitsLTDataLoader(split_seed=split_seed, validation="none")
    test = DigitsLTDataLoader(split_seed=split_seed, training=False)
    model = LogisticRegression(class_weight="balanced", max_iter=5000).fit(pixels(train), train.targets)
    return shot_accuracy(model.predict(pixels(test)), test.targets, train.cls_num_list)


def main() -> None:
    """The command."""
    results = [fit(seed) for seed in range(3)]
    print(f"{'split':<8}{'all':>8}{'many':>8}{'medium':>8}{'few':>8}")
    for name, rows in [*((str(k), [r]) for k, r in enumerate(results)), ("mean", results)]:
        figures = [100 * np.mean([row[group] for row in rows]) for group in ("all", "many", "medium", "few")]
        print(f"{name:<8}" + "".join(f"{value:>8.1f}" for value in figures))


if __name__ == "__main__":
    main()
