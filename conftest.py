"""What holds for the tests and for the notebooks, which nbval runs as tests."""

pytest_plugins = [
    "tests.tiers",
    "tests.notebooks.compare_outputs",
    "tests.notebooks.unchanged",
    "tests.notebooks.warm_kernels",
]
