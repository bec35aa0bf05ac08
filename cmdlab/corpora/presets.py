"""The sizes in which SpokenScenes is made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """How many images each split has, and how many of them are made at a time.

    twins: images 2 i and 2 i + 1 show the same things in the same places, and differ in what
    belongs to what; only who tells that finds the right one of the two.
    """

    sizes: dict[str, int]
    shard: int
    twins: bool = False


PRESETS = {
    "smoke": Preset({"train": 40, "val": 20, "test": 20}, shard=10),
    "study": Preset({"train": 1_000, "val": 250, "test": 500}, shard=50, twins=True),
    "default": Preset({"train": 3_000, "val": 500, "test": 1_000}, shard=100),
    "twins": Preset({"train": 8_000, "val": 1_000, "test": 1_000}, shard=100, twins=True),
    "large": Preset({"train": 113_287, "val": 5_000, "test": 5_000}, shard=500),
}
