"""What shapiq's estimators make of games: run in an environment of its own, prints JSON.

    python shapiq_peer.py games.json

``games.json`` is a list of (the values of all subsets, rows, seeds).
"""

import json
import sys
import warnings
from pathlib import Path

import numpy as np
from shapiq import approximator

warnings.filterwarnings("ignore", message=".*feature names.*")


def estimators(units, seed):
    given = {"n": units, "random_state": seed}
    even = np.array([0.0, *[1.0] * (units - 1), 0.0])  # over sizes
    yield (
        "shapiq KernelSHAP, paired, even sizes",
        approximator.KernelSHAP(**given, pairing_trick=True, sampling_weights=even),
    )
    yield "shapiq OddSHAP", approximator.OddSHAP(**given)
    yield (
        "shapiq RegressionMSR, LightGBM",
        approximator.RegressionMSR(**given, index="SV", proxy_model="lightgbm"),
    )
    yield (
        "shapiq RegressionMSR, linear",
        approximator.RegressionMSR(**given, index="SV", proxy_model="linear"),
    )


def main(path):
    found = {}
    for game, rows, seeds in json.loads(Path(path).read_text(encoding="utf-8")):
        values = np.array(game)
        units = len(values).bit_length() - 1

        def run(kept, values=values, units=units):
            return values[np.asarray(kept).astype(int) @ 2 ** np.arange(units)]

        draws = {}
        for seed in range(seeds):
            for name, estimator in estimators(units, seed):
                scores = estimator.approximate(rows, run).get_n_order_values(1)
                draws.setdefault(name, []).append(scores.tolist())
        for name, some in draws.items():
            found.setdefault(name, []).append(some)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
