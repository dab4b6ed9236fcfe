"""Image classification: any pictures with classes, and the nineteen sets of VTAB-1K."""

from collections.abc import Mapping
from statistics import fmean

from pica.errors import ConfigError, DataError
from pica.tasks.base import Kind, Source, Split, Target
from pica.tasks.decoding import LabelledPicture
from pica.tasks.pictures import read_pictures

GROUPS: dict[str, dict[str, int]] = {
    "natural": {
        "caltech101": 102,
        "cifar": 100,
        "dtd": 47,
        "oxford_flowers102": 102,
        "oxford_iiit_pet": 37,
        "sun397": 397,
        "svhn": 10,
    },
    "specialised": {"diabetic_retinopathy": 5, "eurosat": 10, "patch_camelyon": 2, "resisc45": 45},
    "structured": {
        "clevr_count": 8,
        "clevr_dist": 6,
        "dmlab": 6,
        "dsprites_loc": 16,
        "dsprites_ori": 16,
        "kitti": 4,
        "smallnorb_azi": 18,
        "smallnorb_ele": 9,
    },
}
"""VTAB's three groups: each set's name, as in the folders that the benchmark is shared in, and its number of classes."""
_CLASSES = {name: classes for group in GROUPS.values() for name, classes in group.items()}


class ImagesTask:
    """Pictures with a class each, in any of the forms of `pica.tasks.pictures`.

    Classes are those of the training data unless the recipe lists them. With `task.metric` pearson or spearman labels are
    numbers.
    """

    name = "images"
    kind: Kind = "image-classification"
    subsets = ()
    has_embedded = False

    def target(self, subset: str | None) -> Target:
        """Classes found in the training data, by accuracy."""
        return Target()

    def load(self, split: Split, source: Source) -> list[LabelledPicture]:
        """Read one split; see `Task.load`."""
        return read_pictures(split, _given(source, self.name), source.target or Target())


class VtabTask:
    """The nineteen sets of VTAB-1K by top-1 accuracy.

    A set's folder holds train800.txt (from which is learnt), val200.txt (which chooses learning rates) and test.txt, lists
    of pictures and class numbers, or the same in any form that `ImagesTask` takes. With `data.refit` the final training is
    on all 1,000. Classes are numbers, since 800 pictures need not have all of them (SUN397 has 397).
    """

    name = "vtab"
    kind: Kind = "image-classification"
    subsets = tuple(_CLASSES)
    has_embedded = False

    def target(self, subset: str | None) -> Target:
        """The set's class numbers, by accuracy."""
        return Target(tuple(map(str, range(_classes(subset)))))

    def load(self, split: Split, source: Source) -> list[LabelledPicture]:
        """Read one split; see `Task.load`."""
        target = source.target or self.target(source.subset)
        return read_pictures(split, _given(source, self.name), target, numbered=_classes(source.subset))


def group_means(scores: Mapping[str, float]) -> dict[str, float | None]:
    """Average the scores of the sets as papers do.

    Papers call either of the last two the overall score: the first counts each set the same, the second each group.

    Args:
        scores: By name of the set.
    Returns:
        Means of the groups, of all nineteen sets, and of the three groups. A mean that lacks a set is None, never a mean
        of what is there.
    """
    means: dict[str, float | None] = {
        group: fmean(scores[name] for name in sets) if sets.keys() <= scores.keys() else None
        for group, sets in GROUPS.items()
    }
    groups = [mean for mean in means.values() if mean is not None]
    whole = len(groups) == len(GROUPS)
    means["all sets"] = fmean(scores[name] for name in _CLASSES) if whole else None
    means["all groups"] = fmean(groups) if whole else None
    return means


def _classes(subset: str | None) -> int:
    if subset not in _CLASSES:
        raise ConfigError(f"task.subset = {subset!r}: task vtab is nineteen sets; choose one of {', '.join(_CLASSES)}.")
    return _CLASSES[subset]


def _given(source: Source, name: str) -> Source:
    if source.location == "embedded":
        raise DataError(f"Task {name} has no embedded pictures; set data.train and data.test.")
    return source
