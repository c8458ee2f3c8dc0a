"""Results of experiments with the embedded model that come with the package."""

from importlib import resources

from ghostlib.experiments.results import Results, read_results


def stored(name: str) -> Results:
    """The results stored under a name.

    ``"grid"``, ``"starts"``, ``"beyond"``, ``"ablation"``: notebooks 15 and 17 name the commands
    that computed them. ``"zeroshot"``, all items of both embedded tasks: notebook 10.
    ``"abilities"``, copying and text for every block of seven and of four layers, and other probes
    for those of seven: notebook 12. ``"seeds"``, three draws of calibration and test text for what
    claims rest on: notebooks 08, 10 and 17; ``"recipe"``, the same for those of 15; ``"draws"``,
    two draws more for those of 17.
    """
    file = resources.files("ghostlib.tutorial") / "data" / f"{name}-smollm2.jsonl"
    with resources.as_file(file) as path:
        return read_results(path)
